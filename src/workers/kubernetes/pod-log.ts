import { setTimeout as pause } from 'node:timers/promises'
import { LogRing } from '../log-ring.ts'
import type { KubernetesApi } from './api.ts'
import { ApiError, ApiUnavailableError } from './failures.ts'
import type { LogPosition } from './log-cursor.ts'

/** A stream that is silent for so long is asked whether it has stalled: across rotations some do (kubernetes#59902). */
const SILENT_MS = 30_000
const RETRY_MS = 500
const RETRY_MAX_MS = 10_000
const TIME_LENGTH_MAX = 64
const WORDS_LENGTH_MAX = 512

/**
 * Reads a container's log into a ring, from its beginning, across cuts, stalls and rotations, with no line twice and
 * none left out as long as the kubelet still has it. Streams are taken up by the time of the last line, which the
 * API knows to the second only: lines that were read are dropped by their own, exact time.
 *
 * `after` an earlier reader, what the kubelet still has of the log up to its position is the ring's first content, and
 * bytes are counted on from there. The ring stays empty until that has been read.
 */
export class PodLog {
  readonly #api: KubernetesApi
  readonly #path: string
  readonly #container: string
  readonly #ring: LogRing
  readonly #silentMs: number
  readonly #onRead: (position: LogPosition) => void
  /** Where an earlier reader was, and what there is of the log before; until that is read. */
  #earlier: { position: LogPosition; ring: LogRing } | undefined
  /** The last line: its time, the how manieth of that very time it is, and its bytes so far. */
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
      after?: LogPosition | undefined
      /** After each piece that the ring was given. */
      onRead?: (position: LogPosition) => void
    },
  ) {
    this.#api = api
    this.#path = options.path
    this.#container = options.container
    this.#ring = options.ring
    this.#silentMs = options.silentMs ?? SILENT_MS
    this.#onRead = options.onRead ?? (() => {})
    const { after: position } = options
    if (position) this.#earlier = { position, ring: new LogRing(options.ring.capacityMax) }
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
    // What an earlier reader had is read to the end of what there is now: a silent log would not tell that it is over.
    const isFollowing = follow && !this.#earlier
    this.#begin()
    try {
      const stream = await this.#api.stream(this.#path, {
        query: {
          container: this.#container,
          timestamps: 'true',
          ...(isFollowing ? { follow: 'true' } : {}),
          ...(this.#last.time === '' ? {} : { sinceTime: sinceOf(this.#last.time) }),
        },
        ...{ type: 'text', signal: AbortSignal.any([signal, silent.signal]) },
      })
      for await (const chunk of stream) {
        timer.refresh()
        this.#take(chunk)
        this.#tell()
      }
      if (this.#isAtStart && this.#head.length > 0) throw new Error(this.#head.toString())
      if (this.#earlier) {
        // Nothing of that line or later is left, and so nothing that is known to lie right before it.
        this.#last = { ...this.#earlier.position }
        this.#seed(Buffer.alloc(0), this.#earlier.position)
        this.#tell()
      }
    } finally {
      clearTimeout(timer)
    }
  }

  #tell(): void {
    if (this.#earlier || this.#last.time === '') return
    this.#onRead({ ...this.#last, totalBytes: this.#ring.totalBytes })
  }

  #begin(): void {
    this.#isInLine = false
    this.#isAtStart = true
    this.#head = Buffer.alloc(0)
    this.#seen = { time: '', count: 0 }
    if (!this.#earlier) return
    // From the beginning again: what was rotated away meanwhile must leave no hole.
    this.#earlier.ring = new LogRing(this.#ring.capacityMax)
    this.#last = { time: '', count: 0, bytes: 0 }
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
      this.#append(fresh)
      this.#isInLine = end < 0
      rest = rest.subarray(piece.length)
    }
  }

  /** The last bytes of the last line. */
  #append(fresh: Buffer): void {
    let known = 0
    if (this.#earlier) {
      const { position, ring } = this.#earlier
      const order = compareLines(this.#last, position)
      const beyond = order || this.#last.bytes - position.bytes
      known = order > 0 ? 0 : beyond < 0 ? fresh.length : fresh.length - beyond
      ring.append(fresh.subarray(0, known))
      if (beyond >= 0) this.#seed(ring.tail(ring.capacityMax).content, position)
    }
    this.#ring.append(fresh.subarray(known))
  }

  #seed(content: Buffer, { totalBytes }: LogPosition): void {
    this.#ring.seed(content, totalBytes)
    this.#earlier = undefined
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
