import { execFileSync } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'

const POLL = { timeout: 20_000, interval: 20 }

let folder: string
let app: TestApp

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-runner-tasks-'))
  await writeFile(join(folder, 'echo.sh'), 'echo hi\n')
  await writeFile(join(folder, 'fails.sh'), 'echo oh no\nexit 3\n')
  await writeFile(join(folder, 'only-listed.sh'), 'echo hi\n')
  app = await startApp({ TASKS_DIR: folder })
})

afterAll(async () => {
  await app[Symbol.asyncDispose]()
  await rm(folder, { recursive: true, force: true, maxRetries: 10 })
})

async function run(overrides: object = {}): Promise<string> {
  const request = taskRequest(overrides)
  expect(await app.submit(request)).toMatchObject({ status: 200 })
  await app.finished(request.task_id)
  return request.task_id
}

/** A promise and a server answer that waits for it. */
function held() {
  const { promise, resolve } = Promise.withResolvers<void>()
  return { promise, release: () => resolve() }
}

describe('one task', () => {
  test('tells status, reason, exit code, times and worker of a success', async () => {
    const before = Date.now()
    const taskId = await run()
    const { body } = await app.get(`/tasks/${taskId}`)
    expect(body).toEqual({
      task_id: taskId,
      task_file_name: 'echo.sh',
      status: 'succeeded',
      reason: 'completed',
      message: null,
      waiting_for: null,
      exit_code: 0,
      signal: null,
      claimed_at: expect.any(String),
      created_at: expect.any(String),
      started_at: expect.any(String),
      finished_at: expect.any(String),
      worker_name: expect.stringMatching(/^task-[a-z0-9-]{1,58}$/),
      instance: expect.any(String),
      priority: 0,
      traceparent: null,
      callback_status: 'none',
      worker_config: {},
      callback_url: null,
      terminate_on_completion: true,
      timeout_seconds: 86_400,
      log_bytes: 3,
    })
    const times = [body.created_at, body.claimed_at, body.started_at, body.finished_at].map(
      (time) => Date.parse(String(time)),
    )
    const all = [before, ...times, Date.now()]
    expect(all).toEqual(all.toSorted((a, b) => a - b))
  })

  test('tells the exit code of a failure', async () => {
    const taskId = await run({ task_file_name: 'fails.sh' })
    expect((await app.get(`/tasks/${taskId}`)).body).toMatchObject({
      status: 'failed',
      reason: 'exit_code',
      exit_code: 3,
      message: expect.stringContaining('3'),
    })
  })

  test.each([
    ['GET', '/tasks/nobody'],
    ['GET', '/tasks/nobody/logs'],
    ['GET', '/tasks/nobody/logs?follow=true'],
    ['GET', '/tasks/nobody/callback'],
    ['POST', '/tasks/nobody/cancel'],
    ['POST', '/tasks/nobody/callback/redeliver'],
  ] as const)('%s %s answers 404 that names the task', async (method, url) => {
    const reply = await app.http.inject({ method, url })
    expect(reply.statusCode).toBe(404)
    expect(reply.json()).toEqual({
      ...{ success: false, code: 'task_not_found' },
      message: 'There is no task "nobody"',
    })
  })

  test('a task_id that none can have answers 422', async () => {
    for (const taskId of ['%00', 'a%0Ab', 'x'.repeat(256)]) {
      expect(await app.get(`/tasks/${taskId}`)).toMatchObject({
        status: 422,
        body: { success: false, errors: [{ path: 'task_id' }] },
      })
    }
  })

  test.each([
    ['broken percent-encoding', '/tasks/%E0%A4%A'],
    ['percent alone', '/tasks/100%'],
    ['a path longer than any id', `/tasks/${'x'.repeat(5000)}`],
  ])('%s is answered in the one error shape', async (_name, url) => {
    const reply = await app.http.inject({ method: 'GET', url })
    expect([400, 404, 414, 422]).toContain(reply.statusCode)
    expect(reply.json()).toEqual({
      ...{ success: false, code: expect.stringMatching(/^[a-z_]+$/) },
      message: expect.stringMatching(/./),
      ...(reply.statusCode === 422 ? { errors: expect.any(Array) } : {}),
    })
  })
})

