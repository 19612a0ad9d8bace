import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { Agent, type Dispatcher, errors } from 'undici'
import { Deadline } from '../core/deadline.ts'
import type { AttemptResult, CallbackFacts, CallbackSender } from '../core/ports.ts'
import { type AddressGuard, BlockedAddressError } from '../net/address-guard.ts'
import { type CallbackBody, encodeCallback } from '../wire/callback.ts'
import { signer } from '../wire/signature.ts'

/** Maximum bytes read of a response body; then the connection is closed. The status counts. */
const RESPONSE_BYTES_MAX = 64 * 1024

/** A kept-alive connection that fails sooner than this had been closed by the receiver. */
const STALE_MS = 1_000
const CONNECTION_LOST = new Set(['UND_ERR_SOCKET', 'ECONNRESET', 'EPIPE'])

/** https://undici.nodejs.org/#/docs/api/DiagnosticsChannel */
const HEADERS_SENT = 'undici:client:sendHeaders'

export interface SenderOptions {
  /** Timeout of a whole attempt: connect, send the request, receive the response. */
  timeoutMs: number
  userAgent: string
  guard: AddressGuard
  /** Keys that each sign every callback (Standard Webhooks). Empty: callbacks are not signed. */
  signingKeys: readonly Buffer[]
}

/** Sends callbacks as HTTP/1.1 POSTs with one deadline each. Does not follow redirects. */
export class HttpCallbackSender implements CallbackSender {
  readonly #agent: Agent
  readonly #options: SenderOptions
  /** Sockets that have carried a request. */
  readonly #used = new WeakSet<object>()
  /** The request whose headers are sent next. */
  #starting: Exchange | undefined
  /** Notes on which connection a request is sent; undici reports it in no other way. */
  readonly #onHeaders = (message: unknown) => {
    // Safe: undici documents this channel's message.
    const { socket } = message as { socket: object }
    if (this.#starting) {
      this.#starting.isSent = true
      this.#starting.isOnKeptConnection = this.#used.has(socket)
    }
    this.#starting = undefined
    this.#used.add(socket)
  }

  constructor(options: SenderOptions) {
    this.#options = options
    this.#agent = new Agent({
      // No limit of `connections`: an abandoned connect would block later ones. Attempts are
      // limited.
      allowH2: false,
      // A connect cannot be aborted (nodejs/undici#386), so it has a timeout of its own.
      connect: options.guard.connector({ timeoutMs: options.timeoutMs }),
      // A POST fails if the receiver is closing the connection, so idle ones are kept only briefly.
      keepAliveTimeout: 1_000,
      keepAliveMaxTimeout: 1_000,
    })
    subscribe(HEADERS_SENT, this.#onHeaders)
  }

  async send(
    delivery: Parameters<CallbackSender['send']>[0],
    signal: AbortSignal,
  ): Promise<AttemptResult> {
    const refusal = this.#options.guard.refusal(new URL(delivery.url))
    if (refusal !== undefined) return BLOCKED
    using deadline = new Deadline(this.#options.timeoutMs, [signal])
    const posts: Exchange[] = []
    try {
      return await this.#postOnce(delivery, deadline.signal, posts)
    } catch (err) {
      if (err instanceof BlockedAddressError) return MISDIRECTED
      const error = errorText(err, posts.at(-1)?.isSent ?? false)
      return { statusCode: null, error, retryAfterMs: null }
    }
  }

  async close(): Promise<void> {
    unsubscribe(HEADERS_SENT, this.#onHeaders)
    await this.#agent.destroy()
  }

  /**
   * Makes one POST, and a second one only if the receiver had closed a kept-alive connection: the
   * same `webhook-id` makes that safe. Adds each to `posts`.
   */
  async #postOnce(
    delivery: Parameters<CallbackSender['send']>[0],
    signal: AbortSignal,
    posts: Exchange[],
  ): Promise<AttemptResult> {
    const { webhookId: id, timestamp } = delivery
    const signing = signer(this.#options.signingKeys, { id, timestamp })
    const body = await encodeCallback(delivery.payload, (piece) => signing.update(piece))
    const signature = signing.header()
    const startedAt = performance.now()
    const first = this.#post(delivery, { body, signature }, signal)
    posts.push(first)
    try {
      return resultOf(await first.head(), delivery.url)
    } catch (err) {
      const isStale =
        first.isOnKeptConnection &&
        CONNECTION_LOST.has(String((err as NodeJS.ErrnoException).code)) &&
        !isInterimResponse(err) &&
        performance.now() - startedAt <= STALE_MS
      if (!isStale || signal.aborted) throw err
      const second = this.#post(delivery, { body, signature }, signal)
      posts.push(second)
      return resultOf(await second.head(), delivery.url)
    }
  }

  #post(
    delivery: Parameters<CallbackSender['send']>[0],
    { body, signature }: { body: CallbackBody; signature: string },
    signal: AbortSignal,
  ): Exchange {
    signal.throwIfAborted()
    const { timeoutMs, userAgent } = this.#options
    const { webhookId: id, timestamp } = delivery
    const { origin, pathname, search } = new URL(delivery.url)
    const exchange = new Exchange(signal, (starting) => {
      this.#starting = starting
    })
    this.#agent.dispatch(
      {
        origin,
        path: pathname + search,
        method: 'POST',
        body: body.read(),
        headersTimeout: timeoutMs,
        bodyTimeout: timeoutMs,
        headers: {
          'content-type': 'application/json',
          'user-agent': userAgent,
          ...(delivery.token === null ? {} : { authorization: `Bearer ${delivery.token}` }),
          ...(delivery.traceparent === null ? {} : { traceparent: delivery.traceparent }),
          'webhook-id': id,
          'webhook-timestamp': String(timestamp),
          ...factHeaders(delivery.facts),
          'content-length': String(body.length),
          ...(signature === '' ? {} : { 'webhook-signature': signature }),
        },
      },
      exchange,
    )
    return exchange
  }
}

