import { readFile, stat } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { FIXTURE_TASKS, startApp, type TestApp, taskRequest } from '../helpers/app.ts'
import { type Receiver, startReceiver } from '../helpers/receiver.ts'

const POLL = { timeout: 20_000, interval: 20 }
const MEGABYTE = 1024 * 1024

let app: TestApp
let receiver: Receiver
let port: number

beforeAll(async () => {
  app = await startApp({ PYTHON_COMMAND: '/nonexistent/python' })
  receiver = await startReceiver()
  port = Number(new URL(await app.http.listen({ host: '127.0.0.1', port: 0 })).port)
})

afterAll(async () => {
  await app[Symbol.asyncDispose]()
  await receiver[Symbol.asyncDispose]()
})

/** Runs a task file; what its caller and its log tell. */
async function run(task_file_name: string, overrides: object = {}) {
  const request = taskRequest({ task_file_name, callback_url: receiver.url, ...overrides })
  expect(await app.submit(request)).toMatchObject({ status: 200 })
  const task = await app.finished(request.task_id)
  const { body: callback } = await receiver.callbackOf(request.task_id)
  return {
    task,
    callback,
    log: await app.text(`/tasks/${encodeURIComponent(request.task_id)}/logs`),
  }
}

/** JSON of an object with so many names. */
function objectOf(count: number): string {
  const names = Array.from({ length: count }, (_, index) => `"${index.toString(36)}":1`)
  return `{${names.join()}}`
}

async function post(payload: string | Buffer, type = 'application/json', url = '/task-runner') {
  const reply = await app.http.inject({
    method: 'POST',
    url,
    headers: { 'content-type': type },
    payload,
  })
  return { status: reply.statusCode, body: reply.json() as Record<string, unknown> }
}

/** Sends bytes as they are, and waits for the other side to close. */
async function raw(text: string): Promise<{ status: number; body: unknown }> {
  const answer = await new Promise<string>((resolve, reject) => {
    let received = ''
    const socket = connect(port, '127.0.0.1', () => socket.write(text))
    socket.on('data', (chunk) => {
      received += chunk
      if (/\r\n\r\n.*\}$/s.test(received)) socket.destroy()
    })
    socket.on('error', reject)
    socket.on('close', () => resolve(received))
  })
  const body = answer.slice(answer.indexOf('\r\n\r\n') + 4)
  return {
    status: Number(answer.split(' ')[1]),
    body: body.startsWith('{') ? JSON.parse(body) : body,
  }
}

const ONE_SHAPE = {
  ...{ success: false, code: expect.stringMatching(/^[a-z_]+$/) },
  message: expect.stringMatching(/./),
}

