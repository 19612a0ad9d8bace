import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startApp, type TestApp } from '../helpers/app.ts'

const TOKEN = 'a.token-_~+/='
const OWN = { 'sec-fetch-site': 'same-origin' }

async function call(
  { http }: TestApp,
  method: 'GET' | 'POST' | 'DELETE',
  url: string,
  { headers = {}, payload }: { headers?: Record<string, string>; payload?: object } = {},
) {
  const reply = await http.inject({ method, url, headers, ...(payload ? { payload } : {}) })
  return { status: reply.statusCode, headers: reply.headers, cookies: reply.cookies, reply }
}

describe('where tokens are wanted', () => {
  let app: TestApp

  beforeAll(async () => {
    app = await startApp({ API_TOKENS: `other-token,${TOKEN}`, BASE_PATH: '/apps/runner' })
  })
  afterAll(() => app[Symbol.asyncDispose]())

  const session = (cookie?: string) =>
    call(app, 'GET', '/apps/runner/session', cookie === undefined ? {} : { headers: { cookie } })

  async function signIn(headers = {}): Promise<string> {
    const { status, cookies, reply } = await call(app, 'POST', '/apps/runner/session', {
      payload: { token: TOKEN },
      headers,
    })
    expect(status).toBe(200)
    expect(reply.body).not.toContain(TOKEN)
    const [cookie] = cookies
    return `${cookie?.name}=${encodeURIComponent(cookie?.value ?? '')}`
  }

  test('whoever signs in needs no header, until they sign out', async () => {
    expect((await session()).reply.json()).toEqual({ needed: true, signed_in: false })
    const cookie = await signIn()
    expect((await session(cookie)).reply.json()).toEqual({ needed: true, signed_in: true })
    const headers = { cookie, ...OWN }
    expect((await call(app, 'GET', '/apps/runner/tasks', { headers })).status).toBe(200)
    const out = await call(app, 'DELETE', '/apps/runner/session', { headers })
    expect(out.cookies).toMatchObject([{ value: '', path: '/apps/runner/' }])
    expect(out.cookies[0]?.expires?.getTime()).toBeLessThan(Date.now())
  })

  test('no script reads the cookie, no other site sends it, and only the service gets it', async () => {
    const signedIn = () => call(app, 'POST', '/apps/runner/session', { payload: { token: TOKEN } })
    expect((await signedIn()).cookies).toMatchObject([
      { httpOnly: true, sameSite: 'Strict', path: '/apps/runner/' },
    ])
    expect((await signedIn()).cookies[0]?.secure).toBeUndefined()
    const overTls = await call(app, 'POST', '/apps/runner/session', {
      payload: { token: TOKEN },
      headers: { 'x-forwarded-proto': 'https' },
    })
    expect(overTls.cookies[0]?.secure).toBe(true)
  })

  // Each proxy adds how it was called; the first one is the browser's.
  test.each([
    ['https, http', true],
    ['HTTPS ,http', true],
    ['http, https', undefined],
    ['', undefined],
  ])('behind proxies that say %j the cookie is for TLS alone: %s', async (proto, secure) => {
    const { cookies } = await call(app, 'POST', '/apps/runner/session', {
      payload: { token: TOKEN },
      headers: { 'x-forwarded-proto': proto },
    })
    expect(cookies[0]?.secure).toBe(secure)
  })

  test('a body of more than 16 KB is refused before it is read', async () => {
    const refused = await app.http.inject({
      method: 'POST',
      url: '/apps/runner/session',
      headers: { 'content-type': 'application/json', 'content-length': String(16 * 1024 + 1) },
    })
    expect(refused.statusCode).toBe(413)
    expect(refused.json()).toMatchObject({ success: false })
    const { status } = await call(app, 'POST', '/apps/runner/session', {
      payload: { token: TOKEN, padding: 'x'.repeat(15 * 1024) },
    })
    expect(status).toBe(422)
  })

  test.each(['wrong', `${TOKEN}x`, 'other-token,'])('%j is refused', async (token) => {
    const { status, cookies, reply } = await call(app, 'POST', '/apps/runner/session', {
      payload: { token },
    })
    expect(status).toBe(401)
    expect(reply.json()).toEqual({
      ...{ success: false, code: 'unauthorized' },
      message: 'The token is invalid',
    })
    expect(cookies).toEqual([])
  })

  test.each(['task_runner_token=wrong', 'task_runner_token=', 'other=1'])(
    'the cookie %j opens nothing',
    async (cookie) => {
      expect((await session(cookie)).reply.json()).toMatchObject({ signed_in: false })
      const { status } = await call(app, 'GET', '/apps/runner/tasks', { headers: { cookie } })
      expect(status).toBe(401)
    },
  )

  test.each([
    { 'sec-fetch-site': 'cross-site' },
    { 'sec-fetch-site': 'same-site', origin: 'http://localhost:8080' },
    { origin: 'https://evil.example' },
    { origin: 'null' },
  ])('a page elsewhere that gets the cookie sent is refused: %j', async (headers) => {
    const cookie = await signIn()
    const { status } = await call(app, 'POST', '/apps/runner/workers/cleanup', {
      headers: { ...headers, cookie },
      payload: {},
    })
    expect(status).toBe(403)
  })

  test('a header wins over the cookie, and needs to be of no page', async () => {
    const cookie = await signIn()
    const headers = { cookie, 'sec-fetch-site': 'cross-site' }
    const wrong = { ...headers, authorization: 'Bearer wrong' }
    expect((await call(app, 'GET', '/apps/runner/tasks', { headers: wrong })).status).toBe(401)
    const right = { ...headers, authorization: `Bearer ${TOKEN}` }
    expect((await call(app, 'GET', '/apps/runner/tasks', { headers: right })).status).toBe(200)
  })
})

describe('without tokens', () => {
  let app: TestApp

  beforeAll(async () => {
    app = await startApp()
  })
  afterAll(() => app[Symbol.asyncDispose]())

  test('there is nothing to sign in to', async () => {
    const { reply } = await call(app, 'GET', '/session')
    expect(reply.json()).toEqual({ needed: false, signed_in: true })
  })

  test('a page elsewhere cannot use that: it would need no token either', async () => {
    const headers = { 'sec-fetch-site': 'cross-site' }
    expect((await call(app, 'POST', '/tasks/a/cancel', { headers })).status).toBe(403)
    expect((await call(app, 'POST', '/tasks/a/cancel', { headers: OWN })).status).toBe(404)
    expect((await call(app, 'POST', '/tasks/a/cancel')).status).toBe(404)
  })
})
