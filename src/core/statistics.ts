import type { FinalStatus, Reason } from './task.ts'

/** In seconds; null where nothing was measured. */
export interface Durations {
  mean: number | null
  max: number | null
}

/** Tasks that ended within a span of time. */
export interface EndedTasks extends Record<FinalStatus, number> {
  /** Of those that did not succeed. */
  reasons: Array<{ reason: Reason; count: number }>
  /** From accepted to claimed. */
  queueWait: Durations
  /** From the end of a task to its first callback attempt. */
  callbackDelay: Durations
}

export interface StatisticsStore {
  /** Of tasks that ended from `from` on and before `to`, in epoch ms. Takes longer the more there are. */
  ended(from: number, to: number): Promise<EndedTasks>
}

/** The begin of a span, in epoch ms, and what ended in it. */
export type Bucket = EndedTasks & { at: number }

/** A span that is over by this much changes hardly any more: only late callbacks are still to come. */
const SETTLED_MS = 60_000
const FRESH_MS = 2_000

/**
 * What ended lately, span by span. Each span is a question of its own, so that a day of many tasks does not hold up
 * whoever else asks the store, and is asked for once when it is over.
 */
export class Statistics {
  readonly #store: StatisticsStore
  readonly #now: () => number
  readonly #known = new Map<string, { until: number; ended: Promise<EndedTasks> }>()

  constructor(store: StatisticsStore, now: () => number) {
    this.#store = store
    this.#now = now
  }

  /** The last `count` spans of `bucketMs`, the one under way included, oldest first. */
  async last(count: number, bucketMs: number): Promise<Bucket[]> {
    const end = (Math.floor(this.#now() / bucketMs) + 1) * bucketMs
    const buckets: Bucket[] = []
    for (let at = end - count * bucketMs; at < end; at += bucketMs) {
      buckets.push({ at, ...(await this.#ended(at, bucketMs, count)) })
    }
    for (const [key, { until }] of this.#known) if (until < this.#now()) this.#known.delete(key)
    return buckets
  }

  /** Many may look at the same time: they share one question. */
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
