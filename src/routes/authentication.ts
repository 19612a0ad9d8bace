import { createHash, timingSafeEqual } from 'node:crypto'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import { TaskRunnerError } from '../core/errors.ts'
import { isLoopbackName } from '../core/loopback.ts'

/** Where the page's sign-in keeps the token; session.ts sets it. */
export const TOKEN_COOKIE = 'task_runner_token'

/** Knows which requests may pass. */
export class Authentication {
  readonly #digests: readonly Buffer[]
  readonly #loopbackOnly: boolean

  constructor(options: { tokens: readonly string[]; loopbackOnly: boolean }) {
    this.#digests = options.tokens.map(digest)
    this.#loopbackOnly = options.loopbackOnly
  }

  /** False: whoever reaches us may do everything. */
  get needsToken(): boolean {
    return this.#digests.length > 0
  }

  knows(token: string): boolean {
    const given = digest(token)
    // Of digests, which are equally long, and every one of them: time tells nothing.
    return this.#digests.filter((known) => timingSafeEqual(known, given)).length > 0
  }

  /**
   * Throws unless the request carries one of the tokens (RFC 6750), or the cookie of somebody who signed in. Without
   * tokens, which config.ts allows on loopback alone, only requests to a loopback name pass: a page in somebody's
   * browser could otherwise reach us under a name of its own (DNS rebinding). What a browser sends along by itself
   * counts only where it says that the request is our own page's.
   */
  check(request: FastifyRequest): void {
    if (!this.needsToken) {
      if (!this.#loopbackOnly) return
      if (!isLoopbackName(request.hostname)) {
        throw new TaskRunnerError(
          'host_refused',
          'Without API tokens, only loopback names are served',
        )
      }
      if (isOfAnotherSite(request)) throw refusedSite()
      return
    }
    const header = request.headers.authorization
    const cookie = request.cookies[TOKEN_COOKIE]
    if (header === undefined && cookie !== undefined) {
      if (isOfAnotherSite(request)) throw refusedSite()
      if (!this.knows(cookie)) throw new TaskRunnerError('unauthorized', 'Sign in again')
      return
    }
    const given = /^Bearer ([^\s]+)$/i.exec(header ?? '')?.[1]
    if (given === undefined) throw new TaskRunnerError('unauthorized', 'A bearer token is needed')
    if (!this.knows(given)) throw new TaskRunnerError('unauthorized', 'The bearer token is wrong')
  }
}

export function requireToken(app: FastifyInstance, authentication: Authentication): void {
  app.addHook('onRequest', async (request) => authentication.check(request))
}

/**
 * What only a browser says, of a page that is not ours. Where it says nothing of the site, as over plain HTTP from another
 * machine, the origin tells. https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Sec-Fetch-Site
 */
function isOfAnotherSite({ headers }: FastifyRequest): boolean {
  const site = headers['sec-fetch-site']
  if (site !== undefined) return site !== 'same-origin' && site !== 'none'
  const { origin } = headers
  return origin !== undefined && (!URL.canParse(origin) || new URL(origin).host !== headers.host)
}

function refusedSite(): TaskRunnerError {
  return new TaskRunnerError('host_refused', 'Requests of other sites are not served')
}

function digest(token: string): Buffer {
  return createHash('sha256').update(token).digest()
}
