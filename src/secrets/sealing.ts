import { createCipheriv, createDecipheriv, createHmac, randomBytes, randomUUID } from 'node:crypto'
import { link, readFile, unlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'

const KEY_BYTES = 32
const NONCE_BYTES = 12
const TAG_BYTES = 16
const VERSION = 1

/** Encrypts secrets for the store with AES-256-GCM, bound to their row. */
export class Sealer {
  readonly #key: Buffer

  /** Throws unless `key` has 32 bytes. */
  constructor(key: Buffer) {
    if (key.length !== KEY_BYTES) throw new Error(`a sealing key has ${KEY_BYTES} bytes`)
    this.#key = key
  }

  /** Encrypts a text. Only the same `context` decrypts it, so copies in other rows are useless. */
  seal(text: string, context: string): Buffer {
    const nonce = randomBytes(NONCE_BYTES)
    const cipher = createCipheriv('aes-256-gcm', this.#key, nonce).setAAD(Buffer.from(context))
    const sealed = Buffer.concat([cipher.update(text, 'utf8'), cipher.final()])
    return Buffer.concat([Buffer.from([VERSION]), nonce, cipher.getAuthTag(), sealed])
  }

  /** Decrypts a value. Throws if it was sealed with another key or context, or was modified. */
  unseal(sealed: Uint8Array, context: string): string {
    const bytes = Buffer.from(sealed.buffer, sealed.byteOffset, sealed.byteLength)
    if (bytes[0] !== VERSION) throw new Error('unknown version of a sealed value')
    const tagAt = 1 + NONCE_BYTES
    const textAt = tagAt + TAG_BYTES
    const decipher = createDecipheriv('aes-256-gcm', this.#key, bytes.subarray(1, tagAt), {
      authTagLength: TAG_BYTES,
    })
      .setAAD(Buffer.from(context))
      .setAuthTag(bytes.subarray(tagAt, textAt))
    return Buffer.concat([decipher.update(bytes.subarray(textAt)), decipher.final()]).toString()
  }

  /** Derives a key for another purpose that does not reveal this one. */
  derive(purpose: string): Buffer {
    return createHmac('sha256', this.#key).update(purpose).digest()
  }
}

/** Returns the key in `folder`. Creates it once, even if two processes start at the same time. */
export async function keyFromFolder(folder: string): Promise<Buffer> {
  const path = join(folder, 'sealing.key')
  const stored = await readFile(path, 'utf8').catch((err: NodeJS.ErrnoException) => {
    if (err.code === 'ENOENT') return undefined
    throw err
  })
  if (stored !== undefined) return Buffer.from(stored, 'base64')
  // Linked into place when complete: a crash leaves no half key, and the first process to link
  // wins.
  const draft = join(folder, `sealing.key.${randomUUID()}`)
  await writeFile(draft, `${randomBytes(KEY_BYTES).toString('base64')}\n`, {
    mode: 0o600,
    flag: 'wx',
    flush: true,
  })
  await link(draft, path).catch((err: NodeJS.ErrnoException) => {
    if (err.code !== 'EEXIST') throw err
  })
  await unlink(draft)
  return Buffer.from(await readFile(path, 'utf8'), 'base64')
}
