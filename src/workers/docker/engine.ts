import type { Readable } from 'node:stream'
import { Pool } from 'undici'
import type { z } from 'zod'
import { UnavailableError } from '../../core/errors.ts'
import { WorkerError } from '../../core/ports.ts'
import { until } from '../../core/until.ts'
import {
  FAILURES,
  type FailureKind,
  kindOfRefusal,
  messageIn,
  type Refusal,
  type Step,
} from './failures.ts'

/** Newest API version used; an older engine gets its own. */
const API_VERSION: readonly [number, number] = [1, 47]
const CALL_TIMEOUT_MS = 30_000
/** Time limit of the ping, for which all calls wait. */
const PING_TIMEOUT_MS = 4_000
/** Maximum bytes of an answer; a list of ten thousand containers has 16 MB. */
const ANSWER_BYTES_MAX = 64 * 1024 * 1024
const ERROR_BYTES_MAX = 64 * 1024
const WORDS_MAX = 1000

export interface EngineAddress {
  /** Path of a Unix socket; undefined: `url`. */
  socketPath?: string | undefined
  url?: string | undefined
  tls?: { ca: string; cert: string; key: string } | undefined
}

/** A failed call to the engine. It proves nothing about a container by itself, and is retried. */
export class EngineError extends UnavailableError {
  override name = 'EngineError'
  readonly kind: FailureKind
  /** Message of the engine, a proxy, or the system. */
  readonly words: string

  constructor(kind: FailureKind, words: string, options: { cause?: unknown } = {}) {
    super(`${FAILURES[kind].sentence} (${words})`, options)
    this.kind = kind
    this.words = words
  }
}

/** Returns whether a call failed in one of these ways; `not_found` proves a loss. */
export function isFailure(err: unknown, ...kinds: FailureKind[]): err is EngineError {
  return err instanceof EngineError && kinds.includes(err.kind)
}

interface Call {
  query?: Record<string, string | number>
  body?: object | AsyncIterable<Uint8Array>
  headers?: Record<string, string>
  signal?: AbortSignal | undefined
  /** Default `look`. */
  step?: Step
  /** Status codes of success; default 200 alone. */
  expect?: readonly number[]
  /** Maximum milliseconds until the answer begins, and again until it ends. */
  limitMs?: number
  /** Maximum milliseconds between two pieces of a stream; default none, as tasks may be silent. */
  silenceMs?: number
}

/** Client of the Docker Engine API. All calls throw `EngineError` or the reason of their signal. */
export class Engine {
  readonly #pool: Pool
  readonly #callTimeoutMs: number
  #version: Promise<string> | undefined

  constructor({ socketPath, url, tls }: EngineAddress, callTimeoutMs = CALL_TIMEOUT_MS) {
    this.#callTimeoutMs = callTimeoutMs
    // The engine does not support HTTP/2.
    const options = { allowH2: false }
    this.#pool =
      socketPath === undefined
        ? new Pool(url ?? '', { ...options, ...(tls ? { connect: tls } : {}) })
        : new Pool('http://docker', { ...options, socketPath })
  }

  async json<T>(
    method: 'GET' | 'POST',
    path: string,
    schema: z.ZodType<T>,
    call: Call = {},
  ): Promise<T> {
    const text = await this.text(method, path, call)
    try {
      return schema.parse(JSON.parse(text))
    } catch (err) {
      throw new EngineError('garbage', `${method} ${path}: ${shortened(text)}`, { cause: err })
    }
  }

  /** Maximum milliseconds of a call that sets no limit of its own. */
  get callLimitMs(): number {
    return this.#callTimeoutMs
  }

