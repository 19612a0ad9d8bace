import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { UnusableSecretError } from '../../src/core/ports.ts'
import { FileSecretSource } from '../../src/secrets/source.ts'
import { startApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'

vi.mock('node:fs/promises', async (original) => {
  const fs = await original<typeof import('node:fs/promises')>()
  return { ...fs, readFile: vi.fn(fs.readFile) }
})

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'secrets-'))
})
afterAll(() => rm(folder, { recursive: true }))

describe('FileSecretSource', () => {
  const source = () => new FileSecretSource({ folder, variables: { lower: 'a', TWO_PARTS: 'b' } })

  test('a file is the secret, without its last line end', async () => {
    await writeFile(join(folder, 'plain'), 'value')
    await writeFile(join(folder, 'line'), 'value\n')
    await writeFile(join(folder, 'windows'), 'value\r\n')
    await writeFile(join(folder, 'key'), 'one\ntwo\n\n')
    await writeFile(join(folder, 'my key: ü'), 'odd')
    expect(await source().read('my key: ü')).toBe('odd')
    expect(await source().read('plain')).toBe('value')
    expect(await source().read('line')).toBe('value')
    expect(await source().read('windows')).toBe('value')
    expect(await source().read('key')).toBe('one\ntwo\n')
  })

  test('files are followed as Kubernetes mounts them, by links inside the folder', async () => {
    await writeFile(join(folder, 'target'), 'linked')
    await symlink('target', join(folder, 'link'))
    expect(await source().read('link')).toBe('linked')
  })

  test('a variable is the secret, by its exact name or in capitals; a file wins', async () => {
    expect(await source().read('lower')).toBe('a')
    expect(await source().read('two-parts')).toBe('b')
    expect(await source().read('TWO_PARTS')).toBe('b')
    expect(await source().read('two parts')).toBe('b')
    expect(await source().read('../two:parts')).toBeUndefined()
    await writeFile(join(folder, 'TWO_PARTS'), 'from file')
    expect(await source().read('TWO_PARTS')).toBe('from file')
  })

  test('a changed file has its new value at once', async () => {
    const reused = source()
    await writeFile(join(folder, 'rotated'), 'old')
    expect(await reused.read('rotated')).toBe('old')
    await writeFile(join(folder, 'rotated'), 'new')
    expect(await reused.read('rotated')).toBe('new')
  })

  test.each([
    'missing',
    '',
    '..',
    '.',
    '../plain',
    'a/b',
    '/etc/passwd',
    '..data',
    'constructor',
    'a'.repeat(300),
  ])('%j is not there', async (name) => {
    expect(await source().read(name)).toBeUndefined()
  })

  test('what cannot be passed on says why, and nothing of the value', async () => {
    await writeFile(join(folder, 'nul'), 'canary\0')
    await writeFile(join(folder, 'binary'), Buffer.from([0xff, 0xfe]))
    await writeFile(join(folder, 'long'), 'x'.repeat(200_000))
    for (const [name, why] of [
      ['nul', 'NUL'],
      ['binary', 'UTF-8'],
      ['long', 'longer'],
    ] as const) {
      const err = await source()
        .read(name)
        .catch((err: unknown) => err)
      expect(err).toBeInstanceOf(UnusableSecretError)
      expect(String(err)).toContain(why)
      expect(String(err)).not.toContain('canary')
    }
  })
})

