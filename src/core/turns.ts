import { setImmediate } from 'node:timers/promises'

let line: Promise<void> = Promise.resolve()

/**
 * Waits for the next free turn of the event loop. Long work takes one before each of its pieces. A turn goes to one caller:
 * however many such works are under way, everybody else waits for one piece at most.
 */
export function turn(): Promise<void> {
  line = line.then(() => setImmediate())
  return line
}
