import { setTimeout as pause } from 'node:timers/promises'

export interface Retries<E> {
  /** Ends the pauses. */
  signal: AbortSignal
  /** The first pause. Each one is twice as long as the one before, `toMs` at most. */
  fromMs: number
  toMs: number
  /** Whether the failure may be another one, or none, the next time. */
  isWorthIt: (err: unknown) => err is E
  /** Called before each pause. */
  onRetry?: (err: E) => void
}

/**
 * Repeats a step until it succeeds. Throws a failure that is not worth a retry, and the reason of
 * the signal once that has aborted.
 */
export async function retrying<T, E>(step: () => Promise<T>, retries: Retries<E>): Promise<T> {
  const { signal, fromMs, toMs, isWorthIt, onRetry } = retries
  for (let waitMs = fromMs; ; waitMs = Math.min(waitMs * 2, toMs)) {
    try {
      return await step()
    } catch (err) {
      signal.throwIfAborted()
      if (!isWorthIt(err)) throw err
      onRetry?.(err)
    }
    await pause(waitMs, undefined, { signal }).catch(() => signal.throwIfAborted())
  }
}
