import { createHash, timingSafeEqual } from 'node:crypto'
import { setTimeout as pause } from 'node:timers/promises'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import { TaskRunnerError } from '../core/errors.ts'
import { isLoopbackName } from '../core/loopback.ts'

/** Where the page's sign-in keeps the token; session.ts sets it. */
export const TOKEN_COOKIE = 'task_runner_token'

const WRONG_PAUSE_MS = 250
/** Maximum answers that are paused at a time: each holds a connection and its request in memory. */
const WRONG_PAUSES_MAX = 2_000

/** Knows which requests may pass. */
export class Authentication {
  readonly #digests: readonly Buffer[]
  readonly #loopbackOnly: boolean
  readonly #wrongPauseMs: number
  #pauses = 0

  constructor(options: {
    tokens: readonly string[]
    loopbackOnly: boolean
    wrongPauseMs?: number
  }) {
    this.#digests = options.tokens.map(digest)
    this.#loopbackOnly = options.loopbackOnly
    this.#wrongPauseMs = options.wrongPauseMs ?? WRONG_PAUSE_MS
  }

  /** False: whoever reaches us may do everything. */
  get needsToken(): boolean {
    return this.#digests.length > 0
  }

  /**
   * Tells whether a token is right. A wrong one is answered after a pause, which slows down
   * guessing. Right ones never wait, not even behind wrong ones from the same address, which many
   * people may share. When too many answers are paused already, a wrong one is answered at once.
   */
  async knows(token: string): Promise<boolean> {
    const given = digest(token)
    // Of digests, which are equally long, and every one of them: time tells nothing.
    if (this.#digests.filter((known) => timingSafeEqual(known, given)).length > 0) return true
    if (this.#pauses >= WRONG_PAUSES_MAX) return false
    this.#pauses += 1
    await pause(this.#wrongPauseMs, undefined, { ref: false })
    this.#pauses -= 1
    return false
  }

  /**
   * Throws unless the request carries one of the tokens (RFC 6750), or the cookie of somebody who signed in. Without
   * tokens, which config.ts allows on loopback alone, only requests to a loopback name pass: a page in somebody's
   * browser could otherwise reach us under a name of its own (DNS rebinding). What a browser sends along by itself
   * counts only where it says that the request is our own page's.
   */
  async check(request: FastifyRequest): Promise<void> {
    if (!this.needsToken) {
      if (!this.#loopbackOnly) return
      if (!isLoopbackName(request.hostname)) {
        throw new TaskRunnerError(
          'host_refused',
          'Without API tokens, only loopback names are served',
        )
      }
      if (isOfAnotherSite(request)) throw refusedSite(request)
      return
    }
    const header = request.headers.authorization
    const cookie = request.cookies[TOKEN_COOKIE]
    if (header === undefined && cookie !== undefined) {
      if (isOfAnotherSite(request)) throw refusedSite(request)
      if (!(await this.knows(cookie))) {
        throw new TaskRunnerError('unauthorized', 'Sign in again')
      }
      return
    }
    const given = /^Bearer ([^\s]+)$/i.exec(header ?? '')?.[1]
    if (given === undefined) throw new TaskRunnerError('unauthorized', 'A bearer token is needed')
    if (!(await this.knows(given))) {
      throw new TaskRunnerError('unauthorized', 'The bearer token is wrong')
    }
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

/** Names both hosts: where a proxy sends a `Host` of its own, our page looks like one of another site. */
function refusedSite({ headers }: FastifyRequest): TaskRunnerError {
  const { origin = 'none', host } = headers
  const what = `Requests of other sites are not served: Origin is ${origin}, and Host is ${host}`
  const how =
    'A proxy has to pass on Host, and the port with it: in nginx, proxy_set_header Host $http_host'
  return new TaskRunnerError('site_refused', `${what.slice(0, 600)}. ${how}`)
}

function digest(token: string): Buffer {
  return createHash('sha256').update(token).digest()
}
