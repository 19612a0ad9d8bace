import { once } from 'node:events'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { describe, expect, test } from 'vitest'
import { Sealer } from '../../src/secrets/sealing.ts'
import { FIXTURE_TASKS } from '../helpers/app.ts'
import { startRawServer } from '../helpers/hostile-servers.ts'
import { startReceiver } from '../helpers/receiver.ts'
import { type Service, startService } from '../helpers/service.ts'

const POLL = { timeout: 30_000, interval: 50 }
const SEALING_KEY = Buffer.from('canary-sealing-key-0123456789-32')
const SIGNING_KEY = Buffer.from('canary-signing-key-0123456789-33!')

/** Whatever must show nowhere but where it is for. */
const CANARIES = {
  callbackToken: 'canary-callback-token-7d1e',
  wrongFieldToken: 'canary-misplaced-token-52aa',
  apiToken: 'canary-api-token-91bf',
  otherApiToken: 'canary-other-api-token-0c',
  wrongApiToken: 'canary-wrong-api-token-e7',
  signingKey: SIGNING_KEY.toString(),
  signingSecret: SIGNING_KEY.toString('base64'),
  sealingKey: SEALING_KEY.toString(),
  sealingSecret: SEALING_KEY.toString('base64'),
  refreshToken: 'canary-refresh-token-3b6c',
  urlQuery: 'canary-url-query-a4d9',
  variable: 'canary-variable-value-c8f0',
  hiddenVariable: 'canary-hidden-variable-1e2d',
  namedSecret: 'canary-named-secret-6f0b',
  imagePassword: 'canary-image-password-2b7e',
  gitSecret: 'canary-git/secret@5d17',
}

/** Set on the service by mistake or by its platform: none of its tasks' business. */
const ODD_VARIABLES = {
  NODE_OPTIONS: '--no-warnings',
  AWS_SECRET_ACCESS_KEY: 'canary-odd-aws',
  LD_LIBRARY_PATH: '/canary-odd-library',
  PYTHONPATH: '/canary-odd-python',
  BASH_ENV: '/canary-odd-bash-env',
  ENV: '/canary-odd-env',
  PS4: 'canary-odd-ps4',
  ODD_LINES: 'canary-odd-line\nEVIL=canary-odd-second',
  TASK_ID: 'canary-odd-task-id',
}

