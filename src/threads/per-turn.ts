/** Collects what comes within a turn of the event loop, and passes it on together: each message wakes the other thread. */
export function perTurn<T>(passOn: (items: T[]) => void): {
  add(...items: T[]): void
  /** Passes on at once what has come. */
  flush(): void
} {
  let items: T[] = []
  const flush = () => {
    const collected = items
    items = []
    if (collected.length > 0) passOn(collected)
  }
  return {
    add(...more) {
      if (items.length === 0) setImmediate(flush)
      items.push(...more)
    },
    flush,
  }
}
