import { Agent, request } from 'undici'
import type { AttemptResult, CallbackSender } from '../core/ports.ts'
import { encodeCallback } from '../wire/callback.ts'
import { signatures } from '../wire/signature.ts'
import { type AddressGuard, BlockedAddressError } from './address-guard.ts'

/** Of the answer; a receiver that sends more loses its connection, not its status. */
const ANSWER_BYTES_MAX = 64 * 1024
const CONNECTIONS_PER_ORIGIN = 16

/** A connection that was kept open and fails sooner than this was closed by the receiver meanwhile. */
const STALE_MS = 1_000
const CONNECTION_LOST = new Set(['UND_ERR_SOCKET', 'ECONNRESET', 'EPIPE'])

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

  constructor(options: SenderOptions) {
    this.#options = options
    this.#agent = new Agent({
      allowH2: false,
      connections: CONNECTIONS_PER_ORIGIN,
      // undici honours no abort signal while it connects (nodejs/undici#386): this ends what is left behind.
      connect: options.guard.connector({ timeoutMs: options.timeoutMs }),
      // A POST on a connection that the receiver is just closing fails: keep idle ones only briefly.
      keepAliveTimeout: 1_000,
      keepAliveMaxTimeout: 1_000,
    })
  }

  async send(
    delivery: Parameters<CallbackSender['send']>[0],
    signal: AbortSignal,
  ): Promise<AttemptResult> {
    const refusal = this.#options.guard.refusal(new URL(delivery.url))
    if (refusal !== undefined) return BLOCKED
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(this.#options.timeoutMs)])
    const overdue = Promise.withResolvers<never>()
    // A turn later: an attempt that has its status already still gets to tell it.
    const onOverdue = () => setImmediate(() => overdue.reject(deadline.reason))
    deadline.addEventListener('abort', onOverdue)
    if (deadline.aborted) onOverdue()
    try {
      return await Promise.race([this.#postOnce(delivery, deadline), overdue.promise])
    } catch (err) {
      if (err instanceof BlockedAddressError) return BLOCKED
      return { statusCode: null, error: coarse(err), retryAfterMs: null }
    } finally {
      deadline.removeEventListener('abort', onOverdue)
    }
  }

  async close(): Promise<void> {
    await this.#agent.destroy()
  }

  /** Once, and again at once when the connection turned out to be closed: the same `webhook-id` makes that safe. */
  async #postOnce(
    delivery: Parameters<CallbackSender['send']>[0],
    signal: AbortSignal,
  ): Promise<AttemptResult> {
    const body = await encodeCallback(delivery.payload)
    const startedAt = performance.now()
    try {
      return await this.#post(delivery, body, signal)
    } catch (err) {
      const lost = CONNECTION_LOST.has(String((err as NodeJS.ErrnoException).code))
      if (!lost || signal.aborted || performance.now() - startedAt > STALE_MS) throw err
      return await this.#post(delivery, body, signal)
    }
  }

  async #post(
    delivery: Parameters<CallbackSender['send']>[0],
    body: Buffer,
    signal: AbortSignal,
  ): Promise<AttemptResult> {
    const { timeoutMs, userAgent, signingKeys } = this.#options
    const { webhookId: id, timestamp } = delivery
    const answer = await request(delivery.url, {
      dispatcher: this.#agent,
      method: 'POST',
      body,
      signal,
      headersTimeout: timeoutMs,
      bodyTimeout: timeoutMs,
      headers: {
        'content-type': 'application/json',
        'user-agent': userAgent,
        ...(delivery.token === null ? {} : { authorization: `Bearer ${delivery.token}` }),
        ...(delivery.traceparent === null ? {} : { traceparent: delivery.traceparent }),
        'webhook-id': id,
        'webhook-timestamp': String(timestamp),
        ...(signingKeys.length === 0
          ? {}
          : { 'webhook-signature': signatures(signingKeys, { id, timestamp, body }) }),
      },
    })
    // The status decides; what a broken answer did after it does not matter.
    await answer.body.dump({ limit: ANSWER_BYTES_MAX, signal }).catch(() => {})
    const { statusCode } = answer
    const ok = statusCode >= 200 && statusCode < 300
    return {
      statusCode,
      error: ok ? null : `the receiver answered ${statusCode}`,
      retryAfterMs: retryAfterMs(answer.headers['retry-after'], Date.now()),
    }
  }
}

/** Final, and told without saying which address it was. */
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

/** What went wrong, without the addresses and the fine distinctions that would make a port scanner of us. */
function coarse(err: unknown): string {
  // Holds: `code` is read as a value of any type.
  const { code, name } = (err ?? {}) as { code?: unknown; name?: unknown }
  if (
    name === 'TimeoutError' ||
    code === 'UND_ERR_HEADERS_TIMEOUT' ||
    code === 'UND_ERR_CONNECT_TIMEOUT'
  ) {
    return 'no answer in time'
  }
  if (code === 'ENOTFOUND' || code === 'EAI_AGAIN') return 'the name could not be resolved'
  if (typeof code === 'string' && /CERT|SSL|TLS|VERIFY/.test(code))
    return 'no trusted TLS connection'
  return 'no connection'
}
