import type { LogTail } from '../core/ports.ts'

/**
 * Returns a log as text; invalid bytes become U+FFFD. If its beginning was cut, the first line says
 * how many bytes, and the rest starts with a whole character.
 */
export function logText(log: LogTail): string {
  const { content, totalBytes } = log
  if (totalBytes <= content.length) return content.toString()
  const kept = content.subarray(characterStart(content))
  return cutLine(totalBytes - kept.length) + kept.toString()
}

/** Yields the text of a log that arrives in pieces, with `cutBytes` cut before the first. */
export async function* logTextPieces(
  pieces: AsyncIterable<Buffer>,
  cutBytes: number,
): AsyncGenerator<string, void> {
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
  let isBegun = cutBytes === 0
  for await (const bytes of pieces) {
    if (bytes.length === 0) continue
    const skipped = isBegun ? 0 : characterStart(bytes)
    const head = isBegun ? '' : cutLine(cutBytes + skipped)
    isBegun = true
    const text = head + decoder.decode(bytes.subarray(skipped), { stream: true })
    if (text !== '') yield text
  }
  const rest = (isBegun ? '' : cutLine(cutBytes)) + decoder.decode()
  if (rest !== '') yield rest
}

/** Returns the line that reports how much of a log was cut; empty if nothing was. */
export function cutLine(bytes: number): string {
  return bytes > 0 ? `[task-runner] ${bytes} bytes of log before this line were cut\n` : ''
}

/** Returns the index of the first byte that starts a UTF-8 character. */
function characterStart(bytes: Buffer): number {
  let index = 0
  while (index < 3 && index < bytes.length && ((bytes[index] ?? 0) & 0xc0) === 0x80) index += 1
  return index
}

/** Returns how many bytes at the end belong to an incomplete character. */
export function incompleteBytes(bytes: Buffer): number {
  for (let back = 1; back <= 3 && back <= bytes.length; back += 1) {
    const byte = bytes[bytes.length - back] ?? 0
    if ((byte & 0xc0) === 0x80) continue
    const length = byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : byte >= 0xc0 ? 2 : 1
    return length > back ? back : 0
  }
  return 0
}
