import type { FinalStatus, Reason } from './task.ts'

/** Durations in seconds; null: no tasks. */
export interface Durations {
  mean: number | null
  max: number | null
}

/** Tasks that ended within a span of time. */
export interface EndedTasks extends Record<FinalStatus, number> {
  /** Reasons of the tasks that did not succeed. */
  reasons: Array<{ reason: Reason; count: number }>
  /** Time from accepted to claimed. */
  queueWait: Durations
  /** Time from a task's end to its first callback attempt. */
  callbackDelay: Durations
}

export interface StatisticsStore {
  /** Reads the tasks that ended in [`from`, `to`), in epoch ms. Cost grows with their number. */
  ended(from: number, to: number): Promise<EndedTasks>
}

/** Tasks that ended in the span that begins at `at`, in epoch ms. */
export type Bucket = EndedTasks & { at: number }

/** Age at which a past span is final but for late callbacks. */
const SETTLED_MS = 60_000
const FRESH_MS = 2_000

/**
 * Counts ended tasks span by span, one query each, so that no long query blocks the store. Past
 * spans are cached.
 */
export class Statistics {
  readonly #store: StatisticsStore
  readonly #now: () => number
  readonly #known = new Map<string, { until: number; ended: Promise<EndedTasks> }>()

  constructor(store: StatisticsStore, now: () => number) {
    this.#store = store
    this.#now = now
  }

  /** Returns the last `count` spans of `bucketMs`, oldest first, the current one included. */
  async last(count: number, bucketMs: number): Promise<Bucket[]> {
    const end = (Math.floor(this.#now() / bucketMs) + 1) * bucketMs
    const buckets: Bucket[] = []
    for (let at = end - count * bucketMs; at < end; at += bucketMs) {
      buckets.push({ at, ...(await this.#ended(at, bucketMs, count)) })
    }
    for (const [key, { until }] of this.#known) if (until < this.#now()) this.#known.delete(key)
    return buckets
  }

  /** Concurrent calls share one query. */
  #ended(at: number, bucketMs: number, count: number): Promise<EndedTasks> {
    const key = `${at} ${bucketMs}`
    const known = this.#known.get(key)
    if (known && known.until > this.#now()) return known.ended
    const ended = this.#store.ended(at, at + bucketMs)
    const isOver = at + bucketMs + SETTLED_MS < this.#now()
    const until = isOver ? at + (count + 1) * bucketMs : this.#now() + FRESH_MS
    this.#known.set(key, { until, ended })
    ended.catch(() => this.#known.delete(key))
    return ended
  }
}
