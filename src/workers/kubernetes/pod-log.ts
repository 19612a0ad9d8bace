import { setTimeout as pause } from 'node:timers/promises'
import type { LogRing } from '../log-ring.ts'
import { ApiError, type KubernetesApi } from './api.ts'

/** A stream that is silent for so long is asked whether it has stalled: across rotations some do (kubernetes#59902). */
const SILENT_MS = 30_000
const RETRY_MS = 500

/**
 * Reads a container's log into a ring, from its beginning, across cuts, stalls and rotations, with no line twice and
 * none left out as long as the kubelet still has it. Streams are taken up by the time of the last line, which the
 * API knows to the second only: lines that were read are dropped by their own, exact time.
 */
export class PodLog {
  readonly #api: KubernetesApi
  readonly #path: string
  readonly #container: string
  readonly #ring: LogRing
  /** The last line: its time as it was sent, the how manieth of that very time it is, and its bytes so far. */
  #last = { time: '', count: 0, bytes: 0 }
  #isInLine = false
  /** Of the line that is being read: bytes that are in the ring already. */
  #toSkip = 0
  #head = Buffer.alloc(0)
  #seen = { time: '', count: 0 }

  constructor(api: KubernetesApi, path: string, container: string, ring: LogRing) {
    this.#api = api
    this.#path = path
    this.#container = container
    this.#ring = ring
  }

  /** Follows until `isOver` says that the container has ended, or `signal` aborts. Never rejects. */
  async follow(isOver: () => boolean, signal: AbortSignal): Promise<void> {
    while (!signal.aborted && !isOver()) {
      await this.#read({ follow: true, signal }).catch(() => {})
      if (!signal.aborted && !isOver()) await pause(RETRY_MS, undefined, { signal }).catch(() => {})
    }
  }

  /** What there is beyond what was read. Throws what the API does. */
  async rest(signal: AbortSignal): Promise<void> {
    await this.#read({ follow: false, signal })
  }

  async #read({ follow, signal }: { follow: boolean; signal: AbortSignal }): Promise<void> {
    const silent = new AbortController()
    const timer = setTimeout(() => silent.abort(new Error('silent')), SILENT_MS)
    this.#begin()
    try {
      const stream = await this.#api.stream(this.#path, {
        query: {
          container: this.#container,
          timestamps: 'true',
          ...(follow ? { follow: 'true' } : {}),
          ...(this.#last.time === '' ? {} : { sinceTime: this.#last.time.replace(/\.\d+/, '') }),
        },
        signal: AbortSignal.any([signal, silent.signal]),
      })
      for await (const chunk of stream) {
        timer.refresh()
        this.#take(chunk)
      }
    } catch (err) {
      // Nothing there yet, or not any more.
      if (err instanceof ApiError && !follow) return
      throw err
    } finally {
      clearTimeout(timer)
    }
  }

  #begin(): void {
    this.#isInLine = false
    this.#head = Buffer.alloc(0)
    this.#seen = { time: '', count: 0 }
  }

  /** Timestamps stand at the beginning of lines only: a long line comes in pieces without more of them. */
  #take(chunk: Buffer): void {
    let rest = chunk
    while (rest.length > 0) {
      if (!this.#isInLine) {
        this.#head = Buffer.concat([this.#head, rest])
        const space = this.#head.indexOf(32)
        if (space < 0) return
        this.#startLine(this.#head.subarray(0, space).toString('latin1'))
        rest = this.#head.subarray(space + 1)
        this.#head = Buffer.alloc(0)
        continue
      }
      const end = rest.indexOf(10)
      const piece = end < 0 ? rest : rest.subarray(0, end + 1)
      const fresh = piece.subarray(this.#toSkip)
      this.#toSkip -= piece.length - fresh.length
      this.#last.bytes += fresh.length
      this.#ring.append(fresh)
      this.#isInLine = end < 0
      rest = rest.subarray(piece.length)
    }
  }

  #startLine(time: string): void {
    this.#isInLine = true
    this.#seen = { time, count: this.#seen.time === time ? this.#seen.count + 1 : 1 }
    const { time: lastTime, count, bytes } = this.#last
    const order = compareTimes(time, lastTime) || this.#seen.count - count
    if (order > 0) this.#last = { ...this.#seen, bytes: 0 }
    // The last one may have been cut in its middle.
    this.#toSkip = order > 0 ? 0 : order === 0 ? bytes : Number.POSITIVE_INFINITY
  }
}

/** RFC 3339 with nanoseconds, whose trailing zeros are left out. */
function compareTimes(one: string, other: string): number {
  const padded = (time: string) => {
    const [seconds = '', fraction = ''] = time.replace(/Z$/, '').split('.')
    return `${seconds}.${fraction.padEnd(9, '0')}`
  }
  const [a, b] = [padded(one), padded(other)]
  return a < b ? -1 : a > b ? 1 : 0
}
