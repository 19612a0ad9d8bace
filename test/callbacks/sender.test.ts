import {
  createServer as createHttpServer,
  type IncomingHttpHeaders,
  type RequestListener,
  type Server,
} from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import { type AddressInfo, createServer as createTcpServer, type Socket } from 'node:net'
import { afterEach, describe, expect, test } from 'vitest'
import { HttpCallbackSender, retryAfterMs } from '../../src/callbacks/sender.ts'
import type { CallbackFacts } from '../../src/core/ports.ts'
import { AddressGuard } from '../../src/net/address-guard.ts'
import { storedLog } from '../helpers/stored-log.ts'

/** Of tests that see it pass. */
const TIMEOUT_MS = 1_000
/** Of all others: a busy machine must not let it pass. */
const PATIENT_MS = 20_000
/** What an attempt may take beyond its deadline, on a busy machine. */
const SLACK_MS = 10_000
const NEVER = new AbortController().signal

/** Made for these tests, good for a hundred years; nobody trusts it. */
const TLS_KEY = `-----BEGIN EC PRIVATE KEY-----
MHcCAQEEINNconYqzZMUoakCnLubZhfTaYeB9pRmCWic43jVU03woAoGCCqGSM49
AwEHoUQDQgAEhbY0mSd73BzHHdiXXntI9ZknlObLifPbRHeP2dPLn1MceWmWQaCg
X4qux9sICULNx7in0q4bfBfCqqn4gmcJ8A==
-----END EC PRIVATE KEY-----
`
const SELF_SIGNED = {
  key: TLS_KEY,
  cert: `-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUSc7kIjuPe712S+Qe/d0ePjboMjUwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyNDA4MzkyMloYDzIxMjYxMDMx
MDgzOTIyWjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASFtjSZJ3vcHMcd2Jdee0j1mSeU5suJ89tEd4/Z08ufUxx5aZZBoKBf
iq7H2wgJQs3HuKfSrht8F8KqqfiCZwnwo2QwYjAdBgNVHQ4EFgQUkjLgMnnXhhID
abeWvuvZhQu4U+wwHwYDVR0jBBgwFoAUkjLgMnnXhhIDabeWvuvZhQu4U+wwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
IQDpyJ0oWkyVt+L/EkesqyVZKthH3/YoHABC0fQYkgs2JAIgXCT1e5rwu9uWh15F
l1uZvt6GGufVjcSad6GNaGHjHlg=
-----END CERTIFICATE-----
`,
}
const WITHOUT_ISSUER = {
  key: TLS_KEY,
  cert: `-----BEGIN CERTIFICATE-----
MIIBfTCCASOgAwIBAgIUVnReHef6x3lvw19AvEQo7N3QF7AwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHdGVzdC1jYTAgFw0yNjExMjQwODM5MjJaGA8yMTI2MTAzMTA4
MzkyMlowFDESMBAGA1UEAwwJMTI3LjAuMC4xMFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAEhbY0mSd73BzHHdiXXntI9ZknlObLifPbRHeP2dPLn1MceWmWQaCgX4qu
x9sICULNx7in0q4bfBfCqqn4gmcJ8KNTMFEwDwYDVR0RBAgwBocEfwAAATAdBgNV
HQ4EFgQUkjLgMnnXhhIDabeWvuvZhQu4U+wwHwYDVR0jBBgwFoAUQkOpqWLCxaFb
yCV9pQ9O0c3Yqo0wCgYIKoZIzj0EAwIDSAAwRQIhAMQdorWhhPJ+dEvOYfD21l52
+4b3Kx1xGeyZ1E2hEOmoAiAGlXrC07zl4bTNhUVpMwBnVupfb70lGQ69KJ8elbWa
Cw==
-----END CERTIFICATE-----
`,
}

const cleanups: Array<() => unknown> = []
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup()
})

/** Counts connections that are asked for, and may hold them up. */
class CountingGuard extends AddressGuard {
  asked = 0
  /** What fails each of those that are held. Undefined: none is. */
  held: Array<() => void> | undefined

  constructor() {
    super(['loopback'])
  }

  override connector(options: { timeoutMs: number }): ReturnType<AddressGuard['connector']> {
    const connect = super.connector(options)
    return (target, done) => {
      this.asked += 1
      if (this.held) this.held.push(() => done(new Error('held for too long'), null))
      else connect(target, done)
    }
  }
}

function sender(timeoutMs = PATIENT_MS, guard = new AddressGuard(['loopback'])) {
  const made = new HttpCallbackSender({
    timeoutMs,
    userAgent: 'task-runner/test',
    guard,
    signingKeys: [],
  })
  cleanups.push(() => made.close())
  return made
}

