import { setTimeout as pause } from 'node:timers/promises'
import type { LogRing } from '../log-ring.ts'
import type { KubernetesApi } from './api.ts'
import { ApiError, ApiUnavailableError } from './failures.ts'

/** Silence after which a stream is opened again: some stall across rotations (kubernetes#59902). */
const SILENT_MS = 30_000
/** Time after the API's answer in which an existing log begins. */
const FIRST_PIECE_MS = 1_000
const RETRY_MS = 500
const RETRY_MAX_MS = 10_000
const TIME_LENGTH_MAX = 64
const WORDS_LENGTH_MAX = 512

/**
 * Reads a container's log into a ring across cuts, stalls and rotations, without repeating or
 * omitting lines that the kubelet still has. Streams resume from the second of the last line, the
 * finest the API supports; lines already read are recognised by their exact timestamps.
 */
export class PodLog {
  readonly #api: KubernetesApi
  readonly #path: string
  readonly #container: string
  readonly #ring: LogRing
  readonly #silentMs: number
  readonly #onRead: () => void
  /** Last line: its time, its index among lines with that time, and its bytes read so far. */
  #last = { time: '', count: 0, bytes: 0 }
  readonly #over = new AbortController()
  #isInLine = false
  /** Whether no line with a timestamp has been read since the request. */
  #isAtStart = true
  /** Bytes of the current line that are in the ring already. */
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
      /** Called after each piece added to the ring, and if there is none for a second. */
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

  /** Follows until the stream ends after `over`, or `signal` aborts. Never rejects. */
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
      // A rejection may be permanent, so its retries back off. Outages are retried fast, since the
      // log may be gone soon after.
      const mustBackOff = isRefused && this.#ring.totalBytes === before
      waitMs = mustBackOff ? Math.min(waitMs * 2, RETRY_MAX_MS) : RETRY_MS
      await pause(waitMs, undefined, { signal: either }).catch(() => {})
    }
  }

  /** Ends `follow` with its current stream: the container has ended. */
  over(): void {
    this.#over.abort()
  }

  /** Reads the part of the log after what was read. Throws errors of the API. */
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
        type: 'text',
        signal: AbortSignal.any([signal, silent.signal]),
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

  /** Adds a chunk. Only the beginning of a line has a timestamp, and long lines come in pieces. */
  #take(chunk: Buffer): void {
    let rest = chunk
    while (rest.length > 0) {
      if (!this.#isInLine) {
        this.#head = Buffer.concat([this.#head, rest])
        const space = this.#head.subarray(0, TIME_LENGTH_MAX).indexOf(32)
        if (space < 0 && this.#head.length < TIME_LENGTH_MAX) return
        const time = timeOf(this.#head.subarray(0, Math.max(space, 0)).toString('latin1'))
        if (time === undefined) {
          // A message of the kubelet, such as "unable to retrieve container logs"; or the rest of a
          // long line that began before the requested time.
          if (!this.#isAtStart || this.#last.time === '')
            throw new Error(this.#head.subarray(0, WORDS_LENGTH_MAX).toString())
          const end = this.#head.indexOf(10)
          rest = end < 0 ? Buffer.alloc(0) : this.#head.subarray(end + 1)
          // The beginning is kept for the error, in case no line follows.
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
    // The last line may have been cut.
    this.#toSkip = order > 0 ? 0 : order === 0 ? this.#last.bytes : Number.POSITIVE_INFINITY
    if (order > 0) this.#last = { ...this.#seen, bytes: 0 }
  }
}

/**
 * Converts an RFC 3339 timestamp, in any time zone, to text that sorts by time: seconds since 1970
 * and nanoseconds. Returns undefined for other text.
 */
function timeOf(text: string): string | undefined {
  const match = /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)$/.exec(text)
  if (!match) return undefined
  const [, second = '', fraction = '', zone = ''] = match
  const seconds = String(Date.parse(second + zone) / 1000)
  return `${seconds.padStart(12, '0')}.${fraction.padEnd(9, '0')}`
}

/** Returns the beginning of the second: the kubelet ignores fractions. */
function sinceOf(time: string): string {
  return new Date(Number(time.slice(0, 12)) * 1000).toISOString().replace('.000', '')
}

interface Line {
  time: string
  count: number
}

function compareLines(one: Line, other: Line): number {
  if (one.time !== other.time) return one.time < other.time ? -1 : 1
  return Math.sign(one.count - other.count)
}