describe('secrets', () => {
  test('show in no file, no line of output, no answer and no process but those they are for', {
    timeout: 120_000,
  }, async () => {
    await using story = await startStory()
    const { service, call } = story
    await using receiver = await startReceiver()
    await using dead = await startRawServer(({ socket }) => socket.resetAndDestroy())

    const secretConfig = {
      refresh_token: CANARIES.refreshToken,
      personal_secrets: ['NAMED'],
      image_config: { repo_username: 'robot', repo_password: CANARIES.imagePassword },
      env_variables: { CANARY: CANARIES.variable, GATE: story.gate, SHOW: 'TASK_ID' },
      additional_params: base64({
        env_variables: { HIDDEN: CANARIES.hiddenVariable },
        refresh_token: CANARIES.refreshToken,
      }),
    }
    const request = (task_id: string, overrides: object = {}) => ({
      task_id,
      task_file_name: 'bad-variables.sh',
      worker_config: secretConfig,
      callback_url: `${receiver.url}?key=${CANARIES.urlQuery}`,
      callback_url_token: CANARIES.callbackToken,
      ...overrides,
    })
    const printing = (script: string) => ({
      task_file_name: 'w-eval.sh',
      worker_config: { env_variables: { SCRIPT: script, SECRET: CANARIES.callbackToken } },
    })
    const tasks = [
      request('succeeds'),
      request('prints-it', printing('printf "%s and %s\\n" "$SECRET" "$SECRET"')),
      request('fails', {
        ...printing('echo "$SECRET" >&2; exit 3'),
        terminate_on_completion: false,
      }),
      request('kept', { terminate_on_completion: false }),
      request('dead-receiver', { callback_url: `${dead.url}?key=${CANARIES.urlQuery}` }),
      request('unreachable', { callback_url: `https://127.0.0.1:1/?key=${CANARIES.urlQuery}` }),
      request('calls-the-sample', {
        ...printing('echo "$SECRET"'),
        callback_url: `${service.url}/sample-task-runner-callback?key=${CANARIES.urlQuery}`,
      }),
      request('calls-sample-2', {
        ...printing('echo "$SECRET"'),
        callback_url: `${service.url}/sample-task-runner-callback2?key=${CANARIES.urlQuery}`,
      }),
      request('startup-fails', {
        worker_config: { ...secretConfig, startup_script: 'exit 4' },
      }),
      request('prints-named', {
        ...printing('echo "$NAMED" >&2; exit 3'),
        worker_config: {
          personal_secrets: ['NAMED'],
          env_variables: { SCRIPT: 'echo "$NAMED" >&2; exit 3' },
        },
      }),
      request('clone-fails', {
        worker_config: {
          ...secretConfig,
          git_configs: [{ remote_url: 'http://127.0.0.1:1/a.git', secret_name: 'git' }],
        },
      }),
      request('waits', { task_file_name: 'bad-waits.sh' }),
      request('is-cancelled', { task_file_name: 'bad-waits.sh' }),
    ]
    for (const task of tasks) {
      expect((await call('POST', '/task-runner', task)).status, task.task_id).toBe(200)
    }
    // While two of them run: their own processes know the values, others do not.
    for (const name of ['waits', 'is-cancelled']) await story.status(name, 'running')
    await expect.poll(async () => (await readdir(story.gate)).length, POLL).toBe(2)
    // Looked for until it is so: between fork and exec a child is still a copy of the service.
    await expect
      .poll(() => processesThatKnow(Object.values(CANARIES), story), POLL)
      .toMatchObject({ others: [], own: expect.arrayContaining([expect.any(Number)]) })

    await call('POST', '/tasks/is-cancelled/cancel')
    await story.status('is-cancelled', 'cancelled')
    await refusals(story, request)
    await writeFile(join(story.gate, 'open'), '')
    for (const { task_id } of tasks) await story.status(task_id, /succeeded|failed|cancelled/)
    await expect
      .poll(async () => (await call('GET', '/tasks/unreachable/callback')).text, POLL)
      .toContain('given_up')
    await expect.poll(() => receiver.received.length, POLL).toBeGreaterThanOrEqual(6)
    for (const { task_id } of tasks) await call('POST', `/tasks/${task_id}/callback/redeliver`)
    for (const { task_id } of tasks) {
      for (const path of ['', '/logs', '/logs?follow=true', '/callback']) {
        await call('GET', `/tasks/${task_id}${path}`)
      }
    }
    const { workers } = JSON.parse((await call('GET', '/workers')).text)
    expect(workers.map(({ task_id }: { task_id: string }) => task_id).sort()).toEqual([
      'fails',
      'kept',
    ])
    for (const { name } of workers) {
      await call('GET', `/workers/${name}`)
      await call('GET', `/workers/${name}/logs`)
    }
    for (const path of ['/tasks', '/health/ready', '/docs/json', '/nowhere?token=x'])
      await call('GET', path)

    // The canaries did reach what they are for, or nothing here would mean anything.
    const called = receiver.received.find(({ body }) => body.task_id === 'prints-it')
    expect(called?.headers.authorization).toBe(`Bearer ${CANARIES.callbackToken}`)
    expect(called?.body.logs).toBe('*** and ***\n')
    for (const name of ['fails', 'prints-named']) {
      expect((await call('GET', `/tasks/${name}/logs`)).text, name).toBe('***\n')
    }

    const running = await filesWith(Object.values(CANARIES), story.dataDir)
    await service.kill('SIGTERM')
    const stopped = await filesWith(Object.values(CANARIES), story.dataDir)
    expect(running.searched).toContain('task-runner.db')
    for (const { found } of [running, stopped]) expect(found).toEqual([])
    expect(foundIn(service.log.join('\n'))).toEqual([])
    expect(service.log.join('\n')).toContain('sample callback 2 received')
    expect(story.answers.length).toBeGreaterThan(60)
    expect(
      story.answers.flatMap(({ what, text }) => foundIn(text).map((name) => `${what}: ${name}`)),
    ).toEqual([])
    for (const { raw } of receiver.received) expect(foundIn(raw.toString())).toEqual([])
  })

  test('in the fragment of a callback URL, which nobody is ever sent, are not shown either', async () => {
    await using story = await startStory()
    const callback_url = `http://127.0.0.1:9/hook?a=b#${CANARIES.urlQuery}`
    const worker_config = { env_variables: { SHOW: 'TASK_ID' } }
    const task = { task_id: 'calls', task_file_name: 'bad-variables.sh', worker_config }
    expect((await story.call('POST', '/task-runner', { ...task, callback_url })).status).toBe(200)
    const { text } = await story.call('GET', '/tasks/calls')
    expect(text).toContain('http://127.0.0.1:9/hook?***')
    expect(foundIn(text)).toEqual([])
  })

  test('of a request that is not even HTTP do not show in the log', async () => {
    await using story = await startStory()
    const socket = connect(Number(new URL(story.service.url).port), '127.0.0.1')
    socket.write(
      `GET /tasks HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${CANARIES.apiToken}\r\nbad header\r\n\r\n`,
    )
    const [answer] = await once(socket, 'data')
    expect(String(answer)).toContain('400')
    socket.destroy()
    await story.service.kill('SIGTERM')
    expect(foundIn(story.service.log.join('\n'))).toEqual([])
  })

  test('in broken JSON are not repeated', async () => {
    await using story = await startStory()
    const token = CANARIES.callbackToken
    for (const body of [
      `{"callback_url_token":"${token}"`,
      `{"t":"${token}"x}`,
      `"${token}`,
      token,
    ]) {
      const answer = await story.call('POST', '/task-runner', body)
      expect(answer.status, body).toBe(422)
      expect(answer.text, body).not.toContain(token.slice(0, 8))
      expect(answer.text, body).not.toContain(token.slice(-8))
    }
    await story.service.kill('SIGTERM')
    expect(foundIn(story.service.log.join('\n'))).toEqual([])
  })

  test('of a configuration that is not usable are not repeated', async () => {
    const service = await startService({
      PORT: '99999',
      SEALING_KEY: `${CANARIES.sealingSecret}AAAA`,
      CALLBACK_SIGNING_SECRETS: `whsec_${CANARIES.signingSecret}!`,
      API_TOKENS: `${CANARIES.apiToken} with a space`,
    })
    expect(await service.ended).toBe(1)
    const told = service.log.join('\n')
    expect(told).toContain('PORT')
    expect(told).toContain('SEALING_KEY')
    expect(foundIn(told)).toEqual([])
  })
})

