import { once } from 'node:events'

const CAPACITY_MIN = 4096
const CHUNK_BYTES = 64 * 1024

/**
 * Keeps the last bytes of a streamed log, and counts all. A follower that is slower than the log
 * misses the overwritten bytes, and delays nobody.
 */
export class LogRing {
  readonly #capacityMax: number
  readonly #changed = new EventTarget()
  #buffer = Buffer.alloc(0)
  #totalBytes = 0
  #isEnded = false

  constructor(capacityMax: number) {
    this.#capacityMax = capacityMax
  }

  get totalBytes(): number {
    return this.#totalBytes
  }

  get isEnded(): boolean {
    return this.#isEnded
  }

  append(piece: Buffer): void {
    if (piece.length === 0) return
    this.#grow(this.#totalBytes + piece.length)
    const capacity = this.#buffer.length
    const kept = piece.subarray(Math.max(0, piece.length - capacity))
    const at = (this.#totalBytes + piece.length - kept.length) % capacity
    const first = Math.min(kept.length, capacity - at)
    kept.copy(this.#buffer, at, 0, first)
    kept.copy(this.#buffer, 0, first)
    this.#totalBytes += piece.length
    this.#changed.dispatchEvent(new Event('change'))
  }

  /** Ends the log. Idempotent. */
  end(): void {
    this.#isEnded = true
    this.#changed.dispatchEvent(new Event('change'))
  }

  /** Returns the last bytes that are kept. */
  tail(maxBytes: number): { content: Buffer; totalBytes: number } {
    const content = this.#read(this.#totalBytes - maxBytes, this.#totalBytes)
    return { content, totalBytes: this.#totalBytes }
  }

  /** Yields the bytes from an offset on, until the log ends or `signal` aborts. */
  async *follow(from: number, signal: AbortSignal): AsyncGenerator<Buffer, void> {
    for (let at = from; !signal.aborted; ) {
      const start = Math.max(at, this.#keptFrom)
      if (start < this.#totalBytes) {
        at = Math.min(start + CHUNK_BYTES, this.#totalBytes)
        yield this.#read(start, at)
      } else if (this.#isEnded) return
      else await this.#change(signal)
    }
  }

  get #keptFrom(): number {
    return Math.max(0, this.#totalBytes - this.#buffer.length)
  }

  /** Settles with the next change, or when `signal` aborts. */
  async #change(signal: AbortSignal): Promise<void> {
    // It rejects only when `signal` aborts, which the caller checks.
    await once(this.#changed, 'change', { signal }).catch(() => {})
  }

  /** Returns a copy, since the kept bytes may be overwritten while they are read. */
  #read(from: number, to: number): Buffer {
    const capacity = this.#buffer.length
    const start = Math.max(from, this.#keptFrom)
    if (start >= to) return Buffer.alloc(0)
    const at = start % capacity
    const head = this.#buffer.subarray(at, Math.min(capacity, at + to - start))
    return Buffer.concat([head, this.#buffer.subarray(0, to - start - head.length)])
  }

  /** Grows the buffer by copying it: nothing is overwritten before it has its full size. */
  #grow(neededBytes: number): void {
    const capacity = this.#buffer.length
    if (neededBytes <= capacity || capacity === this.#capacityMax) return
    const grown = Math.max(CAPACITY_MIN, capacity * 2, neededBytes)
    const buffer = Buffer.alloc(Math.min(grown, this.#capacityMax))
    this.#buffer.copy(buffer)
    this.#buffer = buffer
  }
}
