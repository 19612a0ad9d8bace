/** Each field of `worker_config`: what it takes, what it refuses, and what it does. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { skipReason } from '../helpers/programs.ts'
import { expectError } from './expectations.ts'
import { type GitServer, startGitServer } from './git-server.ts'
import { useReceiver } from './receiver.ts'
import { type Answer, type Json, newTaskId, taskRequest, useTarget } from './target.ts'

const target = useTarget()
const receiver = useReceiver()

const STEPS = { STEPS: 0 }
const submit = (config: Json) =>
  target.submit(taskRequest({ worker_config: { env_variables: STEPS, ...config } }))

/** parameters.sh, which prints two variables, with them in `env_variables` unless `config` says otherwise. */
const runParameters = (config: Json) => {
  const env_variables = { MY_FIRST_PARAM: 'first', MY_SECOND_PARAM: 'second' }
  return target.run({
    task_file_name: 'parameters.sh',
    worker_config: { env_variables, ...config },
  })
}

/** A secret that no service has. */
const noSecret = () => `NO_SECRET_${newTaskId().replaceAll('-', '_')}`

const encoded = (value: unknown) => Buffer.from(JSON.stringify(value)).toString('base64')

const ACCEPTED: Record<string, unknown[]> = {
  worker_image: ['', 'None', 'practicus', 'ghcr.io/example/image:1.2.3'],
  worker_size: ['X-Small', 'Small', 'Medium', 'Large', 'X-Large', '2X-Large', 'small', 'X-SMALL'],
  env_variables: [{}, { A: 'text', B: '' }, { NUMBER: 1.5, FLAG: false }],
  personal_secrets: [[]],
  shared_secrets: [[]],
  git_configs: [[]],
  startup_script: ['true', 'echo one\necho two\n'],
  image_config: [{}, '', { pull_policy: '' }, { pull_policy: 'Always', builder: true }],
  log_level: ['DEBUG', 'INFO', ''],
  modules_log_level: ['urllib3:ERROR,asyncio:WARNING'],
  additional_params: [
    '',
    encoded({}),
    encoded({ worker_size: 'Small' }),
    encoded({ timezone: 'UTC' }),
  ],
  service_type: ['', 'cloud_worker', 'workspace'],
  network_protocol: ['', 'http', 'https'],
  interactive: [true, false],
  bypass_ssl_verification: [true, false],
  service_url: ['', 'https://service.example.com'],
  email: ['', 'someone@example.com'],
  refresh_token: ['a-token'],
  distributed_config: [],
}

const REFUSED: Record<string, unknown[]> = {
  worker_image: [1, {}],
  worker_size: ['two\nlines', 1, {}],
  env_variables: ['A=1', ['A=1'], { A: null }, { A: {} }, { A: ['1'] }],
  personal_secrets: ['secret', [1], [''], ['A:B-C'], {}],
  shared_secrets: ['secret', [1], [''], {}],
  git_configs: [{}, 'https://example.com/repo.git', [1]],
  startup_script: [1, ['true'], {}],
  image_config: ['always', [], 1],
  log_level: [1, {}],
  modules_log_level: [1, []],
  additional_params: [1, {}, []],
  service_type: ['model_host', 1],
  network_protocol: ['ftp', 1],
  interactive: ['yes', 1],
  bypass_ssl_verification: ['yes', 1],
  service_url: [1, {}],
  email: [1, {}],
  refresh_token: [1, {}],
  distributed_config: [{ job_type: 'python', worker_count: 2 }],
}

