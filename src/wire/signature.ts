import { createHmac } from 'node:crypto'

const SECRET_PREFIX = 'whsec_'

/** A `whsec_…` secret's key; undefined when it is not one (Standard Webhooks 1.0: 24 to 64 bytes, base64). */
export function signingKey(secret: string): Buffer | undefined {
  if (!/^whsec_[A-Za-z0-9+/]+={0,2}$/.test(secret)) return undefined
  const key = Buffer.from(secret.slice(SECRET_PREFIX.length), 'base64')
  return key.length >= 24 && key.length <= 64 ? key : undefined
}

/** `webhook-signature`: one signature per key, so that receivers can move from one secret to the next. */
export function signatures(
  keys: readonly Buffer[],
  message: { id: string; timestamp: number; body: Buffer },
): string {
  return keys
    .map((key) => {
      const hmac = createHmac('sha256', key).update(`${message.id}.${message.timestamp}.`)
      return `v1,${hmac.update(message.body).digest('base64')}`
    })
    .join(' ')
}
