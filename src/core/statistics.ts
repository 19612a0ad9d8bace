import type { FinalStatus, Reason } from './task.ts'

/** In seconds; null where nothing was measured. */
export interface Durations {
  mean: number | null
  max: number | null
}

/** Tasks that ended in one span of time. */
export interface StatisticsBucket extends Record<FinalStatus, number> {
  /** The span's begin, in epoch ms. */
  at: number
  /** From accepted to claimed. */
  queueWait: Durations
  /** From the end of a task to its first callback attempt. */
  callbackDelay: Durations
}

export interface Statistics {
  /** Oldest first, without gaps. */
  buckets: StatisticsBucket[]
  /** Of tasks that did not succeed, the most frequent first. */
  reasons: Array<{ reason: Reason; count: number }>
}

export interface StatisticsStore {
  /** Of tasks that ended from `from` on (epoch ms), in `count` spans. Takes longer the more there are of them. */
  ended(span: { from: number; bucketMs: number; count: number }): Promise<Statistics>
}
