import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fastifyCookie from '@fastify/cookie'
import Fastify from 'fastify'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { ConfigError, loadConfig } from '../../src/config.ts'
import { Authentication, requireToken } from '../../src/routes/authentication.ts'
import { installErrorHandler } from '../../src/routes/error-handler.ts'
import { sessionRoutes } from '../../src/routes/session.ts'
import { startApp, type TestApp, taskRequest, testEnv } from '../helpers/app.ts'

const SECURED = [
  ['POST', '/task-runner'],
  ['POST', '/task-runner/'],
  ['GET', '/tasks'],
  ['GET', '/tasks/a'],
  ['GET', '/tasks/a/logs'],
  ['GET', '/tasks/a/logs?follow=true'],
  ['POST', '/tasks/a/cancel'],
  ['GET', '/tasks/a/callback'],
  ['POST', '/tasks/a/callback/redeliver'],
  ['GET', '/workers'],
  ['GET', '/workers/a'],
  ['GET', '/workers/a/logs'],
  ['DELETE', '/workers/a'],
  ['POST', '/workers/cleanup'],
  ['GET', '/task-files'],
  ['GET', '/statistics'],
  ['GET', '/metrics'],
] as const
const OPEN = [
  ...(['/health/live', '/health/ready'] as const),
  ...(['/docs/', '/docs/json', '/docs/yaml', '/openapi.json'] as const),
]

describe('with tokens', () => {
  let folder: string
  let app: TestApp

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'task-runner-tokens-'))
    await writeFile(join(folder, 'tokens'), 'from-file-1\n\n  from-file-2  \n')
    app = await startApp({
      API_TOKENS: 'first-token, second.token-_~+/=',
      API_TOKENS_FILE: join(folder, 'tokens'),
    })
  })

  afterAll(async () => {
    await app[Symbol.asyncDispose]()
    await rm(folder, { recursive: true })
  })

  const get = (authorization?: string) =>
    app.http.inject({
      method: 'GET',
      url: '/tasks',
      ...(authorization === undefined ? {} : { headers: { authorization } }),
    })

  test.each(SECURED)(
    '%s %s without a token answers 401, before it looks at anything',
    async (method, url) => {
      const json = { 'content-type': 'application/json' }
      for (const [headers, payload] of [
        [{}, undefined],
        [json, '{"broken'],
        [json, '{}'],
        [{ 'content-type': 'text/plain' }, 'text'],
        [{ 'content-type': 'no media type' }, 'text'],
        [{ ...json, 'content-encoding': 'gzip' }, '{}'],
        [{ ...json, 'content-length': String(2 ** 40) }, undefined],
        [{ ...json, 'content-length': 'much' }, undefined],
      ] as const) {
        const reply = await app.http.inject({
          ...{ method, url, headers },
          ...(payload === undefined ? {} : { payload }),
        })
        expect(reply.statusCode).toBe(401)
        expect(reply.headers['www-authenticate']).toBe('Bearer')
        expect(reply.json()).toEqual({
          ...{ success: false, code: 'unauthorized' },
          message: expect.stringMatching(/token/),
        })
      }
    },
  )

  test.each(['first-token', 'second.token-_~+/=', 'from-file-1', 'from-file-2'])(
    'each of several tokens opens: %s',
    async (token) => {
      expect((await get(`Bearer ${token}`)).statusCode).toBe(200)
    },
  )

  test.each(['Bearer', 'bearer', 'BEARER', 'bEaReR'])(
    'the scheme may be written %s',
    async (scheme) => {
      expect((await get(`${scheme} first-token`)).statusCode).toBe(200)
    },
  )

  test.each([
    ...['', 'Bearer', 'Bearer ', 'first-token', 'Basic first-token', 'Bearer wrong-token'],
    ...['Bearer first-toke', 'Bearer first-tokens', 'Bearer FIRST-TOKEN', 'Bearer first-token x'],
    ...[
      'Bearer first-token,second.token-_~+/=',
      'Bearer undefined',
      'Bearer null',
      'XBearer first-token',
    ],
    `Bearer ${'x'.repeat(8000)}`,
  ])('the header %j is refused, and the token not repeated', async (authorization) => {
    const reply = await get(authorization)
    expect(reply.statusCode).toBe(401)
    expect(reply.json()).toEqual({
      ...{ success: false, code: 'unauthorized' },
      message: expect.stringMatching(/./),
    })
    expect(reply.body).not.toMatch(/first|wrong-token|xxx/)
  })

  test('a token in the query opens nothing', async () => {
    const reply = await app.http.inject({ method: 'GET', url: '/tasks?token=first-token' })
    expect(reply.statusCode).toBe(401)
  })

  test.each(OPEN)('%s is open', async (url) => {
    expect((await app.http.inject({ method: 'GET', url })).statusCode).toBe(200)
  })

  test('the sample callbacks are open', async () => {
    const body = { task_name: 'a.sh', task_id: 'a', success: true, logs: '' }
    for (const url of [
      '/sample-task-runner-callback',
      '/sample-task-runner-callback2',
      '/task-runner-callback',
    ]) {
      expect(await app.post(url, body)).toEqual({
        status: 200,
        body: { success: true, message: 'ok' },
      })
    }
  })

  test('any Host is served: the token is what counts', async () => {
    const headers = { host: 'runner.example', authorization: 'Bearer first-token' }
    const reply = await app.http.inject({ method: 'GET', url: '/tasks', headers })
    expect(reply.statusCode).toBe(200)
  })

  test('a task can be run with a token', async () => {
    const request = taskRequest()
    const reply = await app.http.inject({
      method: 'POST',
      url: '/task-runner/',
      headers: { authorization: 'Bearer from-file-2' },
      payload: request,
    })
    expect(reply.json()).toMatchObject({ success: true, task_id: request.task_id })
    const task = () =>
      app.http
        .inject({
          method: 'GET',
          url: `/tasks/${request.task_id}`,
          headers: { authorization: 'Bearer first-token' },
        })
        .then((answer) => answer.json().status)
    await expect.poll(task, { timeout: 20_000, interval: 20 }).toBe('succeeded')
  })
})

