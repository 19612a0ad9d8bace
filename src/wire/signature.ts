import { createHmac } from 'node:crypto'

const SECRET_PREFIX = 'whsec_'

/**
 * Returns the key of a `whsec_…` secret, or undefined when it is malformed (Standard Webhooks 1.0:
 * 24 to 64 bytes, base64).
 */
export function signingKey(secret: string): Buffer | undefined {
  if (!/^whsec_[A-Za-z0-9+/]+={0,2}$/.test(secret)) return undefined
  const key = Buffer.from(secret.slice(SECRET_PREFIX.length), 'base64')
  return key.length >= 24 && key.length <= 64 ? key : undefined
}

/**
 * Signs a body that arrives in pieces. The `webhook-signature` header has one signature per key, so
 * that receivers can change to a new secret.
 */
export function signer(
  keys: readonly Buffer[],
  { id, timestamp }: { id: string; timestamp: number },
): { update(piece: Buffer): void; header(): string } {
  const hmacs = keys.map((key) => createHmac('sha256', key).update(`${id}.${timestamp}.`))
  return {
    update(piece) {
      for (const hmac of hmacs) hmac.update(piece)
    },
    header: () => hmacs.map((hmac) => `v1,${hmac.digest('base64')}`).join(' '),
  }
}

/** Returns the `webhook-signature` header of a whole body. */
export function signatures(
  keys: readonly Buffer[],
  message: { id: string; timestamp: number; body: Buffer },
): string {
  const signing = signer(keys, message)
  signing.update(message.body)
  return signing.header()
}
