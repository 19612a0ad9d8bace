import type { RequestOptions } from 'node:https'
import type { Readable } from 'node:stream'
import { setTimeout as pause } from 'node:timers/promises'
import type { KubeConfig } from '@kubernetes/client-node'
import { Pool } from 'undici'
import { Deadline } from '../../core/deadline.ts'
import { UnavailableError } from '../../core/errors.ts'
import { until } from '../../core/until.ts'
import { ApiError, ApiUnavailableError, FAILURES, failureOf } from './failures.ts'

/** Time limits of a call. Creating an object may take long, since webhooks are called. */
const READ_TIMEOUT_MS = 10_000
const WRITE_TIMEOUT_MS = 30_000
/** Interval for reading the credentials again: the tokens of pods are rotated on disk. */
const CREDENTIALS_MS = 30_000
/** Rate limit and burst of all calls; the defaults of client-go are 5 and 10. */
const CALLS_PER_SECOND = 20
const CALLS_AT_ONCE = 30
/** Maximum total wait within one call for a busy API server. */
const BUSY_MS_MAX = 8_000
const RETRY_AFTER_MS_MAX = 30_000
const METADATA_ONLY = 'application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1'

export interface ApiCall {
  query?: Record<string, string | number>
  body?: object
  /** Whether the call is exempt from the rate limit: it is rare, and other work waits for it. */
  isUrgent?: boolean
  /** Whether to request only the metadata of objects. */
  isMetadataOnly?: boolean
  /** Expected kind of the answer, such as `JobList`. Default: any object. */
  answer?: string
  signal?: AbortSignal | undefined
}

type Method = 'GET' | 'POST' | 'DELETE'

/**
 * Client of the API server. It uses client-node only for credentials: that library's calls drop
 * unknown fields, and its streams crash the process when a connection is cut.
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
  /** Server and TLS options of the pool. */
  #poolKey = ''
  #headers: Record<string, string> = {}
  #credentialsUntil = 0
  #tokens: number
  #refilledAt: number

  /** `load` is called again after a 401, since the credentials may have been replaced. */
  constructor(
    load: () => KubeConfig,
    options: {
      callsPerSecond?: number
      callsAtOnce?: number
      /** Maximum milliseconds of a call to `json`. Default: 10 s to read, 30 s to write. */
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
   * Makes one call, within a time limit; honours a short `retry-after` of a 429. Throws `ApiError`,
   * `ApiUnavailableError`, or the reason of `signal`.
   */
  async json<T>(method: Method, path: string, call: ApiCall = {}): Promise<T> {
    const others = [this.#closed.signal, ...(call.signal ? [call.signal] : [])]
    let busyMs = 0
    let isNewToken = false
    for (;;) {
      // The time limit does not include the wait for a token.
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
      const isUnauthorized = statusCode === 401
      if (isUnauthorized) this.#reload()
      if (!isUnauthorized || isNewToken)
        throw failureOf(statusCode, text, statusCode === 429 ? waitMs : 0)
      isNewToken = true
    }
  }

  /** Removes the object with this uid. Does nothing if it is gone or was replaced. */
  async remove(path: string, uid: string): Promise<void> {
    try {
      await this.json('DELETE', path, {
        body: {
          apiVersion: 'v1',
          kind: 'DeleteOptions',
          // The default for Jobs leaves their pods behind.
          propagationPolicy: 'Background',
          preconditions: { uid },
        },
      })
    } catch (err) {
      if (!(err instanceof ApiError && FAILURES[err.kind] === 'lost')) throw err
    }
  }

  /** Returns an answer as a stream, which may be cut at any point. */
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

  /** Aborts all calls. */
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
      // Loading credentials may call an identity provider.
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
    // Calls under way on the old pool may finish.
    void this.#pool?.close()
    this.#poolKey = poolKey
    // No timeouts: streams may be silent for long.
    this.#pool = new Pool(server, {
      headersTimeout: 0,
      bodyTimeout: 0,
      allowH2: false,
      connect: { ...connect, timeout: 10_000 },
    })
    return this.#pool
  }

  #reload(): void {
    this.#credentialsUntil = 0
    try {
      this.#config = this.#load()
    } catch {
      // The file may be half written; the next 401 reads it again.
    }
  }

  /** Waits for a token of the bucket that limits the rate of calls. */
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

/** Parses an answer. Throws if it came from a proxy or another server. */
function answerOf<T>(text: string, status: number, wanted: string | undefined): T {
  let parsed: { kind?: unknown; metadata?: unknown; items?: unknown } | null = null
  try {
    parsed = JSON.parse(text)
  } catch {
    // Rejected below.
  }
  const isWanted = wanted === undefined ? true : parsed?.kind === wanted
  const isList = wanted?.endsWith('List') ?? false
  const isWhole = parsed?.metadata instanceof Object && (!isList || Array.isArray(parsed.items))
  if (!isWanted || !isWhole) throw garbage(status, wanted ?? 'an object')
  // Safe: the kind was checked, and the fields of these types are optional.
  return parsed as T
}

function garbage(status: number, wanted: string): ApiUnavailableError {
  const message = `The Kubernetes API answered with status ${status}, but not with ${wanted}: is there a proxy in front of it?`
  return new ApiUnavailableError('garbage', message)
}
