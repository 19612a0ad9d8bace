import { createHmac } from 'node:crypto'

const SECRET_PREFIX = 'whsec_'

/** Returns the key of a secret (Standard Webhooks 1.0), or undefined if it is malformed. */
export function signingKey(secret: string): Buffer | undefined {
  if (!/^whsec_[A-Za-z0-9+/]+={0,2}$/.test(secret)) return undefined
  const key = Buffer.from(secret.slice(SECRET_PREFIX.length), 'base64')
  return key.length >= 24 && key.length <= 64 ? key : undefined
}

/** Signs a body that arrives in pieces, once per key, so that receivers can change their secret. */
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