describe('without tokens', () => {
  let app: TestApp
  beforeAll(async () => {
    app = await startApp()
  })
  afterAll(async () => {
    await app[Symbol.asyncDispose]()
  })

  const withHost = (host: string, url = '/tasks') =>
    app.http.inject({ method: 'GET', url, headers: { host } })

  test.each([
    'localhost',
    'localhost:3000',
    'LOCALHOST',
    '127.0.0.1:3000',
    '127.1.2.3',
    '[::1]:3000',
    '[::1]',
  ])('the loopback name %s is served', async (host) => {
    expect((await withHost(host)).statusCode).toBe(200)
  })

  test.each([
    ...['evil.example', 'evil.example:3000', 'localhost.evil.example', '127.0.0.1.evil.example'],
    ...['10.0.0.1', '0.0.0.0', '[::]', '169.254.169.254', 'xlocalhost', '127.0.0.1@evil.example'],
  ])(
    'a foreign Host %j is refused: a page in a browser may have been re-pointed to us',
    async (host) => {
      const reply = await withHost(host)
      expect(reply.statusCode).toBe(403)
      expect(reply.json()).toEqual({
        ...{ success: false, code: 'host_refused' },
        message: expect.stringMatching(/loopback/),
      })
    },
  )

  test('X-Forwarded-Host does not make a foreign Host a loopback one', async () => {
    const headers = { host: 'evil.example', 'x-forwarded-host': 'localhost' }
    const reply = await app.http.inject({ method: 'GET', url: '/tasks', headers })
    expect(reply.statusCode).toBe(403)
  })

  test('a foreign Host starts no task', async () => {
    const request = taskRequest()
    const reply = await app.http.inject({
      method: 'POST',
      url: '/task-runner',
      headers: { host: 'evil.example' },
      payload: request,
    })
    expect(reply.statusCode).toBe(403)
    expect((await app.get(`/tasks/${request.task_id}`)).status).toBe(404)
  })

  test('probes of any Host find the open routes', async () => {
    expect((await withHost('runner.internal', '/health/live')).statusCode).toBe(200)
    expect((await withHost('runner.internal', '/health/ready')).statusCode).toBe(200)
  })

  test.each(['0.0.0.0', '::', '10.1.2.3', 'runner.example'])(
    'HOST=%s does not start without tokens, unless AUTH=off says so',
    (HOST) => {
      expect(() => loadConfig(testEnv({ HOST }))).toThrow(ConfigError)
      expect(() => loadConfig(testEnv({ HOST }))).toThrow(/HOST.*API_TOKENS.*AUTH=off/)
      expect(() => loadConfig(testEnv({ HOST, API_TOKENS: ' , ' }))).toThrow(ConfigError)
      expect(loadConfig(testEnv({ HOST, API_TOKENS: 'token' }))).toMatchObject({ host: HOST })
      expect(loadConfig(testEnv({ HOST, AUTH: 'off' }))).toMatchObject({ authOff: true })
    },
  )

  test.each(['127.0.0.1', 'localhost', '::1'])('HOST=%s needs no tokens', (HOST) => {
    expect(loadConfig(testEnv({ HOST }))).toMatchObject({ host: HOST, apiTokens: [] })
  })
})

