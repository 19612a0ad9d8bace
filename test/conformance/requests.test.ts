/** What `POST /task-runner` takes and refuses, the shape of every error, and the routes that are open. */
import { describe, expect, test } from 'vitest'
import { expectAccepted, expectDone, expectError } from './expectations.ts'
import { useReceiver } from './receiver.ts'
import { newTaskId, POLL, taskRequest, useTarget } from './target.ts'

const target = useTarget()
const receiver = useReceiver()

describe('POST /task-runner', () => {
  test.each(['/task-runner', '/task-runner/'])(
    '%s answers exactly success, message and task_id',
    async (path) => {
      const request = taskRequest()
      const answer = await target.submit(request, path)
      expectAccepted(answer, request.task_id)
      expect(answer.headers.get('content-type')).toMatch(/^application\/json/)
    },
  )

  test.each(['task_id', 'task_file_name', 'worker_config'])(
    'a request without %s is refused, naming it',
    async (field) => {
      const request = Object.entries(taskRequest()).filter(([name]) => name !== field)
      expectError(await target.submit(Object.fromEntries(request)), 422, field)
    },
  )

  test.each(['callback_url', 'callback_url_token', 'terminate_on_completion', 'timeout_seconds'])(
    '%s may be null',
    async (field) => {
      const request = taskRequest({ [field]: null })
      expectAccepted(await target.submit(request), request.task_id)
    },
  )

  test.each(['callback_url', 'callback_url_token'])('%s may be empty', async (field) => {
    const request = taskRequest({ [field]: '' })
    expectAccepted(await target.submit(request), request.task_id)
  })

  test('worker_config may be empty', async () => {
    const request = taskRequest({ task_file_name: 'failing.py', worker_config: {} })
    expectAccepted(await target.submit(request), request.task_id)
  })

  test.each(['terminate_on_competion', 'task_name', 'Task_id'])(
    'the unknown field %s is refused by name',
    async (field) => {
      expectError(await target.submit(taskRequest({ [field]: true })), 422, field)
    },
  )

  test('each of several wrong fields is named', async () => {
    const answer = await target.submit(taskRequest({ task_id: '', timeout_seconds: 0, extra: 1 }))
    expectError(answer, 422, 'task_id')
    expectError(answer, 422, 'timeout_seconds')
    expectError(answer, 422, 'extra')
  })

  test.each<[string, unknown]>([
    ...values('task_id', [null, 1, true, [], {}]),
    ...values('task_file_name', [null, 1, true, [], {}]),
    ...values('worker_config', [null, 1, 'small', []]),
    ...values('callback_url', [1, true, [], {}]),
    ...values('callback_url_token', [1, true, [], {}]),
    ...values('terminate_on_completion', ['true', 'false', 0, 1, []]),
    ...values('timeout_seconds', ['60', true, 1.5, [], {}]),
  ])('%s of a wrong type is refused: %j', async (field, value) => {
    expectError(await target.submit(taskRequest({ [field]: value })), 422, field)
  })

  test.each<[string, string, unknown]>([
    ['task_id', 'empty', ''],
    ['task_id', '256 characters', 'x'.repeat(256)],
    ['task_id', 'a line end', 'a\nb'],
    ['task_id', 'a NUL', 'a\0b'],
    ['task_id', 'an escape', 'a\u001bb'],
    ['task_id', 'a DEL', 'a\u007fb'],
    ['task_file_name', 'empty', ''],
    ['task_file_name', 'absolute', '/tasks/hello.py'],
    ['task_file_name', 'above the folder', '../tasks/hello.py'],
    ['task_file_name', '.. inside', 'inner/../hello.py'],
    ['task_file_name', 'no extension', 'hello'],
    ['task_file_name', 'another extension', 'default_worker.json'],
    ['callback_url', 'no URL', 'somewhere'],
    ['callback_url', 'a path alone', '/callback'],
    ['callback_url', 'ftp', 'ftp://example.com/callback'],
    ['callback_url', 'a file', 'file:///etc/passwd'],
    ['callback_url', 'a script', 'javascript:alert(1)'],
    ['callback_url', 'a user', 'http://user@example.com/callback'],
    ['callback_url', 'a user and password', 'http://user:password@example.com/callback'],
    ['callback_url_token', 'a header of its own', 'token\r\nX-Other: 1'],
    ['timeout_seconds', 'zero', 0],
    ['timeout_seconds', 'negative', -1],
  ])('%s is refused: %s', async (field, _what, value) => {
    expectError(await target.submit(taskRequest({ [field]: value })), 422, field)
  })

  test.each<[string, (unique: string) => string]>([
    ['255 characters', (unique) => unique.padEnd(255, 'x')],
    ['spaces and signs', (unique) => `${unique} a+b%20c?d#e&f"g'`],
    ['a slash', (unique) => `${unique}/a/b`],
    ['other alphabets', (unique) => `${unique} zażółć 你好 🚀`],
  ])('a task_id may have %s, and is found under it', async (_what, make) => {
    const taskId = make(newTaskId())
    const { task_id } = await target.finished(await target.start({ task_id: taskId }))
    expect(task_id).toBe(taskId)
  })

  test('a task file that is not there is a 404', async () => {
    const request = taskRequest({ task_file_name: `not-there-${newTaskId()}.py` })
    expectError(await target.submit(request), 404)
    expectError(await target.get(`/tasks/${request.task_id}`), 404)
  })

  test('a refused request leaves no task behind', async () => {
    const request = taskRequest()
    expectError(await target.submit({ ...request, timeout_seconds: 0 }), 422, 'timeout_seconds')
    expectError(await target.get(`/tasks/${request.task_id}`), 404)
    expectAccepted(await target.submit(request), request.task_id)
  })

  test('a refusal does not repeat secrets', async () => {
    const secret = `secret-${newTaskId()}`
    const refused = [
      { callback_url_token: `${secret}\n` },
      { callback_url: `http://user:${secret}@example.com/` },
      { callback_url_token: secret, timeout_seconds: 0 },
      { worker_config: { refresh_token: [secret] } },
      { worker_config: { env_variables: { A: [secret] } } },
      {
        worker_config: { git_configs: [{ remote_url: `https://user:${secret}@127.0.0.1/x.git` }] },
      },
    ]
    for (const overrides of refused) {
      const answer = await target.submit(taskRequest(overrides))
      expectError(answer, 422)
      expect(answer.text).not.toContain(secret)
    }
  })
})