  async text(
    method: 'GET' | 'POST' | 'PUT' | 'DELETE',
    path: string,
    call: Call = {},
  ): Promise<string> {
    const body = await this.stream(method, path, call)
    try {
      const limitMs = call.limitMs ?? this.#callTimeoutMs
      const { bytes, isWhole } = await withinLimit(body, limitMs, ANSWER_BYTES_MAX)
      if (isWhole) return bytes.toString()
    } catch (err) {
      throw failureOf(err, call.signal)
    }
    throw new EngineError('garbage', `${method} ${path}: more than ${ANSWER_BYTES_MAX} bytes`)
  }

  /** Returns an answer as a stream, which may be cut at any point. */
  async stream(
    method: 'GET' | 'POST' | 'PUT' | 'DELETE',
    path: string,
    call: Call = {},
  ): Promise<Readable> {
    const { query = {}, body, headers = {}, signal, step = 'look', expect = [200] } = call
    const search = Object.entries(query).map(([name, value]) => [name, String(value)])
    const version = await (signal ? until(this.#negotiated(), signal) : this.#negotiated())
    const tar = body !== undefined && Symbol.asyncIterator in body ? new FileBody(body) : undefined
    const limitMs = call.limitMs ?? this.#callTimeoutMs
    try {
      const response = await this.#pool.request({
        method,
        path: `/v${version}${path}?${new URLSearchParams(search)}`,
        headers: {
          ...(body === undefined
            ? {}
            : { 'content-type': tar ? 'application/x-tar' : 'application/json' }),
          ...headers,
        },
        // Safe: a request accepts any async iterable.
        body: tar ? (tar.pieces() as unknown as Readable) : body ? JSON.stringify(body) : null,
        ...(signal ? { signal } : {}),
        // Each piece of the body that is sent restarts this timeout.
        headersTimeout: limitMs,
        bodyTimeout: call.silenceMs ?? 0,
      })
      if (expect.includes(response.statusCode)) return response.body
      throw await this.#refused(response, `${method} ${path}`, step)
    } catch (err) {
      if (tar?.failure) throw tar.failure
      throw failureOf(err, signal)
    }
  }

  async close(): Promise<void> {
    await this.#pool.destroy()
  }

  async #refused(
    { statusCode, body }: { statusCode: number; body: Readable },
    what: string,
    step: Step,
  ): Promise<EngineError> {
    const { bytes } = await withinLimit(body, this.#callTimeoutMs, ERROR_BYTES_MAX)
    const text = bytes.toString()
    if (statusCode < 400) {
      return new EngineError('garbage', `${what}: status ${statusCode}: ${shortened(text)}`)
    }
    const refusal: Refusal = { status: statusCode, words: messageIn(text), body: text }
    const kind = kindOfRefusal(refusal, step)
    if (kind === 'version_refused') this.#version = undefined
    const words = refusal.words ?? `${what}: status ${statusCode}: ${shortened(text)}`
    return new EngineError(kind, shortened(words))
  }

  #negotiated(): Promise<string> {
    this.#version ??= this.#askVersion().catch((err: unknown) => {
      this.#version = undefined
      throw err
    })
    return this.#version
  }

  async #askVersion(): Promise<string> {
    const limitMs = Math.min(this.#callTimeoutMs, PING_TIMEOUT_MS)
    try {
      const response = await this.#pool.request({
        method: 'GET',
        path: '/_ping',
        headersTimeout: limitMs,
      })
      if (response.statusCode !== 200) throw await this.#refused(response, 'GET /_ping', 'look')
      await withinLimit(response.body, limitMs, ERROR_BYTES_MAX)
      const version = /^(\d+)\.(\d+)$/.exec(String(response.headers['api-version'] ?? ''))
      // The version is cached, so a proxy's answer must not set it.
      if (!version) throw new EngineError('garbage', 'GET /_ping: no API version')
      const [major, minor] = [Number(version[1]), Number(version[2])]
      const isOlder = major < API_VERSION[0] || (major === API_VERSION[0] && minor < API_VERSION[1])
      return isOlder ? `${major}.${minor}` : API_VERSION.join('.')
    } catch (err) {
      throw failureOf(err, undefined)
    }
  }
}

