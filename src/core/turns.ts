import { setImmediate } from 'node:timers/promises'

let line: Promise<void> = Promise.resolve()

/**
 * Waits for a free turn of the event loop. Long work takes one before each of its pieces. A turn
 * goes to one caller, so that requests wait for one piece at most, however much long work is under
 * way.
 */
export function turn(): Promise<void> {
  line = line.then(() => setImmediate())
  return line
}
