import { setImmediate } from 'node:timers/promises'

let queue: Promise<void> = Promise.resolve()

/**
 * Waits for a turn of the event loop that no other caller has. Long work waits for one before each
 * piece, so that requests wait for at most one piece, however much work is under way.
 */
export function turn(): Promise<void> {
  queue = queue.then(() => setImmediate())
  return queue
}
