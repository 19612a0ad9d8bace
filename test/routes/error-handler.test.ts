import Fastify from 'fastify'
import { expect, test } from 'vitest'
import { TaskRunnerError } from '../../src/core/errors.ts'
import { installErrorHandler } from '../../src/routes/error-handler.ts'

test.each([
  ['a handler that takes too long', 'store_unavailable', () => new Promise(() => {})],
  [
    'no workers',
    'workers_unavailable',
    () => Promise.reject(new TaskRunnerError('workers_unavailable', 'none')),
  ],
])('%s is answered with when to come again', async (_, code, handler) => {
  const app = Fastify({ handlerTimeout: 20 })
  installErrorHandler(app)
  app.get('/', handler)
  const answer = await app.inject('/')
  expect([answer.statusCode, answer.headers['retry-after']]).toEqual([503, '5'])
  expect(answer.json()).toEqual({ success: false, code, message: expect.any(String) })
  await app.close()
})