describe('worker_config', () => {
  test.each(rows(ACCEPTED))('%s takes %j', async (field, value) => {
    const { status, text } = await submit({ [field]: value })
    expect(status, text).toBe(200)
  })

  test.each(Object.keys(ACCEPTED))('%s may be null', async (field) => {
    const { status, text } = await submit({ [field]: null })
    expect(status, text).toBe(200)
  })

  test('with every field null runs as if it were empty', async () => {
    const nulls = Object.fromEntries(Object.keys(ACCEPTED).map((field) => [field, null]))
    const overrides = { task_file_name: 'hello.py', worker_config: nulls }
    expect((await target.run(overrides)).task).toMatchObject({ status: 'succeeded' })
  })

  test.each(rows(REFUSED))('%s refuses %j, naming the field', async (field, value) => {
    expectError(await submit({ [field]: value }), 422, field)
  })

  test('an unknown field is refused by name', async () => {
    expectError(await submit({ worker_sise: 'Small' }), 422, 'worker_sise')
  })

  test('distributed_config is refused as not supported', async () => {
    const { text } = await submit({ distributed_config: { job_type: 'python' } })
    expect(text).toMatch(/not supported/i)
  })

  test('fields that have no effect are noted in the log, and the task runs', async () => {
    const { task, log } = await target.run({
      worker_config: {
        env_variables: STEPS,
        interactive: true,
        email: 'someone@example.com',
        service_url: 'https://service.example.com',
      },
    })
    expect(task).toMatchObject({ status: 'succeeded' })
    for (const field of ['interactive', 'email', 'service_url']) expect(log).toContain(field)
  })
})

describe('env_variables', () => {
  test.each<[unknown, string]>([
    ['text', 'text'],
    ['a "b" \'c\' $HOME `id` $(id) \\ *', 'a "b" \'c\' $HOME `id` $(id) \\ *'],
    ['two\nlines', 'two\nlines'],
    ['zażółć 你好 🚀', 'zażółć 你好 🚀'],
    [123, '123'],
    [-1.5, '-1.5'],
    [0, '0'],
    [true, 'true'],
    [false, 'false'],
  ])('reach the task as strings: %j', async (value, printed) => {
    const env_variables = { MY_FIRST_PARAM: value, MY_SECOND_PARAM: 'second' }
    const { log } = await runParameters({ env_variables })
    expect(log).toContain(`MY_FIRST_PARAM=${printed}\nMY_SECOND_PARAM=second\n`)
  })

  test.each(['12345678901234567890', '1.0', '1e+21'])(
    'a number keeps its digits: %s',
    async (digits) => {
      const env_variables = { MY_FIRST_PARAM: JSON.rawJSON(digits), MY_SECOND_PARAM: 'second' }
      const { log } = await runParameters({ env_variables })
      expect(log).toContain(`MY_FIRST_PARAM=${digits}\n`)
    },
  )
})

describe('additional_params', () => {
  test('fill what is not given outright; env_variables merge name by name', async () => {
    const hidden = { MY_FIRST_PARAM: 'hidden', MY_SECOND_PARAM: 'hidden' }
    const { log } = await runParameters({
      env_variables: { MY_SECOND_PARAM: 'outright' },
      additional_params: encoded({ env_variables: hidden, startup_script: 'echo prepared' }),
    })
    expect(log).toMatch(/prepared\n.*MY_FIRST_PARAM=hidden\nMY_SECOND_PARAM=outright\n/s)
  })

  test('fill what is null outright', async () => {
    const { log } = await runParameters({
      env_variables: null,
      startup_script: null,
      additional_params: encoded({
        env_variables: { MY_FIRST_PARAM: 1, MY_SECOND_PARAM: true },
        startup_script: 'echo prepared',
      }),
    })
    expect(log).toMatch(/prepared\n.*MY_FIRST_PARAM=1\nMY_SECOND_PARAM=true\n/s)
  })

  test('do not win over what is given outright', async () => {
    const { task, log } = await runParameters({
      startup_script: 'echo outright',
      additional_params: encoded({ startup_script: 'echo hidden; exit 1' }),
    })
    expect(task).toMatchObject({ status: 'succeeded' })
    expect(log).toContain('outright\n')
    expect(log).not.toContain('hidden')
  })

  test('are read under the names that the Practicus SDK gives them there', async () => {
    const { task, log } = await runParameters({
      additional_params: encoded({
        image_conf_dict: { pull_policy: 'IfNotPresent' },
        startup_script_b64: Buffer.from('echo "prepared at $PRT_LOG_LEVEL"').toString('base64'),
        ...{ PRT_LOG_LEVEL: 'DEBUG', PRT_MODULES_LOG_LEVEL: '', PRT_INTERACTIVE: false },
      }),
    })
    expect(task).toMatchObject({ status: 'succeeded' })
    expect(log).toContain('prepared at DEBUG\n')
    expect(log).toContain('interactive')
  })

  test('with fields that nobody knows are noted, for a newer SDK must not break', async () => {
    const { log } = await runParameters({ additional_params: encoded({ timezone: 'UTC' }) })
    expect(log).toContain('additional_params.timezone')
  })

  test.each<[string, string]>([
    ['no base64', '*** no base64 ***'],
    ['no JSON', Buffer.from('{"worker_size":').toString('base64')],
    ['a list', encoded([])],
    ['a string', encoded('text')],
    ['null', encoded(null)],
  ])('are refused when they hold %s', async (_what, additional_params) => {
    expectError(await submit({ additional_params }), 422, 'additional_params')
  })

  test.each<[string, unknown]>([
    ['worker_size', 1],
    ['startup_script_b64', '%'],
    ['PRT_INTERACTIVE', 'yes'],
    ['distributed_conf_dict', { job_type: 'python' }],
    ['env_variables', { A: {} }],
    ['interactive', 'yes'],
    ['distributed_config', { job_type: 'python' }],
  ])('are refused with a wrong %s inside, naming it', async (field, value) => {
    expectError(await submit({ additional_params: encoded({ [field]: value }) }), 422, field)
  })
})

