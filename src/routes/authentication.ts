import { createHash, timingSafeEqual } from 'node:crypto'
import { setTimeout as pause } from 'node:timers/promises'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import { TaskRunnerError } from '../core/errors.ts'
import { isLoopbackName } from '../core/loopback.ts'

/** Cookie with the token of a browser that signed in; session.ts sets it. */
export const TOKEN_COOKIE = 'task_runner_token'

const WRONG_PAUSE_MS = 250
/** Maximum responses delayed at a time: each keeps a connection and its request in memory. */
const WRONG_PAUSES_MAX = 2_000

/** Decides which requests are allowed. */
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

  /** Whether requests need a token. If not, every client may do everything. */
  get needsToken(): boolean {
    return this.#digests.length > 0
  }

  /**
   * Returns whether a token is valid; for an invalid one after a delay, which slows down guessing.
   * Valid tokens are never delayed, not even by invalid ones from the same address, which many
   * people may share. When too many responses are delayed already, further ones are not.
   */
  async knows(token: string): Promise<boolean> {
    const given = digest(token)
    // Compares all digests, which have the same length: the time taken reveals nothing.
    if (this.#digests.filter((known) => timingSafeEqual(known, given)).length > 0) return true
    if (this.#pauses >= WRONG_PAUSES_MAX) return false
    this.#pauses += 1
    await pause(this.#wrongPauseMs, undefined, { ref: false })
    this.#pauses -= 1
    return false
  }

  /**
   * Throws unless the request has one of the tokens (RFC 6750) or the cookie of a browser that
   * signed in. Without tokens, which config.ts allows on loopback only, the request must name a
   * loopback host: otherwise a web page could reach the service under its own host name (DNS
   * rebinding). With the cookie, or without tokens, requests of other sites are refused (CSRF).
   */
  async check(request: FastifyRequest): Promise<void> {
    if (!this.needsToken) {
      if (!this.#loopbackOnly) return
      if (!isLoopbackName(request.hostname)) {
        throw new TaskRunnerError(
          'host_refused',
          'Without API_TOKENS, only requests to a loopback host name are accepted',
        )
      }
      if (isCrossSite(request)) throw siteRefused(request)
      return
    }
    const header = request.headers.authorization
    const cookie = request.cookies[TOKEN_COOKIE]
    if (header === undefined && cookie !== undefined) {
      if (isCrossSite(request)) throw siteRefused(request)
      if (!(await this.knows(cookie))) {
        throw new TaskRunnerError('unauthorized', 'Sign in again')
      }
      return
    }
    const given = /^Bearer ([^\s]+)$/i.exec(header ?? '')?.[1]
    if (given === undefined) {
      const message = 'A token is required: send Authorization: Bearer <token>'
      throw new TaskRunnerError('unauthorized', message)
    }
    if (!(await this.knows(given))) {
      throw new TaskRunnerError('unauthorized', 'The bearer token is invalid')
    }
  }
}

export function requireToken(app: FastifyInstance, authentication: Authentication): void {
  app.addHook('onRequest', async (request) => authentication.check(request))
}

/**
 * Returns whether a browser sent the request for a page of another site. Browsers leave out
 * `Sec-Fetch-Site` over plain HTTP, except on loopback; then `Origin` decides.
 * https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Sec-Fetch-Site
 */
function isCrossSite({ headers }: FastifyRequest): boolean {
  const site = headers['sec-fetch-site']
  if (site !== undefined) return site !== 'same-origin' && site !== 'none'
  const { origin } = headers
  return origin !== undefined && (!URL.canParse(origin) || new URL(origin).host !== headers.host)
}

/** Names both hosts: behind a proxy that changes `Host`, our own page looks like another site. */
function siteRefused({ headers }: FastifyRequest): TaskRunnerError {
  const { origin = 'none', host } = headers
  const what = `Requests from other sites are refused: Origin is ${origin}, but Host is ${host}`
  const how =
    'A proxy must pass Host unchanged, including the port: in nginx, proxy_set_header Host $http_host'
  return new TaskRunnerError('site_refused', `${what.slice(0, 600)}. ${how}`)
}

function digest(token: string): Buffer {
  return createHash('sha256').update(token).digest()
}
