import { afterAll, beforeAll, expect, test } from 'vitest'
import { startApp, type TestApp } from '../helpers/app.ts'

let app: TestApp
beforeAll(async () => {
  app = await startApp({ API_TOKENS: 'a-token', BASE_PATH: '/apps/runner' })
})
afterAll(() => app[Symbol.asyncDispose]())

test.each([
  ['GET', '/task-runner', 'POST'],
  ['HEAD', '/task-runner/', 'POST'],
  ['PUT', '/task-runner', 'POST'],
  ['OPTIONS', '/task-runner', 'POST'],
  ['TRACE', '/task-runner', 'POST'],
  ['QUERY', '/task-runner', 'POST'],
  ['PATCH', '/tasks/a?b=c', 'GET, HEAD'],
  ['GET', '/tasks/a/cancel', 'POST'],
  ['PUT', '/workers/a', 'DELETE, GET, HEAD'],
  ['DELETE', '/health/live', 'GET, HEAD'],
  ['POST', '/docs/json', 'GET, HEAD'],
  ['POST', '/', 'GET, HEAD'],
] as const)('%s %s answers 405 and allows %s', async (method, url, allow) => {
  const reply = await app.http.inject({
    method: method as 'GET',
    url: `/apps/runner${url}`,
  })
  expect(reply.statusCode).toBe(405)
  expect(reply.headers.allow).toBe(allow)
  if (method === 'HEAD') return
  expect(reply.json()).toEqual({
    success: false,
    code: 'method_not_allowed',
    message: `${url.split('?')[0]?.replace(/^/, '/apps/runner')} does not support ${method}, only ${allow}`,
  })
})

test.each(['GET', 'POST', 'OPTIONS', 'TRACE', 'QUERY'] as const)(
  'a path that is not there is a 404 for %s, whatever the body is',
  async (method) => {
    for (const headers of [{}, { 'content-type': 'text/plain' }]) {
      const reply = await app.http.inject({
        method: method as 'GET',
        url: '/apps/runner/nowhere',
        headers,
        payload: '{"broken',
      })
      expect(reply.statusCode).toBe(404)
      expect(reply.headers.allow).toBeUndefined()
      expect(reply.json()).toEqual({
        success: false,
        code: 'not_found',
        message: `There is no route ${method} /apps/runner/nowhere`,
      })
    }
  },
)

test('HEAD answers as GET does, without the body', async () => {
  const reply = await app.http.inject({ method: 'HEAD', url: '/apps/runner/health/live' })
  expect(reply.statusCode).toBe(200)
  expect(reply.body).toBe('')
})