describe('a secret that cannot be read', () => {
  const failing = (code: string) => {
    vi.mocked(readFile).mockRejectedValueOnce(Object.assign(new Error(`${code}: oops`), { code }))
    return new FileSecretSource({ folder, variables: { there: 'a' } }).read('there')
  }
  const errorOf = (reading: Promise<unknown>) => reading.catch((err: unknown) => err)

  beforeAll(() => writeFile(join(folder, 'there'), 'canary'))
  afterAll(() => rm(join(folder, 'there')))

  test.each(['EMFILE', 'ENFILE', 'ENOMEM', 'EIO', 'ESTALE', 'EAGAIN', 'ETIMEDOUT', 'EANYTHING'])(
    'because of %s is a trouble of ours, and is read the next time',
    async (code) => {
      const error = await errorOf(failing(code))
      expect(error).not.toBeInstanceOf(UnusableSecretError)
      expect(error).toMatchObject({
        message: `The secret "there" cannot be read at the moment (${code})`,
        cause: { code },
      })
      expect(await new FileSecretSource({ folder, variables: {} }).read('there')).toBe('canary')
    },
  )

  test.each(['EACCES', 'EPERM', 'ELOOP'])('because of %s is unusable', async (code) => {
    const error = await errorOf(failing(code))
    expect(error).toBeInstanceOf(UnusableSecretError)
    expect(error).toMatchObject({ message: `cannot be read (${code})` })
  })

  test.each(['ENOENT', 'ENOTDIR'])(
    'as it has just gone (%s), is what a variable says',
    async (code) => {
      expect(await failing(code)).toBe('a')
    },
  )

  test('is a trouble of ours as long as the whole folder is away, but for what variables hold', async () => {
    const away = join(folder, 'unmounted')
    const source = new FileSecretSource({ folder: away, variables: { there: 'a' } })
    expect(await source.read('there')).toBe('a')
    const error = await errorOf(source.read('any'))
    expect(error).not.toBeInstanceOf(UnusableSecretError)
    expect(error).toMatchObject({ message: 'The folder SECRETS_DIR cannot be read (ENOENT)' })
    await mkdir(away)
    expect(await source.read('any')).toBeUndefined()
  })

  test('because of us refuses a new task for the moment, and not as if it asked for something wrong', async () => {
    const dir = await mkdtemp(join(folder, 'away-'))
    await using app = await startApp({ SECRETS_DIR: dir })
    await rm(dir, { recursive: true })
    const request = taskRequest({ worker_config: { personal_secrets: ['any'] } })
    expect(await app.submit(request)).toMatchObject({
      status: 503,
      body: { message: 'The folder SECRETS_DIR cannot be read (ENOENT)' },
    })
    await mkdir(dir)
    expect(await app.submit(request)).toMatchObject({ status: 422 })
  })
})