describe('requests', () => {
  test.each([
    ['cut short', '{"task_id": "a", '],
    ['with a trailing comma', '{"task_id": "a",}'],
    ['in single quotes', "{'task_id': 'a'}"],
    ['followed by more', '{} {}'],
    ['of NUL bytes', '\0\0\0\0'],
    ['that is HTML', '<html></html>'],
    ['that is a form', 'task_id=a&task_file_name=echo.sh'],
  ])('JSON %s: 422 that says it is not valid JSON', async (_name, payload) => {
    expect(await post(payload)).toEqual({
      status: 422,
      body: {
        ...{ success: false, code: 'invalid_request' },
        message: expect.stringContaining('not valid JSON'),
        errors: [{ path: '', message: expect.stringContaining('not valid JSON') }],
      },
    })
  })

  test.each([
    ['NaN', '{"task_id": NaN}', 'task_id'],
    ['Infinity', '{"worker_config": {"env_variables": {"A": "NaN", "B":Infinity}}}', 'B'],
    ['-Infinity', '{"worker_config": {"env_variables": {"A": [1, -Infinity]}}}', 'A.1'],
    ['NaN', 'NaN', ''],
  ])('%s in a body, as Python writes it, is named with its place', async (word, payload, at) => {
    const path = at.length === 1 || at === 'A.1' ? `worker_config.env_variables.${at}` : at
    const message = `${word} is not valid JSON: send null or a string`
    expect(await post(payload)).toMatchObject({
      status: 422,
      body: { errors: [{ path, message }], message: expect.stringContaining(message) },
    })
  })

  test('wrong types are named, each by its path and with what was expected', async () => {
    const { status, body } = await app.post('/task-runner', {
      task_id: 5,
      task_file_name: ['echo.sh'],
      worker_config: 'small',
      callback_url: 1,
      terminate_on_completion: 'yes',
      timeout_seconds: '60',
    })
    expect(status).toBe(422)
    const errors = body.errors as Array<{ path: string; message: string }>
    expect(Object.fromEntries(errors.map(({ path, message }) => [path, message]))).toEqual({
      task_id: expect.stringContaining('string'),
      task_file_name: expect.stringContaining('string'),
      worker_config: expect.stringContaining('object'),
      callback_url: expect.stringContaining('string'),
      terminate_on_completion: 'must be true or false',
      timeout_seconds: expect.stringMatching(/number|int/),
    })
  })

  test('a body of 10 MB: 413 that says it is too large, and the service goes on', async () => {
    const payload = JSON.stringify(taskRequest({ padding: 'x'.repeat(10 * MEGABYTE) }))
    const refused = {
      status: 413,
      body: {
        ...{ success: false, code: 'request_too_large' },
        message: expect.stringContaining('large'),
      },
    }
    expect(await post(payload)).toEqual(refused)
    const head =
      'POST /task-runner HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    expect(await raw(`${head}Content-Length: 10485760\r\n\r\n{"task_id": "`)).toEqual(refused)
    expect((await app.get('/health/ready')).status).toBe(200)
  })

  test('deep nesting is refused or ignored by every route that takes JSON, never a failure of ours', async () => {
    const deep = `${'['.repeat(500_000)}${']'.repeat(500_000)}`
    const objects = `${'{"a":'.repeat(40_000)}1${'}'.repeat(40_000)}`
    const { task_id } = taskRequest()
    const bodies = [
      deep,
      objects,
      `{"task_id": ${deep}}`,
      `{"task_id":"${task_id}","task_file_name":"echo.sh","worker_config":{"distributed_config":${deep}}}`,
      `{"task_id":"${task_id}","task_file_name":"echo.sh","worker_config":{"env_variables":${objects}}}`,
    ]
    for (const body of bodies) {
      expect(await post(body)).toMatchObject({ status: 422, body: ONE_SHAPE })
      expect(await post(body, undefined, '/workers/cleanup')).toMatchObject({ status: 422 })
      expect(await post(body, undefined, '/sample-task-runner-callback')).toMatchObject({
        status: 422,
      })
      const any = await post(body, undefined, '/sample-task-runner-callback2')
      expect([200, 422]).toContain(any.status)
    }
    const kept = `{"task_id":"${task_id}","task_file_name":"echo.sh","worker_config":{"image_config":{"a":${objects}}}}`
    expect((await post(kept)).status).toBe(200)
    expect(await app.finished(task_id)).toMatchObject({ status: 'succeeded' })
  })

  test.each([
    '{"__proto__": {"task_id": "polluted"}}',
    '{"task_id": "a", "worker_config": {"__proto__": {"polluted": true}}}',
    '{"constructor": {"prototype": {"polluted": true}}}',
    '{"task_id": "a", "worker_config": {"env_variables": {"__proto__": {"polluted": "x"}}}}',
  ])('%s is refused and pollutes nothing', async (payload) => {
    expect(await post(payload)).toMatchObject({ status: 422, body: ONE_SHAPE })
    expect({}).not.toHaveProperty('polluted')
    expect({}).not.toHaveProperty('task_id')
  })

  test.each([
    ['NUL in task_id', { task_id: 'a\0b' }, 'task_id', /control/],
    ['a new line in task_id', { task_id: 'a\nb' }, 'task_id', /control/],
    ['an escape in task_id', { task_id: '\u001b[2Ja' }, 'task_id', /control/],
    ['half a character in task_id', { task_id: '\ud83d' }, 'task_id', /Unicode/],
    ['NUL in task_file_name', { task_file_name: 'echo.sh\0.sh' }, 'task_file_name', /control/],
    [
      'NUL in a variable',
      { worker_config: { env_variables: { A: 'a\0b' } } },
      'worker_config.env_variables.A',
      /NUL/,
    ],
    [
      'a variable named A=B',
      { worker_config: { env_variables: { 'A=B': 'c' } } },
      'worker_config.env_variables.A=B',
      /not a variable name/,
    ],
    [
      'NUL in the startup script',
      { worker_config: { startup_script: 'echo \0' } },
      'worker_config.startup_script',
      /NUL/,
    ],
  ])('%s is refused by its path', async (_name, overrides, path, message) => {
    expect(await app.submit(taskRequest(overrides))).toMatchObject({
      status: 422,
      body: { success: false, errors: [{ path, message: expect.stringMatching(message) }] },
    })
  })

  test.each([
    ['of ISO 8859-1', Buffer.from('{"task_id": "caf\u00e9"}', 'latin1')],
    ['cut inside of a character', Buffer.from('{"task_id": "\u20ac').subarray(0, -1)],
    ['of half a surrogate pair', Buffer.from([0x22, 0xed, 0xa0, 0x80, 0x22])],
  ])('bytes %s are no UTF-8: 422 that says so', async (_name, payload) => {
    expect(await post(payload)).toEqual({
      status: 422,
      body: {
        ...{ success: false, code: 'invalid_request' },
        message: expect.stringContaining('The body is not UTF-8'),
        errors: [{ path: '', message: 'The body is not UTF-8' }],
      },
    })
  })

  test.each(['iso-8859-1', '"utf-16le"', 'none'])(
    'a charset of %s: 415 that names it',
    async (charset) => {
      const { status, body } = await post('{}', `application/json; charset=${charset}`)
      expect(status).toBe(415)
      expect(body).toEqual(ONE_SHAPE)
      expect(body.message).toContain(charset.replaceAll('"', ''))
    },
  )

  test.each(['utf-8', 'UTF-8', '"utf-8"', 'utf8'])('a charset of %s is read', async (charset) => {
    const { status, body } = await post('{"task_id": 1}', `application/json; charset=${charset}`)
    expect(status).toBe(422)
    expect(body.message).toContain('task_id')
  })

  test.each(['gzip', 'br', 'identity, gzip'])(
    'a body encoded as %s: 415 that names it',
    async (coding) => {
      const reply = await app.http.inject({
        method: 'POST',
        url: '/task-runner',
        headers: { 'content-type': 'application/json', 'content-encoding': coding },
        payload: gzipSync('{}'),
      })
      expect(reply.statusCode).toBe(415)
      expect(reply.json()).toEqual(ONE_SHAPE)
      expect(reply.json().message).toContain(coding)
    },
  )

  test('a body that says it is not encoded is read', async () => {
    const reply = await app.http.inject({
      method: 'POST',
      url: '/task-runner',
      headers: { 'content-type': 'application/json', 'content-encoding': 'Identity' },
      payload: '{"task_id": 1}',
    })
    expect(reply.statusCode).toBe(422)
    expect(reply.json().message).toContain('task_id')
  })

  test.each([
    [
      '/task-runner',
      'worker_config.env_variables',
      (names: string) => `{"worker_config":{"env_variables":${names}}}`,
    ],
    ['/task-runner', '', (names: string) => names],
    ['/task-runner', 'a.3.b', (names: string) => `{"x":[{}],"a":[1,[2],"c,{",{"b":${names}}]}`],
    ['/sample-task-runner-callback', '', (names: string) => names],
    ['/sample-task-runner-callback2', 'received', (names: string) => `{"received":${names}}`],
    ['/sample-task-runner-callback2', '', (names: string) => JSON.stringify(names)],
    ['/workers/cleanup', '', (names: string) => names],
  ])(
    '%s with half a million names at "%s" is refused at little cost',
    async (url, path, bodyOf) => {
      const body = bodyOf(objectOf(420_000))
      const startedAt = performance.now()
      const answer = await post(body, undefined, url)
      expect(performance.now() - startedAt).toBeLessThan(5 * 50)
      expect(answer).toEqual({
        status: 422,
        body: {
          ...{ success: false, code: 'invalid_request' },
          message: expect.stringContaining('10000 names'),
          errors: [{ path, message: 'has more than 10000 names' }],
        },
      })
    },
  )

  test('10,000 variables are taken, one more is not', async () => {
    const withVariables = (count: number) =>
      taskRequest({
        worker_config: {
          env_variables: Object.fromEntries(
            Array.from({ length: count }, (_, index) => [`A${index}`, '']),
          ),
        },
      })
    const taken = withVariables(10_000)
    expect(await app.submit(taken)).toMatchObject({ status: 200 })
    await app.finished(taken.task_id)
    expect(await app.submit(withVariables(10_001))).toMatchObject({
      status: 422,
      body: { errors: [{ path: 'worker_config.env_variables' }] },
    })
    const hidden = { env_variables: withVariables(10_001).worker_config }
    const additional_params = Buffer.from(JSON.stringify(hidden)).toString('base64')
    expect(await app.submit(taskRequest({ worker_config: { additional_params } }))).toMatchObject({
      status: 422,
      body: {
        errors: [{ path: 'worker_config.additional_params.env_variables.env_variables' }],
      },
    })
  })

  test.each([
    ['numbers', '1'],
    ['lists', '[]'],
    ['objects', '{}'],
  ])('a list of very many %s is refused at little cost', async (_name, value) => {
    const body = `{"task_id":[${`${value},`.repeat(1_300_000)}1]}`
    const startedAt = performance.now()
    const answer = await post(body)
    expect(performance.now() - startedAt).toBeLessThan(5 * 50)
    expect(answer).toMatchObject({ status: 422, body: ONE_SHAPE })
    expect(answer.body.message).toContain('50000 values')
  })

  test.each([
    ['no HTTP at all', 'bad_request', 'NONSENSE\r\n\r\n'],
    [
      'a header that is too long',
      'headers_too_large',
      `GET /tasks HTTP/1.1\r\nHost: localhost\r\nX: ${'x'.repeat(20_000)}\r\n\r\n`,
    ],
    [
      'two lengths',
      'bad_request',
      'POST /task-runner HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}',
    ],
    ['no Host', 'bad_request', 'GET /tasks HTTP/1.1\r\n\r\n'],
    [
      'an Expect that nobody knows',
      'expectation_failed',
      'POST /task-runner HTTP/1.1\r\nHost: localhost\r\nExpect: a-miracle\r\nContent-Length: 0\r\n\r\n',
    ],
  ])('%s is answered with 4xx in the one error shape', async (_name, code, text) => {
    const { status, body } = await raw(text)
    expect(status).toBeGreaterThanOrEqual(400)
    expect(status).toBeLessThan(500)
    expect(body).toEqual({ ...ONE_SHAPE, code })
  })
})