async function listen(server: Server | ReturnType<typeof createTcpServer>): Promise<number> {
  const sockets = new Set<Socket>()
  server.on('connection', (socket: Socket) => sockets.add(socket))
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  cleanups.push(() => {
    for (const socket of sockets) socket.destroy()
    return new Promise((resolve) => server.close(resolve))
  })
  return (server.address() as AddressInfo).port
}

async function http(handler: RequestListener): Promise<string> {
  return `http://127.0.0.1:${await listen(createHttpServer(handler))}/hook`
}

async function tcp(onSocket: (socket: Socket) => void): Promise<string> {
  const server = createTcpServer((socket) => {
    socket.on('error', () => {})
    onSocket(socket)
  })
  return `http://127.0.0.1:${await listen(server)}/hook`
}

function delivery(url: string, overrides: object = {}) {
  return {
    url,
    token: null,
    webhookId: 'msg_1',
    traceparent: null,
    facts: { status: 'failed', reason: 'exit_code', exitCode: 3, durationMs: 12 } as CallbackFacts,
    timestamp: 1_700_000_000,
    payload: {
      ...{ taskName: 'a.sh', taskId: 'an é id', success: false },
      logs: storedLog(Buffer.from('a "log"\n')),
    },
    ...overrides,
  }
}

const post = (url: string, overrides: object = {}) => sender().send(delivery(url, overrides), NEVER)

async function timed<T>(work: Promise<T>): Promise<{ result: T; tookMs: number }> {
  const began = performance.now()
  return { result: await work, tookMs: performance.now() - began }
}

