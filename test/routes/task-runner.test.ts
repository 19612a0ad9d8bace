import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'

const SHOW = 'for name in $SHOW; do eval "echo \\"$name=\\$$name\\""; done\n'
const WAIT = 'while [ -d "$GATE" ] && [ ! -e "$GATE/open" ]; do sleep 0.02; done\n'

const POLL = { timeout: 20_000, interval: 20 }

let folder: string
let tasksDir: string
let gate: string
let app: TestApp

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-runner-route-'))
  tasksDir = join(folder, 'tasks')
  gate = join(folder, 'gate')
  await mkdir(gate)
  await mkdir(join(tasksDir, 'nested'), { recursive: true })
  await mkdir(join(tasksDir, 'node_modules'))
  await mkdir(join(tasksDir, 'folder.sh'))
  const write = (name: string, content: string) => writeFile(join(tasksDir, name), content)
  await write('echo.sh', 'echo hi\n')
  await write('show.sh', SHOW)
  await write('own.sh', SHOW)
  await write('count.sh', 'echo run >>"$COUNT"\n')
  await write('wait.sh', WAIT)
  await write('broken.sh', 'echo hi\n')
  await write('wrong.sh', 'echo hi\n')
  await write('nested/inner.sh', 'echo inner\n')
  await write('node_modules/inner.sh', 'echo inner\n')
  await write('notes.txt', 'no task\n')
  await write(`${'n'.repeat(250)}.sh`, 'echo long\n')
  await writeFile(join(folder, 'outside.sh'), 'echo outside\n')
  await symlink(join(folder, 'outside.sh'), join(tasksDir, 'leads-out.sh'))
  await symlink(folder, join(tasksDir, 'leads-out'))
  await symlink('nested/inner.sh', join(tasksDir, 'leads-in.sh'))
  await symlink('nested', join(tasksDir, 'linked'))
  await symlink('nothing.sh', join(tasksDir, 'dangling.sh'))
  await write(
    'default_worker.json',
    JSON.stringify({
      log_level: 'WARNING',
      worker_size: 'None',
      worker_image: '',
      startup_script: null,
      env_variables: { A: 'common', B: 'common', C: 'common' },
    }),
  )
  await write(
    'own_worker.json',
    JSON.stringify({ modules_log_level: 'own', env_variables: { B: 'own', C: 'own' } }),
  )
  await write('broken_worker.json', '{"refresh_token": a-secret}')
  await write('wrong_worker.json', '{"worker_sise": "Small"}')
  app = await startApp({ TASKS_DIR: tasksDir })
})

afterAll(async () => {
  await rm(gate, { recursive: true, force: true })
  await app[Symbol.asyncDispose]()
  await rm(folder, { recursive: true, force: true, maxRetries: 10 })
})

/** The one shape that every error has. */
function refusal(code: string) {
  return { success: false, code, message: expect.stringMatching(/./) }
}

function base64(value: unknown): string {
  return Buffer.from(JSON.stringify(value)).toString('base64')
}

