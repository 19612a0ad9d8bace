import { setTimeout as pause } from 'node:timers/promises'
import { isOurs } from './failures.ts'

const RETRY_MS = 100
const RETRY_MAX_MS = 2_000

/**
 * Repeats what the machine's trouble keeps from succeeding, with growing pauses. Returns undefined once `isOver`. Throws what
 * is no such trouble.
 */
export async function persistently<T>(
  act: () => T | Promise<T>,
  isOver = () => false,
): Promise<T | undefined> {
  for (let waitMs = RETRY_MS; !isOver(); waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)) {
    try {
      return await act()
    } catch (err) {
      if (!isOurs(err)) throw err
      await pause(waitMs, undefined, { ref: false })
    }
  }
  return undefined
}
