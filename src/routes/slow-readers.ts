import type { ServerResponse } from 'node:http'
import { Socket } from 'node:net'
import type { FastifyInstance } from 'fastify'

/**
 * Time after which a reader that takes nothing is cut off: its answer stays in memory until then.
 */
export const READER_IDLE_MS = 30_000

/** Closes the connection of a reader that takes nothing of its answer for so long. */
export function closeIdleReaders(app: FastifyInstance, idleMs: number = READER_IDLE_MS): void {
  app.addHook('onSend', async (_, reply) => closeWhenIdle(reply.raw, idleMs))
}

/** Does the same for one answer. Node resets the time when the next request comes. */
export function closeWhenIdle(response: ServerResponse, idleMs: number): void {
  const { socket } = response
  // An injected request has something else.
  if (!(socket instanceof Socket)) return
  // At half of it, Node still counts what a write has achieved before, and waits for the other
  // half.
  response.setTimeout(idleMs / 2, () => {
    // A follower with nothing to take is not idle.
    if (socket.writableLength > 0) socket.destroy()
  })
}