/** Returns the `task-` headers, which are not signed. Those without a value are left out. */
function factHeaders({ status, reason, exitCode, durationMs }: CallbackFacts) {
  return {
    'task-status': status,
    ...(reason === null ? {} : { 'task-reason': reason }),
    ...(exitCode === null ? {} : { 'task-exit-code': String(exitCode) }),
    ...(durationMs === null ? {} : { 'task-duration-ms': String(durationMs) }),
  }
}

type Head = { statusCode: number; headers: Record<string, string | string[] | undefined> }

function resultOf({ statusCode, headers }: Head, url: string): AttemptResult {
  const ok = statusCode >= 200 && statusCode < 300
  return {
    statusCode,
    error: ok
      ? null
      : `the receiver responded with ${statusCode}${redirection(statusCode, headers, url)}`,
    retryAfterMs: retryAfterMs(headers['retry-after'], Date.now()),
  }
}

/** Names only the host of a redirect: paths and queries may hold secrets. */
function redirection(statusCode: number, { location }: Head['headers'], url: string): string {
  if (statusCode < 300 || statusCode > 399 || statusCode === 304) return ''
  const to = typeof location === 'string' ? URL.parse(location, url)?.host : undefined
  return ` (redirects are not followed${to ? `: this one leads to ${to.slice(0, 255)}` : ''})`
}

/** A request and its response. The status decides; errors while the body is read are ignored. */
class Exchange implements Dispatcher.DispatchHandler {
  readonly #signal: AbortSignal
  readonly #onStart: (exchange: Exchange) => void
  readonly #end = Promise.withResolvers<Head>()
  #controller: Dispatcher.DispatchController | undefined
  #head: Head | undefined
  #bytes = 0
  /** Whether the request's headers were sent. */
  isSent = false
  isOnKeptConnection = false

