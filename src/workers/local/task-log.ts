import { closeSync, constants, fstatSync, openSync, readSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { asBroken, notPlain, SAFELY } from './folders.ts'
import { discardChunk, moveChunk } from './splice.ts'

const NEWLINE = 10

/**
 * Writes the log of one worker. It is opened before the task begins, and whatever the task makes of its worker's folder then,
 * what it writes goes into that file.
 */
export class TaskLog {
  readonly #file: number
  readonly #bytesMax: number
  #bytes: number
  #lostBytes = 0

  /** What comes beyond `bytesMax` is thrown away. Throws a `LocalFailure`. */
  constructor(folder: string, bytesMax: number) {
    this.#bytesMax = bytesMax
    let file: number | undefined
    try {
      file = openSync(join(folder, 'log'), constants.O_RDWR | SAFELY)
      const stats = fstatSync(file)
      if (!stats.isFile()) throw notPlain('log')
      this.#file = file
      this.#bytes = stats.size
    } catch (err) {
      if (file !== undefined) closeSync(file)
      throw asBroken('log', err)
    }
  }

  /** What the task has written, with what there was no space for. */
  get seenBytes(): number {
    return this.#bytes + this.#lostBytes
  }

  /**
   * Takes what is in the pipe, about `bytesMax` at most, and returns how many bytes it took. On a full disk they are counted
   * and thrown away: a task must not wait for space that its own log has filled.
   */
  take(pipe: number, bytesMax: number): number {
    let taken = 0
    while (taken < bytesMax) {
      const bytes = this.#takeChunk(pipe)
      if (bytes === 0) break
      taken += bytes
    }
    return taken
  }

  #takeChunk(pipe: number): number {
    if (this.#bytes >= this.#bytesMax) return discardChunk(pipe)
    try {
      const bytes = moveChunk(pipe, this.#file, this.#bytes)
      this.#bytes += bytes
      return bytes
    } catch {
      // Whatever keeps us from writing: `end` tells how much is not there.
      const bytes = discardChunk(pipe)
      this.#lostBytes += bytes
      return bytes
    }
  }

  /** Adds lines of the service's own. On a full disk they are left out. */
  add(lines: readonly string[]): void {
    const last = Buffer.alloc(1)
    const isBegun = this.#bytes > 0 && readSync(this.#file, last, 0, 1, this.#bytes - 1) === 1
    const start = isBegun && last[0] !== NEWLINE ? '\n' : ''
    const text = start + lines.map((line) => `[task-runner] ${line}\n`).join('')
    try {
      this.#bytes += writeSync(this.#file, text, this.#bytes)
    } catch {
      // They are of less worth than the outcome.
    }
  }

  close(): void {
    if (this.#lostBytes > 0)
      this.add([`${this.#lostBytes} bytes of log were lost: the disk was full`])
    closeSync(this.#file)
  }
}
