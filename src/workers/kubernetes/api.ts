import type { RequestOptions } from 'node:https'
import type { Readable } from 'node:stream'
import { setTimeout as pause } from 'node:timers/promises'
import type { KubeConfig } from '@kubernetes/client-node'
import { Pool } from 'undici'
import { Deadline } from '../../core/deadline.ts'

const CALL_TIMEOUT_MS = 30_000
/** Credentials are read anew so often: tokens of pods are rotated on disk. */
const CREDENTIALS_MS = 30_000
/** Towards the API server, as other controllers do (the defaults of client-go's rest config are 5 and 10). */
const CALLS_PER_SECOND = 20
const CALLS_AT_ONCE = 30
const RETRIES_MAX = 5
const RETRY_AFTER_MS_MAX = 30_000

/** The API server refused. `reason` and `message` are its own (meta/v1 Status). */
export class ApiError extends Error {
  override name = 'ApiError'
  readonly status: number
  readonly reason: string

  constructor(status: number, reason: string, message: string) {
    super(message)
    this.status = status
    this.reason = reason
  }
}

/** The API server does not answer, or not at the moment: nothing is known about its objects. */
export class ApiUnreachableError extends Error {
  override name = 'ApiUnreachableError'
}

export interface ApiCall {
  query?: Record<string, string | number>
  body?: object
  /** Few, and others wait for what it tells: it does not wait its turn. */
  isUrgent?: boolean
  signal?: AbortSignal | undefined
}

type Method = 'GET' | 'POST' | 'DELETE'

/**
 * Plain calls to the API server. Credentials are client-node's business; its calls are not used, since they drop
 * fields they do not know, and its streams end the process when a connection is cut.
 */
export class KubernetesApi {
  readonly #load: () => KubeConfig
  readonly #now: () => number
  readonly #callsPerSecond: number
  readonly #callsAtOnce: number
  #config: KubeConfig
  #pool: Pool | undefined
  /** What the pool was made for. */
  #poolKey = ''
  #headers: Record<string, string> = {}
  #credentialsUntil = 0
  #tokens: number
  #refilledAt: number

  /** `load` is called again when the credentials are refused: they may have been replaced. */
  constructor(
    load: () => KubeConfig,
    options: { callsPerSecond?: number; callsAtOnce?: number; now?: () => number } = {},
  ) {
    this.#load = load
    this.#config = load()
    this.#now = options.now ?? Date.now
    this.#callsPerSecond = options.callsPerSecond ?? CALLS_PER_SECOND
    this.#callsAtOnce = options.callsAtOnce ?? CALLS_AT_ONCE
    this.#tokens = this.#callsAtOnce
    this.#refilledAt = this.#now()
  }

  get config(): KubeConfig {
    return this.#config
  }

  /** Throws `ApiError`, `ApiUnreachableError`, or the reason of `signal`. 429 is waited out, as it asks for. */
  async json<T>(method: Method, path: string, call: ApiCall = {}): Promise<T> {
    for (let attempt = 1; ; attempt += 1) {
      // Before the clock starts: in a rush the turn alone may take longer than a call.
      await this.#token(call)
      using deadline = new Deadline(CALL_TIMEOUT_MS, call.signal ? [call.signal] : [])
      const { signal } = deadline
      const response = await this.#request(method, path, { ...call, signal })
      const text = await textOf(response.body, call.signal)
      if (response.statusCode < 400) return JSON.parse(text) as T
      const isBusy = response.statusCode === 429
      if (response.statusCode === 401) this.#reload()
      const isWorthIt = isBusy || (response.statusCode === 401 && attempt === 1)
      if (!isWorthIt || attempt > RETRIES_MAX) throw errorOf(response.statusCode, text)
      if (isBusy) {
        const asked = Number(response.headers['retry-after'] ?? 1) * 1000
        const waitMs = Math.min(asked || 1000, RETRY_AFTER_MS_MAX) * (1 + Math.random() / 2)
        await pause(waitMs, undefined, call.signal && { signal: call.signal })
      }
    }
  }

  /** An answer as it comes. Its reader has to expect that it is cut. */
  async stream(path: string, call: ApiCall = {}): Promise<Readable> {
    await this.#token(call)
    const response = await this.#request('GET', path, call)
    if (response.statusCode < 400) return response.body
    const text = await textOf(response.body, call.signal)
    if (response.statusCode === 401) this.#reload()
    throw errorOf(response.statusCode, text)
  }

