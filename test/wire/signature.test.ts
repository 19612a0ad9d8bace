import fc from 'fast-check'
import { Webhook } from 'standardwebhooks'
import { describe, expect, test } from 'vitest'
import { ConfigError, loadConfig } from '../../src/config.ts'
import { signatures, signingKey } from '../../src/wire/signature.ts'
import { startApp, taskRequest } from '../helpers/app.ts'
import { type Received, startReceiver } from '../helpers/receiver.ts'

const CURRENT = `whsec_${Buffer.alloc(32, 'current').toString('base64')}`
const OLD = `whsec_${Buffer.alloc(24, 'old').toString('base64')}`
const FOREIGN = `whsec_${Buffer.alloc(32, 'foreign').toString('base64')}`

describe('a signature', () => {
  test('is the one of the test vector that all reference libraries share', () => {
    const key = signingKey('whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw') ?? expect.fail()
    const message = {
      id: 'msg_p5jXN8AQM9LWM0D4loKWxJek',
      timestamp: 1614265330,
      body: Buffer.from('{"test": 2432232314}'),
    }
    expect(signatures([key], message)).toBe('v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=')
  })

  test('is the same as the one of the standardwebhooks package, for any key and text', () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ minLength: 24, maxLength: 64 }),
        fc.string({ unit: 'grapheme' }),
        fc.integer({ min: 0, max: 4_000_000_000 }),
        (bytes, text, timestamp) => {
          const secret = `whsec_${Buffer.from(bytes).toString('base64')}`
          const key = signingKey(secret) ?? expect.fail()
          const body = Buffer.from(text)
          expect(signatures([key], { id: 'msg_1', timestamp, body })).toBe(
            new Webhook(secret).sign('msg_1', new Date(timestamp * 1000), body),
          )
        },
      ),
      { numRuns: 200 },
    )
  })

  test.each([
    ['whole', Buffer.alloc(25, 'k').toString('base64')],
    ['without its padding', Buffer.alloc(25, 'k').toString('base64').replace(/=+$/, '')],
    ['with too much padding', `${Buffer.alloc(24, 'k').toString('base64')}==`],
    ['with a character cut off', 'kkkk'.repeat(10).slice(1)],
  ])('a secret %s is the same key to us as to the receivers', (_, base64) => {
    const secret = `whsec_${base64}`
    const key = signingKey(secret) ?? expect.fail()
    const body = Buffer.from('{}')
    expect(signatures([key], { id: 'msg_1', timestamp: 1_700_000_000, body })).toBe(
      new Webhook(secret).sign('msg_1', new Date(1_700_000_000_000), body),
    )
  })
})

