/**
 * W3C Trace Context, section 3.2: version, trace id, parent id, flags; later versions may add more.
 */
const TRACEPARENT =
  /^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?<more>-.*)?$/
const LENGTH_MAX = 256

/**
 * Returns the header's value, or undefined when it is malformed: the standard says to ignore it.
 */
export function traceparentOf(header: string | undefined): string | undefined {
  const match = header === undefined ? null : TRACEPARENT.exec(header)
  if (!match || match.input.length > LENGTH_MAX) return undefined
  return match.input.startsWith('00-') && match.groups?.more !== undefined ? undefined : match.input
}
