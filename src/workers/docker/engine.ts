import type { Readable } from 'node:stream'
import { setTimeout as pause } from 'node:timers/promises'
import { Pool } from 'undici'
import { UnavailableError } from '../../core/errors.ts'
import type { Logger } from '../../core/ports.ts'

/** The newest API this was written for; an older engine is spoken to in its own (https://docs.docker.com/reference/api/engine/). */
const API_VERSION: readonly [number, number] = [1, 47]
const CALL_TIMEOUT_MS = 30_000
const RETRY_MS = 250
const RETRY_MAX_MS = 5_000

export interface EngineAddress {
  /** Of a Unix socket; undefined: `url`. */
  socketPath?: string | undefined
  url?: string | undefined
  tls?: { ca: string; cert: string; key: string } | undefined
}

/** The engine refused. */
export class EngineError extends Error {
  override name = 'EngineError'
  readonly status: number

  constructor(status: number, message: string) {
    super(message)
    this.status = status
  }
}

/** The engine does not answer: nothing is known about its containers. */
export class EngineUnreachableError extends Error {
  override name = 'EngineUnreachableError'
}

interface Call {
  query?: Record<string, string | number>
  body?: object | AsyncIterable<Uint8Array>
  headers?: Record<string, string>
  signal?: AbortSignal | undefined
}

/** The Docker Engine API over its socket; Podman serves it as well. */
export class Engine {
  readonly #pool: Pool
  readonly #callTimeoutMs: number
  #version: Promise<string> | undefined

  /** `callTimeoutMs` bounds calls without a signal of their own. */
  constructor({ socketPath, url, tls }: EngineAddress, callTimeoutMs = CALL_TIMEOUT_MS) {
    this.#callTimeoutMs = callTimeoutMs
    // Streams of logs are silent for as long as tasks are. allowH2: the engine speaks none.
    const options = { headersTimeout: 0, bodyTimeout: 0, allowH2: false }
    this.#pool =
      socketPath === undefined
        ? new Pool(url ?? '', { ...options, ...(tls ? { connect: tls } : {}) })
        : new Pool('http://docker', { ...options, socketPath })
  }

  /** An answer in JSON; undefined when it has none. Throws `EngineError`, `EngineUnreachableError`. */
  async json<T>(method: 'GET' | 'POST', path: string, call: Call = {}): Promise<T> {
    const text = await this.text(method, path, call)
    // Holds as far as the engine keeps to its documentation.
    return (text === '' ? undefined : JSON.parse(text)) as T
  }

  async text(
    method: 'GET' | 'POST' | 'PUT' | 'DELETE',
    path: string,
    call: Call = {},
  ): Promise<string> {
    const signal = call.signal ?? AbortSignal.timeout(this.#callTimeoutMs)
    try {
      const chunks: Buffer[] = []
      for await (const chunk of await this.stream(method, path, { ...call, signal })) {
        chunks.push(chunk)
      }
      return Buffer.concat(chunks).toString()
    } catch (err) {
      // One that takes too long is as good as away: nothing is known, and it can be asked again.
      throw err instanceof EngineError ? err : unreachable(err, call.signal)
    }
  }

  /** An answer as it comes. Its reader has to expect that it is cut. */
  async stream(
    method: 'GET' | 'POST' | 'PUT' | 'DELETE',
    path: string,
    { query = {}, body, headers = {}, signal }: Call = {},
  ): Promise<Readable> {
    const isTar = body !== undefined && Symbol.asyncIterator in body
    const search = Object.entries(query).map(([name, value]) => [name, String(value)])
    try {
      const response = await this.#pool.request({
        method,
        path: `/v${await this.#negotiated()}${path}?${new URLSearchParams(search)}`,
        headers: {
          ...(body === undefined
            ? {}
            : { 'content-type': isTar ? 'application/x-tar' : 'application/json' }),
          ...headers,
        },
        body: isTar ? (body as Readable) : body === undefined ? null : JSON.stringify(body),
        ...(signal ? { signal } : {}),
      })
      if (response.statusCode < 400) return response.body
      throw new EngineError(response.statusCode, messageOf(await response.body.text()))
    } catch (err) {
      throw err instanceof EngineError ? err : unreachable(err, signal)
    }
  }

  async close(): Promise<void> {
    await this.#pool.destroy()
  }

  #negotiated(): Promise<string> {
    this.#version ??= this.#askVersion().catch((err: unknown) => {
      this.#version = undefined
      throw err
    })
    return this.#version
  }

  async #askVersion(): Promise<string> {
    // Without one, an engine that hangs would keep every later call waiting, too.
    const signal = AbortSignal.timeout(this.#callTimeoutMs)
    const { headers, body } = await this.#pool.request({ method: 'GET', path: '/_ping', signal })
    await body.dump()
    const [major = 1, minor = 24] = String(headers['api-version'] ?? '')
      .split('.')
      .map(Number)
    const isOlder = major < API_VERSION[0] || (major === API_VERSION[0] && minor < API_VERSION[1])
    return isOlder ? `${major}.${minor}` : API_VERSION.join('.')
  }
}

/** Repeats a step while the engine does not answer, or not sensibly. Rejects when `signal` aborts. */
export async function untilAnswered<T>(
  step: () => Promise<T>,
  { signal, log }: { signal: AbortSignal; log: Logger },
): Promise<T> {
  for (let waitMs = RETRY_MS; ; waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)) {
    try {
      return await step()
    } catch (err) {
      const isBroken = err instanceof EngineError && err.status >= 500
      if (!(err instanceof EngineUnreachableError || isBroken)) throw err
      signal.throwIfAborted()
      log.warn({ err }, 'waiting for the engine')
      await pause(waitMs, undefined, { signal })
    }
  }
}

/**
 * The bytes of a container's output, stdout and stderr in their order: frames of a type, three zeros, a length, and
 * that many bytes.
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

/** Ends a stream that nobody reads to its end. */
export async function discard(stream: Readable): Promise<void> {
  if (stream.closed) return
  // Not `once`, which rejects with the error that undici makes of this.
  const closed = new Promise((resolve) => stream.on('error', () => {}).on('close', resolve))
  stream.destroy()
  await closed
}

/** What a failed request, or an answer that was cut, says: `signal` aborted, or the engine is away. */
export function unreachable(err: unknown, signal: AbortSignal | undefined): unknown {
  if (signal?.aborted) return signal.reason
  // Also an error of our own: of the body that was being sent.
  if (err instanceof EngineUnreachableError || err instanceof UnavailableError) return err
  const { code } = err as { code?: unknown }
  const words = err instanceof Error ? err.message : String(err)
  const why = typeof code === 'string' ? code : words
  return new EngineUnreachableError(`The Docker engine does not answer (${why})`, { cause: err })
}

function messageOf(body: string): string {
  try {
    return String((JSON.parse(body) as { message?: unknown }).message ?? body)
  } catch {
    return body.slice(0, 1000)
  }
}