describe('log_level and modules_log_level', () => {
  test('reach the worker, also under the names that the Practicus SDK reads', async () => {
    const { log } = await runParameters({
      startup_script:
        'echo "levels: $LOG_LEVEL, $MODULES_LOG_LEVEL, $PRT_LOG_LEVEL, $PRT_MODULES_LOG_LEVEL"',
      log_level: 'DEBUG',
      modules_log_level: 'urllib3:ERROR',
    })
    expect(log).toContain('levels: DEBUG, urllib3:ERROR, DEBUG, urllib3:ERROR\n')
  })
})

describe('startup_script', () => {
  test('runs before the task, as a shell script', async () => {
    const startup_script = 'name=prepared\nif [ -d "$HOME" ]; then echo "$name"; fi'
    const { task, log } = await runParameters({ startup_script })
    expect(task).toMatchObject({ status: 'succeeded', exit_code: 0 })
    expect(log).toMatch(/prepared\n.*MY_FIRST_PARAM=first\n/s)
  })

  test('that fails ends the task as startup_failed before it runs, with a callback', async () => {
    const { taskId, task, log } = await target.run({
      worker_config: { env_variables: STEPS, startup_script: 'echo broken\nexit 3' },
      callback_url: receiver.url,
    })
    expect(task).toMatchObject({ status: 'failed', reason: 'startup_failed' })
    expect(log).toContain('broken\n')
    expect(log).not.toContain('done')
    const { body } = await receiver.callbackOf(taskId)
    expect(body).toMatchObject({ success: false, logs: expect.stringContaining('broken\n') })
  })
})

describe('secrets', () => {
  test.each(['personal_secrets', 'shared_secrets'])(
    '%s that are not there are refused by name',
    async (field) => {
      const name = noSecret()
      const answer = await submit({ [field]: [name] })
      expectError(answer, 422, field)
      expect(answer.text).toContain(name)
      const hidden = await submit({ additional_params: encoded({ [field]: [name] }) })
      expectError(hidden, 422)
      expect(hidden.text).toContain(name)
    },
  )

  test('secret_name of a git_config that is not there is refused by name', async () => {
    const secret_name = noSecret()
    const git_configs = [{ remote_url: 'https://github.com/example/repo.git', secret_name }]
    const answer = await submit({ git_configs })
    expectError(answer, 422, 'secret_name')
    expect(answer.text).toContain(secret_name)
  })
})

