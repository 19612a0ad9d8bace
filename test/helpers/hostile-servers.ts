import { createServer, type Server, type Socket } from 'node:net'
import { expect } from 'vitest'
import { HttpCallbackSender } from '../../src/callbacks/sender.ts'
import type { AttemptResult, CallbackSender } from '../../src/core/ports.ts'
import { AddressGuard } from '../../src/net/address-guard.ts'
import type { Lookup } from '../../src/net/bounded-lookup.ts'
import { storedLog } from './stored-log.ts'

/** A TCP listener that does to its connections whatever a test likes, and remembers them. */
export interface RawServer extends AsyncDisposable {
  port: number
  /** `http://127.0.0.1:<port>/hook` */
  url: string
  connections: RawConnection[]
  /** Connections that are still open. */
  open(): number
}

export interface RawConnection {
  socket: Socket
  /** All that came in, as far as the test's handler lets it be read. */
  received: () => Buffer
  closed: boolean
}

/**
 * `behave` is called for each connection; `received` fills by itself unless it pauses the socket. With a `path` it
 * listens on a Unix socket and has no port.
 */
export async function startRawServer(
  behave: (connection: RawConnection, count: number) => void = () => {},
  address: { host?: string; port?: number; path?: string } = {},
): Promise<RawServer> {
  const { path } = address
  const where = path === undefined ? { host: '127.0.0.1', port: 0, ...address } : { path }
  const connections: RawConnection[] = []
  const server: Server = createServer((socket) => {
    const chunks: Buffer[] = []
    const connection = { socket, received: () => Buffer.concat(chunks), closed: false }
    connections.push(connection)
    socket.on('data', (chunk: Buffer) => chunks.push(chunk))
    // What the other side does to the connection is what these tests are about.
    socket.on('error', () => {})
    socket.on('close', () => {
      connection.closed = true
    })
    behave(connection, connections.length)
  })
  await new Promise<void>((resolve, reject) => {
    server.on('error', reject)
    server.listen(where, resolve)
  })
  const bound = server.address()
  const port = typeof bound === 'object' && bound !== null ? bound.port : 0
  return {
    port,
    url: `http://${address.host ?? '127.0.0.1'}:${port}/hook`,
    connections,
    open: () => connections.filter(({ closed }) => !closed).length,
    async [Symbol.asyncDispose]() {
      for (const { socket } of connections) socket.destroy()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

/** Answers with this text as soon as a whole request head and body have come, once per request. */
export function answering(text: string): (connection: RawConnection) => void {
  return ({ socket, received }) => {
    let answered = 0
    socket.on('data', () => {
      const whole = requestsIn(received().toString('latin1'))
      for (; answered < whole; answered += 1) socket.write(text)
    })
  }
}

/** How many whole requests with a Content-Length a text holds. */
export function requestsIn(text: string): number {
  let count = 0
  for (let at = 0; ; ) {
    const headEnd = text.indexOf('\r\n\r\n', at)
    if (headEnd < 0) return count
    const length = Number(/\r\ncontent-length: (\d+)/i.exec(text.slice(at, headEnd))?.[1] ?? 0)
    at = headEnd + 4 + length
    if (at > text.length) return count
    count += 1
  }
}

/** A resolver that knows these names alone; a name may answer differently each time it is asked. */
export function lookupOf(names: Record<string, string[] | (() => string[])>): Lookup {
  return (hostname, _options, done) => {
    const known = names[hostname]
    const addresses = typeof known === 'function' ? known() : known
    if (addresses === undefined) {
      done(Object.assign(new Error(`getaddrinfo ENOTFOUND ${hostname}`), { code: 'ENOTFOUND' }), [])
      return
    }
    done(
      null,
      addresses.map((address) => ({ address, family: address.includes(':') ? 6 : 4 })),
    )
  }
}

export interface TestSender extends AsyncDisposable {
  sender: CallbackSender
  guard: AddressGuard
  send(
    url: string,
    overrides?: Partial<Parameters<CallbackSender['send']>[0]>,
  ): Promise<AttemptResult>
}

/** The real sender behind a guard that allows loopback, unless told otherwise. */
export function testSender(
  options: { timeoutMs?: number; allowed?: string[]; lookup?: Lookup; signingKeys?: Buffer[] } = {},
): TestSender {
  const { timeoutMs = 5_000, allowed = ['loopback'], lookup, signingKeys = [] } = options
  const guard = new AddressGuard(allowed, { lookup })
  const sender = new HttpCallbackSender({ timeoutMs, guard, signingKeys, userAgent: 'test/1' })
  return {
    sender,
    guard,
    send: (url, overrides = {}) =>
      sender.send(
        {
          url,
          token: CANARY_TOKEN,
          webhookId: 'msg_test',
          traceparent: null,
          facts: { status: 'failed', reason: 'exit_code', exitCode: 3, durationMs: 1 },
          timestamp: Math.floor(Date.now() / 1000),
          payload: {
            taskName: 'a.sh',
            taskId: 't',
            success: true,
            logs: storedLog(Buffer.from('hi\n')),
          },
          ...overrides,
        },
        new AbortController().signal,
      ),
    [Symbol.asyncDispose]: () => sender.close(),
  }
}

/** Easy to recognise where it must not be. */
export const CANARY_TOKEN = 'canary-callback-token-4f1c'

/** Runs `work` and checks that it took no longer than `ms`; generous, for machines that are busy. */
export async function within<T>(ms: number, work: () => Promise<T>): Promise<T> {
  const startedAt = performance.now()
  const result = await work()
  expect(performance.now() - startedAt).toBeLessThan(ms)
  return result
}
