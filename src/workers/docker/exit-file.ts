import { createTarDecoder } from 'modern-tar'
import { type Exit, parseExit } from '../completion.ts'
import { WORKER_FOLDER } from '../worker-files.ts'
import { beginningOf, discard, type Engine, EngineError, failureOf, isFailure } from './engine.ts'

/** Maximum bytes read of the archive: header, extended header and one line. */
const ARCHIVE_BYTES_MAX = 64 * 1024
const EXIT_BYTES_MAX = 16 * 1024
const SILENCE_MS = 30_000

/** The exit that the bootstrap wrote. `broken`: the task, which owns the folder, replaced it. */
export type ExitFile = Exit | 'missing' | 'broken'

export async function readExitFile(engine: Engine, id: string): Promise<ExitFile> {
  try {
    const tar = await engine.stream('GET', `/containers/${id}/archive`, {
      query: { path: `${WORKER_FOLDER}/exit` },
      silenceMs: SILENCE_MS,
      step: 'exit',
    })
    try {
      return await exitIn(await beginningOf(tar, ARCHIVE_BYTES_MAX))
    } finally {
      await discard(tar)
    }
  } catch (err) {
    if (isFailure(err, 'not_found')) return 'missing'
    if (isFailure(err, 'exit_broken')) return 'broken'
    throw failureOf(err, undefined)
  }
}

async function exitIn(archive: { bytes: Buffer; isWhole: boolean }): Promise<ExitFile> {
  // An empty archive has only zeros: engines leave sockets out.
  const { bytes } = archive
  if (bytes.length >= 1024 && bytes.every((byte) => byte === 0)) return 'broken'
  // Safe: a concatenated Buffer is not a view of shared memory.
  const source = new Blob([bytes as Buffer<ArrayBuffer>]).stream()
  const entries = source.pipeThrough(createTarDecoder({ strict: true })).getReader()
  try {
    const { value: entry } = await entries.read()
    if (!entry) throw new Error('an empty archive')
    const { type = 'file', size } = entry.header
    if (type !== 'file' || size > EXIT_BYTES_MAX || !archive.isWhole) return 'broken'
    return parseExit(await new Response(entry.body).text()) ?? 'broken'
  } catch (err) {
    // The engine archives whatever the task put there, so a proxy sent this.
    throw new EngineError('garbage', 'the archive of the exit code', { cause: err })
  } finally {
    await entries.cancel().catch(() => {})
  }
}
