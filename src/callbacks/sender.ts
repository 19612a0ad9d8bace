import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { Agent, type Dispatcher, errors } from 'undici'
import { Deadline } from '../core/deadline.ts'
import type { AttemptResult, CallbackFacts, CallbackSender } from '../core/ports.ts'
import { type CallbackBody, encodeCallback } from '../wire/callback.ts'
import { signer } from '../wire/signature.ts'
import { type AddressGuard, BlockedAddressError } from './address-guard.ts'

/** Of the answer; a receiver that sends more loses its connection, not its status. */
const ANSWER_BYTES_MAX = 64 * 1024

/** A connection that was kept open and fails sooner than this was closed by the receiver meanwhile. */
const STALE_MS = 1_000
const CONNECTION_LOST = new Set(['UND_ERR_SOCKET', 'ECONNRESET', 'EPIPE'])

/** https://undici.nodejs.org/#/docs/api/DiagnosticsChannel */
const HEADERS_SENT = 'undici:client:sendHeaders'

export interface SenderOptions {
  /** One whole attempt: connect, send, answer. */
  timeoutMs: number
  userAgent: string
  guard: AddressGuard
  /** Each signs every callback (Standard Webhooks); none: no signature. */
  signingKeys: readonly Buffer[]
}

/** Sends callbacks: plain HTTP/1.1 POSTs, no redirects, each under one deadline. */
export class HttpCallbackSender implements CallbackSender {
  readonly #agent: Agent
  readonly #options: SenderOptions
  /** Connections that carried a request before. */
  readonly #used = new WeakSet<object>()
  /** The request whose head is being written. */
  #beginning: Answer | undefined
  /** Nothing else tells which connection a request goes out on. */
  readonly #onHeaders = (message: unknown) => {
    // Holds: undici's documentation of this channel.
    const { socket } = message as { socket: object }
    if (this.#beginning) {
      this.#beginning.isBegun = true
      this.#beginning.isOnKeptConnection = this.#used.has(socket)
    }
    this.#beginning = undefined
    this.#used.add(socket)
  }

  constructor(options: SenderOptions) {
    this.#options = options
    this.#agent = new Agent({
      // No limit of `connections`: what was given up while it connects would wait for one before others. Attempts are limited.
      allowH2: false,
      // Nothing aborts a connection that is being made (nodejs/undici#386): this ends what is left behind.
      connect: options.guard.connector({ timeoutMs: options.timeoutMs }),
      // A POST on a connection that the receiver is just closing fails: keep idle ones only briefly.
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
    const posts: Answer[] = []
    try {
      return await this.#postOnce(delivery, deadline.signal, posts)
    } catch (err) {
      if (err instanceof BlockedAddressError) return MISDIRECTED
      const error = coarse(err, posts.at(-1)?.isBegun ?? false)
      return { statusCode: null, error, retryAfterMs: null }
    }
  }

  async close(): Promise<void> {
    unsubscribe(HEADERS_SENT, this.#onHeaders)
    await this.#agent.destroy()
  }

  /**
   * Makes one POST. Repeats it at once only when a kept connection turned out to be closed by the
   * receiver: the same `webhook-id` makes that safe. What was posted is added to `posts`.
   */
  async #postOnce(
    delivery: Parameters<CallbackSender['send']>[0],
    signal: AbortSignal,
    posts: Answer[],
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
        !isInterimAnswer(err) &&
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
  ): Answer {
    signal.throwIfAborted()
    const { timeoutMs, userAgent } = this.#options
    const { webhookId: id, timestamp } = delivery
    const { origin, pathname, search } = new URL(delivery.url)
    const answer = new Answer(signal, (begun) => {
      this.#beginning = begun
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
      answer,
    )
    return answer
  }
}

/** They are not signed. What the task does not have is left out. */
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
      : `the receiver answered ${statusCode}${redirection(statusCode, headers, url)}`,
    retryAfterMs: retryAfterMs(headers['retry-after'], Date.now()),
  }
}