describe('the same task_id again', () => {
  test('with the same request answers 200, names the status and starts nothing', async () => {
    const request = taskRequest({ callback_url: receiver.url })
    expectAccepted(await target.submit(request), request.task_id)
    await receiver.callbackOf(request.task_id)
    expect(await target.task(request.task_id)).toMatchObject({ status: 'succeeded' })

    const again = await target.submit(request)
    const message = 'Already accepted: succeeded'
    expectDone(again, { message, task_id: request.task_id })
    // Had it been started again, it would be ahead of this one.
    await receiver.callbackOf(await target.start({ callback_url: receiver.url }))
    expect(receiver.callbacksOf(request.task_id)).toHaveLength(1)
    expect(await target.log(request.task_id)).toMatch(/^(?!.*done.*done).*done/s)
  })

  test('at the same time is one run', async () => {
    const request = taskRequest({ callback_url: receiver.url })
    const answers = await Promise.all(Array.from({ length: 8 }, () => target.submit(request)))
    const messages = answers.map(({ body }) => String(body.message))
    expect(answers.map(({ status }) => status)).toEqual(Array(8).fill(200))
    expect(messages.filter((each) => each === 'Started Task successfully')).toHaveLength(1)
    expect(messages.filter((each) => /^Already accepted: \w+$/.test(each))).toHaveLength(7)

    await target.finished(request.task_id)
    await receiver.callbackOf(request.task_id)
    await receiver.callbackOf(await target.start({ callback_url: receiver.url }))
    expect(receiver.callbacksOf(request.task_id)).toHaveLength(1)
  })

  test.each<[string, object]>([
    ['task_file_name', { task_file_name: 'hello.py' }],
    ['worker_config', { worker_config: { env_variables: { STEPS: 0, OTHER: 1 } } }],
    ['callback_url', { callback_url: 'https://example.com/callback' }],
    ['callback_url_token', { callback_url_token: 'another' }],
    ['terminate_on_completion', { terminate_on_completion: false }],
    ['timeout_seconds', { timeout_seconds: 77 }],
  ])('with another %s is a 409', async (_field, overrides) => {
    const request = taskRequest()
    expectAccepted(await target.submit(request), request.task_id)
    expectError(await target.submit({ ...request, ...overrides }), 409)
    expect(await target.finished(request.task_id)).toMatchObject({ status: 'succeeded' })
  })
})

