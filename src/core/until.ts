/** The promise's outcome, or a rejection with the signal's reason as soon as that aborts. */
export async function until<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  // When the abort comes first, nobody waits for the promise any more.
  promise.catch(() => {})
  signal.throwIfAborted()
  const aborted = Promise.withResolvers<never>()
  const onAbort = () => aborted.reject(signal.reason)
  signal.addEventListener('abort', onAbort)
  try {
    return await Promise.race([promise, aborted.promise])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}
