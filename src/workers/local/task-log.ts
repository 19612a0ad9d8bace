import { closeSync, constants, fstatSync, openSync, readSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { brokenFileError, notPlainError, SAFE_OPEN } from './folders.ts'
import { discardChunk, moveChunk } from './splice.ts'

const NEWLINE = 10

/**
 * Writes the log of one worker. The file is opened before the task begins, so that its output goes
 * into that file even if it replaces the log in its folder.
 */
export class TaskLog {
  readonly #file: number
  readonly #bytesMax: number
  #bytes: number
  #lostBytes = 0

  /** Opens the log; discards output beyond `bytesMax`. Throws a `LocalFailure`. */
  constructor(folder: string, bytesMax: number) {
    this.#bytesMax = bytesMax
    let file: number | undefined
    try {
      file = openSync(join(folder, 'log'), constants.O_RDWR | SAFE_OPEN)
      const stats = fstatSync(file)
      if (!stats.isFile()) throw notPlainError('log')
      this.#file = file
      this.#bytes = stats.size
    } catch (err) {
      if (file !== undefined) closeSync(file)
      throw brokenFileError('log', err)
    }
  }

  /** Bytes that the task has written, including those that the disk had no space for. */
  get seenBytes(): number {
    return this.#bytes + this.#lostBytes
  }

  /**
   * Moves about `bytesMax` bytes at most from the pipe into the log. Returns the number of bytes.
   * On a full disk it counts and discards them: the task must not wait for space that its log has
   * filled.
   */
  drain(pipe: number, bytesMax: number): number {
    let moved = 0
    while (moved < bytesMax) {
      const bytes = this.#drainChunk(pipe)
      if (bytes === 0) break
      moved += bytes
    }
    return moved
  }

  #drainChunk(pipe: number): number {
    if (this.#bytes >= this.#bytesMax) return discardChunk(pipe)
    try {
      const bytes = moveChunk(pipe, this.#file, this.#bytes)
      this.#bytes += bytes
      return bytes
    } catch {
      // `close` reports how much is lost.
      const bytes = discardChunk(pipe)
      this.#lostBytes += bytes
      return bytes
    }
  }

  /** Adds a line of the service. On a full disk it is left out. */
  add(line: string): void {
    const last = Buffer.alloc(1)
    const isBegun = this.#bytes > 0 && readSync(this.#file, last, 0, 1, this.#bytes - 1) === 1
    const start = isBegun && last[0] !== NEWLINE ? '\n' : ''
    const text = `${start}[task-runner] ${line}\n`
    try {
      this.#bytes += writeSync(this.#file, text, this.#bytes)
    } catch {
      // The outcome must not depend on it.
    }
  }

  close(): void {
    if (this.#lostBytes > 0)
      this.add(`${this.#lostBytes} bytes of log were lost: the disk was full`)
    closeSync(this.#file)
  }
}