describe('wrong tokens', () => {
  const PAUSED_MAX = 2_000

  /**
   * The service's own sign-in and a route that wants a token, with pauses that outlast the test.
   */
  async function startGuarded(wrongPauseMs: number) {
    const http = Fastify()
    await http.register(fastifyCookie)
    http.setValidatorCompiler(() => (value) => ({ value }))
    http.setSerializerCompiler(() => JSON.stringify)
    installErrorHandler(http)
    const authentication = new Authentication({
      ...{ tokens: ['right'], loopbackOnly: true, wrongPauseMs },
    })
    await http.register(sessionRoutes, { authentication, basePath: '' })
    await http.register(async (secured) => {
      requireToken(secured, authentication)
      secured.get('/secured', async () => 'in')
    })
    let answered = 0
    const request = async (token: string, by: 'sign-in' | 'header' | 'cookie' | 'look') => {
      const { statusCode } = await http.inject({
        ...(by === 'sign-in'
          ? { method: 'POST', url: '/session', payload: { token } }
          : { method: 'GET', url: by === 'look' ? '/session' : '/secured' }),
        headers:
          by === 'header'
            ? { authorization: `Bearer ${token}` }
            : by === 'sign-in'
              ? {}
              : { cookie: `task_runner_token=${token}`, 'sec-fetch-site': 'same-origin' },
      })
      answered += 1
      return statusCode
    }
    return { http, request, answered: () => answered }
  }
  const WAYS = ['sign-in', 'header', 'cookie', 'look'] as const

  test('wait for their answers; right ones do not, while thousands of wrong ones wait', async () => {
    const { request, answered } = await startGuarded(600_000)
    for (let count = 0; count < PAUSED_MAX; count += 1) {
      void request('wrong', WAYS[count % WAYS.length] ?? 'header')
    }
    expect(await Promise.all(WAYS.map((way) => request('right', way)))).toEqual([
      200, 200, 200, 200,
    ])
    // None of the wrong ones.
    expect(answered()).toBe(WAYS.length)
    // What waits costs memory: so many do, and no more.
    expect(await Promise.all(WAYS.map((way) => request('wrong', way)))).toEqual([
      401, 401, 401, 200,
    ])
    expect(await request('right', 'header')).toBe(200)
    expect(answered()).toBe(2 * WAYS.length + 1)
  })

  test('are answered after the pause, and others may wait then', async () => {
    const { request } = await startGuarded(1)
    for (let count = 0; count < PAUSED_MAX + 1; count += 100) {
      const wrong = Array.from({ length: 100 }, () => request('wrong', 'header'))
      expect(new Set(await Promise.all(wrong))).toEqual(new Set([401]))
    }
  })

  test('a request without any does not wait', async () => {
    const { http } = await startGuarded(600_000)
    expect((await http.inject({ url: '/secured' })).statusCode).toBe(401)
    expect((await http.inject({ url: '/session' })).json()).toMatchObject({ signed_in: false })
  })
})

test('AUTH=off serves any Host without a token, also where tokens are set', async () => {
  await using app = await startApp({ AUTH: 'off', API_TOKENS: 'a-token' })
  const headers = { host: 'runner.example' }
  const reply = await app.http.inject({ method: 'GET', url: '/tasks', headers })
  expect(reply.statusCode).toBe(200)
})

test('under BASE_PATH the same routes are secured, and the same are open', async () => {
  await using app = await startApp({ API_TOKENS: 'a-token', BASE_PATH: '/apps/runner/' })
  const status = async (url: string, authorization = '') =>
    (await app.http.inject({ method: 'GET', url, headers: { authorization } })).statusCode
  expect(await status('/apps/runner/tasks')).toBe(401)
  expect(await status('/apps/runner/tasks', 'Bearer a-token')).toBe(200)
  expect(await status('/apps/runner/health/live')).toBe(200)
  expect(await status('/apps/runner/docs/json')).toBe(200)
  expect(await status('/apps/runner/openapi.json')).toBe(200)
  expect(await status('/tasks', 'Bearer a-token')).toBe(404)
})