describe('what is stored', () => {
  test('of a task that has ended holds no values of its variables, even unsealed', async () => {
    await using story = await startStory()
    const body = {
      task_file_name: 'bad-variables.sh',
      worker_config: {
        personal_secrets: ['NAMED'],
        env_variables: { CANARY: CANARIES.variable, SHOW: 'TASK_ID' },
        additional_params: base64({
          env_variables: { HIDDEN: CANARIES.hiddenVariable },
          refresh_token: CANARIES.refreshToken,
        }),
      },
      callback_url_token: CANARIES.callbackToken,
    }
    const waiting = {
      ...body,
      task_file_name: 'bad-waits.sh',
      worker_config: {
        personal_secrets: ['NAMED'],
        env_variables: { CANARY: CANARIES.variable, GATE: story.gate },
      },
    }
    await story.call('POST', '/task-runner', { ...body, task_id: 'done' })
    await story.call('POST', '/task-runner', { ...waiting, task_id: 'running' })
    await story.call('POST', '/task-runner', { ...waiting, task_id: 'cancelled' })
    await story.status('done', 'succeeded')
    for (const id of ['running', 'cancelled']) await story.status(id, 'running')
    await story.call('POST', '/tasks/cancelled/cancel')
    await story.status('cancelled', 'cancelled')
    await story.service.kill('SIGKILL')

    const rows = await unsealedRows(story.dataDir)
    // One that runs still needs them: the search finds what is there.
    expect(rows.running).toContain(CANARIES.variable)
    expect(rows.running).toContain(CANARIES.namedSecret)
    for (const id of ['done', 'cancelled']) {
      expect(rows[id], id).toContain('"CANARY":""')
      const { variable, hiddenVariable, refreshToken, namedSecret } = CANARIES
      for (const value of [variable, hiddenVariable, refreshToken, namedSecret]) {
        expect(rows[id], id).not.toContain(value)
      }
      // Without a callback there is nothing that a token could still be for.
      expect(rows[id], id).not.toContain(CANARIES.callbackToken)
    }
    await writeFile(join(story.gate, 'open'), '')
  })

  test('is for the user of the service alone, under the most open umask', async () => {
    const before = process.umask(0)
    const starting = startStory()
    await using story = await starting.finally(() => process.umask(before))
    const config = { env_variables: { GATE: story.gate }, startup_script: 'true' }
    await story.call('POST', '/task-runner', {
      task_id: 'waits',
      task_file_name: 'bad-waits.sh',
      worker_config: config,
    })
    await story.status('waits', 'running')
    await expect.poll(async () => (await readdir(story.gate)).length, POLL).toBe(1)
    expect((await stat(story.dataDir)).mode & 0o777).toBe(0o700)
    const wrong: string[] = []
    let looked = 0
    for (const entry of await readdir(story.dataDir, { recursive: true, withFileTypes: true })) {
      const path = join(entry.parentPath, entry.name)
      const { mode } = await stat(path)
      looked += 1
      // The task's own copies keep the modes of the files they are of; nobody gets to them through their folder.
      const inside = path.slice(story.dataDir.length + 1)
      if (/^workers\/[^/]+\/(tasks|home|tmp)\//.test(inside)) continue
      if ((mode & 0o777) !== (entry.isDirectory() ? 0o700 : 0o600)) {
        wrong.push(`${inside} ${(mode & 0o777).toString(8)}`)
      }
    }
    expect(wrong).toEqual([])
    expect(looked).toBeGreaterThan(8)
    // The gate was made by the task, with the mask that the service was started with.
    const [made = ''] = await readdir(story.gate)
    expect((await stat(join(story.gate, made))).mode & 0o777).toBe(0o666)
    await writeFile(join(story.gate, 'open'), '')
    await story.status('waits', 'succeeded')
  })
})

test.each([
  ['.js', 'w-environment.js', undefined],
  ['.js, after a startup script', 'w-environment.js', 'true'],
  ['.py', 'w-eval.py', undefined],
  ['.sh', 'w-eval.sh', undefined],
])("a task's environment (%s) holds nothing of the service's", async (_, file, startupScript) => {
  await using story = await startStory(ODD_VARIABLES)
  const scripts: Record<string, string> = {
    'w-eval.py': 'import os, json; print(json.dumps(dict(os.environ)))',
    'w-eval.sh': `tr '\\0' '\\n' </proc/self/environ | sed 's/=.*//' | sort -u | tr '\\n' ' '; cat /proc/$$/environ`,
  }
  const script = scripts[file]
  await story.call('POST', '/task-runner', {
    task_id: 'prints-all',
    task_file_name: file,
    worker_config: {
      env_variables: { MINE: 'yes', ...(script === undefined ? {} : { SCRIPT: script }) },
      startup_script: startupScript ?? null,
    },
  })
  await story.status('prints-all', 'succeeded')
  const { text } = await story.call('GET', '/tasks/prints-all/logs')
  expect(text).not.toContain('canary')
  if (file === 'w-eval.sh') {
    expect(text).toContain('MINE=yes')
    return
  }
  const names = Object.keys(JSON.parse(text)).filter((name) => name !== 'SCRIPT')
  // What shells add of themselves aside.
  const ofShells = ['PWD', 'OLDPWD', 'SHLVL', '_', 'LC_CTYPE', '__CF_USER_TEXT_ENCODING']
  expect(names.filter((name) => !ofShells.includes(name)).sort()).toEqual(
    [
      'HOME',
      'LANG',
      'MINE',
      'PATH',
      'PIP_BREAK_SYSTEM_PACKAGES',
      ...(process.getuid?.() === 0 ? ['PIP_USER'] : []),
      'PYTHONUNBUFFERED',
      'TASK_FILE_NAME',
      'TASK_ID',
      'TASK_RUNNER_FOLDER',
      'TMPDIR',
      'WORKER_NAME',
    ].sort(),
  )
  expect(JSON.parse(text)).toMatchObject({ TASK_ID: 'prints-all', MINE: 'yes' })
})

interface Story extends AsyncDisposable {
  service: Service
  dataDir: string
  /** A folder that waiting tasks look into. */
  gate: string
  /** All answers that were given. */
  answers: Array<{ what: string; text: string }>
  call(
    method: string,
    path: string,
    body?: object | string,
    token?: string,
  ): Promise<{ status: number; text: string }>
  status(taskId: string, status: string | RegExp): Promise<void>
}

/** The real service, as talkative as it can be, with a secret everywhere it takes one. */
async function startStory(env: Record<string, string> = {}): Promise<Story> {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-secrets-'))
  const gate = await mkdtemp(join(folder, 'gate-'))
  const dataDir = join(folder, 'data')
  const secretsDir = await mkdtemp(join(folder, 'secrets-'))
  await writeFile(join(secretsDir, 'NAMED'), `${CANARIES.namedSecret}\n`)
  await writeFile(join(secretsDir, 'git'), CANARIES.gitSecret)
  const service = await startService({
    DATA_DIR: dataDir,
    SECRETS_DIR: secretsDir,
    TASKS_DIR: FIXTURE_TASKS,
    LOG_LEVEL: 'trace',
    API_TOKENS: `${CANARIES.otherApiToken},${CANARIES.apiToken}`,
    SEALING_KEY: CANARIES.sealingSecret,
    CALLBACK_SIGNING_SECRETS: `whsec_${CANARIES.signingSecret}`,
    CALLBACK_RETRY_SECONDS: '0.05',
    TERMINATION_GRACE_SECONDS: '0.2',
    MAX_CONCURRENT_TASKS: '6',
    ...env,
  })
  const answers: Story['answers'] = []
  const call: Story['call'] = async (method, path, body, token = CANARIES.apiToken) => {
    const reply = await fetch(service.url + path, {
      method,
      headers: {
        authorization: `Bearer ${token}`,
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      ...(body === undefined
        ? {}
        : { body: typeof body === 'string' ? body : JSON.stringify(body) }),
    })
    const text = await reply.text()
    const headers = JSON.stringify([...reply.headers])
    answers.push({ what: `${method} ${path}`, text: headers + text })
    return { status: reply.status, text }
  }
  return {
    service,
    dataDir,
    gate,
    answers,
    call,
    async status(taskId, status) {
      const now = async () => JSON.parse((await call('GET', `/tasks/${taskId}`)).text).status
      await expect.poll(now, POLL).toMatch(status)
    },
    async [Symbol.asyncDispose]() {
      await writeFile(join(gate, 'open'), '')
      if (service.process.exitCode === null && service.process.signalCode === null) {
        await service.kill('SIGTERM')
      }
      await endTasksOf(dataDir)
      // A shell whose task was killed just then still writes down how it ended.
      await rm(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 50 })
    },
  }
}

/** Tasks outlive their service: ours must not outlive their test. */
async function endTasksOf(dataDir: string): Promise<void> {
  for (const pid of await pids()) {
    const environment = await readFile(`/proc/${pid}/environ`, 'latin1').catch(() => '')
    if (!environment.includes(`HOME=${dataDir}/workers/`)) continue
    try {
      process.kill(pid, 'SIGKILL')
    } catch {
      // It ended by itself meanwhile.
    }
  }
}

/** Requests that are refused, with tokens where they do not belong. */
async function refusals(
  { call, service, answers }: Story,
  request: (taskId: string, overrides?: object) => Record<string, unknown>,
): Promise<void> {
  const token = CANARIES.wrongFieldToken
  const wrong = [
    { callback_url: token },
    { callback_url: `ftp://${token}/` },
    { callback_url: `http://user:${token}@example.com/` },
    { callback_url: `http://169.254.169.254/?${token}` },
    { callback_url: { url: token } },
    { callback_url_token: `Bearer ${token}` },
    { callback_url_token: [token] },
    { callback_url_token: `${token}\r\nx-evil: yes` },
    { terminate_on_completion: token },
    { timeout_seconds: token },
    { worker_config: token },
    { worker_config: [token] },
    { worker_config: { worker_size: `${token}\n` } },
    { worker_config: { env_variables: token } },
    { worker_config: { env_variables: { A: [token] } } },
    { worker_config: { env_variables: { A: `${token}\0` } } },
    { worker_config: { env_variables: { A: token.repeat(6_000) } } },
    { worker_config: { refresh_token: { token } } },
    { worker_config: { service_type: token } },
    { worker_config: { log_level: `${token}\n` } },
    { worker_config: { git_configs: [{ remote_url: token }] } },
    { worker_config: { git_configs: [{ remote_url: `https://u:${token}@example.com/r.git` }] } },
    { worker_config: { additional_params: token } },
    { worker_config: { additional_params: Buffer.from(token).toString('base64') } },
    { worker_config: { additional_params: base64({ env_variables: token }) } },
    { worker_config: { additional_params: base64({ refresh_token: [token] }) } },
    { worker_config: { distributed_config: { secret: token } } },
    { unknown_field: token },
  ]
  for (const overrides of wrong) {
    const answer = await call('POST', '/task-runner', request('invalid', overrides))
    expect(answer.status, JSON.stringify(overrides).slice(0, 200)).toBe(422)
  }
  // The same id for something else, and nobody's token.
  expect(
    (await call('POST', '/task-runner', request('kept', { callback_url_token: token }))).status,
  ).toBe(409)
  expect((await call('POST', '/task-runner', request('x'), CANARIES.wrongApiToken)).status).toBe(
    401,
  )
  expect((await call('GET', '/tasks', undefined, CANARIES.wrongApiToken)).status).toBe(401)
  // Too large by its own account: refused before it was sent whole.
  const { port } = new URL(service.url)
  const socket = connect(Number(port), '127.0.0.1')
  const head = ['POST /task-runner HTTP/1.1', 'host: x', 'content-type: application/json']
  const auth = `authorization: Bearer ${CANARIES.apiToken}`
  socket.write(
    `${[...head, auth, 'content-length: 99999999'].join('\r\n')}\r\n\r\n{"${token}":"${token}`,
  )
  const [answer] = await once(socket, 'data')
  socket.destroy()
  expect(String(answer)).toContain('413')
  answers.push({ what: 'a large one', text: String(answer) })
}

/** Names of the canaries in a text: as they are, or as base64, hex, percent-encoded, or a list of bytes. */
function foundIn(text: string): string[] {
  return Object.entries(CANARIES).flatMap(([name, value]) =>
    forms(value).some((form) => text.includes(form)) ? [name] : [],
  )
}

function forms(value: string): string[] {
  const bytes = Buffer.from(value)
  // Without the ends, which depend on what stands beside them.
  const shifted = [0, 1, 2].map((by) =>
    Buffer.concat([Buffer.alloc(by), bytes])
      .toString('base64')
      .slice(4, -4),
  )
  return [value, bytes.toString('hex'), [...bytes].join(','), encodeURIComponent(value), ...shifted]
}

/** Files of the data folder in which one of the values stands; the log that a task itself wrote aside. */
async function filesWith(values: string[], folder: string) {
  const found: string[] = []
  const searched: string[] = []
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    const path = join(entry.parentPath, entry.name)
    const inside = path.slice(folder.length + 1)
    if (!entry.isFile() || /^workers\/[^/]+\/log$/.test(inside)) continue
    const content = (await readFile(path)).toString('latin1')
    searched.push(inside)
    for (const value of values) {
      if (forms(value).some((form) => content.includes(form))) found.push(`${inside}: ${value}`)
    }
  }
  return { found, searched }
}

