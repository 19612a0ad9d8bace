export interface RetrySchedule {
  /** Milliseconds to wait after the first, second, … failed attempt. */
  delaysMs: readonly number[]
  /** Returns a number in [0, 1). */
  random: () => number
}

/** ±20 %, as Svix does, so that deliveries that failed together are not retried together. */
const JITTER = 0.2

/** Returns the delay after failed attempt number `attempt` (from 1). Undefined: it was the last. */
export function retryDelayMs(attempt: number, schedule: RetrySchedule): number | undefined {
  const delayMs = schedule.delaysMs[attempt - 1]
  if (delayMs === undefined) return undefined
  return Math.round(delayMs * (1 - JITTER + 2 * JITTER * schedule.random()))
}

/** Returns the maximum of `retryDelayMs` by the number of attempts made: 0 before the first. */
export function longestDelaysMs({ delaysMs }: RetrySchedule): number[] {
  return [0, ...delaysMs.map((delayMs) => Math.round(delayMs * (1 + JITTER)))]
}
