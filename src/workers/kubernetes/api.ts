import type { RequestOptions } from 'node:https'
import type { Readable } from 'node:stream'
import { setTimeout as pause } from 'node:timers/promises'
import type { KubeConfig } from '@kubernetes/client-node'
import { Pool } from 'undici'
import { Deadline } from '../../core/deadline.ts'
import { UnavailableError } from '../../core/errors.ts'
import { until } from '../../core/until.ts'
import { ApiError, ApiUnavailableError, FAILURES, failureOf } from './failures.ts'

/** Maximum milliseconds until an answer. What creates objects may wait for several webhooks. */
const READ_TIMEOUT_MS = 10_000
const WRITE_TIMEOUT_MS = 30_000
/** Credentials are read anew so often: tokens of pods are rotated on disk. */
const CREDENTIALS_MS = 30_000
/** Towards the API server, as other controllers do (the defaults of client-go's rest config are 5 and 10). */
const CALLS_PER_SECOND = 20
const CALLS_AT_ONCE = 30
/** Longest wait within one call for an API server that is busy. */
const BUSY_MS_MAX = 8_000
const RETRY_AFTER_MS_MAX = 30_000
const METADATA_ONLY = 'application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1'

export interface ApiCall {
  query?: Record<string, string | number>
  body?: object
  /** Few, and others wait for what it tells: it does not wait its turn. */
  isUrgent?: boolean
  /** Asks for the metadata of objects alone. */
  isMetadataOnly?: boolean
  /** What the answer is to be, such as `JobList`. Default: any object. */
  answer?: string
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
  readonly #callMs: number | undefined
  readonly #closed = new AbortController()
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
    options: {
      callsPerSecond?: number
      callsAtOnce?: number
      /** Maximum milliseconds of a plain call. Default: 10 s, and 30 s for what creates objects. */
      callMs?: number
      now?: () => number
    } = {},
  ) {
    this.#load = load
    this.#config = load()
    this.#now = options.now ?? Date.now
    this.#callsPerSecond = options.callsPerSecond ?? CALLS_PER_SECOND
    this.#callsAtOnce = options.callsAtOnce ?? CALLS_AT_ONCE
    this.#callMs = options.callMs
    this.#tokens = this.#callsAtOnce
    this.#refilledAt = this.#now()
  }

  get config(): KubeConfig {
    return this.#config
  }

  /**
   * Throws `ApiError`, `ApiUnavailableError`, or the reason of `signal`. Ends by itself. 429 is waited out as it asks for,
   * as long as that is short.
   */
  async json<T>(method: Method, path: string, call: ApiCall = {}): Promise<T> {
    const others = [this.#closed.signal, ...(call.signal ? [call.signal] : [])]
    let busyMs = 0
    let isNewToken = false
    for (;;) {
      // Before the clock starts: in a rush the turn alone may take longer than a call.
      await this.#token(call)
      const callMs = this.#callMs ?? (method === 'GET' ? READ_TIMEOUT_MS : WRITE_TIMEOUT_MS)
      using deadline = new Deadline(callMs, others)
      const { signal } = deadline
      const response = await this.#request(method, path, { ...call, signal })
      const text = await textOf(response.body, signal)
      const { statusCode } = response
      if (statusCode < 400) return answerOf<T>(text, statusCode, call.answer)
      const asked = Number(response.headers['retry-after'] ?? 1) * 1000
      const waitMs = Math.min(asked || 1000, RETRY_AFTER_MS_MAX) * (1 + Math.random() / 2)
      busyMs += waitMs
      if (statusCode === 429 && busyMs <= BUSY_MS_MAX) {
        await pause(waitMs, undefined, call.signal && { signal: call.signal })
        continue
      }
      const isRefused = statusCode === 401
      if (isRefused) this.#reload()
      if (!isRefused || isNewToken)
        throw failureOf(statusCode, text, statusCode === 429 ? waitMs : 0)
      isNewToken = true
    }
  }

  /** Removes the very object, and no other of its name. That it is gone already is no failure. */
  async remove(path: string, uid: string): Promise<void> {
    try {
      await this.json('DELETE', path, {
        body: {
          ...{ apiVersion: 'v1', kind: 'DeleteOptions' },
          // The default of Jobs leaves their pods behind.
          propagationPolicy: 'Background',
          preconditions: { uid },
        },
      })
    } catch (err) {
      // Gone, or another by now.
      if (!(err instanceof ApiError && FAILURES[err.kind] === 'lost')) throw err
    }
  }

  /** An answer as it comes. Its reader has to expect that it is cut, or never begins. */
  async stream(path: string, call: ApiCall & { type: 'json' | 'text' }): Promise<Readable> {
    await this.#token(call)
    const response = await this.#request('GET', path, call)
    const { statusCode, headers, body } = response
    const isJson = String(headers['content-type'] ?? '').startsWith('application/json')
    if (statusCode < 400 && (call.type === 'text' || isJson)) return body
    if (statusCode < 400) {
      body.on('error', () => {}).destroy()
      throw garbage(statusCode, 'a stream of JSON')
    }
    const text = await textOf(body, call.signal)
    if (statusCode === 401) this.#reload()
    throw failureOf(statusCode, text)
  }

  /** Ends what is under way. */
  async close(): Promise<void> {
    this.#closed.abort(new UnavailableError('The Kubernetes backend is closed'))
    await this.#pool?.destroy()
  }

  async #request(
    method: Method,
    path: string,
    { query = {}, body, isMetadataOnly, signal }: ApiCall,
  ) {
    const search = Object.entries(query).map(([name, value]) => [name, String(value)])
    try {
      const authenticated = this.#authenticated()
      // It may ask an identity provider.
      const pool = await (signal ? until(authenticated, signal) : authenticated)
      return await pool.request({
        method,
        path: search.length > 0 ? `${path}?${new URLSearchParams(search)}` : path,
        headers: {
          ...this.#headers,
          accept: isMetadataOnly ? METADATA_ONLY : 'application/json',
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
    try {
      await this.#config.applyToHTTPSOptions(options)
    } catch (err) {
      const message = `The credentials of the kubeconfig cannot be used (${wordsOf(err)})`
      throw new ApiUnavailableError('credentials', message, { cause: err })
    }
    this.#closed.signal.throwIfAborted()
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
  if (err instanceof UnavailableError) return err
  const isTimeout = signal?.reason instanceof DOMException && signal.reason.name === 'TimeoutError'
  if (signal?.aborted && !isTimeout) return signal.reason
  const why = isTimeout ? 'in time' : `(${wordsOf(err)})`
  const message = `The Kubernetes API does not answer ${why}`
  return new ApiUnavailableError(isTimeout ? 'timed_out' : 'unreachable', message, { cause: err })
}

function wordsOf(err: unknown): string {
  const { code } = err as NodeJS.ErrnoException
  return code ?? (err instanceof Error ? err.message : String(err))
}

/** Throws where a proxy or another server has answered. */
function answerOf<T>(text: string, status: number, wanted: string | undefined): T {
  let parsed: { kind?: unknown; metadata?: unknown; items?: unknown } | null = null
  try {
    parsed = JSON.parse(text)
  } catch {
    // Told below.
  }
  const isWanted = wanted === undefined ? true : parsed?.kind === wanted
  const isList = wanted?.endsWith('List') ?? false
  const isWhole = parsed?.metadata instanceof Object && (!isList || Array.isArray(parsed.items))
  if (!isWanted || !isWhole) throw garbage(status, wanted ?? 'an object')
  // Holds as far as it was looked at; what is read of it is optional in its type.
  return parsed as T
}

function garbage(status: number, wanted: string): ApiUnavailableError {
  const message = `The Kubernetes API answered with status ${status}, and not with ${wanted}: does a proxy answer in its place?`
  return new ApiUnavailableError('garbage', message)
}
