/** W3C Trace Context, section 3.2. Later versions may append fields. */
const TRACEPARENT =
  /^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?<more>-.*)?$/
const LENGTH_MAX = 256

/** Returns the header's value. A malformed one is ignored, as the standard requires. */
export function traceparentOf(header: string | undefined): string | undefined {
  const match = header === undefined ? null : TRACEPARENT.exec(header)
  if (!match || match.input.length > LENGTH_MAX) return undefined
  return match.input.startsWith('00-') && match.groups?.more !== undefined ? undefined : match.input
}
