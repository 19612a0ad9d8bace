import type { ServerResponse } from 'node:http'
import { Socket } from 'node:net'
import type { FastifyInstance } from 'fastify'

/** What is to be sent stays in memory until it was taken, or until the connection is closed. */
export const READER_IDLE_MS = 30_000

/** Closes the connection of a reader that takes nothing of its answer for so long. */
export function closeIdleReaders(app: FastifyInstance, idleMs: number = READER_IDLE_MS): void {
  app.addHook('onSend', async (_, reply) => closeWhenIdle(reply.raw, idleMs))
}

/** The same for one answer that is being sent. Node resets the time when the next request comes. */
export function closeWhenIdle(response: ServerResponse, idleMs: number): void {
  // An injected request has something else.
  if (response.socket instanceof Socket) response.socket.setTimeout(idleMs)
}