describe('fields', () => {
  const wrong: Record<string, unknown[]> = {
    task_id: [
      1,
      null,
      {},
      [],
      true,
      '',
      'x'.repeat(256),
      'a\nb',
      'a\0',
      'a\u007f',
      '\u0085',
      '\ud800',
    ],
    task_file_name: [
      ...[1, null, {}, [], '', 'echo', 'notes.txt', 'echo.SH.txt', '.sh/', '/echo.sh', '/etc/a.sh'],
      ...['../outside.sh', 'nested/../echo.sh', './echo.sh', 'nested//inner.sh', '..\\outside.sh'],
      ...[
        'leads-out.sh',
        'leads-out/outside.sh',
        'echo.sh\n',
        'echo\0.sh',
        `${'a/'.repeat(300)}b.sh`,
      ],
    ],
    worker_config: [null, 1, 'small', [], true],
    callback_url: [
      ...[
        1,
        {},
        [],
        true,
        'None',
        'example.com',
        '/callback',
        'ftp://example.com/',
        'javascript:alert(1)',
      ],
      ...[
        'http://',
        'https://user:password@example.com/',
        `https://example.com/${'x'.repeat(4096)}`,
      ],
    ],
    callback_url_token: [1, {}, [], 'two words', 'a\r\nInjected: yes', 'ü', 'x'.repeat(8193)],
    terminate_on_completion: [1, 0, 'true', '', {}, []],
    timeout_seconds: [0, -1, 1.5, '60', true, {}, [], 86_401, 1e20],
  }

  test.each(
    Object.entries(wrong).flatMap(([field, values]) =>
      values.map((value) => [field, JSON.stringify(value).slice(0, 40), value] as const),
    ),
  )('%s: %s is refused with 422 by its path', async (field, _shown, value) => {
    const { status, body } = await app.submit(taskRequest({ [field]: value }))
    expect({ status, body }).toMatchObject({
      status: 422,
      body: { success: false, message: expect.stringContaining(field) },
    })
    expect(body.errors).toEqual(
      expect.arrayContaining([{ path: field, message: expect.stringMatching(/./) }]),
    )
  })

  test('what is missing is named, all of it at once', async () => {
    expect(await app.submit({})).toEqual({
      status: 422,
      body: {
        ...{ success: false, code: 'invalid_request' },
        message: expect.stringContaining('task_id: is required'),
        errors: ['task_id', 'task_file_name', 'worker_config'].map((path) => ({
          path,
          message: 'is required',
        })),
      },
    })
  })

  test('unknown fields are named: a typo is not silent', async () => {
    const request = taskRequest({
      terminate_on_complete: false,
      worker_config: { worker_sise: 'S' },
    })
    const { status, body } = await app.submit(request)
    expect(status).toBe(422)
    expect(body.errors).toEqual(
      expect.arrayContaining([
        { path: 'terminate_on_complete', message: 'unknown field' },
        { path: 'worker_config.worker_sise', message: 'unknown field' },
      ]),
    )
    expect((await app.get(`/tasks/${request.task_id}`)).status).toBe(404)
  })

  test('every optional field may be null', async () => {
    const request = taskRequest({
      callback_url: null,
      callback_url_token: null,
      terminate_on_completion: null,
      timeout_seconds: null,
    })
    expect(await app.submit(request)).toMatchObject({ status: 200 })
    expect(await app.finished(request.task_id)).toMatchObject({
      status: 'succeeded',
      callback_url: null,
      callback_status: 'none',
      terminate_on_completion: true,
      timeout_seconds: 86_400,
    })
  })

  test.each(['12|AbCdEfGh', 'user:secret1', 'p@ss!word#1', '"quoted"', '~'])(
    'the token %s reaches the receiver as it is',
    async (token) => {
      await using receiver = await startReceiver()
      const request = taskRequest({ callback_url: receiver.url, callback_url_token: token })
      expect(await app.submit(request)).toMatchObject({ status: 200 })
      const { headers } = await receiver.callbackOf(request.task_id)
      expect(headers).toMatchObject({
        ...{ authorization: `Bearer ${token}`, 'task-status': 'succeeded' },
        ...{ 'task-reason': 'completed', 'task-exit-code': '0' },
        'task-duration-ms': expect.stringMatching(/^[0-9]+$/),
      })
    },
  )

  test('an empty callback_url or callback_url_token means none', async () => {
    const request = taskRequest({ callback_url: '', callback_url_token: '' })
    expect(await app.submit(request)).toMatchObject({ status: 200 })
    expect(await app.finished(request.task_id)).toMatchObject({
      callback_url: null,
      callback_status: 'none',
    })
    expect(await app.submit({ ...request, callback_url: null })).toMatchObject({
      status: 200,
      body: { message: 'Already accepted: succeeded' },
    })
  })

  test.each([
    ['task_id', '', 'must not be empty'],
    ['task_id', 'a\nb', 'must not contain control characters'],
    ['task_id', '..', 'must not be a relative path'],
    ['task_id', 'x'.repeat(256), 'must be at most 255 characters long'],
    ['task_file_name', '', 'must not be empty'],
    ['task_file_name', 'a\n.sh', 'must not contain control characters'],
    ['task_file_name', '../notes.txt', 'must end in .py, .sh, .js, .mjs, .cjs, .ts'],
    ['task_file_name', './a.sh', 'must be a plain relative path inside the tasks folder'],
    ['callback_url', 'here', 'is not a URL'],
    ['callback_url', 'ftp://example.com', 'must be http or https'],
    ['callback_url_token', 'two words', 'must be visible ASCII characters, without spaces'],
    ['timeout_seconds', 0.5, 'must be a whole number'],
    ['timeout_seconds', 0, 'must be at least 1'],
    ['priority', 10, 'must be at most 9'],
  ])('%s: %j has one fault, told once: %s', async (field, value, message) => {
    const { body } = await app.submit(taskRequest({ [field]: value }))
    expect(body.errors).toEqual([{ path: field, message }])
    expect(body.message).toBe(`Invalid request: ${field}: ${message}`)
  })

  test.each([
    ['None', 'None'],
    ['1 character', 'x'],
    ['dots', '...'],
    ['a leading dot', '.a'],
    ['255 characters', 'x'.repeat(255)],
    ['spaces, slashes, emoji', ` a/b c?d#e%20 ../ 🚀 ñ " '`],
  ])('a task_id of %s is taken as it is', async (_name, taskId) => {
    const request = taskRequest({ task_id: taskId })
    expect(await app.submit(request)).toEqual({
      status: 200,
      body: { success: true, message: 'Started Task successfully', task_id: taskId },
    })
    expect(await app.finished(taskId)).toMatchObject({ status: 'succeeded', task_id: taskId })
  })
})

