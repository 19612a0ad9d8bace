import { setTimeout as pause } from 'node:timers/promises'
import type { LogTail } from '../../core/ports.ts'
import { LogRing } from '../log-ring.ts'
import { isFailure } from './engine.ts'

/** Notice for followers that part of the log is repeated. */
export const READ_AGAIN =
  '[task-runner] The log was cut off and is read again: some lines may come twice\n'

const RETRY_MS = 250
/** Time after which a log that is read again replaces the ring read before. */
const READ_AGAIN_MS = 1_000
/** Time for the first piece of an existing log to arrive. */
const FIRST_PIECE_MS = 1_000
/** Time without output after the task's end after which the log is complete. */
const STILL_MS = 5_000
const POLL_MS = 20
/** Size of the pieces in which the engine stores long lines; shorter ones are stored whole. */
const STORED_BYTES = 16 * 1024
const NEWLINE = 10

/** Period in epoch ms. */
export interface Span {
  from: number
  to: number
}

export interface ContainerLogOptions {
  /** Opens the log at the first byte that the engine has. */
  open: () => Promise<AsyncIterable<Buffer>>
  /**
   * Called after each stream. Returns a last line for the log, maybe empty, once the container has
   * ended. `unwatched`: the gap before that stream.
   */
  lastLine: (unwatched: Span) => Promise<string | undefined>
  onGrown: (totalBytes: number) => void
  bytesKept: number
  /** Ends the reading. */
  closing: AbortSignal
}

/**
 * Reads the log of a container until it has ended. After a cut, reads again from the beginning into
 * a new ring: a killed engine has lost unstored bytes, so resuming at an offset would skip others.
 */
export class ContainerLog {
  readonly #options: ContainerLogOptions
  readonly #begun = Promise.withResolvers<void>()
  #ring: LogRing
  /** Total bytes read, including re-reads. */
  #bytesRead = 0

  /** `output`: stream from the container's start; undefined: the log is opened. */
  constructor(output: AsyncIterable<Buffer> | undefined, options: ContainerLogOptions) {
    this.#options = options
    this.#ring = new LogRing(options.bytesKept)
    setTimeout(this.#begun.resolve, FIRST_PIECE_MS).unref()
    void this.#feed(output)
  }

  /** Waits for the first piece of the log, at most a second. */
  begun(): Promise<void> {
    return this.#begun.promise
  }

  /** Returns the last bytes of the log. */
  tail(maxBytes: number): LogTail {
    return this.#ring.tail(maxBytes)
  }

  /**
   * Yields the log from an offset on, as it grows. After a re-read it repeats an unfinished line,
   * part of which the engine may have lost, or, if the log is shorter now, all that is kept of it.
   */
  async *follow(from: number, signal: AbortSignal): AsyncGenerator<Buffer, void> {
    let at = from
    let lineAt = from
    for (let ring = this.#ring; ; ring = this.#ring) {
      for await (const piece of ring.follow(at, signal)) {
        const lineEnd = piece.lastIndexOf(NEWLINE)
        if (lineEnd >= 0) lineAt = at + lineEnd + 1
        at += piece.length
        yield piece
      }
      if (signal.aborted || ring === this.#ring) return
      const isInLine = lineAt < at
      lineAt = Math.max(lineAt, at - STORED_BYTES)
      if (lineAt > this.#ring.totalBytes) lineAt = 0
      if (lineAt < at) yield Buffer.from(`${isInLine ? '\n' : ''}${READ_AGAIN}`)
      at = lineAt
    }
  }

  /** Waits until the log has ended, has `bytes` bytes, or has stopped growing, and ends it. */
  async end(bytes: number): Promise<void> {
    const { closing: signal } = this.#options
    let movedAt = performance.now()
    const isWhole = () => this.#ring.isEnded || this.#ring.totalBytes >= bytes
    for (let seen = -1; !isWhole() && !signal.aborted; ) {
      if (this.#bytesRead !== seen) movedAt = performance.now()
      else if (performance.now() - movedAt > STILL_MS) break
      seen = this.#bytesRead
      await pause(POLL_MS, undefined, { signal }).catch(() => {})
    }
    this.#ring.end()
  }

  /** Never rejects. */
  async #feed(first: AsyncIterable<Buffer> | undefined): Promise<void> {
    const { open, lastLine, bytesKept, closing: signal } = this.#options
    let cutAt = Number.POSITIVE_INFINITY
    for (let output = first; !signal.aborted && !this.#ring.isEnded; output = undefined) {
      const ring = this.#bytesRead === 0 ? this.#ring : new LogRing(bytesKept)
      try {
        const pieces = output ?? (await open())
        const unwatched = { from: cutAt, to: Date.now() }
        try {
          await this.#read(pieces, ring)
        } finally {
          cutAt = Date.now()
        }
        const line = await lastLine(unwatched)
        if (line !== undefined) {
          // If the engine has nothing, the ring read before stays.
          if (ring.totalBytes > 0) this.#replace(ring)
          this.#note(line)
          break
        }
      } catch (err) {
        if (isFailure(err, 'not_found')) break
      }
      await pause(RETRY_MS, undefined, { signal }).catch(() => {})
    }
    this.#ring.end()
  }

  /** Reads into a ring, which replaces the previous one when it has as many bytes, or in time. */
  async #read(pieces: AsyncIterable<Buffer>, ring: LogRing): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    try {
      for await (const piece of pieces) {
        if (this.#ring.isEnded) return
        ring.append(piece)
        this.#bytesRead += piece.length
        this.#begun.resolve()
        this.#options.onGrown(ring.totalBytes)
        if (ring.totalBytes >= this.#ring.totalBytes) this.#replace(ring)
        timer ??= setTimeout(() => this.#replace(ring), READ_AGAIN_MS)
      }
    } finally {
      clearTimeout(timer)
    }
  }

  #replace(ring: LogRing): void {
    const before = this.#ring
    if (ring === before || before.isEnded) return
    this.#ring = ring
    before.end()
  }

  /** Adds a line, after a line break if needed. */
  #note(line: string): void {
    if (line === '') return
    const { content } = this.#ring.tail(1)
    const isInLine = content.length > 0 && content.toString() !== '\n'
    this.#ring.append(Buffer.from(`${isInLine ? '\n' : ''}${line}`))
  }
}
