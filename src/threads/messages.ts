/** Messages between the main thread and a service thread. */

export interface Call<Request> {
  id: number
  request: Request
}

/** `details`: own fields of the error, such as `code`, which a message between threads loses. */
export type Answer =
  | { id: number; value: unknown }
  | { id: number; error: Error; details: Record<string, unknown> }

export type ToThread<Request> = Call<Request>[] | 'close'
/** `open`: the thread has started. `notice`: a message that answers no call. */
export type FromThread = 'open' | Answer[] | { notice: unknown }

export function failed(id: number, cause: unknown): Answer {
  const error = cause instanceof Error ? cause : new Error(String(cause))
  const details = Object.entries(error).filter(([, value]) =>
    ['string', 'number'].includes(typeof value),
  )
  return { id, error, details: Object.fromEntries(details) }
}