describe('task ids with odd characters', () => {
  let address: string
  beforeAll(async () => {
    address = await app.http.listen({ host: '127.0.0.1', port: 0 })
  })

  test.each([
    ...['a/b/c', '/', '//', 'a/', '/a', 'x/logs', 'x/callback/redeliver', 'a/../b', './a'],
    ...['with space', ' leading and trailing ', '100%', '%41', '%2F', '%25', '%2e%2e', 'a%2Fb/c'],
    ...['a?b=c', 'a#b', 'a;b', 'a&b', 'a+b', 'a:b', '*', ':task_id', 'a\\b', '"quoted"', "o'clock"],
    ...[
      'ünïcödé',
      '任务',
      '🚀',
      'e\u0301',
      '\u202ertl',
      '\ufeff',
      '\u2028',
      '__proto__',
      'constructor',
    ],
    ...[
      'null',
      'cleanup',
      '{"a":1}',
      '<script>',
      '$(id)',
      '`id`',
      '; rm -rf /',
      '-rf',
      '.a',
      '..a',
    ],
  ])('%j is reachable URL-encoded, on every route', async (taskId) => {
    await run({ task_id: taskId })
    const url = `${address}/tasks/${encodeURIComponent(taskId)}`
    const task = await fetch(url)
    expect({ status: task.status, body: await task.json() }).toMatchObject({
      status: 200,
      body: { task_id: taskId, status: 'succeeded' },
    })
    expect(await (await fetch(`${url}/logs`)).text()).toBe('hi\n')
    expect(await (await fetch(`${url}/callback`)).json()).toMatchObject({ task_id: taskId })
    expect(await (await fetch(`${url}/cancel`, { method: 'POST' })).json()).toMatchObject({
      success: true,
      task_id: taskId,
      status: 'succeeded',
    })
  })
})

describe('what is secret', () => {
  test('values of variables, the query of the callback URL and the token are in no answer', async () => {
    await using receiver = await startReceiver((_, response) => {
      response.statusCode = 410
      response.end('{}')
    })
    const taskId = await run({
      task_file_name: 'fails.sh',
      worker_config: {
        env_variables: { PASSWORD: 'secret-value', NUMBER: 271828 },
        refresh_token: 'secret-refresh',
        additional_params: Buffer.from('{"env_variables":{"HIDDEN":"secret-hidden"}}').toString(
          'base64',
        ),
      },
      callback_url: `${receiver.url}/path?key=secret-query&b=1`,
      callback_url_token: 'secret-token',
    })
    await receiver.callbackOf(taskId)
    await expect
      .poll(async () => (await app.get(`/tasks/${taskId}/callback`)).body.status, POLL)
      .toBe('given_up')

    const { body } = await app.get(`/tasks/${taskId}`)
    expect(body).toMatchObject({
      worker_config: { env_variables: { PASSWORD: '***', NUMBER: '***', HIDDEN: '***' } },
      callback_url: `${receiver.url}/path?***`,
    })
    const answers = await Promise.all(
      ['', '/callback', '/logs'].map((part) => app.text(`/tasks/${taskId}${part}`)),
    )
    answers.push(await app.text('/tasks'), await app.text('/workers'))
    expect(answers.join()).not.toMatch(/secret-|271828/)
  })

  test('a conflict under the same task_id repeats nothing of either request', async () => {
    const request = taskRequest({
      callback_url: 'http://127.0.0.1:1/',
      callback_url_token: 'secret-1',
    })
    await app.submit(request)
    const other = await app.submit({ ...request, callback_url_token: 'secret-2' })
    expect(other.status).toBe(409)
    expect(JSON.stringify(other.body)).not.toContain('secret')
  })
})

