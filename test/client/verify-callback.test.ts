import { randomBytes } from 'node:crypto'
import { Webhook } from 'standardwebhooks'
import { Headers as UndiciHeaders } from 'undici'
import { describe, expect, test } from 'vitest'
import { CallbackVerificationError, verifyCallback } from '../../src/client/verify-callback.ts'
import { startApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'

const secretOf = () => `whsec_${randomBytes(32).toString('base64')}`
const SECRET = secretOf()
const CALLBACK = { task_name: 'a.sh', task_id: 'a', success: true, logs: 'é\n' }

/** As another library signs it. */
function signed(body = JSON.stringify(CALLBACK), { at = new Date(), secret = SECRET } = {}) {
  return {
    body,
    headers: {
      'webhook-id': 'msg_1',
      'webhook-timestamp': String(Math.floor(at.getTime() / 1000)),
      'webhook-signature': new Webhook(secret).sign('msg_1', at, body),
    },
  }
}

describe('verifyCallback', () => {
  test('a callback of the service is returned as its four fields', async () => {
    await using receiver = await startReceiver()
    await using app = await startApp({ CALLBACK_SIGNING_SECRETS: `${secretOf()},${SECRET}` })
    const request = taskRequest({ callback_url: receiver.url })
    await app.submit(request)
    const { headers, raw, body } = await receiver.callbackOf(request.task_id)
    expect(verifyCallback(headers, raw, SECRET)).toEqual(body)
    expect(verifyCallback(headers, raw.toString(), [secretOf(), SECRET])).toEqual(body)
    expect(() => verifyCallback(headers, raw, secretOf())).toThrow('no signature matches')
  })

  test('headers may be a Headers object, or spelled in any case', () => {
    const { headers, body } = signed()
    expect(verifyCallback(new Headers(headers), body, SECRET)).toEqual(CALLBACK)
    const upper = Object.entries(headers).map(([name, value]) => [name.toUpperCase(), [value]])
    expect(verifyCallback(Object.fromEntries(upper), body, SECRET)).toEqual(CALLBACK)
  })

  test('headers may be those of another library, a Map, or anything that one can ask', () => {
    const { headers, body } = signed()
    const upper = Object.entries(headers).map(
      ([name, value]) => [name.toUpperCase(), value] as const,
    )
    for (const each of [
      new UndiciHeaders(headers),
      new Map(upper),
      { get: (name: string) => new Map(Object.entries(headers)).get(name) ?? null },
    ]) {
      expect(verifyCallback(each, body, SECRET)).toEqual(CALLBACK)
    }
    expect(() => verifyCallback(new UndiciHeaders(), body, SECRET)).toThrow('it is not signed')
    // A header of that name is nobody to ask.
    expect(verifyCallback({ ...headers, get: 'a' }, body, SECRET)).toEqual(CALLBACK)
  })

  test('a parsed body says to pass the raw one', () => {
    const { headers } = signed()
    for (const parsed of [CALLBACK, null, undefined, [1]]) {
      const verifying = () => verifyCallback(headers, parsed as unknown as string, SECRET)
      expect(verifying).toThrow(TypeError)
      expect(verifying).toThrow('pass the raw body')
    }
  })

  const now = Date.now()
  test.each([
    ['another body', () => ({ ...signed(), body: `${signed().body} ` })],
    ['another id', () => changed('webhook-id', 'msg_2')],
    ['another time', () => changed('webhook-timestamp', String(Math.floor(now / 1000) + 10))],
    ['a time that is none', () => changed('webhook-timestamp', 'soon')],
    ['a time long ago', () => signed(undefined, { at: new Date(now - 301_000) })],
    ['a time to come', () => signed(undefined, { at: new Date(now + 600_000) })],
    ['no signature', () => changed('webhook-signature', undefined)],
    ['an empty signature', () => changed('webhook-signature', '')],
    ['a signature of another length', () => changed('webhook-signature', 'v1,AAAA')],
    ['a body that is no callback', () => signed('{"task_id":"a"}')],
    ['a body that is no JSON', () => signed('nonsense')],
  ])('%s is refused', (_what, make) => {
    const { headers, body } = make()
    expect(() => verifyCallback(headers, body, SECRET)).toThrow(CallbackVerificationError)
  })

  test('a secret that is none is the caller’s mistake', () => {
    const { headers, body } = signed()
    expect(() => verifyCallback(headers, body, 'secret')).toThrow(TypeError)
  })

  function changed(name: string, value: string | undefined) {
    const { headers, body } = signed()
    return { body, headers: { ...headers, [name]: value } }
  }
})
