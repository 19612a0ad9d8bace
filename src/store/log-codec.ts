import { promisify } from 'node:util'
import { zstdCompress, zstdDecompress } from 'node:zlib'
import type { TaskLogsTable } from './schema.ts'

const compress = promisify(zstdCompress)
const decompress = promisify(zstdDecompress)

/** Logs up to this size are not worth a trip to the thread pool. */
const PLAIN_BYTES_MAX = 1024

export async function encodeLog(
  content: Buffer,
): Promise<Pick<TaskLogsTable, 'encoding' | 'content'>> {
  if (content.length <= PLAIN_BYTES_MAX) return { encoding: 'plain', content }
  return { encoding: 'zstd', content: await compress(content) }
}

export async function decodeLog(
  stored: Pick<TaskLogsTable, 'encoding' | 'content'>,
): Promise<Buffer> {
  const { buffer, byteOffset, byteLength } = stored.content
  const bytes = Buffer.from(buffer, byteOffset, byteLength)
  return stored.encoding === 'plain' ? bytes : decompress(bytes)
}
