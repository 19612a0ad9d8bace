import { open } from 'node:fs/promises'
import { extname, join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { Worker as Thread } from 'node:worker_threads'
import { UnavailableError } from '../../core/errors.ts'
import {
  type LogTail,
  type Worker,
  type WorkerBackend,
  WorkerError,
  type WorkerSpec,
  type WorkerStatus,
} from '../../core/ports.ts'
import { until } from '../../core/until.ts'
import type { End, LocalSettings, WorkerInfo } from './local-workers.ts'
import type { Answer, Call, Methods } from './thread.ts'

const FOLLOW_MS = 100
const CHUNK_BYTES = 64 * 1024

/** Workers that are processes of this machine, each in a folder of its own. */
export class LocalBackend implements WorkerBackend {
  readonly name = 'local'
  readonly #settings: LocalSettings
  readonly #thread: Thread
  readonly #waiting = new Map<number, PromiseWithResolvers<unknown>>()
  #outgoing: Call[] = []
  #lastId = 0
  #dead: Error | undefined

  constructor(settings: LocalSettings) {
    this.#settings = settings
    this.#thread = new Thread(new URL(`./thread${extname(import.meta.url)}`, import.meta.url), {
      workerData: settings,
      name: 'local-workers',
    })
    this.#thread.on('message', (answers: Answer[]) => {
      for (const answer of answers) {
        const waiting = this.#waiting.get(answer.id)
        this.#waiting.delete(answer.id)
        if ('error' in answer) waiting?.reject(named(answer.error, answer.name))
        else waiting?.resolve(answer.value)
      }
    })
    this.#thread.on('error', (err) => this.#fail(err))
    this.#thread.on('exit', () => this.#fail(new Error('the local workers thread ended')))
  }

  async provision(spec: WorkerSpec, signal: AbortSignal): Promise<Worker> {
    signal.throwIfAborted()
    const notes = [...spec.notes]
    if (spec.image !== undefined)
      notes.push(`worker_image "${spec.image}" is not used by local workers`)
    if (spec.size !== undefined)
      notes.push(`worker_size "${spec.size}" is not enforced on local workers`)
    if (spec.imageConfig !== undefined) notes.push('image_config is not used by local workers')
    try {
      const making = this.#call('provision', spec, notes)
      // Asked along with it. Whether the worker could be made, `making` tells.
      const end = this.#call('completion', spec.name)
      end.catch(() => {})
      return this.#worker(await until(making, signal), end)
    } catch (err) {
      const code = /^(ENOSPC|EDQUOT|EROFS)\b/.exec(err instanceof Error ? err.message : '')?.[1]
      if (code === undefined) throw err
      const message = `The worker's folder could not be written (${code}: disk full or read-only)`
      throw new WorkerError('internal_error', message, { cause: err })
    }
  }

  async find(name: string): Promise<Worker | undefined> {
    const info = await this.#call('find', name)
    return info && this.#worker(info)
  }

  async list(): Promise<Worker[]> {
    return (await this.#call('list')).map((info) => this.#worker(info))
  }

  async check(): Promise<void> {
    await this.#call('list')
  }

  async close(): Promise<void> {
    if (this.#dead) return
    const exited = new Promise((resolve) => this.#thread.once('exit', resolve))
    await this.#call('close')
    await exited
  }

  #worker(info: WorkerInfo, end?: Promise<End>): Worker {
    const { name, taskId, size, createdAt } = info
    const log = join(this.#settings.workersDir, name, 'log')
    const status = async (): Promise<WorkerStatus> =>
      (await this.#call('find', name))?.status ?? 'Terminating'
    let wholeLog: LogTail | undefined
    return {
      ...{ name, taskId, size, createdAt, backend: this.name, image: null },
      status,
      completion: async (signal) => {
        const { completion, ...ended } = await until(end ?? this.#call('completion', name), signal)
        wholeLog = ended.wholeLog
        return completion
      },
      stop: () => this.#call('stop', name),
      logs: async ({ maxBytes }) =>
        lastBytes(wholeLog ?? (await this.#call('tail', name, maxBytes)), maxBytes),
      follow: ({ from, signal }) =>
        follow(log, from, signal, async () => (await status()) === 'Running'),
      terminate: () => this.#call('terminate', name),
    }
  }

  #call<M extends keyof Methods>(
    method: M,
    ...args: Parameters<Methods[M]>
  ): Promise<Awaited<ReturnType<Methods[M]>>> {
    if (this.#dead) return Promise.reject(this.#dead)
    this.#lastId += 1
    const waiting = Promise.withResolvers<unknown>()
    this.#waiting.set(this.#lastId, waiting)
    // What comes within a turn of the loop goes together: each message wakes the other thread.
    if (this.#outgoing.length === 0) setImmediate(() => this.#send())
    this.#outgoing.push({ id: this.#lastId, method, arguments: args })
    // Holds: the thread answers with what its method of the same name returned.
    return waiting.promise as Promise<Awaited<ReturnType<Methods[M]>>>
  }

  #send(): void {
    const calls = this.#outgoing
    this.#outgoing = []
    this.#thread.postMessage(calls)
  }

  #fail(err: unknown): void {
    this.#dead ??= err instanceof Error ? err : new Error(String(err))
    for (const { reject } of this.#waiting.values()) reject(this.#dead)
    this.#waiting.clear()
  }
}

/** An error of the thread as what it was there. */
function named(err: Error, name: string): Error {
  if (name === 'UnavailableError') return new UnavailableError(err.message, { cause: err })
  if (name === 'WorkerError') return new WorkerError('startup_failed', err.message, { cause: err })
  return err
}

/** The log's bytes as they come, from offset `from` on, until the task has ended and all was read. */
async function* follow(
  path: string,
  from: number,
  signal: AbortSignal,
  isRunning: () => Promise<boolean>,
): AsyncIterable<Buffer> {
  const file = await open(path, 'r')
  try {
    for (let at = from; !signal.aborted; ) {
      // Asked before reading: what is written before the end is then always read.
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

/** A Buffer crosses threads as a plain Uint8Array. */
function lastBytes({ content, totalBytes }: LogTail, maxBytes: number): LogTail {
  const { buffer, byteOffset, byteLength } = content
  const length = Math.min(byteLength, maxBytes)
  return { content: Buffer.from(buffer, byteOffset + byteLength - length, length), totalBytes }
}