describe('the list', () => {
  type List = { tasks: Array<{ task_id: string; status: string }>; next_cursor: string | null }
  const list = async (query: string) => (await app.get(`/tasks?${query}`)).body as unknown as List
  const idsOf = ({ tasks }: List) => tasks.map(({ task_id }) => task_id)

  test('is newest first, and shows the summary that one task shows', async () => {
    const first = await run()
    const second = await run()
    const { tasks } = await list('limit=2')
    expect(tasks.map(({ task_id }) => task_id)).toEqual([second, first])
    const { body } = await app.get(`/tasks/${second}`)
    expect(body).toMatchObject(tasks[0] as object)
    expect(tasks[0]).not.toHaveProperty('worker_config')
  })

  test('filters by status and by task file, and by both', async () => {
    const failed = await run({ task_file_name: 'fails.sh' })
    const listed = await run({ task_file_name: 'only-listed.sh' })
    const failures = await list('status=failed&limit=500')
    expect(idsOf(failures)).toContain(failed)
    expect(new Set(failures.tasks.map(({ status }) => status))).toEqual(new Set(['failed']))
    expect(idsOf(await list('task_file_name=only-listed.sh'))).toEqual([listed])
    expect(idsOf(await list('task_file_name=only-listed.sh&status=succeeded'))).toEqual([listed])
    expect(await list('task_file_name=only-listed.sh&status=failed')).toEqual({
      tasks: [],
      next_cursor: null,
    })
    expect(await list('task_file_name=nothing.sh')).toEqual({ tasks: [], next_cursor: null })
  })

  test('pages neither overlap nor leave a gap, also while new tasks arrive', async () => {
    const submitted: string[] = []
    for (let count = 0; count < 7; count += 1) {
      submitted.push(await run({ task_file_name: 'fails.sh' }))
    }
    const whole = idsOf(await list('task_file_name=fails.sh&limit=500'))
    expect(whole.slice(0, 7)).toEqual(submitted.toReversed())
    for (const limit of [1, 3, whole.length - 1, whole.length]) {
      const seen: string[] = []
      let cursor: string | null = ''
      let pages = 0
      while (cursor !== null) {
        const from = cursor === '' ? '' : `&cursor=${encodeURIComponent(cursor)}`
        const page = await list(`task_file_name=fails.sh&limit=${limit}${from}`)
        expect(page.tasks.length).toBeLessThanOrEqual(limit)
        expect(page.tasks.length).toBeGreaterThan(0)
        seen.push(...idsOf(page))
        cursor = page.next_cursor
        pages += 1
        if (pages === 1) {
          const request = taskRequest({ task_file_name: 'fails.sh' })
          await app.submit(request)
          await app.finished(request.task_id)
          expect(idsOf(await list('limit=1'))).toEqual([request.task_id])
        }
      }
      expect(pages).toBe(Math.ceil(seen.length / limit))
      expect(seen.slice(-whole.length)).toEqual(whole.slice(-seen.length))
      expect(seen).toEqual([...new Set(seen)])
      whole.unshift(...idsOf(await list('task_file_name=fails.sh&limit=1')))
    }
  })

  test.each([
    ...['status=done', 'status=', 'limit=0', 'limit=-1', 'limit=501', 'limit=1.5', 'limit=many'],
    ...['cursor=', 'cursor=nonsense', 'cursor=YmVmb3JlOi0x', 'statuss=failed', 'limit=1&limit=2'],
    ...['task_file_name=', 'task_file_name=a%00', '__proto__=x', `cursor=${'x'.repeat(101)}`],
  ])('?%s is refused, naming the parameter', async (query) => {
    const { status, body } = await app.get(`/tasks?${query}`)
    expect(status).toBe(422)
    expect(body).toMatchObject({ success: false, errors: [{ path: query.split('=')[0] }] })
  })
})

describe('cancel', () => {
  test('a final task stays as it is, however often it is asked for', async () => {
    const taskId = await run()
    for (let count = 0; count < 2; count += 1) {
      expect(await app.post(`/tasks/${taskId}/cancel`)).toEqual({
        status: 200,
        body: {
          success: true,
          message: 'The task has already succeeded',
          task_id: taskId,
          status: 'succeeded',
        },
      })
    }
  })

  test('works for clients that send Content-Type with an empty body', async () => {
    const taskId = await run()
    const reply = await app.http.inject({
      method: 'POST',
      url: `/tasks/${taskId}/cancel`,
      headers: { 'content-type': 'application/json' },
    })
    expect(reply.json()).toMatchObject({ success: true, status: 'succeeded' })
  })
})

