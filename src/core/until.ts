/** Settles as the promise does, or rejects with the signal's reason as soon as that aborts. */
export async function until<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  // After an abort, nobody awaits the promise: its rejection must not be unhandled.
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
