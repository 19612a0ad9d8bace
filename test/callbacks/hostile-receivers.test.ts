import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import type { Socket } from 'node:net'
import { type AddressInfo, connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { getCACertificates, setDefaultCACertificates } from 'node:tls'
import { promisify } from 'node:util'
import { gzipSync } from 'node:zlib'
import { afterEach, describe, expect, test } from 'vitest'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'
import {
  answering,
  CANARY_TOKEN,
  lookupOf,
  type RawConnection,
  requestsIn,
  startRawServer,
  testSender,
  within,
} from '../helpers/hostile-servers.ts'
import { startReceiver } from '../helpers/receiver.ts'
import { storedLog } from '../helpers/stored-log.ts'

const POLL = { timeout: 20_000, interval: 20 }
/** What sockets hold between the two ends, on loopback: not read by us, yet written by the other. */
const SOCKET_BUFFERS_BYTES = 16 * 1024 * 1024
const DAY_MS = 86_400_000

const UNANSWERED = 'the connection ended without a response'

describe('what follows the answer of a receiver', () => {
  test('2xx delivers, at the first attempt', async () => {
    await using story = await startStory({ CALLBACK_RETRY_SECONDS: '3600' })
    const paths = ['/200', '/201', '/202', '/204', '/299', '/103-204']
    const states = await story.deliver(paths, 'delivered')
    for (const [path, state] of states) {
      expect(state.attempts, path).toEqual([
        expect.objectContaining({ number: 1, status_code: Number(path.slice(-3)), error: null }),
      ])
      expect(state.next_attempt_at, path).toBeNull()
    }
    expect(story.receiver.received).toHaveLength(paths.length)
  })

  test('everything else is tried again by the schedule, within its jitter', async () => {
    await using story = await startStory({ CALLBACK_RETRY_SECONDS: '3600' })
    const paths = ['/500', '/502', '/404', '/401', '/400', '/408', '/301', '/304', '/429', '/503']
    const states = await story.deliver(paths, 'pending')
    for (const [path, state] of states) {
      expect(state.attempts, path).toEqual([
        expect.objectContaining({
          number: 1,
          status_code: Number(path.slice(1)),
          error: expect.stringContaining(`the receiver responded with ${path.slice(1)}`),
        }),
      ])
      expect(waitMs(state), path).toBeGreaterThanOrEqual(3600_000 * 0.8)
      expect(waitMs(state), path).toBeLessThanOrEqual(3600_000 * 1.2 + 10_000)
    }
    // Not all at once: receivers that fail together are not called again together.
    expect(new Set(states.map(([, state]) => waitMs(state))).size).toBeGreaterThan(1)
  })

  test('410 ends it', async () => {
    await using story = await startStory({ CALLBACK_RETRY_SECONDS: '0.05,0.05' })
    const [[, state] = expect.fail()] = await story.deliver(['/410'], 'given_up')
    expect(state).toMatchObject({
      next_attempt_at: null,
      attempts: [{ number: 1, status_code: 410 }],
    })
    expect(story.receiver.received).toHaveLength(1)
  })

  test('Retry-After is heeded in both forms, up to a day, never sooner than the schedule', async () => {
    await using story = await startStory({ CALLBACK_RETRY_SECONDS: '100' })
    const inTwoHours = new Date(Date.now() + 7_200_000).toUTCString()
    const inTenYears = new Date(Date.now() + 3650 * DAY_MS).toUTCString()
    const scheduled: [number, number] = [80_000, 120_000]
    const expected: Array<[path: string, [from: number, to: number]]> = [
      ['/503?7200', [7_200_000, 7_200_000]],
      ['/429?7200', [7_200_000, 7_200_000]],
      [`/503?${encodeURIComponent(inTwoHours)}`, [7_000_000, 7_200_000]],
      ['/503?315360000', [DAY_MS, DAY_MS]],
      [`/429?${encodeURIComponent(inTenYears)}`, [DAY_MS, DAY_MS]],
      ['/503?0', scheduled],
      [`/503?${encodeURIComponent('Wed, 21 Oct 2015 07:28:00 GMT')}`, scheduled],
      ['/503?soon', scheduled],
    ]
    const paths = expected.map(([path]) => path)
    const states = new Map(await story.deliver(paths, 'pending'))
    for (const [path, [from, to]] of expected) {
      const state = states.get(path) ?? expect.fail()
      expect(waitMs(state), path).toBeGreaterThanOrEqual(from - 1_000)
      expect(waitMs(state), path).toBeLessThanOrEqual(to + 10_000)
    }
  })

  test.each([
    ...['-5', '1.5', 'soon', '', '1e9', '0x7fffffff', '+120', '120, 240', '2999-01-01T00:00:00Z'],
    ...['Xyz, 99 Abc 2999 99:99:99 GMT', 'Wed, 21 Oct 2099 07:28:00', '21 Oct 2099', 'Infinity'],
  ])('Retry-After: %s is garbage, and ignored', async (retryAfter) => {
    await using target = await startRawServer(
      answering(`HTTP/1.1 503 Busy\r\nretry-after: ${retryAfter}\r\ncontent-length: 0\r\n\r\n`),
    )
    await using callbacks = testSender()
    expect(await callbacks.send(target.url)).toMatchObject({ statusCode: 503, retryAfterMs: null })
  })

  test('at the end of the schedule it is given up, with each attempt on record', async () => {
    await using story = await startStory({ CALLBACK_RETRY_SECONDS: '0.02,0.02,0.02' })
    const [[, state] = expect.fail()] = await story.deliver(['/500'], 'given_up')
    expect(state.attempts.map(({ number }) => number)).toEqual([1, 2, 3, 4])
    expect(state.next_attempt_at).toBeNull()
    expect(story.receiver.received).toHaveLength(4)
    expect(new Set(story.receiver.received.map(({ raw }) => raw.toString())).size).toBe(1)
    expect(webhookIds(story)).toEqual([state.webhook_id])
  })

  test.each([301, 302, 303, 307, 308])('a redirect (%i) leads nowhere', async (status) => {
    await using other = await startRawServer(
      answering('HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n'),
    )
    await using target = await startRawServer(
      answering(`HTTP/1.1 ${status} Moved\r\nlocation: ${other.url}\r\ncontent-length: 0\r\n\r\n`),
    )
    await using callbacks = testSender()
    expect(await callbacks.send(target.url)).toMatchObject({
      statusCode: status,
      error: `the receiver responded with ${status} (redirects are not followed: this one leads to ${new URL(other.url).host})`,
    })
    expect(target.connections).toHaveLength(1)
    expect(other.connections).toHaveLength(0)
  })
})

describe('a broken connection is a failure, told coarsely', () => {
  const behaviours: Record<string, (connection: RawConnection) => void> = {
    'closes without a reply': ({ socket }) => {
      socket.on('data', () => socket.end())
    },
    'resets the connection': ({ socket }) => {
      socket.on('data', () => socket.resetAndDestroy())
    },
    'closes before it is asked': ({ socket }) => {
      socket.destroy()
    },
    'speaks something else than HTTP': answering('SSH-2.0-OpenSSH_9.9\r\n'),
    'answers garbage': answering('\0\x01\x02 HTTP/1.1 200 OK\r\n\r\n'),
    'answers with a broken length': answering('HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n'),
    'answers with two lengths': answering(
      'HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab',
    ),
    'wants another protocol': answering(
      'HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n',
    ),
  }

  test.each(Object.entries(behaviours))('a receiver that %s', async (_, behave) => {
    await using target = await startRawServer(behave)
    await using callbacks = testSender()
    const result = await within(4_000, () => callbacks.send(target.url))
    expect(result).toEqual({ statusCode: null, error: UNANSWERED, retryAfterMs: null })
    // A connection lost at once may have been a stale one: it is tried once more, not more often.
    expect(target.connections.length).toBeLessThanOrEqual(2)
    await expect.poll(() => target.open(), POLL).toBe(0)
  })

  test('nobody listens', async () => {
    const gone = await startRawServer()
    await gone[Symbol.asyncDispose]()
    await using callbacks = testSender()
    expect(await callbacks.send(gone.url)).toEqual({
      statusCode: null,
      error: 'no connection',
      retryAfterMs: null,
    })
  })

  test('an answer that breaks off after its status counts by its status', async () => {
    await using target = await startRawServer(({ socket }) => {
      socket.on('data', () => {
        socket.write('HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf', () => socket.destroy())
      })
    })
    await using callbacks = testSender()
    expect(await callbacks.send(target.url)).toMatchObject({ statusCode: 200, error: null })
  })

  test('the service tries again and delivers once the receiver is well', async () => {
    await using receiver = await startReceiver((_, response, count) => {
      if (count <= 2) response.socket?.destroy()
      else response.end()
    })
    await using app = await startApp()
    const task = taskRequest({ callback_url: receiver.url })
    await app.submit(task)
    const state = await deliveryOf(app, task.task_id, 'delivered')
    expect(state.attempts.map(({ status_code }) => status_code)).toEqual([null, null, 200])
    expect(new Set(receiver.received.map(({ headers }) => headers['webhook-id'])).size).toBe(1)
    expect(JSON.stringify(state)).not.toContain('127.0.0.1')
  })
})

describe('a receiver without a trusted certificate gets nothing', () => {
  const trusted = getCACertificates('default')
  afterEach(() => setDefaultCACertificates(trusted))

  test('self-signed, and no way around it', async () => {
    const identity = await certificate('good.example')
    await using target = await startTlsReceiver(identity)
    await using callbacks = testSender({ lookup: lookupOf({ 'good.example': ['127.0.0.1'] }) })
    const url = `https://good.example:${target.port}/hook`
    expect(await callbacks.send(url)).toEqual({
      statusCode: null,
      error: 'no trusted TLS connection',
      retryAfterMs: null,
    })
    expect(target.requests).toBe(0)
    expectNothingInClear(target.bytes())

    // The same one, trusted: it was the certificate, nothing else.
    setDefaultCACertificates([...trusted, identity.cert])
    await using trusting = testSender({ lookup: lookupOf({ 'good.example': ['127.0.0.1'] }) })
    expect(await trusting.send(url)).toMatchObject({ statusCode: 200 })
    expect(target.requests).toBe(1)
    expectNothingInClear(target.bytes())
  })

  test('trusted, but for another name', async () => {
    const identity = await certificate('good.example')
    setDefaultCACertificates([...trusted, identity.cert])
    await using target = await startTlsReceiver(identity)
    await using callbacks = testSender({ lookup: lookupOf({ 'bad.example': ['127.0.0.1'] }) })
    for (const host of ['bad.example', '127.0.0.1', 'localhost']) {
      await using named = testSender({
        lookup: lookupOf({ 'bad.example': ['127.0.0.1'], localhost: ['127.0.0.1'] }),
      })
      expect(await named.send(`https://${host}:${target.port}/`), host).toEqual({
        statusCode: null,
        error: 'no trusted TLS connection',
        retryAfterMs: null,
      })
    }
    expect(target.requests).toBe(0)
    expectNothingInClear(target.bytes())
    expect(await callbacks.send(`https://bad.example:${target.port}/`)).toMatchObject({
      statusCode: null,
    })
  })

  test('trusted, but expired', async () => {
    const identity = await certificate('good.example', '20200102000000Z')
    setDefaultCACertificates([...trusted, identity.cert])
    await using target = await startTlsReceiver(identity)
    await using callbacks = testSender({ lookup: lookupOf({ 'good.example': ['127.0.0.1'] }) })
    expect(await callbacks.send(`https://good.example:${target.port}/`)).toMatchObject({
      statusCode: null,
      error: 'no trusted TLS connection',
    })
    expect(target.requests).toBe(0)
  })

  test('https to an http port sends nothing in clear', async () => {
    await using target = await startRawServer(({ socket }) => {
      socket.on('data', () => {
        socket.end('HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n')
      })
    })
    await using callbacks = testSender()
    expect(await callbacks.send(target.url.replace('http:', 'https:'))).toEqual({
      statusCode: null,
      error: 'no trusted TLS connection',
      retryAfterMs: null,
    })
    expect(target.connections.length).toBeGreaterThan(0)
    for (const { received } of target.connections) expectNothingInClear(received())
  })
})

describe('one deadline ends an attempt, whatever the receiver does', () => {
  const TIMEOUT_MS = 800
  const TIMED_OUT = { statusCode: null, error: 'no response in time', retryAfterMs: null }
  const IN_TIME_MS = TIMEOUT_MS + 2_500

  test('a name that is never resolved, while other names are', async () => {
    await using target = await startRawServer(answering('HTTP/1.1 204 No Content\r\n\r\n'))
    const known = lookupOf({ 'works.example': ['127.0.0.1'] })
    let asked = 0
    await using callbacks = testSender({
      timeoutMs: TIMEOUT_MS,
      lookup: (hostname, options, done) => {
        if (hostname !== 'hangs.example') known(hostname, options, done)
        else asked += 1
      },
    })
    const hanging = [1, 2, 3].map(() =>
      within(IN_TIME_MS, () => callbacks.send(`http://hangs.example:${target.port}/`)),
    )
    expect(await callbacks.send(`http://works.example:${target.port}/`)).toMatchObject({
      statusCode: 204,
    })
    expect(await Promise.all(hanging)).toEqual([TIMED_OUT, TIMED_OUT, TIMED_OUT])
    expect(asked).toBe(1)
    expect(target.connections).toHaveLength(1)
  })

  test('accepts, and says nothing', async () => {
    await using target = await startRawServer()
    await expectTimeout(target, target.url)
    expect(target.connections[0]?.received().toString()).toContain('POST /hook HTTP/1.1')
  })

  test('accepts, and never shakes hands for TLS', async () => {
    await using target = await startRawServer()
    await expectTimeout(target, target.url.replace('http:', 'https:'))
    for (const { received } of target.connections) expectNothingInClear(received())
  })

  test('drips its headers', async () => {
    await using target = await startRawServer(dripping('HTTP/1.1 200 OK\r\nx-long: ', 'a'))
    await expectTimeout(target, target.url)
  })

  test('sends interim responses forever', async () => {
    await using target = await startRawServer(dripping('', 'HTTP/1.1 102 Processing\r\n\r\n'))
    await expectTimeout(target, target.url)
  })

  test('never reads the body', async () => {
    await using target = await startRawServer(({ socket }) => {
      socket.pause()
    })
    await expectTimeout(target, target.url, Buffer.alloc(5 * 1024 * 1024, 'x'))
  })

  test.each([
    [200, null],
    [500, 'the receiver responded with 500'],
  ])(
    'a body that drips for ever after %i does not change what the status said',
    async (statusCode, error) => {
      await using target = await startRawServer(
        dripping(
          `HTTP/1.1 ${statusCode} Status\r\ntransfer-encoding: chunked\r\n\r\n`,
          '1\r\na\r\n',
        ),
      )
      await using callbacks = testSender({ timeoutMs: TIMEOUT_MS })
      const result = await within(IN_TIME_MS, () => callbacks.send(target.url))
      await expect.poll(() => target.open(), POLL).toBe(0)
      expect(result).toEqual({ statusCode, error, retryAfterMs: null })
    },
  )

  test('after a timeout nothing is sent late', async () => {
    let resolveName = () => {}
    await using target = await startRawServer(answering('HTTP/1.1 204 No Content\r\n\r\n'))
    await using callbacks = testSender({
      timeoutMs: TIMEOUT_MS,
      lookup: (_hostname, _options, done) => {
        resolveName = () => done(null, [{ address: '127.0.0.1', family: 4 }])
      },
    })
    const url = `http://slow.example:${target.port}`
    expect(await callbacks.send(`${url}/late`)).toEqual(TIMED_OUT)
    resolveName()
    // The next one to the same name goes through, and is the first that the receiver hears of us.
    const next = callbacks.send(`${url}/next`)
    const resolving = setInterval(() => resolveName(), 20)
    expect(await next.finally(() => clearInterval(resolving))).toMatchObject({ statusCode: 204 })
    const heard = target.connections.map(({ received }) => received().toString()).join('')
    expect(heard).toContain('POST /next ')
    expect(heard).not.toContain('POST /late ')
  })

  async function expectTimeout(
    target: Awaited<ReturnType<typeof startRawServer>>,
    url: string,
    logs = Buffer.from('hi'),
  ): Promise<void> {
    // A large body takes its time to be encoded before anything is sent.
    const timeoutMs = logs.length > 1_000 ? TIMEOUT_MS * 3 : TIMEOUT_MS
    await using callbacks = testSender({ timeoutMs })
    const payload = {
      taskName: 'a.sh',
      taskId: 't',
      success: true,
      logs: storedLog(logs),
    }
    const result = await within(IN_TIME_MS + timeoutMs, () => callbacks.send(url, { payload }))
    expect(result).toEqual(TIMED_OUT)
    expect(target.connections).toHaveLength(1)
    // The connection is let go of as well, soon after.
    await expect.poll(() => target.connections[0]?.socket.resume() && target.open(), POLL).toBe(0)
  }
})

describe('an answer of any size counts by its status and costs us 64 KB', () => {
  const endless = Buffer.alloc(64 * 1024, 'x')

  test.each([
    ['200 and a body without end', 200, 'HTTP/1.1 200 OK\r\n\r\n'],
    ['200 and a body of 10 GB', 200, 'HTTP/1.1 200 OK\r\ncontent-length: 10737418240\r\n\r\n'],
    ['500 and a body without end', 500, 'HTTP/1.1 500 Oh\r\n\r\n'],
  ])('%s', async (_, statusCode, head) => {
    await using target = await startRawServer(({ socket }) => {
      const pour = () => {
        while (!socket.destroyed && socket.write(endless)) {}
      }
      socket.once('data', () => {
        socket.write(head)
        pour()
      })
      socket.on('drain', pour)
    })
    await using callbacks = testSender({ timeoutMs: 20_000 })
    const result = await within(10_000, () => callbacks.send(target.url))
    expect(result.statusCode).toBe(statusCode)
    await expect.poll(() => target.open(), POLL).toBe(0)
    expect(target.connections).toHaveLength(1)
    expect(target.connections[0]?.socket.bytesWritten).toBeLessThan(SOCKET_BUFFERS_BYTES)
  })

  test('a gzip bomb is not inflated', async () => {
    const bomb = gzipSync(Buffer.alloc(64 * 1024 * 1024))
    await using target = await startRawServer(({ socket }) => {
      socket.once('data', () => {
        socket.write(
          `HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: ${bomb.length}\r\n\r\n`,
        )
        socket.write(bomb)
      })
    })
    await using callbacks = testSender()
    // A first one, so that what is loaded once is loaded.
    expect(await callbacks.send(target.url)).toMatchObject({ statusCode: 200 })
    const before = process.memoryUsage()
    expect(await callbacks.send(target.url)).toMatchObject({ statusCode: 200 })
    const after = process.memoryUsage()
    const grown = after.arrayBuffers + after.external - before.arrayBuffers - before.external
    expect(grown).toBeLessThan(32 * 1024 * 1024)
  })

  test('headers without end are refused', async () => {
    await using target = await startRawServer(({ socket }) => {
      const pour = () => {
        while (!socket.destroyed && socket.write('x-more: and more and more\r\n'.repeat(100))) {}
      }
      socket.once('data', () => {
        socket.write('HTTP/1.1 200 OK\r\n')
        pour()
      })
      socket.on('drain', pour)
    })
    await using callbacks = testSender()
    const result = await within(4_500, () => callbacks.send(target.url))
    expect(result).toMatchObject({ statusCode: null, error: UNANSWERED })
    await expect.poll(() => target.open(), POLL).toBe(0)
  })
})

describe('kept connections', () => {
  test('one that the receiver closes just then costs no failed attempt', async () => {
    await using target = await startRawServer((connection) => {
      let answered = false
      connection.socket.on('data', () => {
        if (requestsIn(connection.received().toString('latin1')) === 0) return
        if (answered) connection.socket.destroy()
        else connection.socket.write('HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok')
        answered = true
      })
    })
    await using callbacks = testSender()
    for (const webhookId of ['msg_1', 'msg_2', 'msg_3']) {
      expect(await callbacks.send(target.url, { webhookId })).toMatchObject({ statusCode: 200 })
    }
    const heard = target.connections.map(({ received }) => received().toString())
    // A connection was used twice, and closed at that: there was a stale one.
    expect(heard.map(requestsIn)).toContain(2)
    for (const id of ['msg_1', 'msg_2', 'msg_3']) expect(heard.join('')).toContain(id)
  })

  test.each([
    ['reset', (socket: Socket) => socket.resetAndDestroy()],
    ['closed', (socket: Socket) => socket.destroy()],
    ['half closed', (socket: Socket) => socket.end()],
    ['closed after the beginning of an answer', (socket: Socket) => socket.end('HTTP/1.1 2')],
  ])('a new one that is %s after the POST gets no second one in the attempt', async (_, end) => {
    await using target = await startRawServer((connection) => {
      connection.socket.on('data', () => {
        if (requestsIn(connection.received().toString('latin1')) === 1) end(connection.socket)
      })
    })
    await using callbacks = testSender()
    for (const webhookId of ['msg_1', 'msg_2']) {
      expect(await callbacks.send(target.url, { webhookId })).toMatchObject({
        statusCode: null,
        error: UNANSWERED,
      })
    }
    const heard = target.connections.map(({ received }) => received().toString())
    expect(heard.map((text) => /msg_\d/.exec(text)?.[0])).toEqual(['msg_1', 'msg_2'])
  })

  test.each([1, 2])(
    'an interim response that was not requested is reported as such, on connection use %i',
    async (use) => {
      await using target = await startRawServer((connection) => {
        let answered = 0
        connection.socket.on('data', () => {
          const whole = requestsIn(connection.received().toString('latin1'))
          for (; answered < whole; answered += 1) {
            if (answered + 1 === use) connection.socket.write('HTTP/1.1 100 Continue\r\n\r\n')
            connection.socket.write('HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n')
          }
        })
      })
      await using callbacks = testSender()
      // A connection is not kept yet in the moment in which its answer has come.
      const results = [await callbacks.send(target.url)]
      while (results.length < 5 && results.at(-1)?.statusCode !== null) {
        results.push(await callbacks.send(target.url))
      }
      expect(results.at(-1)).toMatchObject({
        statusCode: null,
        error: 'an interim response that was not requested',
      })
      const heard = target.connections.map(({ received }) => requestsIn(received().toString()))
      expect(heard).toContain(use)
      expect(heard.reduce((sum, count) => sum + count, 0)).toBe(results.length)
    },
  )

  test('one that was closed while idle is not used', async () => {
    await using target = await startRawServer((connection) => {
      answering('HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n')(connection)
    })
    await using callbacks = testSender()
    expect(await callbacks.send(target.url)).toMatchObject({ statusCode: 200 })
    target.connections[0]?.socket.end()
    await expect.poll(() => target.open(), POLL).toBe(0)
    expect(await callbacks.send(target.url)).toMatchObject({ statusCode: 200 })
    expect(target.connections).toHaveLength(2)
  })

  test('the service records one attempt for a callback that met a stale one', async () => {
    await using target = await startRawServer((connection, count) => {
      let answered = false
      connection.socket.on('data', () => {
        if (requestsIn(connection.received().toString('latin1')) === 0) return
        if (answered && count === 1) connection.socket.destroy()
        else connection.socket.write('HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n')
        answered = true
      })
    })
    await using app = await startApp({ CALLBACK_RETRY_SECONDS: '3600' })
    const task = taskRequest({ callback_url: target.url })
    await app.submit(task)
    await deliveryOf(app, task.task_id, 'delivered')
    // At once, so that the connection is still kept.
    await app.post(`/tasks/${task.task_id}/callback/redeliver`)
    await expect.poll(async () => (await state(app, task.task_id)).attempts.length, POLL).toBe(2)
    expect(await state(app, task.task_id)).toMatchObject({
      status: 'delivered',
      attempts: [{ status_code: 200 }, { status_code: 200 }],
    })
  })
})

describe('a dead origin holds up nobody else', () => {
  test('with 100 callbacks to it, tasks run on and a second origin is served at once', {
    timeout: 90_000,
  }, async () => {
    await using dead = await startRawServer()
    await using receiver = await startReceiver()
    await using app = await startApp({
      CALLBACK_TIMEOUT_SECONDS: '120',
      SHUTDOWN_GRACE_SECONDS: '0',
      MAX_CONCURRENT_TASKS: '4',
    })
    const stuck = Array.from({ length: 100 }, () => taskRequest({ callback_url: dead.url }))
    await Promise.all(stuck.map((task) => app.submit(task)))
    // It has never answered.
    await expect.poll(() => dead.open(), POLL).toBe(1)
    const urgent = taskRequest({ callback_url: receiver.url })
    await app.submit(urgent)

    expect((await receiver.callbackOf(urgent.task_id)).body.success).toBe(true)
    const succeeded = async () => {
      const { body } = await app.get('/tasks?status=succeeded&limit=500')
      return (body.tasks as unknown[]).length
    }
    // The slots were free all along: none of the hundred waited for its callback.
    await expect.poll(succeeded, { timeout: 60_000, interval: 50 }).toBe(101)
    expect(dead.open()).toBe(1)
    expect(dead.connections).toHaveLength(1)
    await deliveryOf(app, urgent.task_id, 'delivered')
    // Redelivering is not held up either.
    await app.post(`/tasks/${urgent.task_id}/callback/redeliver`)
    await expect.poll(() => receiver.received.length, POLL).toBe(2)
  })
})

describe('attempts of one delivery', () => {
  test('are never made two at a time, however often it is asked for', async () => {
    let underWay = 0
    let atOnce = 0
    const answers: Array<() => void> = []
    await using receiver = await startReceiver((_, response) => {
      underWay += 1
      atOnce = Math.max(atOnce, underWay)
      answers.push(() => {
        underWay -= 1
        response.writeHead(500).end()
      })
    })
    await using app = await startApp({ CALLBACK_RETRY_SECONDS: '0.01,0.01,0.01,0.01,0.01' })
    const task = taskRequest({ callback_url: receiver.url })
    await app.submit(task)
    const redeliver = () => app.post(`/tasks/${task.task_id}/callback/redeliver`)
    for (let attempt = 1; attempt <= 6; attempt += 1) {
      await expect.poll(() => receiver.received.length, POLL).toBe(attempt)
      const asked = await Promise.all(Array.from({ length: 10 }, redeliver))
      expect(asked.map(({ status }) => status)).toEqual(Array(10).fill(409))
      expect(asked[0]?.body).toMatchObject({ success: false })
      answers.shift()?.()
      // Also in the moment between the answer and its record.
      await Promise.all(Array.from({ length: 10 }, redeliver))
    }
    expect(atOnce).toBe(1)
    await expect
      .poll(async () => {
        for (const answer of answers.splice(0)) answer()
        return (await state(app, task.task_id)).status
      }, POLL)
      .toBe('given_up')
    const { attempts } = await state(app, task.task_id)
    expect(attempts.map(({ number }) => number)).toEqual(attempts.map((_, index) => index + 1))
    expect(attempts).toHaveLength(receiver.received.length)
    expect(atOnce).toBe(1)
  })

  test('asked for after it was given up: one more, on record with the others, and none by itself', async () => {
    await using story = await startStory({ CALLBACK_RETRY_SECONDS: '0.01' })
    const [[, first] = expect.fail()] = await story.deliver(['/500'], 'given_up')
    expect(first.attempts).toHaveLength(2)

    await story.app.post(`/tasks/${first.task_id}/callback/redeliver`)
    await expect
      .poll(async () => (await state(story.app, first.task_id)).attempts.length, POLL)
      .toBe(3)
    const failed = await state(story.app, first.task_id)
    expect(failed).toMatchObject({ status: 'given_up', next_attempt_at: null })
    expect(failed.attempts.slice(0, 2)).toEqual(first.attempts)

    story.healthy = true
    expect(await story.app.post(`/tasks/${first.task_id}/callback/redeliver`)).toMatchObject({
      status: 200,
      body: { success: true },
    })
    const delivered = await deliveryOf(story.app, first.task_id, 'delivered')
    expect(delivered.attempts.map(({ status_code }) => status_code)).toEqual([500, 500, 500, 200])
    expect(story.receiver.received).toHaveLength(4)
    expect(webhookIds(story)).toEqual([first.webhook_id])
  })

  test('asked for after a 410: one more', async () => {
    await using story = await startStory({ CALLBACK_RETRY_SECONDS: '0.01,0.01' })
    const [[, gone] = expect.fail()] = await story.deliver(['/410'], 'given_up')
    story.healthy = true
    await story.app.post(`/tasks/${gone.task_id}/callback/redeliver`)
    const delivered = await deliveryOf(story.app, gone.task_id, 'delivered')
    expect(delivered.attempts).toHaveLength(2)
  })

  test('asked for after it was delivered: the same again, and a failure changes nothing', async () => {
    await using receiver = await startReceiver((_, response, count) => {
      response.writeHead(count === 2 ? 500 : 200).end()
    })
    await using app = await startApp({ CALLBACK_RETRY_SECONDS: '0.01,0.01' })
    const task = taskRequest({ callback_url: receiver.url, callback_url_token: CANARY_TOKEN })
    await app.submit(task)
    await deliveryOf(app, task.task_id, 'delivered')
    for (const count of [2, 3]) {
      await app.post(`/tasks/${task.task_id}/callback/redeliver`)
      await expect
        .poll(async () => (await state(app, task.task_id)).attempts.length, POLL)
        .toBe(count)
      expect(await state(app, task.task_id)).toMatchObject({
        status: 'delivered',
        next_attempt_at: null,
      })
    }
    expect(receiver.received).toHaveLength(3)
    const [first, ...others] = receiver.received
    for (const other of others) {
      expect(other.raw).toEqual(first?.raw)
      expect(other.headers['webhook-id']).toBe(first?.headers['webhook-id'])
      expect(other.headers.authorization).toBe(`Bearer ${CANARY_TOKEN}`)
    }
  })

  test('asked for while it waits for its next one: made now, and the schedule goes on', async () => {
    await using story = await startStory({ CALLBACK_RETRY_SECONDS: '3600,3600' })
    const [[, waiting] = expect.fail()] = await story.deliver(['/500'], 'pending')
    await story.app.post(`/tasks/${waiting.task_id}/callback/redeliver`)
    await expect
      .poll(async () => (await state(story.app, waiting.task_id)).attempts.length, POLL)
      .toBe(2)
    const next = await state(story.app, waiting.task_id)
    expect(next.status).toBe('pending')
    expect(waitMs(next)).toBeGreaterThan(2_800_000)
  })

  test('one under way when the service stops is cut short in time, and made again by the next', async () => {
    const dead = await startRawServer()
    await using first = await startApp({
      CALLBACK_TIMEOUT_SECONDS: '60',
      SHUTDOWN_GRACE_SECONDS: '0.2',
    })
    const task = taskRequest({ callback_url: dead.url })
    await first.submit(task)
    await expect.poll(() => dead.open(), POLL).toBe(1)
    const [sent] = dead.connections
    await expect.poll(() => requestsIn(sent?.received().toString() ?? ''), POLL).toBe(1)
    await within(10_000, () => first.stop())
    const webhookId = /webhook-id: (\S+)/.exec(sent?.received().toString() ?? '')?.[1]
    await dead[Symbol.asyncDispose]()

    await using alive = await startRawServer(answering('HTTP/1.1 204 No Content\r\n\r\n'), {
      port: dead.port,
    })
    await using second = await startApp({}, { dataDir: first.dataDir })
    const delivered = await deliveryOf(second, task.task_id, 'delivered')
    expect(delivered.attempts).toMatchObject([{ number: 1, status_code: 204 }])
    expect(delivered.webhook_id).toBe(webhookId)
    const heard = alive.connections[0]?.received().toString() ?? ''
    expect(heard).toContain(`webhook-id: ${webhookId}`)
    expect(bodyIn(heard)).toBe(bodyIn(sent?.received().toString() ?? ''))
  })
})

interface CallbackState {
  task_id: string
  status: string
  webhook_id: string
  next_attempt_at: string | null
  attempts: Array<{
    number: number
    started_at: string
    status_code: number | null
    error: string | null
  }>
}

/** An app whose receiver answers as the path of the callback URL says: `/503?<Retry-After>`. */
async function startStory(env: Record<string, string>) {
  const received: Array<{ raw: Buffer; webhookId: string }> = []
  const server = createServer(async (request, response) => {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk as Buffer)
    received.push({
      raw: Buffer.concat(chunks),
      webhookId: String(request.headers['webhook-id']),
    })
    const [path = '', retryAfter] = (request.url ?? '').split('?')
    if (path.startsWith('/103-')) response.writeEarlyHints({ link: '</style.css>; rel=preload' })
    if (retryAfter !== undefined) response.setHeader('retry-after', decodeURIComponent(retryAfter))
    response.writeHead(story.healthy ? 200 : Number(path.slice(-3))).end()
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  // Holds: it listens on TCP.
  const { port } = server.address() as AddressInfo
  const app = await startApp(env)
  const story = {
    app,
    /** From now on it answers 200. */
    healthy: false,
    receiver: { received },
    /** Runs a task for each path and waits until its callback has had an attempt and this status. */
    async deliver(paths: string[], status: string): Promise<Array<[string, CallbackState]>> {
      return Promise.all(
        paths.map(async (path) => {
          const task = taskRequest({ callback_url: `http://127.0.0.1:${port}${path}` })
          expect((await app.submit(task)).status).toBe(200)
          return [path, await deliveryOf(app, task.task_id, status)] satisfies [
            string,
            CallbackState,
          ]
        }),
      )
    },
    async [Symbol.asyncDispose]() {
      await app[Symbol.asyncDispose]()
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
  return story
}

async function state(app: TestApp, taskId: string): Promise<CallbackState> {
  const { body } = await app.get(`/tasks/${taskId}/callback`)
  // Holds: what the route answers, as `callbackStateSchema` declares it.
  return body as unknown as CallbackState
}

async function deliveryOf(app: TestApp, taskId: string, status: string): Promise<CallbackState> {
  await expect
    .poll(async () => {
      const now = await state(app, taskId)
      return now.attempts.length > 0 && now.status
    }, POLL)
    .toBe(status)
  return state(app, taskId)
}

/** From the start of the last attempt to the next. */
function waitMs({ attempts, next_attempt_at }: CallbackState): number {
  return Date.parse(next_attempt_at ?? '') - Date.parse(attempts.at(-1)?.started_at ?? '')
}

function webhookIds(story: { receiver: { received: Array<{ webhookId: string }> } }): string[] {
  return [...new Set(story.receiver.received.map(({ webhookId }) => webhookId))]
}

function bodyIn(text: string): string {
  return text.slice(text.indexOf('\r\n\r\n') + 4)
}

/** Writes `head` once a request has come, then `more` again and again, a few at a time. */
function dripping(head: string, more: string): (connection: RawConnection) => void {
  return ({ socket }) => {
    socket.once('data', () => {
      socket.write(head)
      const timer = setInterval(() => socket.write(more), 20)
      socket.on('close', () => clearInterval(timer))
    })
  }
}

function expectNothingInClear(bytes: Buffer): void {
  const text = bytes.toString('latin1')
  expect(text).not.toContain(CANARY_TOKEN)
  expect(text).not.toContain('POST')
  expect(text).not.toContain('task_name')
  expect(text).not.toContain('webhook')
}

interface Identity {
  key: string
  cert: string
}

/** A self-signed certificate, made now; it ends in the past when told so. */
async function certificate(name: string, end = '20490101000000Z'): Promise<Identity> {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-tls-'))
  const openssl = (...args: string[]) =>
    promisify(execFile)('openssl', args, { cwd: folder, encoding: 'utf8' })
  try {
    const settings = [
      ...['[ca]', 'default_ca=here', '[here]', 'database=index', 'new_certs_dir=.'],
      ...['rand_serial=yes', 'default_md=sha256', 'policy=any', 'x509_extensions=names'],
      ...['[any]', 'commonName=supplied', '[names]', `subjectAltName=DNS:${name}`],
    ]
    await writeFile(join(folder, 'settings'), settings.join('\n'))
    await writeFile(join(folder, 'index'), '')
    const algorithm = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes']
    await openssl('req', ...algorithm, '-subj', `/CN=${name}`, '-keyout', 'key', '-out', 'request')
    const made = ['-selfsign', '-batch', '-notext', '-in', 'request', '-out', 'cert']
    const dates = ['-startdate', '20200101000000Z', '-enddate', end]
    await openssl('ca', '-config', 'settings', '-keyfile', 'key', ...made, ...dates)
    const [key, cert] = await Promise.all(
      ['key', 'cert'].map((file) => readFile(join(folder, file), 'utf8')),
    )
    return { key: key ?? '', cert: cert ?? '' }
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

/** An HTTPS receiver behind a listener that keeps all bytes that pass. */
async function startTlsReceiver(identity: Identity) {
  const counts = { requests: 0 }
  const server = createTlsServer(identity, (request, response) => {
    counts.requests += 1
    request.resume()
    response.end('ok')
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  // Holds: it listens on TCP.
  const { port } = server.address() as AddressInfo
  const front = await startRawServer(({ socket }) => {
    const back = connect(port, '127.0.0.1')
    back.on('error', () => socket.destroy())
    socket.on('close', () => back.destroy())
    socket.pipe(back).pipe(socket)
  })
  return {
    port: front.port,
    get requests() {
      return counts.requests
    },
    bytes: () => Buffer.concat(front.connections.map(({ received }) => received())),
    async [Symbol.asyncDispose]() {
      await front[Symbol.asyncDispose]()
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}
