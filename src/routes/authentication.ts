import { createHash, timingSafeEqual } from 'node:crypto'
import type { FastifyInstance } from 'fastify'
import { TaskRunnerError } from '../core/errors.ts'
import { isLoopbackName } from '../core/loopback.ts'

/**
 * Lets only requests with one of the tokens pass (RFC 6750). Without tokens, which config.ts allows on
 * loopback alone, only requests to a loopback name: a page in somebody's browser could otherwise reach us
 * under a name of its own (DNS rebinding).
 */
export function requireToken(
  app: FastifyInstance,
  options: { tokens: readonly string[]; loopbackOnly: boolean },
): void {
  const digests = options.tokens.map(digest)
  app.addHook('onRequest', async (request) => {
    if (digests.length === 0) {
      if (options.loopbackOnly && !isLoopbackName(request.hostname)) {
        throw new TaskRunnerError(
          'host_refused',
          'Without API tokens, only loopback names are served',
        )
      }
      return
    }
    const given = /^Bearer ([^\s]+)$/i.exec(request.headers.authorization ?? '')?.[1]
    if (given === undefined) throw new TaskRunnerError('unauthorized', 'A bearer token is needed')
    const givenDigest = digest(given)
    // Of digests, which are equally long, and every one of them: time tells nothing.
    const matches = digests.filter((known) => timingSafeEqual(known, givenDigest))
    if (matches.length === 0) throw new TaskRunnerError('unauthorized', 'The bearer token is wrong')
  })
}

function digest(token: string): Buffer {
  return createHash('sha256').update(token).digest()
}