describe('task files', () => {
  test.each(['nothing.sh', 'nested/nothing.sh', 'echo.sh/inner.sh', 'dangling.sh', 'folder.sh'])(
    '%s is no file: 404 that names it, and no task',
    async (name) => {
      const request = taskRequest({ task_file_name: name })
      expect(await app.submit(request)).toEqual({
        status: 404,
        body: {
          ...{ success: false, code: 'task_file_not_found' },
          message: expect.stringContaining(name),
        },
      })
      expect((await app.get(`/tasks/${request.task_id}`)).status).toBe(404)
    },
  )

  test.each([['a name longer than a disk takes', `${'x'.repeat(300)}.sh`]])(
    '%s is refused as the caller’s error',
    async (_name, task_file_name) => {
      const { status, body } = await app.submit(taskRequest({ task_file_name }))
      expect([404, 422]).toContain(status)
      expect(body).toMatchObject({ success: false, message: expect.stringMatching(/./) })
    },
  )

  test('a link that leads to itself is refused, and says so', async () => {
    const link = join(tasksDir, 'circle.sh')
    await symlink('circle.sh', link)
    expect(await app.submit(taskRequest({ task_file_name: 'circle.sh' }))).toEqual({
      status: 404,
      body: {
        ...{ success: false, code: 'task_file_not_found' },
        message: 'The task file "circle.sh" cannot be read (ELOOP)',
      },
    })
    await rm(link)
  })

  test('a link out of the folder is refused, and says so', async () => {
    expect(await app.submit(taskRequest({ task_file_name: 'leads-out.sh' }))).toEqual({
      status: 422,
      body: {
        ...{ success: false, code: 'invalid_request' },
        message: expect.stringContaining('out of the tasks folder'),
        errors: [{ path: 'task_file_name', message: 'leads out of the tasks folder' }],
      },
    })
  })

  test.each([
    ['in a folder', 'nested/inner.sh', 'inner\n'],
    ['behind a link inside the folder', 'leads-in.sh', 'inner\n'],
    ['behind a linked folder inside the folder', 'linked/inner.sh', 'inner\n'],
    ['in node_modules', 'node_modules/inner.sh', 'inner\n'],
    ['with the longest name', `${'n'.repeat(250)}.sh`, 'long\n'],
  ])(
    'a file %s is refused at once, or runs: never accepted and then impossible',
    async (_where, task_file_name, log) => {
      const request = taskRequest({ task_file_name })
      const { status } = await app.submit(request)
      if (status !== 200) {
        expect([404, 422]).toContain(status)
        return
      }
      expect(await app.finished(request.task_id)).toMatchObject({
        status: 'succeeded',
        message: null,
      })
      expect(await app.text(`/tasks/${request.task_id}/logs`)).toBe(log)
    },
  )
})

