/** Passes on the items of an event loop turn together: each message wakes the other thread. */
export function perTurn<T>(passOn: (items: T[]) => void): {
  add(...items: T[]): void
  /** Passes on the collected items immediately. */
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
