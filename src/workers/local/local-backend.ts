import { constants } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { Deadline } from '../../core/deadline.ts'
import { TaskRunnerError } from '../../core/errors.ts'
import type {
  Logger,
  LogTail,
  Worker,
  WorkerBackend,
  WorkerSpec,
  WorkerStatus,
} from '../../core/ports.ts'
import { SharedLook } from '../../core/shared-look.ts'
import { until } from '../../core/until.ts'
import { ServiceThread } from '../../threads/service-thread.ts'
import { LocalFailure, toCoreError } from './failures.ts'
import { brokenFileError, notPlainError, SAFE_OPEN } from './folders.ts'
import type { End, LocalSettings, WorkerInfo } from './local-workers.ts'
import type { Methods, Notice, Request } from './thread.ts'

const FOLLOW_MS = 100
const CHUNK_BYTES = 64 * 1024
/** Time after which a check counts as failed. */
const CHECK_MS = 5_000

/** Runs workers as processes of this machine, each in its own folder. */
export class LocalBackend implements WorkerBackend {
  readonly name = 'local'
  /** Settles once workers can be made; rejects if their folder cannot be used. */
  readonly ready: Promise<void>
  readonly #settings: LocalSettings
  readonly #thread: ServiceThread<Request>
  readonly #checks: SharedLook<void>
  #leftBehind = 0

  constructor(
    settings: LocalSettings,
    options: {
      /** Called as `ServiceThread` does. */
      onThreadDeath?: ((err: Error) => void) | undefined
      log?: Logger | undefined
    } = {},
  ) {
    this.#settings = settings
    this.#thread = new ServiceThread('./thread', import.meta.url, {
      name: 'local-workers',
      workerData: settings,
      onDeath: options.onThreadDeath,
      onNotice: (notice) => {
        // thread.ts sends no other notices.
        const { unremovable, found } = notice as Notice
        this.#leftBehind = unremovable
        if (found) options.log?.error(found, "a worker's folder could not be removed")
      },
    })
    this.ready = this.#thread.ready
    this.#checks = new SharedLook(() => this.#call('check'))
  }

  async provision(spec: WorkerSpec, signal: AbortSignal): Promise<Worker> {
    signal.throwIfAborted()
    const notes = [...spec.notes]
    if (spec.image !== undefined)
      notes.push(`worker_image "${spec.image}" is not used by local workers`)
    if (spec.size !== undefined)
      notes.push(`worker_size "${spec.size}" is not enforced on local workers`)
    if (spec.imageConfig !== undefined) notes.push('image_config is not used by local workers')
    const making = this.#call('provision', spec, notes)
    // Requested at once to save a round trip; failures to provision reject `making`, too.
    const end = this.#call('completion', spec.name)
    end.catch(() => {})
    return this.#worker(await until(making, signal), end)
  }

  async find(name: string): Promise<Worker | undefined> {
    const info = await this.#call('find', name)
    return info && this.#worker(info)
  }

  async list(): Promise<Worker[]> {
    return (await this.#call('list')).map((info) => this.#worker(info))
  }

  /** Checks the machine. Concurrent callers share a check. */
  async check(): Promise<void> {
    using deadline = new Deadline(CHECK_MS, [])
    try {
      await until(this.#checks.at(''), deadline.signal)
    } catch (err) {
      // Otherwise the thread hangs, has ended, or failed unexpectedly.
      if (err instanceof TaskRunnerError) throw err
      throw toCoreError(new LocalFailure('no_answer', { cause: err }))
    }
  }

  /** Returns the number of workers' folders that could not be removed. */
  leftBehind(): number {
    return this.#leftBehind
  }

  close(): Promise<void> {
    return this.#thread.close()
  }

  #worker(info: WorkerInfo, provisioned?: Promise<End>): Worker {
    const { name, taskId, size, createdAt } = info
    const log = join(this.#settings.workersDir, name, 'log')
    const status = async (): Promise<WorkerStatus> =>
      (await this.#call('find', name))?.status ?? 'Terminating'
    let end = provisioned
    let wholeLog: LogTail | undefined
    return {
      name,
      taskId,
      size,
      createdAt,
      backend: this.name,
      image: null,
      status,
      completion: async (signal) => {
        end ??= this.#call('completion', name)
        // A later call tries again.
        end.catch(() => {
          end = undefined
        })
        const { completion, ...ended } = await until(end, signal)
        wholeLog = ended.wholeLog
        return completion
      },
      stop: () => this.#call('stop', name),
      hasEnded: () => this.#call('hasEnded', name),
      logs: async ({ maxBytes }) =>
        lastBytes(wholeLog ?? (await this.#call('tail', name, maxBytes)), maxBytes),
      follow: ({ from, signal }) =>
        follow(log, from, signal, async () => (await status()) === 'Running'),
      terminate: () => this.#call('terminate', name),
      freeSpace: () => this.#call('freeSpace', name),
    }
  }

  async #call<M extends keyof Methods>(
    method: M,
    ...args: Parameters<Methods[M]>
  ): Promise<Awaited<ReturnType<Methods[M]>>> {
    try {
      // The thread returns the result of its method of the same name.
      return (await this.#thread.call({ method, arguments: args })) as Awaited<
        ReturnType<Methods[M]>
      >
    } catch (err) {
      throw toCoreError(err)
    }
  }
}

/** Yields the log's bytes from offset `from` on, until the task has ended and all is read. */
async function* follow(
  path: string,
  from: number,
  signal: AbortSignal,
  isRunning: () => Promise<boolean>,
): AsyncIterable<Buffer> {
  const file = await openLog(path)
  try {
    for (let at = from; !signal.aborted; ) {
      // Checked before reading, so that all that was written before the end is read.
      const running = await isRunning()
      for (;;) {
        const { buffer, bytesRead } = await file.read(Buffer.alloc(CHUNK_BYTES), 0, CHUNK_BYTES, at)
        if (bytesRead === 0 || signal.aborted) break
        at += bytesRead
        yield buffer.subarray(0, bytesRead)
      }
      if (!running) return
      await pause(FOLLOW_MS, undefined, { signal }).catch(() => {})
    }
  } finally {
    await file.close()
  }
}

/** Opens a log that its task may have replaced: follows no link, and blocks on no FIFO. */
async function openLog(path: string): Promise<FileHandle> {
  let file: FileHandle | undefined
  try {
    file = await open(path, constants.O_RDONLY | SAFE_OPEN)
    if ((await file.stat()).isFile()) return file
    throw notPlainError('log')
  } catch (err) {
    await file?.close()
    throw toCoreError(brokenFileError('log', err))
  }
}

/** Returns the last bytes of a log; from another thread, a Buffer arrives as a Uint8Array. */
function lastBytes({ content, totalBytes }: LogTail, maxBytes: number): LogTail {
  const { buffer, byteOffset, byteLength } = content
  const length = Math.min(byteLength, maxBytes)
  return { content: Buffer.from(buffer, byteOffset + byteLength - length, length), totalBytes }
}
