import { setTimeout as pause } from 'node:timers/promises'

export interface Retries<E> {
  /** Ends the pauses. */
  signal: AbortSignal
  /** First pause. Each further one is twice as long, at most `toMs`. */
  fromMs: number
  toMs: number
  /** Returns whether a retry may succeed. */
  isWorthIt: (err: unknown) => err is E
  /** Called before each pause. */
  onRetry?: (err: E) => void
}

/** Repeats a step until it succeeds. Throws a failure not worth a retry, or the signal's reason. */
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