describe('callbacks', () => {
  const state = async (taskId: string) => (await app.get(`/tasks/${taskId}/callback`)).body
  const redeliver = (taskId: string) => app.post(`/tasks/${taskId}/callback/redeliver`)

  test('the state shows each attempt: when, how long, and what was answered', async () => {
    await using receiver = await startReceiver((_, response, count) => {
      response.statusCode = count === 1 ? 503 : 204
      response.end()
    })
    const before = Date.now()
    const taskId = await run({ callback_url: receiver.url })
    await expect.poll(() => state(taskId), POLL).toMatchObject({ status: 'delivered' })
    const { attempts, ...rest } = await state(taskId)
    expect(rest).toEqual({
      task_id: taskId,
      status: 'delivered',
      webhook_id: receiver.received[0]?.headers['webhook-id'],
      next_attempt_at: null,
    })
    const attempt = {
      started_at: expect.any(String),
      duration_ms: expect.any(Number),
      manual: false,
    }
    expect(attempts).toEqual([
      { ...attempt, number: 1, status_code: 503, error: expect.stringContaining('503') },
      { ...attempt, number: 2, status_code: 204, error: null },
    ])
    for (const { started_at, duration_ms } of attempts as Array<{
      started_at: string
      duration_ms: number
    }>) {
      expect(Date.parse(started_at)).toBeGreaterThanOrEqual(before)
      expect(Date.parse(started_at) + duration_ms).toBeLessThanOrEqual(Date.now())
    }
    expect(receiver.received.map(({ headers }) => headers['webhook-id'])).toEqual(
      Array(2).fill(rest.webhook_id),
    )
    expect((await app.get(`/tasks/${taskId}`)).body.callback_status).toBe('delivered')
  })

  test('a task without a callback says none, and has nothing to deliver again', async () => {
    const taskId = await run()
    expect(await state(taskId)).toEqual({
      task_id: taskId,
      status: 'none',
      webhook_id: null,
      next_attempt_at: null,
      attempts: [],
    })
    expect(await redeliver(taskId)).toEqual({
      status: 404,
      body: {
        ...{ success: false, code: 'no_callback' },
        message: 'The task has no callback_url',
      },
    })
  })

  test('a callback cannot be redelivered before the task has ended', async () => {
    await writeFile(join(folder, 'blocks.sh'), 'read -r _ < "$GATE"\n')
    const gate = join(folder, 'gate')
    execFileSync('mkfifo', [gate])
    const request = taskRequest({
      task_file_name: 'blocks.sh',
      callback_url: 'http://127.0.0.1:9/',
      worker_config: { env_variables: { GATE: gate } },
    })
    await app.submit(request)
    expect(await redeliver(request.task_id)).toMatchObject({
      status: 404,
      body: { code: 'no_callback', message: 'The callback is not sent before the task has ended' },
    })
    await app.post(`/tasks/${request.task_id}/cancel`)
    await app.finished(request.task_id)
  })

  test('what was delivered is delivered again on request, with the same webhook-id', async () => {
    await using receiver = await startReceiver()
    const taskId = await run({ callback_url: receiver.url })
    await expect.poll(() => state(taskId), POLL).toMatchObject({ status: 'delivered' })
    for (const count of [2, 3]) {
      expect(await redeliver(taskId)).toEqual({
        status: 200,
        body: { success: true, message: 'Queued for delivery' },
      })
      await expect
        .poll(() => state(taskId), POLL)
        .toMatchObject({ status: 'delivered', attempts: { length: count } })
      expect(receiver.received).toHaveLength(count)
    }
    const [first, ...again] = receiver.received
    for (const { headers, body } of again) {
      expect(headers['webhook-id']).toBe(first?.headers['webhook-id'])
      expect(body).toEqual(first?.body)
    }
  })

  test('a repetition that fails leaves it delivered, and is not tried again', async () => {
    await using receiver = await startReceiver((_, response, count) => {
      response.statusCode = count === 1 ? 200 : 500
      response.end()
    })
    const taskId = await run({ callback_url: receiver.url })
    await expect.poll(() => state(taskId), POLL).toMatchObject({ status: 'delivered' })
    await redeliver(taskId)
    await expect
      .poll(() => state(taskId), POLL)
      .toMatchObject({ status: 'delivered', attempts: { length: 2 }, next_attempt_at: null })
  })

  test('what was given up is delivered on request', async () => {
    let isUp = false
    await using receiver = await startReceiver((_, response) => {
      response.statusCode = isUp ? 200 : 500
      response.end()
    })
    const taskId = await run({ callback_url: receiver.url })
    await expect
      .poll(() => state(taskId), POLL)
      .toMatchObject({ status: 'given_up', attempts: { length: 4 } })
    isUp = true
    expect((await redeliver(taskId)).status).toBe(200)
    await expect
      .poll(() => state(taskId), POLL)
      .toMatchObject({ status: 'delivered', attempts: { length: 5 } })
    expect(new Set(receiver.received.map(({ headers }) => headers['webhook-id'])).size).toBe(1)
  })

  test('while an attempt is under way it is pending, and asking again answers 409', async () => {
    const answer = held()
    await using receiver = await startReceiver((_, response) => {
      void answer.promise.then(() => response.end())
    })
    const request = taskRequest({ callback_url: receiver.url })
    await app.submit(request)
    await receiver.callbackOf(request.task_id)
    expect(await state(request.task_id)).toMatchObject({ status: 'pending', attempts: [] })
    expect((await app.get(`/tasks/${request.task_id}`)).body).toMatchObject({
      status: 'succeeded',
      callback_status: 'pending',
    })
    expect(await redeliver(request.task_id)).toEqual({
      status: 409,
      body: {
        ...{ success: false, code: 'delivery_in_flight' },
        message: expect.stringMatching(/./),
      },
    })
    answer.release()
    await expect
      .poll(() => state(request.task_id), POLL)
      .toMatchObject({ status: 'delivered', attempts: { length: 1 } })
  })
})
