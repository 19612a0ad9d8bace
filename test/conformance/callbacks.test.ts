/** What a receiver gets, and what can be seen of its delivery. */
import { describe, expect, test } from 'vitest'
import { expectDone, expectError } from './expectations.ts'
import { useReceiver } from './receiver.ts'
import { type Json, newTaskId, POLL, parameters, useTarget } from './target.ts'

const target = useTarget()
const receiver = useReceiver()

describe('a callback', () => {
  test('has exactly four fields, as JSON, and says what to know it by', async () => {
    const before = Date.now() / 1000
    const first = '"quotes" \\ \u001b[31mred\u001b[0m zażółć 你好 🚀'
    const { taskId, log } = await target.run({ ...parameters(first), callback_url: receiver.url })
    const { headers, body } = await receiver.callbackOf(taskId)
    expect(body).toEqual({ task_name: 'parameters.sh', task_id: taskId, success: true, logs: log })
    expect(log).toContain(`MY_FIRST_PARAM=${first}\nMY_SECOND_PARAM=second\n`)
    expect(headers['content-type']).toMatch(/^application\/json/)
    expect(headers['webhook-id']).toMatch(/\S/)
    // In seconds; the clocks of the two machines may differ a little.
    expect(headers['webhook-timestamp']).toMatch(/^\d+$/)
    expect(Math.abs(Number(headers['webhook-timestamp']) - before)).toBeLessThan(600)
    expect(headers.authorization).toBeUndefined()
  })

  test('carries callback_url_token as bearer token', async () => {
    const token = 'some.token-123~_+/=='
    const overrides = { callback_url: receiver.url, callback_url_token: token }
    const { headers } = await receiver.callbackOf(await target.start(overrides))
    expect(headers.authorization).toBe(`Bearer ${token}`)
  })

  test('is sent when the task failed', async () => {
    const overrides = { task_file_name: 'failing.py', callback_url: receiver.url }
    const { body } = await receiver.callbackOf(await target.start(overrides))
    expect(body).toMatchObject({ task_name: 'failing.py', success: false })
    expect(body.logs).toContain('ZeroDivisionError')
  })

  test('has a state of its own, with each attempt', async () => {
    const taskId = await target.start({ callback_url: receiver.url })
    const { headers } = await receiver.callbackOf(taskId)
    const state = await target.callback(taskId, 'delivered')
    expect(state).toEqual({
      task_id: taskId,
      status: 'delivered',
      webhook_id: headers['webhook-id'],
      next_attempt_at: null,
      attempts: [
        {
          number: 1,
          started_at: expect.stringMatching(/^\d{4}-.*Z$/),
          duration_ms: expect.any(Number),
          manual: false,
          status_code: 200,
          error: null,
        },
      ],
    })
    expect(await target.task(taskId)).toMatchObject({ callback_status: 'delivered' })
  })

  test('that was not asked for is none, and cannot be delivered again', async () => {
    const { taskId } = await target.run({ callback_url: null })
    expect(await target.callback(taskId, 'none')).toMatchObject({ attempts: [] })
    expectError(await target.request('POST', `/tasks/${taskId}/callback/redeliver`), 404)
  })

  test('that was delivered is sent again on demand, under the same webhook-id', async () => {
    const taskId = await target.start({ callback_url: receiver.url })
    const first = await receiver.callbackOf(taskId)
    await target.callback(taskId, 'delivered')
    expectDone(await target.request('POST', `/tasks/${taskId}/callback/redeliver`))
    const second = await receiver.callbackOf(taskId, 2)
    expect(second.body).toEqual(first.body)
    expect(second.headers['webhook-id']).toBe(first.headers['webhook-id'])
  })

  test('that the receiver refused is pending, and delivered on demand, under the same webhook-id', async () => {
    const taskId = newTaskId()
    receiver.answer(taskId, 503)
    await target.start({ task_id: taskId, callback_url: receiver.url })
    await receiver.callbackOf(taskId)
    await expect.poll(async () => (await attemptsOf(taskId)).length, POLL).toBeGreaterThan(0)
    const pending = await target.callback(taskId, 'pending')
    expect(pending.next_attempt_at).toEqual(expect.stringMatching(/^\d{4}-.*Z$/))
    expect((await attemptsOf(taskId))[0]).toMatchObject({ number: 1, status_code: 503 })
    expect(await target.task(taskId)).toMatchObject({ status: 'succeeded' })

    receiver.answer(taskId, 204)
    // A retry of its own may be under way (409); then that is the one that arrives.
    const { status } = await target.request('POST', `/tasks/${taskId}/callback/redeliver`)
    expect(status).toBeOneOf([200, 409])
    await receiver.callbackOf(taskId, 2)
    await target.callback(taskId, 'delivered')
    expect((await attemptsOf(taskId)).at(-1)).toMatchObject({ status_code: 204 })
    const ids = receiver.callbacksOf(taskId).map(({ headers }) => headers['webhook-id'])
    expect(new Set(ids).size).toBe(1)
  })

  test('that nobody receives does not hold the task back', async () => {
    const { taskId, task } = await target.run({ callback_url: deadUrl() })
    expect(task).toMatchObject({ status: 'succeeded', callback_status: 'pending' })
    await expect.poll(async () => (await attemptsOf(taskId)).length, POLL).toBeGreaterThan(0)
    const failed = { status_code: null, error: expect.stringMatching(/\S/) }
    expect((await attemptsOf(taskId))[0]).toMatchObject(failed)
    await target.workerGone(task.worker_name)
  })
})

async function attemptsOf(taskId: string): Promise<Json[]> {
  const { body } = await target.get(`/tasks/${taskId}/callback`)
  // Holds: `has a state of its own` checks the shape.
  return body.attempts as Json[]
}

/** On the host that callbacks may be sent to, a port that nobody listens on. */
function deadUrl(): string {
  const url = new URL(receiver.url)
  url.port = '1'
  return url.href
}