describe('the error shape', () => {
  test.each([
    ['GET', '/no-such-route'],
    ['POST', '/task-runner/no-such-route'],
    ['GET', '/tasks/no-such-task'],
    ['GET', '/tasks/no-such-task/logs'],
    ['GET', '/tasks/no-such-task/logs?follow=true'],
    ['GET', '/tasks/no-such-task/callback'],
    ['POST', '/tasks/no-such-task/cancel'],
    ['POST', '/tasks/no-such-task/callback/redeliver'],
    ['GET', '/workers/no-such-worker'],
    ['GET', '/workers/no-such-worker/logs'],
    ['DELETE', '/workers/no-such-worker'],
  ])('is what 404 has: %s %s', async (method, path) => {
    expectError(await target.request(method, path), 404)
  })

  test.each([
    ['no JSON', '{"task_id": '],
    ['nothing', ''],
    ['a list', '[]'],
    ['a string', '"{}"'],
    ['null', 'null'],
  ])('is what 422 has when the body is %s', async (_what, raw) => {
    expectError(await target.request('POST', '/task-runner', { raw }), 422)
  })

  test.each([
    ['/tasks?limit=0', 'limit'],
    ['/tasks?limit=many', 'limit'],
    ['/tasks?status=sleeping', 'status'],
    ['/tasks?cursor=no-cursor', 'cursor'],
  ])('is what 422 has for a query, naming it: %s', async (path, field) => {
    expectError(await target.get(path), 422, field)
  })

  test.each(['text/plain', 'application/x-www-form-urlencoded', 'application/xml'])(
    'is what 415 has for %s',
    async (type) => {
      const options = { json: taskRequest(), headers: { 'content-type': type } }
      expectError(await target.request('POST', '/task-runner', options), 415)
    },
  )

  test('is what 413 has for more than 4 MB', async () => {
    const startup_script = `# ${'x'.repeat(4.5 * 1024 * 1024)}`
    const request = taskRequest({ worker_config: { startup_script } })
    // A service may answer before it has read all, and close; whoever still sends then may miss the answer.
    const answered = async () => {
      const answer = await target.submit(request).catch(() => undefined)
      if (answer) expectError(answer, 413)
      return answer !== undefined
    }
    await expect.poll(answered, POLL).toBe(true)
  })
})

