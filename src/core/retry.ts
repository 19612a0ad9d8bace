export interface RetrySchedule {
  /** Milliseconds to wait after the first, second, … failed attempt. */
  delaysMs: readonly number[]
  /** Returns a number in [0, 1). */
  random: () => number
}

/** ±20 %, as Svix does: receivers that fail together are not called again together. */
const JITTER = 0.2

/**
 * Milliseconds to wait after failed attempt number `attempt` (1 is the first), or undefined when the
 * schedule is exhausted.
 */
export function retryDelayMs(attempt: number, schedule: RetrySchedule): number | undefined {
  const delayMs = schedule.delaysMs[attempt - 1]
  if (delayMs === undefined) return undefined
  return Math.round(delayMs * (1 - JITTER + 2 * JITTER * schedule.random()))
}

/**
 * Milliseconds that `retryDelayMs` returns at most, by the number of attempts made: none before the
 * first.
 */
export function longestDelaysMs({ delaysMs }: RetrySchedule): number[] {
  return [0, ...delaysMs.map((delayMs) => Math.round(delayMs * (1 + JITTER)))]
}