describe('idempotency', () => {
  test('the same request again answers 200, names the status, and starts nothing', async () => {
    const count = join(folder, 'count-repeated')
    const request = taskRequest({
      task_file_name: 'count.sh',
      worker_config: { env_variables: { COUNT: count } },
      callback_url_token: 'a-token',
    })
    expect((await app.submit(request)).body.message).toBe('Started Task successfully')
    await app.finished(request.task_id)
    const again = {
      ...Object.fromEntries(Object.entries(request).reverse()),
      callback_url: null,
      timeout_seconds: null,
      terminate_on_completion: true,
    }
    for (const repeated of [request, again]) {
      expect(await app.submit(repeated)).toEqual({
        status: 200,
        body: {
          success: true,
          message: 'Already accepted: succeeded',
          task_id: request.task_id,
        },
      })
    }
    expect(await readFile(count, 'utf8')).toBe('run\n')
  })

  test('another request under the same task_id answers 409 and changes nothing', async () => {
    const request = taskRequest({
      callback_url: 'http://127.0.0.1:1/',
      callback_url_token: 'a-token',
      worker_config: { env_variables: { A: '1' } },
    })
    expect((await app.submit(request)).status).toBe(200)
    const others = [
      { task_file_name: 'count.sh' },
      { worker_config: {} },
      { worker_config: { env_variables: { A: '2' } } },
      { worker_config: { env_variables: { A: JSON.rawJSON('1.0') } } },
      { callback_url: null },
      { callback_url: 'http://127.0.0.1:1/other' },
      { callback_url_token: 'another-token' },
      { callback_url_token: null },
      { terminate_on_completion: false },
      { timeout_seconds: 60 },
    ]
    for (const other of others) {
      expect(await app.submit({ ...request, ...other })).toEqual({
        status: 409,
        body: {
          ...{ success: false, code: 'task_id_conflict' },
          message: expect.stringContaining(request.task_id),
        },
      })
    }
    const task = await app.finished(request.task_id)
    expect(task).toMatchObject({ task_file_name: 'echo.sh', terminate_on_completion: true })
  })

  test('the same request written in another way is the same request', async () => {
    const request = taskRequest({
      worker_config: { worker_size: 'SMALL', env_variables: { A: 1, B: true } },
    })
    expect((await app.submit(request)).status).toBe(200)
    const worker_config = {
      worker_image: null,
      worker_size: 'Small',
      env_variables: { B: 'true' },
      additional_params: base64({ env_variables: { A: '1' } }),
    }
    const { status, body } = await app.submit({ ...request, worker_config })
    expect({ status, message: body.message }).toEqual({
      status: 200,
      message: expect.stringMatching(/^Already accepted: \w+$/),
    })
  })

  test('concurrent posts of one task_id start one run', async () => {
    const count = join(folder, 'count-concurrent')
    const request = taskRequest({
      task_file_name: 'count.sh',
      worker_config: { env_variables: { COUNT: count } },
    })
    const answers = await Promise.all(Array.from({ length: 20 }, () => app.submit(request)))
    expect(answers.map(({ status }) => status)).toEqual(Array(20).fill(200))
    const messages = answers.map(({ body }) => body.message)
    expect(messages.filter((message) => message === 'Started Task successfully')).toHaveLength(1)
    expect(
      messages.filter((message) => String(message).startsWith('Already accepted: ')),
    ).toHaveLength(19)
    await app.finished(request.task_id)
    expect(await readFile(count, 'utf8')).toBe('run\n')
  })

  test('of concurrent different requests under one task_id, one is taken and the others get 409', async () => {
    const request = taskRequest()
    const answers = await Promise.all(
      Array.from({ length: 10 }, (_, index) =>
        app.submit({ ...request, timeout_seconds: 100 + index }),
      ),
    )
    const statuses = answers.map(({ status }) => status).sort()
    expect(statuses).toEqual([200, ...Array(9).fill(409)])
    expect(await app.finished(request.task_id)).toMatchObject({
      timeout_seconds: 100 + answers.findIndex(({ status }) => status === 200),
    })
  })
})

describe('a client of the old app', () => {
  test('is served unchanged: all nulls, variables in additional_params, trailing slash', async () => {
    await using receiver = await startReceiver()
    const request = {
      task_id: 'old-app-23erd-rt56',
      task_file_name: 'show.sh',
      worker_config: {
        worker_image: null,
        worker_size: 'X-Small',
        service_type: null,
        network_protocol: null,
        distributed_config: null,
        env_variables: null,
        personal_secrets: null,
        shared_secrets: null,
        git_configs: null,
        startup_script: null,
        image_config: null,
        log_level: null,
        modules_log_level: null,
        interactive: null,
        bypass_ssl_verification: null,
        service_url: null,
        email: null,
        refresh_token: null,
        additional_params: base64({
          env_variables: {
            MY_FIRST_PARAM: 'VALUE1',
            MY_SECOND_PARAM: 123,
            SHOW: 'MY_FIRST_PARAM MY_SECOND_PARAM',
          },
        }),
      },
      callback_url: receiver.url,
      callback_url_token: null,
      terminate_on_completion: true,
    }
    expect(await app.post('/task-runner/', request)).toEqual({
      status: 200,
      body: {
        success: true,
        message: 'Started Task successfully',
        task_id: 'old-app-23erd-rt56',
      },
    })
    const { body, headers } = await receiver.callbackOf(request.task_id)
    expect(body).toEqual({
      task_name: 'show.sh',
      task_id: 'old-app-23erd-rt56',
      success: true,
      logs: expect.stringMatching(/MY_FIRST_PARAM=VALUE1\nMY_SECOND_PARAM=123\n$/),
    })
    expect(headers).not.toHaveProperty('authorization')
    expect((await app.post('/task-runner', request)).body.message).toMatch(/^Already accepted: /)
  })
})