/** Names the host alone: paths and queries hold secrets. */
function redirection(statusCode: number, { location }: Head['headers'], url: string): string {
  if (statusCode < 300 || statusCode > 399 || statusCode === 304) return ''
  const to = typeof location === 'string' ? URL.parse(location, url)?.host : undefined
  return ` (redirects are not followed${to ? `: this one leads to ${to.slice(0, 255)}` : ''})`
}

/** Hears an answer to its end, or to its limit. Its status decides; what a broken one did after that does not matter. */
class Answer implements Dispatcher.DispatchHandler {
  readonly #signal: AbortSignal
  readonly #onBegin: (answer: Answer) => void
  readonly #end = Promise.withResolvers<Head>()
  #controller: Dispatcher.DispatchController | undefined
  #head: Head | undefined
  #bytes = 0
  /** Its head was sent. */
  isBegun = false
  isOnKeptConnection = false

  /** `onBegin` is called when its request is about to be sent. */
  constructor(signal: AbortSignal, onBegin: (answer: Answer) => void) {
    this.#signal = signal
    this.#onBegin = onBegin
  }

  /** Throws what ended the connection before there was a status, or the signal's reason. */
  async head(): Promise<Head> {
    // While it connects there is nothing to abort: then the signal ends the waiting, and the request at its start.
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
    else this.#onBegin(this)
    this.#controller = controller
  }

  onResponseStart(
    _: Dispatcher.DispatchController,
    statusCode: number,
    headers: Record<string, string | string[] | undefined>,
  ): void {
    // Others announce an answer.
    if (statusCode >= 200) this.#head = { statusCode, headers }
  }

  onResponseData(controller: Dispatcher.DispatchController, chunk: Buffer): void {
    this.#bytes += chunk.length
    if (this.#bytes > ANSWER_BYTES_MAX) controller.abort(new Error('the answer is too long'))
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

/** A resolver may answer wrongly for a while, as those of hotels and ad blockers do: tried again. */
const MISDIRECTED: AttemptResult = {
  statusCode: null,
  error: 'blocked: the name leads to an address that may not be called',
  retryAfterMs: null,
}

/** Final: the URL names the address. */
const BLOCKED: AttemptResult = {
  statusCode: null,
  error: 'blocked: the address may not be called',
  retryAfterMs: null,
  blocked: true,
}

/** RFC 9110, section 10.2.3: seconds, or a date. Anything else is ignored. */
export function retryAfterMs(header: string | string[] | undefined, now: number): number | null {
  if (typeof header !== 'string') return null
  if (/^\d{1,10}$/.test(header)) return Number(header) * 1000
  // IMF-fixdate alone: Date.parse takes "-5" and "1.5" for dates.
  if (!/^[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT$/.test(header)) return null
  const at = Date.parse(header)
  return Number.isNaN(at) ? null : Math.max(0, at - now)
}

/** undici takes no `100 Continue` that it did not ask for. */
function isInterimAnswer(err: unknown): boolean {
  return err instanceof errors.SocketError && err.message === 'bad response'
}

/** What went wrong, without the addresses and the fine distinctions that would make a port scanner of us. */
function coarse(err: unknown, isBegun: boolean): string {
  // Holds: `code` is read as a value of any type.
  const { code, name } = (err ?? {}) as { code?: unknown; name?: unknown }
  if (
    name === 'TimeoutError' ||
    code === 'UND_ERR_HEADERS_TIMEOUT' ||
    code === 'UND_ERR_CONNECT_TIMEOUT'
  ) {
    return 'no answer in time'
  }
  if (isInterimAnswer(err)) return 'an interim answer came that was not asked for'
  if (code === 'ENOTFOUND' || code === 'EAI_AGAIN' || code === 'ETIMEOUT') {
    return 'the name could not be resolved'
  }
  if (typeof code === 'string' && /CERT|SSL|TLS|VERIFY/.test(code))
    return 'no trusted TLS connection'
  // One that answers early and closes may reset the connection before its answer is read.
  return isBegun || code === 'UND_ERR_SOCKET'
    ? 'the connection ended without an answer'
    : 'no connection'
}