describe('without the right token', () => {
  const PROTECTED: Array<[string, string]> = [
    ['POST', '/task-runner'],
    ['POST', '/task-runner/'],
    ['GET', '/tasks'],
    ['GET', '/tasks/some-task'],
    ['GET', '/tasks/some-task/logs'],
    ['POST', '/tasks/some-task/cancel'],
    ['GET', '/tasks/some-task/callback'],
    ['POST', '/tasks/some-task/callback/redeliver'],
    ['GET', '/workers'],
    ['GET', '/workers/some-worker'],
    ['GET', '/workers/some-worker/logs'],
    ['DELETE', '/workers/some-worker'],
    ['POST', '/workers/cleanup'],
  ]

  test.for(PROTECTED)('%s %s is a 401', async ([method, path], { skip }) => {
    if (target.token === undefined) skip('the service under test has no token')
    const body = method === 'POST' && path.startsWith('/task-runner') ? { json: taskRequest() } : {}
    expectError(await target.request(method, path, { ...body, token: null }), 401)
    expectError(await target.request(method, path, { ...body, token: `${target.token}x` }), 401)
    const headers = { authorization: `Basic ${btoa(`user:${target.token}`)}` }
    expectError(await target.request(method, path, { ...body, headers, token: null }), 401)
  })

  test.each(['/health/live', '/health/ready'])('%s is open and says so', async (path) => {
    const { status, body } = await target.get(path, { token: null })
    expect(status).toBe(200)
    expect(body).toMatchObject({ success: true, message: expect.any(String) })
  })

  test('/docs/json is open, an OpenAPI 3 document with the request and its fields', async () => {
    const { status, body } = await target.get('/docs/json', { token: null })
    expect(status).toBe(200)
    expect(body).toMatchObject({
      openapi: expect.stringMatching(/^3\./),
      paths: {
        '/task-runner': { post: expect.any(Object) },
        '/tasks': { get: expect.any(Object) },
        '/workers': { get: expect.any(Object) },
      },
      components: {
        schemas: {
          TaskRunnerRequest: {
            properties: Object.fromEntries(
              [...Object.keys(taskRequest()), 'callback_url', 'callback_url_token']
                .concat('terminate_on_completion', 'timeout_seconds')
                .map((name) => [name, expect.any(Object)]),
            ),
            required: expect.arrayContaining(['task_id', 'task_file_name', 'worker_config']),
          },
        },
      },
    })
  })

  test('/docs/yaml is the same as YAML', async () => {
    const { status, text } = await target.get('/docs/yaml', { token: null })
    expect(status).toBe(200)
    expect(text).toMatch(/^"?openapi"?: "?3\./m)
    expect(text).toMatch(/^\s+"?TaskRunnerRequest"?:/m)
  })

  test('/docs is a page', async () => {
    const { status, headers, text } = await target.get('/docs/', { token: null })
    expect([status, text]).toEqual([200, expect.stringMatching(/<html/i)])
    expect(headers.get('content-type')).toMatch(/^text\/html/)
  })
})

describe('the sample callbacks, open', () => {
  const CALLBACK = { task_name: 'hello.py', task_id: 'some-task', success: true, logs: 'hello\n' }
  const post = (path: string, json: unknown) => target.request('POST', path, { json, token: null })
  const OK = { message: 'ok' }

  test.each([true, false])('the first takes the four fields, success %s', async (success) => {
    expectDone(await post('/sample-task-runner-callback', { ...CALLBACK, success }), OK)
  })

  test.each(Object.keys(CALLBACK))('the first wants %s, of its type', async (field) => {
    const others = Object.entries(CALLBACK).filter(([name]) => name !== field)
    const missing = Object.fromEntries(others)
    expectError(await post('/sample-task-runner-callback', missing), 422, field)
    const wrong = { ...CALLBACK, [field]: 1 }
    expectError(await post('/sample-task-runner-callback', wrong), 422, field)
  })

  test('the first takes a fifth field, and refuses JSON that was encoded twice', async () => {
    expectDone(await post('/sample-task-runner-callback', { ...CALLBACK, extra: 1 }), OK)
    expectError(await post('/sample-task-runner-callback', JSON.stringify(CALLBACK)), 422)
  })

  test.each<[string, unknown]>([
    ['the four fields', CALLBACK],
    ['an empty object', {}],
    ['any object', { some: [1, { thing: null }] }],
    ['a string that holds an object', JSON.stringify(CALLBACK)],
  ])('the second takes %s', async (_what, json) => {
    expectDone(await post('/sample-task-runner-callback2', json), OK)
  })

  test.each<[string, unknown]>([
    ['a list', []],
    ['a number', 1],
    ['a string that holds no JSON', 'hello'],
    ['a string that holds a list', '[]'],
  ])('the second refuses %s', async (_what, json) => {
    expectError(await post('/sample-task-runner-callback2', json), 422)
  })
})

function values(field: string, wrong: unknown[]): Array<[string, unknown]> {
  return wrong.map((value) => [field, value])
}
