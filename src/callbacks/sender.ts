import { Agent, request } from 'undici'
import type { AttemptResult, CallbackSender } from '../core/ports.ts'
import { encodeCallback } from '../wire/callback.ts'

/** Of the answer; a receiver that sends more loses its connection, not its status. */
const ANSWER_BYTES_MAX = 64 * 1024
const CONNECTIONS_PER_ORIGIN = 16

/** Sends callbacks: plain HTTP/1.1 POSTs, no redirects, each under one deadline. */
export class HttpCallbackSender implements CallbackSender {
  readonly #agent: Agent
  readonly #timeoutMs: number
  readonly #userAgent: string

  constructor(options: { timeoutMs: number; userAgent: string }) {
    this.#timeoutMs = options.timeoutMs
    this.#userAgent = options.userAgent
    this.#agent = new Agent({
      allowH2: false,
      connections: CONNECTIONS_PER_ORIGIN,
      // Below the whole deadline: undici honours no abort signal while it connects (nodejs/undici#386).
      connect: { timeout: Math.max(1_000, options.timeoutMs - 1_000) },
      // A POST on a connection that the receiver is just closing fails: keep idle ones only briefly.
      keepAliveTimeout: 1_000,
      keepAliveMaxTimeout: 1_000,
    })
  }

  async send(
    delivery: Parameters<CallbackSender['send']>[0],
    signal: AbortSignal,
  ): Promise<AttemptResult> {
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(this.#timeoutMs)])
    const overdue = Promise.withResolvers<never>()
    const onOverdue = () => overdue.reject(deadline.reason)
    deadline.addEventListener('abort', onOverdue)
    if (deadline.aborted) onOverdue()
    try {
      return await Promise.race([this.#post(delivery, deadline), overdue.promise])
    } catch (err) {
      return { statusCode: null, error: coarse(err), retryAfterMs: null }
    } finally {
      deadline.removeEventListener('abort', onOverdue)
    }
  }

  async close(): Promise<void> {
    await this.#agent.destroy()
  }

  async #post(
    delivery: Parameters<CallbackSender['send']>[0],
    signal: AbortSignal,
  ): Promise<AttemptResult> {
    const body = await encodeCallback(delivery.payload)
    const answer = await request(delivery.url, {
      dispatcher: this.#agent,
      method: 'POST',
      body,
      signal,
      headersTimeout: this.#timeoutMs,
      bodyTimeout: this.#timeoutMs,
      headers: {
        'content-type': 'application/json',
        'user-agent': this.#userAgent,
        ...(delivery.token === null ? {} : { authorization: `Bearer ${delivery.token}` }),
        'webhook-id': delivery.webhookId,
        'webhook-timestamp': String(delivery.timestamp),
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
  if (typeof code === 'string' && /CERT|SSL|TLS/.test(code)) return 'no trusted TLS connection'
  return 'no connection'
}