/** Processes with one of the values in their arguments or environment, besides the service. */
async function processesThatKnow(values: string[], { service, dataDir }: Story) {
  const own: number[] = []
  const others: string[] = []
  for (const pid of await pids()) {
    if (pid === service.process.pid) {
      const cmdline = await readFile(`/proc/${pid}/cmdline`, 'latin1')
      if (values.some((value) => cmdline.includes(value))) others.push(`${pid}: ${cmdline}`)
      continue
    }
    const [cmdline, environ] = await Promise.all(
      ['cmdline', 'environ'].map((name) =>
        readFile(`/proc/${pid}/${name}`, 'latin1').catch(() => ''),
      ),
    )
    const known = values.filter((value) => `${cmdline}\0${environ}`.includes(value))
    if (known.length === 0) continue
    const isTask = environ?.includes(`HOME=${dataDir}/workers/`)
    // A task knows its own variables, by its environment alone.
    const { variable, hiddenVariable, namedSecret, callbackToken } = CANARIES
    const allowed: string[] = [variable, hiddenVariable, namedSecret, callbackToken]
    const ownOnly = known.every((value) => allowed.includes(value) && !cmdline?.includes(value))
    if (isTask && ownOnly) own.push(pid)
    else others.push(`${pid} ${cmdline?.replaceAll('\0', ' ')}: ${known}`)
  }
  return { own, others }
}

async function pids(): Promise<number[]> {
  return (await readdir('/proc')).map(Number).filter((pid) => Number.isInteger(pid))
}

async function unsealedRows(dataDir: string): Promise<Record<string, string>> {
  const db = new DatabaseSync(join(dataDir, 'task-runner.db'))
  try {
    const sealer = new Sealer(SEALING_KEY)
    return Object.fromEntries(
      db
        .prepare('select task_id, sealed from tasks')
        .all()
        // Holds: the columns are text and bytes.
        .map((row) => row as { task_id: string; sealed: Uint8Array })
        .map(({ task_id, sealed }) => [task_id, sealer.unseal(sealed, task_id)]),
    )
  } finally {
    db.close()
  }
}

function base64(value: object): string {
  return Buffer.from(JSON.stringify(value)).toString('base64')
}
