import { setTimeout as pause } from 'node:timers/promises'
import type { LogRing } from '../log-ring.ts'
import type { KubernetesApi } from './api.ts'
import { ApiError, ApiUnavailableError } from './failures.ts'

/** A stream that is silent for so long is asked whether it has stalled: across rotations some do (kubernetes#59902). */
const SILENT_MS = 30_000
/** The first piece of a log comes within this time after the API's answer, or there is none yet. */
const FIRST_PIECE_MS = 1_000
const RETRY_MS = 500
const RETRY_MAX_MS = 10_000
const TIME_LENGTH_MAX = 64
const WORDS_LENGTH_MAX = 512

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
  readonly #silentMs: number
  readonly #onRead: () => void
  /** The last line: its time, its index among lines of that same time, and its bytes so far. */
  #last = { time: '', count: 0, bytes: 0 }
  readonly #over = new AbortController()
  #isInLine = false
  /** Between the request and the first line that tells its time. */
  #isAtStart = true
  /** Of the line that is being read: bytes that are in the ring already. */
  #toSkip = 0
  #head = Buffer.alloc(0)
  #seen = { time: '', count: 0 }

  constructor(
    api: KubernetesApi,
    options: {
      path: string
      container: string
      ring: LogRing
      silentMs?: number | undefined
      /** Called after each piece that the ring was given, and when there is none for a second. */
      onRead?: () => void
    },
  ) {
    this.#api = api
    this.#path = options.path
    this.#container = options.container
    this.#ring = options.ring
    this.#silentMs = options.silentMs ?? SILENT_MS
    this.#onRead = options.onRead ?? (() => {})
  }

  /** Follows until the container is `over` and the stream has ended with it, or `signal` aborts. Never rejects. */
  async follow(signal: AbortSignal): Promise<void> {
    const either = AbortSignal.any([signal, this.#over.signal])
    for (let waitMs = RETRY_MS; !either.aborted; ) {
      const before = this.#ring.totalBytes
      const isRefused = await this.#read({ follow: true, signal }).then(
        () => false,
        (err: unknown) =>
          err instanceof ApiError ||
          (err instanceof ApiUnavailableError && err.kind === 'forbidden'),
      )
      // One that refuses for good, for want of rights, is not asked for ever. An outage is over at any moment, and the log may
      // be gone soon after.
      const isFutile = isRefused && this.#ring.totalBytes === before
      waitMs = isFutile ? Math.min(waitMs * 2, RETRY_MAX_MS) : RETRY_MS
      await pause(waitMs, undefined, { signal: either }).catch(() => {})
    }
  }

  /** The container has ended. */
  over(): void {
    this.#over.abort()
  }

  /** What there is beyond what was read. Throws what the API does. */
  async rest(signal: AbortSignal): Promise<void> {
    await this.#read({ follow: false, signal })
  }

  async #read({ follow, signal }: { follow: boolean; signal: AbortSignal }): Promise<void> {
    const silent = new AbortController()
    const timer = setTimeout(() => silent.abort(new Error('silent')), this.#silentMs)
    let empty: NodeJS.Timeout | undefined
    this.#begin()
    try {
      const stream = await this.#api.stream(this.#path, {
        query: {
          container: this.#container,
          timestamps: 'true',
          ...(follow ? { follow: 'true' } : {}),
          ...(this.#last.time === '' ? {} : { sinceTime: sinceOf(this.#last.time) }),
        },
        ...{ type: 'text', signal: AbortSignal.any([signal, silent.signal]) },
      })
      empty = setTimeout(this.#onRead, FIRST_PIECE_MS)
      for await (const chunk of stream) {
        timer.refresh()
        this.#take(chunk)
        if (!this.#isAtStart) this.#onRead()
      }
      if (this.#isAtStart && this.#head.length > 0) throw new Error(this.#head.toString())
    } finally {
      clearTimeout(timer)
      clearTimeout(empty)
    }
  }

  #begin(): void {
    this.#isInLine = false
    this.#isAtStart = true
    this.#head = Buffer.alloc(0)
    this.#seen = { time: '', count: 0 }
  }

  /** Timestamps stand at the beginning of lines only: a long line comes in pieces without more of them. */
  #take(chunk: Buffer): void {
    let rest = chunk
    while (rest.length > 0) {
      if (!this.#isInLine) {
        this.#head = Buffer.concat([this.#head, rest])
        const space = this.#head.subarray(0, TIME_LENGTH_MAX).indexOf(32)
        if (space < 0 && this.#head.length < TIME_LENGTH_MAX) return
        const time = timeOf(this.#head.subarray(0, Math.max(space, 0)).toString('latin1'))
        if (time === undefined) {
          // Words of the kubelet's, such as "unable to retrieve container logs"; or, where it was asked for what is
          // later than the beginning of a long line, the rest of that.
          if (!this.#isAtStart || this.#last.time === '')
            throw new Error(this.#head.subarray(0, WORDS_LENGTH_MAX).toString())
          const end = this.#head.indexOf(10)
          rest = end < 0 ? Buffer.alloc(0) : this.#head.subarray(end + 1)
          // Its beginning stays for what is no line at all.
          this.#head = end < 0 ? this.#head.subarray(0, WORDS_LENGTH_MAX) : Buffer.alloc(0)
          continue
        }
        this.#isAtStart = false
        this.#startLine(time)
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
    const order = compareLines(this.#seen, this.#last)
    // The last one may have been cut in its middle.
    this.#toSkip = order > 0 ? 0 : order === 0 ? this.#last.bytes : Number.POSITIVE_INFINITY
    if (order > 0) this.#last = { ...this.#seen, bytes: 0 }
  }
}

/**
 * Comparable as text: seconds since 1970, nanoseconds. Of RFC 3339, trailing zeros left out or not, in the node's own
 * time zone. Undefined: it is no time.
 */
function timeOf(text: string): string | undefined {
  const match = /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)$/.exec(text)
  if (!match) return undefined
  const [, second = '', fraction = '', zone = ''] = match
  const seconds = String(Date.parse(second + zone) / 1000)
  return `${seconds.padStart(12, '0')}.${fraction.padEnd(9, '0')}`
}

/** The beginning of that second: the kubelet is asked in whole ones. */
function sinceOf(time: string): string {
  return new Date(Number(time.slice(0, 12)) * 1000).toISOString().replace('.000', '')
}

interface Line {
  time: string
  count: number
}

/** -1, 0 or 1. */
function compareLines(one: Line, other: Line): number {
  if (one.time !== other.time) return one.time < other.time ? -1 : 1
  return Math.sign(one.count - other.count)
}