describe('HttpCallbackSender', () => {
  test('it sends one POST with exactly these headers and this body', async () => {
    const seen: object[] = []
    const url = await http(async (request, response) => {
      let body = ''
      for await (const chunk of request) body += chunk
      const { method, headers, httpVersion } = request
      seen.push({ method, path: request.url, headers, httpVersion, body })
      response.end('ok')
    })
    const body = '{"task_name":"a.sh","task_id":"an é id","success":false,"logs":"a \\"log\\"\\n"}'
    expect(await post(`${url}?x=1&y=%20`, { token: 'a-token' })).toEqual({
      ...{ statusCode: 200, error: null, retryAfterMs: null },
    })
    expect(seen).toEqual([
      {
        ...{ method: 'POST', path: '/hook?x=1&y=%20', httpVersion: '1.1', body },
        headers: {
          host: new URL(url).host,
          connection: 'keep-alive',
          'content-type': 'application/json',
          'content-length': String(Buffer.byteLength(body)),
          'user-agent': 'task-runner/test',
          authorization: 'Bearer a-token',
          'webhook-id': 'msg_1',
          'webhook-timestamp': '1700000000',
          ...{ 'task-status': 'failed', 'task-reason': 'exit_code' },
          ...{ 'task-exit-code': '3', 'task-duration-ms': '12' },
        },
      },
    ])
  })

  test('without a token there is no authorization', async () => {
    let headers: object = {}
    const url = await http((request, response) => {
      headers = request.headers
      response.end()
    })
    await post(url)
    expect(headers).toMatchObject({ 'webhook-id': 'msg_1' })
    expect(headers).not.toHaveProperty('authorization')
  })

  test('5 MB of log arrive whole', async () => {
    const received = Promise.withResolvers<number>()
    const url = await http(async (request, response) => {
      let body = ''
      for await (const chunk of request.setEncoding('utf8')) body += chunk
      received.resolve(JSON.parse(body).logs.length)
      response.end()
    })
    const content = Buffer.alloc(5 * 1024 * 1024, 'x\n')
    const payload = { ...delivery(url).payload, logs: storedLog(content) }
    const { statusCode } = await sender().send(delivery(url, { payload }), NEVER)
    expect(statusCode).toBe(200)
    expect(await received.promise).toBe(content.length)
  })

  test.each([201, 204, 400, 404, 410, 429, 500, 503])(
    'status %i is told as it is',
    async (code) => {
      const url = await http((_, response) => response.writeHead(code).end())
      expect(await post(url)).toMatchObject({
        statusCode: code,
        error: code < 300 ? null : `the receiver responded with ${code}`,
      })
    },
  )

  test.each([301, 302, 303, 307, 308])('a redirect (%i) is not followed', async (code) => {
    const paths: Array<string | undefined> = []
    const url = await http((request, response) => {
      paths.push(request.url)
      response.writeHead(code, { location: '/elsewhere?key=secret' }).end()
    })
    expect(await post(url)).toMatchObject({
      statusCode: code,
      error: `the receiver responded with ${code} (redirects are not followed: this one leads to ${new URL(url).host})`,
    })
    expect(paths).toEqual(['/hook'])
  })

  test('a redirect to nowhere is told as one', async () => {
    for (const location of ['http://[', undefined]) {
      const url = await http((_, response) =>
        response.writeHead(307, location ? { location } : {}).end(),
      )
      expect(await post(url)).toMatchObject({
        error: 'the receiver responded with 307 (redirects are not followed)',
      })
    }
  })

  test('how the task ended is told in headers, as far as it is known', async () => {
    const seen: IncomingHttpHeaders[] = []
    const url = await http((request, response) => {
      seen.push(request.headers)
      response.end()
    })
    await post(url)
    const unknown = { status: 'cancelled', reason: null, exitCode: null, durationMs: null }
    await post(url, { facts: unknown })
    const factsIn = (headers: object) =>
      Object.fromEntries(Object.entries(headers).filter(([name]) => name.startsWith('task-')))
    expect(seen.map(factsIn)).toEqual([
      {
        ...{ 'task-status': 'failed', 'task-reason': 'exit_code' },
        ...{ 'task-exit-code': '3', 'task-duration-ms': '12' },
      },
      { 'task-status': 'cancelled' },
    ])
  })

  describe('the deadline of a whole attempt', () => {
    const hurried = (url: string, overrides: object = {}) =>
      sender(TIMEOUT_MS).send(delivery(url, overrides), NEVER)
    const late = { statusCode: null, error: 'no response in time', retryAfterMs: null }

    test('holds for a receiver that takes the request and never answers', async () => {
      const { result, tookMs } = await timed(hurried(await http(() => {})))
      expect(result).toEqual(late)
      expect(tookMs).toBeGreaterThan(TIMEOUT_MS - 50)
      expect(tookMs).toBeLessThan(TIMEOUT_MS + SLACK_MS)
    })

    test('holds for one that accepts and never reads', async () => {
      const content = Buffer.alloc(5 * 1024 * 1024, 'x')
      const url = await tcp((socket) => socket.pause())
      const payload = { ...delivery(url).payload, logs: storedLog(content) }
      const { result, tookMs } = await timed(hurried(url, { payload }))
      expect(result).toEqual(late)
      expect(tookMs).toBeLessThan(TIMEOUT_MS + SLACK_MS)
    })

    test('holds for one that drips its headers', async () => {
      const url = await tcp((socket) => {
        socket.write('HTTP/1.1 200 OK\r\n')
        const drip = setInterval(() => socket.write('x-drip: 1\r\n'), 20)
        socket.on('close', () => clearInterval(drip))
      })
      const { result, tookMs } = await timed(hurried(url))
      expect(result).toEqual(late)
      expect(tookMs).toBeLessThan(TIMEOUT_MS + SLACK_MS)
    })

    test('holds for one that drips its body; the status that it gave counts', async () => {
      const url = await tcp((socket) => {
        socket.write('HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n')
        const drip = setInterval(() => socket.write('x'), 20)
        socket.on('close', () => clearInterval(drip))
      })
      const { result, tookMs } = await timed(hurried(url))
      expect(tookMs).toBeLessThan(TIMEOUT_MS + SLACK_MS)
      expect(result).toMatchObject({ statusCode: 200, error: null })
    })

    test('an abort ends an attempt at once', async () => {
      const stop = new AbortController()
      const url = await http(() => stop.abort())
      const { result, tookMs } = await timed(sender(60_000).send(delivery(url), stop.signal))
      expect(result.statusCode).toBeNull()
      expect(tookMs).toBeLessThan(SLACK_MS)
    })

    test('a signal that is aborted already sends nothing', async () => {
      let requests = 0
      const url = await http((_, response) => {
        requests += 1
        response.end()
      })
      const guard = new CountingGuard()
      const made = sender(PATIENT_MS, guard)
      expect((await made.send(delivery(url), AbortSignal.abort())).statusCode).toBeNull()
      expect(guard.asked).toBe(0)
      expect((await made.send(delivery(url), NEVER)).statusCode).toBe(200)
      expect(requests).toBe(1)
    })

    test('those that were given up while they connected ask for no connection later', async () => {
      const guard = new CountingGuard()
      const held: Array<() => void> = []
      guard.held = held
      const made = sender(PATIENT_MS, guard)
      const url = await http((_, response) => response.end())
      const stop = new AbortController()
      const attempts = Array.from({ length: 40 }, () => made.send(delivery(url), stop.signal))
      await expect.poll(() => guard.asked).toBeGreaterThan(15)
      stop.abort()
      for (const { statusCode } of await Promise.all(attempts)) expect(statusCode).toBeNull()
      guard.held = undefined
      for (const fail of held) fail()
      const before = guard.asked
      expect((await made.send(delivery(url), NEVER)).statusCode).toBe(200)
      expect(guard.asked).toBe(before + 1)
    })
  })

  describe('the answer', () => {
    test('is read up to 64 KB: an endless one costs its connection, not its status', async () => {
      const closed = Promise.withResolvers<void>()
      let writtenBytes = 0
      const url = await http((request, response) => {
        request.socket.on('close', closed.resolve)
        response.on('error', () => {})
        const more = () => {
          if (response.destroyed) return
          writtenBytes += 16_384
          if (response.write(Buffer.alloc(16_384))) setImmediate(more)
          else response.once('drain', more)
        }
        more()
      })
      const { result, tookMs } = await timed(sender().send(delivery(url), NEVER))
      expect(result).toMatchObject({ statusCode: 200, error: null })
      await closed.promise
      expect(tookMs).toBeLessThan(SLACK_MS)
      // The rest filled the buffers of the system.
      expect(writtenBytes).toBeLessThan(32 * 1024 * 1024)
    })

    test('that breaks off after its status has delivered', async () => {
      const url = await tcp((socket) => {
        socket.end('HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf')
      })
      expect(await post(url)).toMatchObject({ statusCode: 200, error: null })
    })

    test('that is no HTTP is none', async () => {
      const url = await tcp((socket) => socket.end('SSH-2.0-OpenSSH\r\n'))
      expect(await post(url)).toMatchObject({
        statusCode: null,
        error: 'the connection ended without a response',
      })
    })

    test('tells when to come again, in seconds or as a date', async () => {
      const inAMinute = new Date(Date.now() + 60_000).toUTCString()
      const values = ['120', inAMinute, 'soon']
      const url = await http((_, response) => {
        response.writeHead(503, { 'retry-after': values.shift() ?? '' }).end()
      })
      expect((await post(url)).retryAfterMs).toBe(120_000)
      const { retryAfterMs: untilDate } = await post(url)
      expect(untilDate).toBeGreaterThan(50_000)
      expect(untilDate).toBeLessThanOrEqual(60_000)
      expect((await post(url)).retryAfterMs).toBeNull()
    })
  })

  describe('what went wrong is told coarsely', () => {
    test('nobody listens', async () => {
      const server = createTcpServer()
      await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
      const { port } = server.address() as AddressInfo
      await new Promise((resolve) => server.close(resolve))
      const { error, statusCode } = await post(`http://127.0.0.1:${port}/`)
      expect({ error, statusCode }).toEqual({ error: 'no connection', statusCode: null })
    })

    test('the connection is closed at once', async () => {
      const url = await tcp((socket) => socket.destroy())
      expect(await post(url)).toMatchObject({
        statusCode: null,
        error: 'the connection ended without a response',
      })
    })

    test('a name that does not exist', async () => {
      const { error } = await sender(10_000).send(delivery('http://nowhere.invalid/'), NEVER)
      expect(error).toBe('the name could not be resolved')
    })

    test.each([
      ['signed by itself', SELF_SIGNED],
      ['whose issuer is not sent', WITHOUT_ISSUER],
    ])('a certificate %s', async (_, options) => {
      const port = await listen(createTlsServer(options, (_request, response) => response.end()))
      const { error, statusCode } = await post(`https://127.0.0.1:${port}/`)
      expect({ error, statusCode }).toEqual({
        error: 'no trusted TLS connection',
        statusCode: null,
      })
    })

    test('no address, port or system detail is in it', async () => {
      const { error } = await post('http://127.0.0.1:1/')
      expect(error).not.toMatch(/127|ECONN|\d/)
    })
  })
})

describe('retryAfterMs', () => {
  const now = Date.parse('2026-01-01T00:00:00Z')
  test.each<[string | string[] | undefined, number | null]>([
    [undefined, null],
    ['0', 0],
    ['1', 1_000],
    ['86400', 86_400_000],
    ['Thu, 01 Jan 2026 00:01:00 GMT', 60_000],
    ['Wed, 31 Dec 2025 00:00:00 GMT', 0],
    ['', null],
    ['-5', null],
    ['1.5', null],
    ['1e3', null],
    [' 5', null],
    ['99999999999', null],
    ['Thu, 99 Jan 2026 00:01:00 GMT', null],
    ['2026-01-01', null],
    [['1', '2'], null],
  ])('%j means %j', (header, expected) => {
    expect(retryAfterMs(header, now)).toBe(expected)
  })
})
