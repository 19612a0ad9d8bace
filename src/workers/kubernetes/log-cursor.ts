import { z } from 'zod'
import type { LogCursors, Logger } from '../../core/ports.ts'

const WRITE_MS = 2_000

const positionSchema = z.object({
  time: z.string().regex(/^\d{12}\.\d{9}$/),
  count: z.int().min(1),
  bytes: z.int().min(0),
  totalBytes: z.int().min(0),
})

/** How far a log was read: the last line, as `PodLog` knows it, and the bytes of all. */
export type LogPosition = z.infer<typeof positionSchema>

export interface LogCursorOptions {
  cursors: LogCursors | undefined
  taskId: string
  writeMs?: number | undefined
  log: Logger
}

/**
 * A log's position as the store has it: written now and then, since one that is behind is as good as long as the
 * kubelet has what came after it. The store's troubles are not the task's.
 */
export class LogCursor {
  readonly #options: LogCursorOptions
  #position: LogPosition | undefined
  /** Runs while there is something to write. */
  #timer: NodeJS.Timeout | undefined
  #written = Promise.resolve()

  constructor(options: LogCursorOptions) {
    this.#options = options
  }

  /** Undefined: there is none that can be used. */
  async read(): Promise<LogPosition | undefined> {
    const { cursors, taskId, log } = this.#options
    try {
      const text = await cursors?.read(taskId)
      return text === undefined ? undefined : positionSchema.parse(JSON.parse(text))
    } catch (err) {
      log.warn(
        { err, taskId },
        'a log cursor cannot be used: what is left of the log is all there is',
      )
      return undefined
    }
  }

  moved(position: LogPosition): void {
    const { cursors, writeMs = WRITE_MS } = this.#options
    if (!cursors) return
    this.#position = position
    this.#timer ??= setTimeout(() => void this.flush(), writeMs).unref()
  }

  /** Settles once nothing is left to write. Never rejects. */
  async flush(): Promise<void> {
    if (this.#timer) this.#written = this.#written.then(() => this.#write())
    this.drop()
    await this.#written
  }

  /** Forgets what was not written yet. */
  drop(): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
  }

  async #write(): Promise<void> {
    const { cursors, taskId, log } = this.#options
    try {
      await cursors?.write(taskId, JSON.stringify(this.#position))
    } catch (err) {
      log.warn({ err, taskId }, 'a log cursor could not be written')
    }
  }
}