describe('defaults files', () => {
  const logOf = async (task_file_name: string, worker_config: object) => {
    const request = taskRequest({ task_file_name, worker_config })
    expect(await app.submit(request)).toMatchObject({ status: 200 })
    await app.finished(request.task_id)
    return app.text(`/tasks/${request.task_id}/logs`)
  }

  test('the common file is weakest, then the one of the task, then the request', async () => {
    const log = await logOf('own.sh', {
      env_variables: { C: 'request', SHOW: 'A B C LOG_LEVEL MODULES_LOG_LEVEL' },
    })
    expect(log).toBe('A=common\nB=own\nC=request\nLOG_LEVEL=WARNING\nMODULES_LOG_LEVEL=own\n')
  })

  test('the file of one task does not reach another', async () => {
    const log = await logOf('show.sh', { env_variables: { SHOW: 'A B C MODULES_LOG_LEVEL' } })
    expect(log).toBe('A=common\nB=common\nC=common\nMODULES_LOG_LEVEL=\n')
  })

  test('a field of the request wins over the files, also from additional_params; null does not', async () => {
    const show = { env_variables: { SHOW: 'LOG_LEVEL' } }
    expect(await logOf('own.sh', { ...show, log_level: 'DEBUG' })).toBe('LOG_LEVEL=DEBUG\n')
    const additional_params = base64({ log_level: 'ERROR' })
    expect(await logOf('own.sh', { ...show, additional_params })).toBe('LOG_LEVEL=ERROR\n')
    expect(await logOf('own.sh', { ...show, log_level: null })).toBe('LOG_LEVEL=WARNING\n')
  })

  test('a broken file answers 500 that names it, repeats nothing of it, and stores no task', async () => {
    const request = taskRequest({ task_file_name: 'broken.sh' })
    const { status, body } = await app.submit(request)
    expect({ status, body }).toEqual({
      status: 500,
      body: {
        ...{ success: false, code: 'defaults_file_broken' },
        message: expect.stringContaining('broken_worker.json'),
      },
    })
    expect(body.message).not.toContain('secret')
    expect((await app.get(`/tasks/${request.task_id}`)).status).toBe(404)
  })

  test('a wrong field in a file is named with the file; once mended, it works at once', async () => {
    const request = taskRequest({ task_file_name: 'wrong.sh' })
    expect(await app.submit(request)).toEqual({
      status: 500,
      body: {
        ...{ success: false, code: 'defaults_file_broken' },
        message: expect.stringMatching(/wrong_worker\.json.*worker_sise: unknown field/),
      },
    })
    await writeFile(join(tasksDir, 'wrong_worker.json'), '{"worker_size": "Small"}')
    expect(await app.submit(request)).toMatchObject({ status: 200 })
    expect(await app.finished(request.task_id)).toMatchObject({
      status: 'succeeded',
      worker_config: { worker_size: 'Small' },
    })
  })

  test('a broken common file stops every task with its name, and readiness warns of it', async () => {
    const own = join(folder, 'broken-tasks')
    await mkdir(own)
    await writeFile(join(own, 'echo.sh'), 'echo hi\n')
    await writeFile(join(own, 'default_worker.json'), '[]')
    await using other = await startApp({ TASKS_DIR: own })
    expect(await other.submit(taskRequest())).toEqual({
      status: 500,
      body: {
        ...{ success: false, code: 'defaults_file_broken' },
        message: expect.stringContaining('default_worker.json'),
      },
    })
    expect(await other.get('/health/ready')).toMatchObject({
      status: 200,
      body: {
        message: 'ready',
        warnings: [expect.stringContaining('"default_worker.json" cannot be used')],
      },
    })
    await rm(join(own, 'default_worker.json'))
    expect(await other.get('/health/ready')).toMatchObject({ body: { warnings: [] } })
  })

  test('readiness warns of broken files of single tasks too, also in folders', async () => {
    const own = join(folder, 'nested-tasks')
    await mkdir(join(own, 'sub'), { recursive: true })
    await writeFile(join(own, 'sub/a_worker.json'), '{"service_type": "other"}')
    await writeFile(join(own, 'good_worker.json'), '{"worker_size": "Small"}')
    await writeFile(join(own, 'unrelated.json'), '{')
    await using other = await startApp({ TASKS_DIR: own })
    expect((await other.get('/health/ready')).body.warnings).toEqual([
      expect.stringMatching(/"sub\/a_worker\.json".*service_type: must be one of/),
    ])
  })

  test('a file that cannot be read is broken as well, not skipped', async () => {
    const own = join(folder, 'unreadable-tasks')
    await mkdir(join(own, 'default_worker.json'), { recursive: true })
    await writeFile(join(own, 'echo.sh'), 'echo hi\n')
    await using other = await startApp({ TASKS_DIR: own })
    expect(await other.submit(taskRequest())).toEqual({
      status: 500,
      body: {
        ...{ success: false, code: 'defaults_file_broken' },
        message: expect.stringContaining('default_worker.json'),
      },
    })
  })
})