describe('secrets of a task', () => {
  const VALUES = { personal: 'canary-personal-1', shared: 'canary-shared-2', both: 'canary-both-3' }

  async function withSecrets(env: Record<string, string> = {}) {
    const dir = await mkdtemp(join(folder, 'task-'))
    for (const [name, value] of Object.entries(VALUES)) await writeFile(join(dir, name), value)
    return {
      dir,
      app: await startApp({ SECRETS_DIR: dir, SECRET_FROM_VARIABLE: 'canary-v-4', ...env }),
    }
  }

  const printing = (worker_config: object, names: string) =>
    taskRequest({
      task_file_name: 'w-eval.sh',
      worker_config: {
        ...worker_config,
        // Its length tells that the value came, though the value itself is masked.
        env_variables: {
          SCRIPT: `for n in ${names}; do echo "$n \${!n} $(expr length "\${!n}")"; done`,
        },
      },
    })

  test('reach it as variables under their names, and are masked in its log and callback', async () => {
    const { app } = await withSecrets()
    await using _ = app
    await using receiver = await startReceiver()
    const config = { personal_secrets: ['personal', 'from_variable'], shared_secrets: ['shared'] }
    const request = {
      ...printing(config, 'personal from_variable shared'),
      callback_url: receiver.url,
    }
    expect(await app.submit(request)).toMatchObject({ status: 200 })
    const { body } = await receiver.callbackOf(request.task_id)
    const log = 'personal *** 17\nfrom_variable *** 10\nshared *** 15\n'
    expect(body.logs).toBe(log)
    const task = await app.finished(request.task_id)
    expect(await app.text(`/tasks/${request.task_id}/logs`)).toBe(log)
    expect(task.worker_config).toMatchObject(config)
    expect(JSON.stringify(task)).not.toContain('canary')
  })

  test('may have any name, and be given another', async () => {
    const { app, dir } = await withSecrets()
    await using _ = app
    for (const name of ['git-secret', '2nd.key', 'plain']) {
      await writeFile(join(dir, name), `canary of ${name}`)
    }
    const request = printing(
      { personal_secrets: ['git-secret', '2nd.key'], shared_secrets: ['plain:RENAMED'] },
      'git_secret _2nd_key RENAMED plain',
    )
    expect(await app.submit(request)).toMatchObject({ status: 200 })
    await app.finished(request.task_id)
    expect(await app.text(`/tasks/${request.task_id}/logs`)).toBe(
      'git_secret *** 20\n_2nd_key *** 17\nRENAMED *** 15\nplain  0\n',
    )
  })

  test('that would be the same variable are refused, unless they are the same secret', async () => {
    const { app, dir } = await withSecrets()
    await using _ = app
    for (const name of ['a-b', 'a.b']) await writeFile(join(dir, name), 'canary')
    const submit = (worker_config: object) => app.submit(taskRequest({ worker_config }))
    expect(
      await submit({ personal_secrets: ['a-b'], shared_secrets: ['both', 'a.b'] }),
    ).toMatchObject({
      status: 422,
      body: {
        errors: [
          {
            path: 'worker_config.shared_secrets.1',
            message:
              'is the variable "a_b", as the secret "a-b" is; give it another: NAME:VARIABLE',
          },
        ],
      },
    })
    const twice = { personal_secrets: ['both', 'both'], shared_secrets: ['both:both', 'a.b:OTHER'] }
    expect(await submit(twice)).toMatchObject({ status: 200 })
  })

  test('are masked in the logs of a running task, also when followed, and after a restart of the service', async () => {
    const { app, dir } = await withSecrets()
    const gate = join(dir, 'gate')
    const script = `echo "it is $personal"; until [ -e ${gate} ]; do sleep 0.02; done`
    const request = taskRequest({
      task_file_name: 'w-eval.sh',
      worker_config: { personal_secrets: ['personal'], env_variables: { SCRIPT: script } },
    })
    await app.submit(request)
    const logs = `/tasks/${request.task_id}/logs`
    await expect.poll(() => app.text(logs), { timeout: 10_000 }).toBe('it is ***\n')
    await app.stop()
    // Rotated meanwhile: the running task still has the old one.
    await writeFile(join(dir, 'personal'), 'canary-rotated')
    await using again = await startApp({ SECRETS_DIR: dir }, { dataDir: app.dataDir })
    expect(await again.text(logs)).toBe('it is ***\n')
    const followed = again.text(`${logs}?follow=true`)
    await writeFile(gate, '')
    expect(await followed).toContain('data: it is ***\n')
    expect(await again.finished(request.task_id)).toMatchObject({ status: 'succeeded' })
    expect(await again.text(logs)).toBe('it is ***\n')
  })

  test('that are rotated reach the next task with their new value, without a restart', async () => {
    const { app, dir } = await withSecrets()
    await using _ = app
    await writeFile(join(dir, 'personal'), 'canary-rotated-long')
    const request = printing({ personal_secrets: ['personal'] }, 'personal')
    await app.submit(request)
    await app.finished(request.task_id)
    expect(await app.text(`/tasks/${request.task_id}/logs`)).toBe('personal *** 19\n')
  })

  test('come after env_variables, and personal ones before shared ones, where a name is taken twice', async () => {
    const { app } = await withSecrets({ SECRET_PERSONAL: 'not this' })
    await using _ = app
    const script = 'expr length "$both"; expr length "$personal"'
    const request = taskRequest({
      task_file_name: 'w-eval.sh',
      worker_config: {
        ...{ personal_secrets: ['personal', 'both'], shared_secrets: ['personal', 'both'] },
        env_variables: { SCRIPT: script, both: 'x' },
      },
    })
    await app.submit(request)
    await app.finished(request.task_id)
    expect(await app.text(`/tasks/${request.task_id}/logs`)).toBe('1\n17\n')
  })

  test('that do not exist are a 422 that names each, wherever it is named', async () => {
    const { app } = await withSecrets()
    await using _ = app
    const request = taskRequest({
      worker_config: {
        personal_secrets: ['personal', 'nope'],
        shared_secrets: ['neither'],
        git_configs: [{ remote_url: 'https://example.com/a.git', secret_name: 'nor-this' }],
      },
    })
    const path = (field: string) => `worker_config.${field}`
    expect(await app.submit(request)).toMatchObject({
      status: 422,
      body: {
        errors: [
          { path: path('personal_secrets.1'), message: 'the secret "nope" does not exist' },
          { path: path('shared_secrets.0'), message: 'the secret "neither" does not exist' },
          {
            path: path('git_configs.0.secret_name'),
            message: 'the secret "nor-this" does not exist',
          },
        ],
      },
    })
  })

  test('that are gone when the task’s turn comes end it as startup_failed, with their name', async () => {
    const { app, dir } = await withSecrets({ MAX_CONCURRENT_TASKS: '1' })
    await using _ = app
    const gate = join(dir, 'gate')
    const first = taskRequest({
      task_file_name: 'w-eval.sh',
      worker_config: {
        env_variables: { SCRIPT: `until [ -e ${gate} ]; do sleep 0.02; done` },
      },
    })
    await app.submit(first)
    const second = taskRequest({ worker_config: { personal_secrets: ['personal'] } })
    expect(await app.submit(second)).toMatchObject({ status: 200 })
    await rm(join(dir, 'personal'))
    await writeFile(gate, '')
    expect(await app.finished(second.task_id)).toMatchObject({
      ...{ status: 'failed', reason: 'startup_failed' },
      message: 'The secret "personal" does not exist any more',
    })
    expect(await app.text(`/tasks/${second.task_id}/logs`)).toBe(
      '[task-runner] The secret "personal" does not exist any more\n',
    )
  })
})