describe('CALLBACK_SIGNING_SECRETS', () => {
  const bytes = (count: number) => Buffer.alloc(count, 'secret').toString('base64')
  const bad = [
    ...[bytes(32), `whsk_${bytes(32)}`, `WHSEC_${bytes(32)}`, 'whsec_', 'whsec_secret'],
    ...[`whsec_${bytes(23)}`, `whsec_${bytes(65)}`, `whsec_${bytes(32)}!`, `whsec_ ${bytes(32)}`],
    ...[`whsec_${bytes(32).replace('=', '')}*`, `whsec_${'_-'.repeat(20)}`, `"whsec_${bytes(32)}"`],
  ]

  test.each(bad)('%s is refused, and not repeated', (secret) => {
    for (const value of [secret, `${CURRENT},${secret}`, `${secret}\n${OLD}`]) {
      const err = caught(() => loadConfig({ CALLBACK_SIGNING_SECRETS: value }))
      expect(err).toBeInstanceOf(ConfigError)
      const told = `${err} ${JSON.stringify(err)} ${err.stack}`
      expect(told).toContain('CALLBACK_SIGNING_SECRETS')
      for (const each of value.split(/[,\n]/)) {
        const hidden = each.replace(/^"?whs(ec|k)_/i, '').trim()
        if (hidden.length >= 6) expect(told).not.toContain(hidden)
      }
    }
  })

  test('24 to 64 bytes are taken, comma or line separated, in their order', () => {
    const { callbackSigningKeys } = loadConfig({
      CALLBACK_SIGNING_SECRETS: ` ${CURRENT} , ${OLD}\nwhsec_${bytes(64)},`,
    })
    expect(callbackSigningKeys.map((key) => key.length)).toEqual([32, 24, 64])
    expect(callbackSigningKeys[0]).toEqual(Buffer.alloc(32, 'current'))
  })
})

describe('a delivered callback', () => {
  test('verifies with either of two secrets, and with no other', async () => {
    const received = await callbackWith({ CALLBACK_SIGNING_SECRETS: `${CURRENT},${OLD}` })
    expect(received.headers['webhook-signature']).toMatch(
      /^v1,[A-Za-z0-9+/]{43}= v1,[A-Za-z0-9+/]{43}=$/,
    )
    for (const secret of [CURRENT, OLD]) {
      expect(verified(secret, received)).toEqual({
        task_name: 'echo.sh',
        task_id: received.body.task_id,
        success: true,
        logs: 'hi\n',
      })
    }
    expect(() => verified(FOREIGN, received)).toThrow('No matching signature')
  })

  test('verifies no more once anything of it was changed', async () => {
    const received = await callbackWith({ CALLBACK_SIGNING_SECRETS: CURRENT })
    const { headers, raw } = received
    expect(verified(CURRENT, received)).toBeDefined()
    const forged: Received[] = [
      { ...received, raw: Buffer.from(raw.toString().replace('true', 'true ')) },
      { ...received, headers: { ...headers, 'webhook-id': `${headers['webhook-id']}0` } },
      {
        ...received,
        headers: {
          ...headers,
          'webhook-timestamp': String(Number(headers['webhook-timestamp']) + 1),
        },
      },
    ]
    for (const each of forged) expect(() => verified(CURRENT, each)).toThrow()
  })

  test('is signed byte for byte, whatever the log holds', async () => {
    const received = await callbackWith(
      { CALLBACK_SIGNING_SECRETS: CURRENT },
      { task_file_name: 'bad-bytes.sh' },
    )
    expect(verified(CURRENT, received)).toMatchObject({
      logs: expect.stringContaining('\ufffd'),
    })
  })

  test('carries no signature without secrets', async () => {
    const { headers } = await callbackWith({})
    expect(headers['webhook-id']).toBeDefined()
    expect(headers['webhook-timestamp']).toBeDefined()
    expect(headers).not.toHaveProperty('webhook-signature')
  })

  test('that is repeated has a new timestamp and signature, and the same id and bytes', async () => {
    // A clock that each failed attempt moves on.
    let skippedMs = 0
    await using receiver = await startReceiver((_, response, count) => {
      if (count < 3) skippedMs += 5_000
      response.writeHead(count < 3 ? 500 : 200).end()
    })
    await using app = await startApp(
      { CALLBACK_SIGNING_SECRETS: `${CURRENT},${OLD}` },
      { now: () => Date.now() + skippedMs },
    )
    const task = taskRequest({ callback_url: receiver.url })
    await app.submit(task)
    await expect.poll(() => receiver.received.length, { timeout: 20_000 }).toBe(3)

    const stamps = receiver.received.map(({ headers }) => Number(headers['webhook-timestamp']))
    for (const [index, stamp] of stamps.entries()) {
      if (index > 0) expect(stamp).toBeGreaterThanOrEqual((stamps[index - 1] ?? 0) + 5)
    }
    const distinct = (name: string) =>
      new Set(receiver.received.map(({ headers }) => headers[name])).size
    expect(distinct('webhook-id')).toBe(1)
    expect(distinct('webhook-signature')).toBe(3)
    for (const received of receiver.received) {
      expect(received.raw).toEqual(receiver.received[0]?.raw)
      expect(verified(CURRENT, received)).toMatchObject({ task_id: task.task_id })
      expect(verified(OLD, received)).toMatchObject({ task_id: task.task_id })
    }
  })
})

/** Runs a task and returns its callback. */
async function callbackWith(
  env: Record<string, string>,
  overrides: object = {},
): Promise<Received> {
  await using receiver = await startReceiver()
  await using app = await startApp(env)
  const task = taskRequest({ callback_url: receiver.url, ...overrides })
  expect((await app.submit(task)).status).toBe(200)
  return await receiver.callbackOf(task.task_id)
}

/** What the package makes of a callback; throws when it is not satisfied. */
function verified(secret: string, { raw, headers }: Received): unknown {
  return new Webhook(secret).verify(raw.toString(), {
    'webhook-id': String(headers['webhook-id']),
    'webhook-timestamp': String(headers['webhook-timestamp']),
    'webhook-signature': String(headers['webhook-signature']),
  })
}

function caught(work: () => unknown): Error {
  try {
    work()
  } catch (err) {
    if (err instanceof Error) return err
  }
  throw new Error('nothing was thrown')
}