describe('one shape for every error', () => {
  const send = (headers: Record<string, string>, payload: string | undefined) =>
    app.http.inject({
      method: 'POST',
      url: '/task-runner',
      headers,
      ...(payload === undefined ? {} : { payload }),
    })
  const json = { 'content-type': 'application/json' }

  test('413: a body over the limit', async () => {
    const reply = await send(json, JSON.stringify({ task_id: 'x'.repeat(10_000_000) }))
    expect(reply.statusCode).toBe(413)
    expect(reply.json()).toEqual(refusal('request_too_large'))
  })

  test.each([
    'text/plain',
    'text/plain; charset=utf-8',
    'application/xml',
    'application/x-www-form-urlencoded',
    'multipart/form-data; boundary=x',
    'application/jsonp',
    'nonsense',
  ])('415: a body sent as %s', async (type) => {
    const reply = await send({ 'content-type': type }, JSON.stringify(taskRequest()))
    expect(reply.statusCode).toBe(415)
    expect(reply.json()).toEqual(refusal('unsupported_media_type'))
  })

  test.each(['application/json', 'application/json; charset=utf-8', 'Application/JSON'])(
    'a body sent as %s is taken',
    async (type) => {
      const reply = await send({ 'content-type': type }, JSON.stringify(taskRequest()))
      expect(reply.statusCode).toBe(200)
    },
  )

  test.each([
    ['no body', undefined],
    ['an empty body', ''],
    ['white space', '  '],
    ['null', 'null'],
    ['a list', '[]'],
    ['a string', '"text"'],
    ['a number', '1'],
    ['broken JSON', '{"task_id": "a-secret-id"'],
  ])('422: %s', async (_name, payload) => {
    const reply = await send(json, payload)
    expect(reply.statusCode).toBe(422)
    expect(reply.json()).toMatchObject({ success: false, message: expect.stringMatching(/./) })
    expect(reply.body).not.toContain('a-secret-id')
  })

  test('many wrong fields do not make a huge answer', async () => {
    const fields = Array.from({ length: 10_000 }, (_, index) => [`field-${index}`, 1])
    const { status, body } = await app.submit(Object.fromEntries(fields))
    expect(status).toBe(422)
    expect(body).toMatchObject({ success: false, message: expect.stringContaining('task_id') })
    expect(JSON.stringify(body).length).toBeLessThan(100_000)
  })
})

test('what can be run is listed, and nothing else', async () => {
  const { status, body } = await app.get('/task-files')
  expect(status).toBe(200)
  const long = `${'n'.repeat(250)}.sh`
  const files = ['broken.sh', 'count.sh', 'echo.sh', 'leads-in.sh', 'nested/inner.sh', long]
  expect(body.task_files).toEqual([...files, 'own.sh', 'show.sh', 'wait.sh', 'wrong.sh'].sort())
})

