/** W3C Trace Context, section 3.2: version, trace id, parent id, flags; later versions may have more after them. */
const TRACEPARENT =
  /^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?<more>-.*)?$/
const LENGTH_MAX = 256

/** The header's value when it is one; what is none is ignored, as the standard asks. */
export function traceparentOf(header: string | undefined): string | undefined {
  const match = header === undefined ? null : TRACEPARENT.exec(header)
  if (!match || match.input.length > LENGTH_MAX) return undefined
  return match.input.startsWith('00-') && match.groups?.more !== undefined ? undefined : match.input
}