  /** Calls `onStart` when the request is about to be sent. */
  constructor(signal: AbortSignal, onStart: (exchange: Exchange) => void) {
    this.#signal = signal
    this.#onStart = onStart
  }

  /** Returns status and headers. Throws the connection's error, or the signal's reason. */
  async head(): Promise<Head> {
    // A connect cannot be aborted: the signal ends this wait, and the request once it is connected.
    const onAbort = () => {
      this.#controller?.abort(this.#signal.reason)
      this.#settle(this.#signal.reason)
    }
    this.#signal.addEventListener('abort', onAbort)
    try {
      return await this.#end.promise
    } finally {
      this.#signal.removeEventListener('abort', onAbort)
    }
  }

  onRequestStart(controller: Dispatcher.DispatchController): void {
    if (this.#signal.aborted) controller.abort(this.#signal.reason)
    else this.#onStart(this)
    this.#controller = controller
  }

  onResponseStart(
    _: Dispatcher.DispatchController,
    statusCode: number,
    headers: Record<string, string | string[] | undefined>,
  ): void {
    // 1xx statuses precede the response.
    if (statusCode >= 200) this.#head = { statusCode, headers }
  }

  onResponseData(controller: Dispatcher.DispatchController, chunk: Buffer): void {
    this.#bytes += chunk.length
    if (this.#bytes > RESPONSE_BYTES_MAX) controller.abort(new Error('the response is too long'))
  }

  onResponseEnd(): void {
    this.#settle()
  }

  onResponseError(_: Dispatcher.DispatchController, err: Error): void {
    this.#settle(err)
  }

  #settle(err?: unknown): void {
    if (this.#head) this.#end.resolve(this.#head)
    else this.#end.reject(err)
  }
}

/** Result if a name resolves to a blocked address. Retried: a resolver may be wrong for a while. */
const MISDIRECTED: AttemptResult = {
  statusCode: null,
  error: 'blocked: the name resolves to an address that may not be called',
  retryAfterMs: null,
}

/** Result for a URL with a blocked address. It is final. */
const BLOCKED: AttemptResult = {
  statusCode: null,
  error: 'blocked: the address may not be called',
  retryAfterMs: null,
  blocked: true,
}

/** Parses `Retry-After` (RFC 9110, section 10.2.3): seconds, or a date. Ignores anything else. */
export function retryAfterMs(header: string | string[] | undefined, now: number): number | null {
  if (typeof header !== 'string') return null
  if (/^\d{1,10}$/.test(header)) return Number(header) * 1000
  // Only an IMF-fixdate: Date.parse would read "-5" and "1.5" as dates.
  if (!/^[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT$/.test(header)) return null
  const at = Date.parse(header)
  return Number.isNaN(at) ? null : Math.max(0, at - now)
}

/** Returns whether undici rejected a `100 Continue` that it did not request. */
function isInterimResponse(err: unknown): boolean {
  return err instanceof errors.SocketError && err.message === 'bad response'
}

/** Describes an error without details, so that callbacks cannot be used to scan ports. */
function errorText(err: unknown, isSent: boolean): string {
  // Safe: both fields are read as `unknown`.
  const { code, name } = (err ?? {}) as { code?: unknown; name?: unknown }
  if (
    name === 'TimeoutError' ||
    code === 'UND_ERR_HEADERS_TIMEOUT' ||
    code === 'UND_ERR_CONNECT_TIMEOUT'
  ) {
    return 'no response in time'
  }
  if (isInterimResponse(err)) return 'an interim response that was not requested'
  if (code === 'ENOTFOUND' || code === 'EAI_AGAIN' || code === 'ETIMEOUT') {
    return 'the name could not be resolved'
  }
  if (typeof code === 'string' && /CERT|SSL|TLS|VERIFY/.test(code))
    return 'no trusted TLS connection'
  // A receiver that responds early and closes may reset the connection before its response is read.
  return isSent || code === 'UND_ERR_SOCKET'
    ? 'the connection ended without a response'
    : 'no connection'
}