describe('a full queue', () => {
  let full: TestApp
  let fullGate: string
  const waiting = () =>
    taskRequest({ task_file_name: 'wait.sh', worker_config: { env_variables: { GATE: fullGate } } })

  /** One task runs, nothing waits. */
  const start = async () => {
    fullGate = await mkdtemp(join(folder, 'gate-'))
    full = await startApp({
      TASKS_DIR: tasksDir,
      MAX_QUEUED_TASKS: '1',
      MAX_CONCURRENT_TASKS: '1',
    })
    const running = waiting()
    expect(await full.submit(running)).toMatchObject({ status: 200 })
    await expect
      .poll(async () => (await full.get(`/tasks/${running.task_id}`)).body.status, POLL)
      .toBe('running')
    return {
      running: running.task_id,
      async [Symbol.asyncDispose]() {
        await writeFile(join(fullGate, 'open'), '').catch(() => {})
        await full.finished(running.task_id)
        await full[Symbol.asyncDispose]()
      },
    }
  }

  test('answers 429 with Retry-After, still knows what it took, and takes more once there is room', async () => {
    await using _ = await start()
    const second = waiting()
    expect(await full.submit(second)).toMatchObject({ status: 200 })
    const third = waiting()
    const reply = await full.http.inject({ method: 'POST', url: '/task-runner', payload: third })
    expect(reply.statusCode).toBe(429)
    expect(reply.json()).toEqual(refusal('queue_full'))
    expect(Number(reply.headers['retry-after'])).toBeGreaterThan(0)
    expect((await full.get(`/tasks/${third.task_id}`)).status).toBe(404)
    expect((await full.submit(second)).body).toMatchObject({ message: 'Already accepted: queued' })
    expect((await full.submit({ ...second, timeout_seconds: 9 })).status).toBe(409)

    await writeFile(join(fullGate, 'open'), '')
    await full.finished(second.task_id)
    expect(await full.submit(third)).toMatchObject({ status: 200 })
    expect(await full.finished(third.task_id)).toMatchObject({ status: 'succeeded' })
  })

  test('a waiting task that is cancelled gives back its place', async () => {
    await using _ = await start()
    const second = waiting()
    await full.submit(second)
    await full.post(`/tasks/${second.task_id}/cancel`)
    expect((await full.get(`/tasks/${second.task_id}`)).body.status).toBe('cancelled')
    expect(await full.submit(waiting())).toMatchObject({ status: 200 })
  })

  test('the limit holds against concurrent posts', async () => {
    await using _ = await start()
    const answers = await Promise.all(Array.from({ length: 12 }, () => full.submit(waiting())))
    const statuses = answers.map(({ status }) => status).sort()
    expect(statuses).toEqual([200, ...Array(11).fill(429)])
  })
})

test('a task that was taken is known when its file has gone', async () => {
  const tasksDir = await mkdtemp(join(tmpdir(), 'task-runner-tasks-'))
  try {
    await writeFile(join(tasksDir, 'gone.sh'), 'true\n')
    await using other = await startApp({ TASKS_DIR: tasksDir })
    const request = taskRequest({ task_file_name: 'gone.sh' })
    await other.submit(request)
    await other.finished(request.task_id)
    await rm(join(tasksDir, 'gone.sh'))
    expect((await other.submit(request)).body).toMatchObject({
      message: 'Already accepted: succeeded',
    })
    expect((await other.submit({ ...request, timeout_seconds: 9 })).status).toBe(409)
    expect((await other.submit({ ...request, task_id: 'another' })).status).toBe(404)
  } finally {
    await rm(tasksDir, { recursive: true })
  }
})

describe('a draining service', () => {
  test('answers 503 to new tasks, with Retry-After, and still tells about those it took', async () => {
    await using draining = await startApp()
    const known = taskRequest()
    await draining.submit(known)
    await draining.finished(known.task_id)
    await draining.app.stop()
    const fresh = taskRequest()
    const reply = await draining.http.inject({
      method: 'POST',
      url: '/task-runner',
      payload: fresh,
    })
    expect(reply.statusCode).toBe(503)
    expect(reply.json()).toEqual(refusal('draining'))
    expect(Number(reply.headers['retry-after'])).toBeGreaterThan(0)
    expect((await draining.get(`/tasks/${fresh.task_id}`)).status).toBe(404)
    expect((await draining.submit(known)).body).toMatchObject({
      message: 'Already accepted: succeeded',
    })
    expect((await draining.get('/health/ready')).status).toBe(503)
    expect((await draining.get('/health/live')).status).toBe(200)
  })
})
