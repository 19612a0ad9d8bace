import type { ServerResponse } from 'node:http'
import { Socket } from 'node:net'
import type { FastifyInstance } from 'fastify'

/** Time after which a client that reads nothing is disconnected: its response fills memory. */
export const READER_IDLE_MS = 30_000

/** Closes connections whose client has read nothing of its response for `idleMs`. */
export function closeIdleReaders(app: FastifyInstance, idleMs: number = READER_IDLE_MS): void {
  app.addHook('onSend', async (_, reply) => closeWhenIdle(reply.raw, idleMs))
}

/** Does the same for one response. Node resets the timeout at the connection's next request. */
export function closeWhenIdle(response: ServerResponse, idleMs: number): void {
  const { socket } = response
  // Requests injected by tests have no socket.
  if (!(socket instanceof Socket)) return
  // Node extends the timeout once if a write made progress, so half of it is enough.
  response.setTimeout(idleMs / 2, () => {
    // A client that waits for more log is not idle.
    if (socket.writableLength > 0) socket.destroy()
  })
}
