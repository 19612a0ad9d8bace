import { setTimeout as pause } from 'node:timers/promises'
import { isTemporary } from './failures.ts'

const RETRY_MS = 100
const RETRY_MAX_MS = 2_000

/**
 * Retries `act`, with growing pauses, while its failures are temporary. Returns undefined once
 * `isOver`. Throws any other error.
 */
export async function persistently<T>(
  act: () => T | Promise<T>,
  isOver = () => false,
): Promise<T | undefined> {
  for (let waitMs = RETRY_MS; !isOver(); waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)) {
    try {
      return await act()
    } catch (err) {
      if (!isTemporary(err)) throw err
      await pause(waitMs, undefined, { ref: false })
    }
  }
  return undefined
}
