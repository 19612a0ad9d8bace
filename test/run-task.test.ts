import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest'
import { InvalidRequestError } from '../src/core/errors.ts'
import { type RunTaskOptions, runTask } from '../src/run-task.ts'
import { FIXTURE_TASKS } from './helpers/app.ts'
import { startGitServer } from './helpers/git-server.ts'
import { needs } from './helpers/needs.ts'
import { processesOf } from './helpers/service.ts'

let root: string
let temporary: string
beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), 'run-task-test-'))
})
afterAll(() => rm(root, { recursive: true, force: true }))
beforeEach(async () => {
  // Where runTask makes its folders, so that a test sees what is left of them.
  temporary = await mkdtemp(join(root, 'tmp-'))
  vi.stubEnv('TMPDIR', temporary)
  vi.stubEnv('PYTHON_COMMAND', '/usr/bin/python3')
  vi.stubEnv('TERMINATION_GRACE_SECONDS', '1')
  return () => vi.unstubAllEnvs()
})

const running = (SCRIPT: string, options: Partial<RunTaskOptions> = {}) =>
  runTask({
    fileName: 'w-eval.sh',
    filesPath: FIXTURE_TASKS,
    ...options,
    workerConfig: { ...options.workerConfig, env_variables: { SCRIPT } },
  })

describe('runTask', () => {
  test('runs a script, shows its log as it comes, and leaves nothing', async () => {
    let log = ''
    const run = await running('echo one; echo é', {
      onLog: (text) => {
        log += text
      },
    })
    expect(run).toMatchObject({ success: true, exitCode: 0, reason: 'completed', message: null })
    expect(log).toBe('one\né\n')
    expect(await run.worker.logs()).toBe('one\né\n')
    expect(await readdir(temporary)).toEqual([])
    await run.worker.terminate()
  })

  test('a script that fails is a result', async () => {
    expect(await running('exit 7')).toMatchObject({ success: false, exitCode: 7 })
    const startup = await running('echo no', { workerConfig: { startup_script: 'exit 3' } })
    expect(startup).toMatchObject({ success: false, reason: 'startup_failed' })
  })

  test('takes defaults from worker files, secrets from the environment, and masks them', async () => {
    const folder = await mkdtemp(join(root, 'files-'))
    await writeFile(join(folder, 'default_worker.json'), '{"log_level": "WARNING"}')
    await mkdir(join(folder, 'sub'))
    await writeFile(join(folder, 'sub/task.sh'), 'echo "$LOG_LEVEL $MINE $(expr length "$MINE")"\n')
    vi.stubEnv('SECRET_MINE', 'canary-secret')
    let log = ''
    const run = await runTask({
      fileName: 'sub/task.sh',
      filesPath: folder,
      workerConfig: { personal_secrets: ['MINE'] },
      onLog: (text) => {
        log += text
      },
    })
    expect(log).toBe('WARNING *** 13\n')
    expect(await run.worker.logs()).toBe('WARNING *** 13\n')
  })

  needs('git')('runs a file of a cloned repository', async () => {
    await using git = await startGitServer({ username: 'x', password: 'y' })
    git.create('repo', { 'jobs/task.sh': 'echo from the repository\n' })
    const run = await runTask({
      fileName: 'repo/jobs/task.sh',
      filesPath: await mkdtemp(join(root, 'empty-')),
      workerConfig: { git_configs: [{ remote_url: `${git.url}/repo.git` }] },
    })
    expect(run).toMatchObject({ success: true })
    expect(await run.worker.logs()).toContain('from the repository\n')
  })

  test('keeps the worker when it is told to, until it is terminated', async () => {
    const run = await running('echo left > ~/behind', { terminateOnCompletion: false })
    const [folder = ''] = await readdir(temporary)
    const behind = join(temporary, folder, 'workers', run.worker.name, 'home/behind')
    expect(existsSync(behind)).toBe(true)
    await run.worker.terminate()
    await run.worker.terminate()
    expect(await readdir(temporary)).toEqual([])
  })

  test('ends script and worker when its signal aborts', async () => {
    const stop = new AbortController()
    const ending = running('echo begun; sleep 1000', {
      signal: stop.signal,
      onLog: () => stop.abort(new Error('enough')),
    })
    await expect(ending).rejects.toThrow('enough')
    expect(await readdir(temporary)).toEqual([])
    expect(processesOf(temporary)).toEqual([])
  })

  test('a file that is not there, a wrong field and a missing secret throw before anything runs', async () => {
    const here = { filesPath: FIXTURE_TASKS }
    await expect(runTask({ ...here, fileName: 'none.sh' })).rejects.toMatchObject({
      code: 'task_file_not_found',
    })
    await expect(runTask({ ...here, fileName: '../a.sh' })).rejects.toThrow(InvalidRequestError)
    const wrong = { log_level: 'a\nb' }
    await expect(running('', { workerConfig: wrong })).rejects.toThrow('workerConfig.log_level')
    const missing = { personal_secrets: ['NOT_THERE'] }
    await expect(running('', { workerConfig: missing })).rejects.toThrow('"NOT_THERE"')
    expect(await readdir(temporary)).toEqual([])
  })
})