/** A request body read from files. Keeps its failure apart from those of the engine. */
class FileBody {
  failure: Error | undefined
  readonly #body: AsyncIterable<Uint8Array>

  constructor(body: AsyncIterable<Uint8Array>) {
    this.#body = body
  }

  async *pieces(): AsyncGenerator<Uint8Array, void> {
    try {
      yield* this.#body
    } catch (err) {
      const isTyped = err instanceof UnavailableError || err instanceof WorkerError
      this.failure = isTyped ? err : new EngineError('own_files', wordsOf(err), { cause: err })
      throw err
    }
  }
}

/** Reads a stream up to `maxBytes` and closes it. */
export async function beginningOf(
  stream: Readable,
  maxBytes: number,
): Promise<{ bytes: Buffer; isWhole: boolean }> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of stream) {
    chunks.push(chunk)
    length += chunk.length
    if (length > maxBytes) break
  }
  const bytes = Buffer.concat(chunks).subarray(0, maxBytes)
  return { bytes, isWhole: length <= maxBytes }
}

/** Reads the beginning of a stream. Throws when that takes longer than `limitMs`. */
async function withinLimit(
  stream: Readable,
  limitMs: number,
  maxBytes: number,
): Promise<{ bytes: Buffer; isWhole: boolean }> {
  const timer = setTimeout(() => stream.destroy(timedOut(limitMs)), limitMs)
  try {
    return await beginningOf(stream, maxBytes)
  } finally {
    clearTimeout(timer)
  }
}

/**
 * Yields a container's output, stdout and stderr in order. The stream has frames of a type, three
 * zeros, a length, and that many bytes.
 */
export async function* outputOf(stream: Readable): AsyncGenerator<Buffer, void> {
  const HEAD_BYTES = 8
  let unread: Buffer = Buffer.alloc(0)
  let left = 0
  for await (const chunk of stream) {
    unread = unread.length === 0 ? chunk : Buffer.concat([unread, chunk])
    while (unread.length > 0) {
      if (left === 0) {
        if (unread.length < HEAD_BYTES) break
        // A proxy's error page must not appear in the log.
        if (unread.readUInt32BE(0) & 0xfcffffff) {
          throw new EngineError('garbage', `output: ${shortened(unread.toString())}`)
        }
        left = unread.readUInt32BE(4)
        unread = unread.subarray(HEAD_BYTES)
        continue
      }
      const piece = unread.subarray(0, left)
      left -= piece.length
      unread = unread.subarray(piece.length)
      yield piece
    }
  }
}

/** Closes a stream that is not read to its end. */
export async function discard(stream: Readable): Promise<void> {
  if (stream.closed) return
  // `once` would reject with the error that undici emits here.
  const closed = new Promise((resolve) => stream.on('error', () => {}).on('close', resolve))
  stream.destroy()
  await closed
}

/** Returns the error for a failed or cut call: the signal's reason, or an `EngineError`. */
export function failureOf(err: unknown, signal: AbortSignal | undefined): unknown {
  if (signal?.aborted) return signal.reason
  if (err instanceof UnavailableError) return err
  // Codes of undici, and of `timedOut`.
  const isTimeout = err instanceof Error && codeOf(err)?.endsWith('_TIMEOUT')
  if (isTimeout) return new EngineError('timeout', err.message, { cause: err })
  return new EngineError('unreachable', wordsOf(err), { cause: err })
}

function timedOut(ms: number): Error {
  return Object.assign(new Error(`no whole answer within ${ms} ms`), { code: 'ANSWER_TIMEOUT' })
}

function codeOf(err: unknown): string | undefined {
  const { code } = err as { code?: unknown }
  return typeof code === 'string' ? code : undefined
}

function wordsOf(err: unknown): string {
  return codeOf(err) ?? (err instanceof Error ? err.message : String(err))
}

function shortened(words: string): string {
  return words.trim().slice(0, WORDS_MAX)
}