describe('names from all over the world', () => {
  test('reach task, environment, log and callback unharmed', async () => {
    const task_id = 'zadaća 任务 🚀 — “quoted” $HOME `id` \'"\\ %s'
    const value = 'värde 値 🚀 $HOME `id` $(id) \'"\\ %s\ttab\nnew line'
    const { callback, log } = await run('bad-variables.sh', {
      task_id,
      worker_config: { env_variables: { SHOW: 'TASK_ID VALUE', VALUE: value } },
    })
    expect(log).toBe(`TASK_ID=${task_id}\nVALUE=${value}\n`)
    expect(callback).toEqual({ task_name: 'bad-variables.sh', task_id, success: true, logs: log })
  })

  test('variables named as those of our own scripts reach the task, with a startup script too', async () => {
    const names = ['code', 'option', 'interpreter', 'file', 'folder', 'name', 'IFS', 'CDPATH']
    const env_variables = Object.fromEntries(names.map((name) => [name, `my ${name}`]))
    for (const startup_script of [null, 'true\n']) {
      const { task, log } = await run('bad-variables.sh', {
        worker_config: {
          env_variables: { ...env_variables, SHOW: 'code option interpreter file folder' },
          startup_script,
        },
      })
      expect(task).toMatchObject({ status: 'succeeded' })
      const lines = ['code', 'option', 'interpreter', 'file', 'folder']
      expect({ startup_script, log }).toEqual({
        startup_script,
        log: lines.map((name) => `${name}=my ${name}\n`).join(''),
      })
    }
  })
})

