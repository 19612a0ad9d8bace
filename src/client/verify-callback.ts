import { timingSafeEqual } from 'node:crypto'
import type { z } from 'zod'
import { callbackSchema } from '../wire/callback.ts'
import { signatures, signingKey } from '../wire/signature.ts'

export type TaskRunnerCallback = z.output<typeof callbackSchema>

/** Maximum difference between a callback's timestamp and now, as Standard Webhooks 1.0 advises. */
const TOLERANCE_SECONDS = 300

type HeaderValue = string | readonly string[] | undefined

/** Headers of any HTTP server: a `Headers`, a `Map` or a plain object; case does not matter. */
export type CallbackHeaders =
  | Iterable<[string, HeaderValue]>
  | { get(name: string): string | null | undefined }
  | Readonly<Record<string, HeaderValue>>

/** A callback that must not be trusted; the message says why. */
export class CallbackVerificationError extends Error {
  override name = 'CallbackVerificationError'
}

/**
 * Verifies that a callback was signed with one of the secrets (`whsec_…`, Standard Webhooks) within
 * five minutes of now, and returns its four fields. `body` must be the raw body: parsing and
 * serializing it would change bytes. A callback may arrive more than once, always with the same
 * `webhook-id`. Throws `CallbackVerificationError`, or a `TypeError` if a secret is malformed or
 * the body was parsed.
 */
export function verifyCallback(
  headers: CallbackHeaders,
  body: string | Uint8Array,
  secret: string | readonly string[],
): TaskRunnerCallback {
  if (typeof body !== 'string' && !ArrayBuffer.isView(body)) {
    throw new TypeError('pass the raw body as a string or bytes: a parsed body cannot be verified')
  }
  const keys = [secret].flat().map((each) => {
    const key = signingKey(each)
    if (!key) throw new TypeError('a signing secret must be whsec_ and 24 to 64 bytes in base64')
    return key
  })
  const [id, timestamp, given] = ['webhook-id', 'webhook-timestamp', 'webhook-signature'].map(
    (name) => headerOf(headers, name),
  )
  if (!id || !timestamp || !given) throw new CallbackVerificationError('it is not signed')
  const seconds = /^\d{1,12}$/.test(timestamp) ? Number(timestamp) : Number.NaN
  if (!(Math.abs(Date.now() / 1000 - seconds) <= TOLERANCE_SECONDS)) {
    throw new CallbackVerificationError('its timestamp is more than five minutes away')
  }
  const bytes = Buffer.from(body)
  const expected = signatures(keys, { id, timestamp: seconds, body: bytes }).split(' ')
  const matches = given.split(' ').some((one) => expected.some((other) => isSame(one, other)))
  if (!matches) throw new CallbackVerificationError('no signature matches')
  const parsed = callbackSchema.safeParse(jsonOf(bytes))
  if (!parsed.success) throw new CallbackVerificationError('its body is not a callback')
  return parsed.data
}

function headerOf(headers: CallbackHeaders, name: string): string | undefined {
  if (!isIterable(headers) && hasGet(headers)) return headers.get(name) ?? undefined
  const entries = isIterable(headers) ? [...headers] : Object.entries(headers)
  const [, value] = entries.find(([each]) => each.toLowerCase() === name) ?? []
  return typeof value === 'string' ? value : value?.[0]
}

function isIterable(headers: CallbackHeaders): headers is Iterable<[string, HeaderValue]> {
  return Symbol.iterator in headers
}

function hasGet(headers: object): headers is { get(name: string): string | null | undefined } {
  return 'get' in headers && typeof headers.get === 'function'
}

function isSame(one: string, other: string): boolean {
  const [a, b] = [Buffer.from(one), Buffer.from(other)]
  return a.length === b.length && timingSafeEqual(a, b)
}

function jsonOf(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString())
  } catch {
    return undefined
  }
}