describe('git_configs', () => {
  /** Nobody listens there, so that nothing can be cloned. */
  const DEAD = 'http://127.0.0.1:1/x.git'
  let server: GitServer | undefined

  beforeAll(async () => {
    server = await startGitServer()
  })
  afterAll(() => server?.[Symbol.asyncDispose]())

  test.each([
    'file:///etc/repo.git',
    '/etc/repo.git',
    'git://example.com/repo.git',
    'ftp://example.com/repo.git',
    'ext::sh -c id',
    'example.com:team/repo.git',
    'example.com/repo.git',
    '--upload-pack=id',
    'https://user:password@example.com/repo.git',
    'https://token@example.com/repo.git',
    'ssh://git:password@example.com/repo.git',
    '',
  ])('refuse the remote_url %j', async (remote_url) => {
    expectError(await submit({ git_configs: [{ remote_url }] }), 422, 'remote_url')
  })

  test.each<[string, unknown]>([
    ['remote_url', null],
    ['remote_url', 1],
    ['secret_name', 1],
    ['save_secret', 'yes'],
    ['username', 1],
    ['local_path', 1],
    ['local_path', '/etc/projects'],
    ['local_path', '~/../outside'],
    ['branch', 1],
    ['branch', '--upload-pack=id'],
    ['sparse_checkout_folders', 'folder'],
    ['sparse_checkout_folders', [1]],
    ['fetch_depth', 0],
    ['fetch_depth', -1],
    ['fetch_depth', '1'],
    ['depth', 1],
  ])('refuse %s %j, naming it', async (field, value) => {
    expectError(await submit({ git_configs: [{ remote_url: DEAD, [field]: value }] }), 422, field)
  })

  test('want a remote_url', async () => {
    expectError(await submit({ git_configs: [{ branch: 'main' }] }), 422, 'remote_url')
  })

  test.each<[string, Json]>([
    ['no other field', {}],
    [
      'every other field null',
      {
        secret_name: null,
        save_secret: null,
        username: null,
        local_path: null,
        branch: null,
        sparse_checkout_folders: null,
        fetch_depth: null,
      },
    ],
    [
      'every field that needs no secret',
      {
        save_secret: false,
        username: 'someone',
        local_path: '~/projects/other',
        branch: 'main',
        sparse_checkout_folders: ['folder'],
        fetch_depth: 1,
      },
    ],
  ])(
    'that cannot be cloned end the task as startup_failed, with a callback: %s',
    async (_what, fields) => {
      const request = taskRequest({
        worker_config: { env_variables: STEPS, git_configs: [{ remote_url: DEAD, ...fields }] },
        callback_url: receiver.url,
      })
      const answer = await target.submit(request)
      if (isAddressRefused(answer)) return
      expect(answer.status, answer.text).toBe(200)
      const task = await target.finished(request.task_id)
      expect(task).toMatchObject({ status: 'failed', reason: 'startup_failed' })
      expect(await target.log(request.task_id)).not.toContain('done')
      expect((await receiver.callbackOf(request.task_id)).body).toMatchObject({ success: false })
    },
  )

  test('are cloned before the startup script: where they say, what they say', async ({ skip }) => {
    if (!server) return skip(skipReason('needs git, to serve a repository'))
    const remote_url = server.url
    const request = taskRequest({
      worker_config: {
        env_variables: STEPS,
        git_configs: [
          { remote_url },
          { remote_url, local_path: '~/work/side', branch: 'side', fetch_depth: 1 },
          { remote_url, local_path: 'sparse', sparse_checkout_folders: ['sparse'] },
        ],
        startup_script: `
          cat ~/projects/sample/kept.txt ~/work/side/side.txt ~/sparse/sparse/file.txt || exit 1
          for name in projects/sample/side.txt sparse/other; do
            if [ -e ~/"$name" ]; then echo "unexpected: $name"; fi
          done
          echo "depth $(git -C ~/work/side rev-list --count HEAD)"`,
      },
    })
    const answer = await target.submit(request)
    if (isAddressRefused(answer)) return skip('the service may not clone from this machine')
    expect(answer.status, answer.text).toBe(200)
    const task = await target.finished(request.task_id)
    const log = await target.log(request.task_id)
    expect(task, log).toMatchObject({ status: 'succeeded' })
    expect(log).toMatch(/content of kept.txt\ncontent of side.txt\ncontent of sparse\/file.txt\n/)
    expect(log).toContain('depth 1\n')
    expect(log).not.toContain('unexpected')
  })
})

/** A service may refuse addresses of its own network outright; that is about the URL alone then. */
function isAddressRefused(answer: Answer): boolean {
  if (answer.status !== 422) return false
  expectError(answer, 422, 'remote_url')
  expect(answer.body.errors).toHaveLength(1)
  return true
}

function rows(table: Record<string, unknown[]>): Array<[string, unknown]> {
  return Object.entries(table).flatMap(([field, values]) =>
    values.map((value): [string, unknown] => [field, value]),
  )
}