describe('scripts', () => {
  test('one that is not executable runs all the same', async () => {
    const { mode } = await stat(join(FIXTURE_TASKS, 'bad-not-executable.sh'))
    expect(mode & 0o111).toBe(0)
    const { task, log } = await run('bad-not-executable.sh')
    expect(task).toMatchObject({ status: 'succeeded', exit_code: 0 })
    expect(log).toBe('it runs all the same\n')
  })

  test('one with CRLF line ends fails, and the first line of its log says why', async () => {
    const { task, callback, log } = await run('bad-crlf.sh')
    expect(task).toMatchObject({ status: 'failed', reason: 'exit_code' })
    expect(log.split('\n')[0]).toMatch(/^\[task-runner\] .*CRLF.*LF$/)
    expect(callback).toMatchObject({ success: false, logs: log })
  })

  test('a missing interpreter fails the task with 127, and log and message name it', async () => {
    const { task, callback, log } = await run('bad-hello.py')
    expect(task).toMatchObject({
      status: 'failed',
      reason: 'exit_code',
      exit_code: 127,
      message: expect.stringContaining('interpreter'),
    })
    expect(log).toContain('/nonexistent/python')
    expect(callback).toMatchObject({ success: false, logs: log })
  })

  test('one that prints bytes that are not UTF-8 is shown with U+FFFD', async () => {
    const { task, callback, log } = await run('bad-bytes.sh')
    expect(task).toMatchObject({ status: 'succeeded', log_bytes: 16 })
    expect(log).toBe('fine \ufffd\ufffd \ufffd cut \ufffd')
    expect(callback.logs).toBe(log)
  })

  test('one that prints 200 MB keeps the last 5 MB, says how many bytes were cut, and costs no memory', async () => {
    const bytes = 200 * MEGABYTE
    const request = taskRequest({
      task_file_name: 'bad-flood.sh',
      callback_url: receiver.url,
      worker_config: { env_variables: { BYTES: bytes } },
    })
    const before = process.memoryUsage.rss()
    let peak = before
    const sample = setInterval(() => {
      peak = Math.max(peak, process.memoryUsage.rss())
    }, 10)
    await app.submit(request)
    const { body: callback } = await receiver.callbackOf(request.task_id)
    clearInterval(sample)
    const task = await app.finished(request.task_id)
    const total = bytes + 'the end\n'.length
    const kept = 5 * MEGABYTE
    expect(task).toMatchObject({ status: 'succeeded', log_bytes: total })
    const log = await app.text(`/tasks/${request.task_id}/logs`)
    const first = `[task-runner] ${total - kept} bytes of log before this line were cut\n`
    expect(log.slice(0, first.length)).toBe(first)
    expect(log.length).toBe(first.length + kept)
    expect(log.endsWith('the end\n')).toBe(true)
    expect(callback.success).toBe(true)
    expect(callback.logs === log).toBe(true)
    // A few copies of 5 MB in two threads and in the receiver of this test, not of 200 MB.
    expect(peak - before).toBeLessThan(100 * MEGABYTE)
  })

  test('one that leaves children holding its output ends promptly, and they are killed', async () => {
    const startedAt = Date.now()
    const { task, log } = await run('bad-leaves-children.sh')
    expect(Date.now() - startedAt).toBeLessThan(15_000)
    expect(task).toMatchObject({ status: 'succeeded', exit_code: 0 })
    const pids = [...log.matchAll(/^child (\d+)$/gm)].map(([, pid]) => Number(pid))
    expect(pids).toHaveLength(2)
    for (const pid of pids) {
      const isGone = () =>
        readFile(`/proc/${pid}/stat`, 'latin1').then(
          (text) => text.slice(text.lastIndexOf(')') + 2).startsWith('Z'),
          () => true,
        )
      await expect.poll(isGone, POLL).toBe(true)
    }
  })
})