  async close(): Promise<void> {
    await this.#pool?.destroy()
  }

  async #request(method: Method, path: string, { query = {}, body, signal }: ApiCall) {
    const search = Object.entries(query).map(([name, value]) => [name, String(value)])
    try {
      const pool = await this.#authenticated()
      return await pool.request({
        method,
        path: search.length > 0 ? `${path}?${new URLSearchParams(search)}` : path,
        headers: {
          ...this.#headers,
          accept: 'application/json',
          'user-agent': 'task-runner',
          ...(body === undefined ? {} : { 'content-type': 'application/json' }),
        },
        body: body === undefined ? null : JSON.stringify(body),
        ...(signal ? { signal } : {}),
      })
    } catch (err) {
      throw unreachable(err, signal)
    }
  }

  async #authenticated(): Promise<Pool> {
    if (this.#pool && this.#now() < this.#credentialsUntil) return this.#pool
    const options: RequestOptions = {}
    await this.#config.applyToHTTPSOptions(options)
    const { ca, cert, key, rejectUnauthorized, servername, auth, headers } = options
    this.#headers = {
      ...(auth ? { authorization: `Basic ${Buffer.from(auth).toString('base64')}` } : {}),
      ...Object.fromEntries(
        Object.entries(headers ?? {}).map(([name, value]) => [name.toLowerCase(), String(value)]),
      ),
    }
    this.#credentialsUntil = this.#now() + CREDENTIALS_MS
    const given = { ca, cert, key, rejectUnauthorized, servername }
    const connect = Object.fromEntries(
      Object.entries(given).filter(([, value]) => value !== undefined && value !== null),
    )
    const server = this.#config.getCurrentCluster()?.server ?? ''
    const poolKey = JSON.stringify([server, connect])
    if (this.#pool && poolKey === this.#poolKey) return this.#pool
    // What is under way over the old one may end.
    void this.#pool?.close()
    this.#poolKey = poolKey
    // Streams are silent for as long as tasks and clusters are.
    this.#pool = new Pool(server, {
      ...{ headersTimeout: 0, bodyTimeout: 0, allowH2: false },
      connect: { ...connect, timeout: 10_000 },
    })
    return this.#pool
  }

  #reload(): void {
    this.#credentialsUntil = 0
    try {
      this.#config = this.#load()
    } catch {
      // Half written, as may be: the next refusal is not far.
    }
  }

  /** A bucket of calls: many tasks at once must not overrun the API server. */
  async #token({ signal, isUrgent }: ApiCall): Promise<void> {
    const now = this.#now()
    const refilled = ((now - this.#refilledAt) / 1000) * this.#callsPerSecond
    this.#tokens = Math.min(this.#callsAtOnce, this.#tokens + refilled) - 1
    this.#refilledAt = now
    if (this.#tokens >= 0 || isUrgent) return
    await pause((-this.#tokens / this.#callsPerSecond) * 1000, undefined, signal && { signal })
  }
}

async function textOf(body: Readable, signal: AbortSignal | undefined): Promise<string> {
  try {
    const chunks: Buffer[] = []
    for await (const chunk of body) chunks.push(chunk)
    return Buffer.concat(chunks).toString()
  } catch (err) {
    throw unreachable(err, signal)
  }
}

function unreachable(err: unknown, signal: AbortSignal | undefined): unknown {
  if (
    signal?.aborted &&
    !(signal.reason instanceof DOMException && signal.reason.name === 'TimeoutError')
  ) {
    return signal.reason
  }
  const { code } = err as NodeJS.ErrnoException
  const why = code ?? (err instanceof Error ? err.message : String(err))
  return new ApiUnreachableError(`The Kubernetes API does not answer (${why})`, { cause: err })
}

/** What an answer of 400 and more means. Proxies in between answer with HTML. */
function errorOf(status: number, text: string): Error {
  let reason = ''
  let message = `The Kubernetes API answered with status ${status}`
  try {
    const parsed = JSON.parse(text) as { reason?: string; message?: string }
    reason = parsed.reason ?? ''
    message = parsed.message ?? message
  } catch {
    // Not the API server's own words.
  }
  // It will answer otherwise when it has recovered, or our credentials have.
  if (status >= 500 || status === 401 || status === 429) return new ApiUnreachableError(message)
  return new ApiError(status, reason, message)
}
