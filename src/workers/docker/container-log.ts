import { setTimeout as pause } from 'node:timers/promises'
import type { LogTail } from '../../core/ports.ts'
import { LogRing } from '../log-ring.ts'
import { isFailure } from './engine.ts'

/** Tells followers that some of the log comes again. */
export const READ_AGAIN =
  '[task-runner] The log was cut off and is read again: some lines may come twice\n'

const RETRY_MS = 250
/** Time after which a log that is read again takes the place of what was read before. */
const READ_AGAIN_MS = 1_000
/** For what there is of a log that nobody has followed here. */
const FIRST_PIECE_MS = 1_000
/** A log that stands still for so long after its task has ended is whole. */
const STILL_MS = 5_000
const POLL_MS = 20
/** The engine stores whole lines, and longer ones in pieces of this size. */
const STORED_BYTES = 16 * 1024
const NEWLINE = 10

/** In epoch ms. */
export interface Span {
  from: number
  to: number
}

export interface ContainerLogOptions {
  /** Opens the log at its beginning, as far as the engine has it. */
  open: () => Promise<AsyncIterable<Buffer>>
  /**
   * Called after each stream. Returns a last line for the log, which may be empty, once the
   * container has ended. `unwatched`: when nobody read the log, before that stream.
   */
  lastLine: (unwatched: Span) => Promise<string | undefined>
  onGrown: (totalBytes: number) => void
  bytesKept: number
  /** Ends the reading. */
  closing: AbortSignal
}

/**
 * The log of a container, read until that has ended. When the stream is cut, it is read again from
 * its beginning into a new ring: an engine that was killed has lost what it had not stored, so that
 * going on after as many bytes would skip others.
 */
export class ContainerLog {
  readonly #options: ContainerLogOptions
  readonly #begun = Promise.withResolvers<void>()
  #ring: LogRing
  /** Bytes read, those that were read again included. */
  #bytesRead = 0

  /** `output`: stream from the container's start; undefined: the log is opened. */
  constructor(output: AsyncIterable<Buffer> | undefined, options: ContainerLogOptions) {
    this.#options = options
    this.#ring = new LogRing(options.bytesKept)
    setTimeout(this.#begun.resolve, FIRST_PIECE_MS).unref()
    void this.#feed(output)
  }

  /** Settles with the first of the log, or when there seems to be none yet. */
  begun(): Promise<void> {
    return this.#begun.promise
  }

  /** Returns the last bytes of the log. */
  tail(maxBytes: number): LogTail {
    return this.#ring.tail(maxBytes)
  }

  /**
   * Reads the log from an offset on, as it comes. When it was read again, a line that had not ended
   * comes again, since the engine may have lost its beginning; and so does all that is kept of a log
   * that has become shorter, since the engine has dropped its beginning.
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

  /** Waits until the log has ended, or has so many bytes, or has stood still, and ends it. */
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
          // If the engine has nothing, what was read before is all there is.
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

  /** Reads into a ring, which takes the place of the one before once it has as much, or in time. */
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

  /** Adds a line of its own. */
  #note(line: string): void {
    if (line === '') return
    const { content } = this.#ring.tail(1)
    const isInLine = content.length > 0 && content.toString() !== '\n'
    this.#ring.append(Buffer.from(`${isInLine ? '\n' : ''}${line}`))
  }
}
