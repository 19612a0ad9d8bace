/** The command line as its users meet it: a process with its output, exit code and signals. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { FIXTURE_TASKS, testEnv } from './helpers/app.ts'
import { processesOf, type Service, startService } from './helpers/service.ts'

const CLI = new URL('../src/cli.ts', import.meta.url).pathname
const TASKS = new URL('../tasks', import.meta.url).pathname
const TOKEN = 'canary-cli-token'

let root: string
let service: Service
beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), 'cli-test-'))
  service = await startService({ DATA_DIR: join(root, 'data'), API_TOKENS: TOKEN })
})
afterAll(async () => {
  await service.kill('SIGTERM')
  await rm(root, { recursive: true, force: true })
})

interface Ended {
  code: number | null
  stdout: string
  stderr: string
}

function start(args: string[], options: { input?: string; env?: Record<string, string> } = {}) {
  const child = spawn(process.execPath, [CLI, ...args], {
    env: testEnv({ TMPDIR: root, ...options.env }),
    stdio: ['pipe', 'pipe', 'pipe'],
  })
  const shown = { stdout: '', stderr: '' }
  const seen = Promise.withResolvers<void>()
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (text: string) => {
      shown[name] += text
      seen.resolve()
    })
  }
  child.stdin.end(options.input ?? '')
  const ended = once(child, 'close').then(([code]): Ended => ({ code, ...shown }))
  return { child, ended, firstOutput: seen.promise }
}

const run = (...args: string[]) => start(args).ended
const there = (...args: string[]) =>
  start([...args, '--url', service.url], { env: { TASK_RUNNER_TOKEN: TOKEN } })

describe('run on this machine', () => {
  test('shows the log, and nothing else, and exits with the exit code of the script', async () => {
    expect(await run('run', join(FIXTURE_TASKS, 'echo.sh'))).toEqual({
      ...{ code: 0, stdout: 'hi\n', stderr: '' },
    })
    const failing = await run('run', join(FIXTURE_TASKS, 'w-eval.sh'), '--env', 'SCRIPT=exit 7')
    expect(failing).toEqual({ code: 7, stdout: '', stderr: 'task-runner: Exit code 7\n' })
  })

  test('hands on variables, a worker file under them, and secrets', async () => {
    const file = join(root, 'worker.json')
    const variables = { SCRIPT: 'echo "$A $B $LOG_LEVEL $MINE"', A: 'file', B: 'file' }
    const additional_params = Buffer.from(JSON.stringify({ env_variables: variables }))
    await writeFile(
      file,
      JSON.stringify({
        log_level: 'DEBUG',
        additional_params: additional_params.toString('base64'),
      }),
    )
    const { ended } = start(
      [
        ...['run', join(FIXTURE_TASKS, 'w-eval.sh'), '--worker-config', file],
        ...['--env', 'B=option=2', '--secret', 'MINE'],
      ],
      { env: { SECRET_MINE: 'canary-secret' } },
    )
    expect(await ended).toMatchObject({ code: 0, stdout: 'file option=2 DEBUG ***\n' })
  })

  test('with --json stdout holds the outcome alone', async () => {
    const { stdout, stderr } = await run('run', '--json', join(FIXTURE_TASKS, 'echo.sh'))
    expect(JSON.parse(stdout)).toEqual({
      worker: expect.stringMatching(/^task-run-/),
      ...{ success: true, exit_code: 0, reason: 'completed', message: null },
    })
    expect(stderr).toBe('hi\n')
  })

  test.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)(
    '%s ends the script and leaves nothing',
    async (signal) => {
      const script = 'SCRIPT=echo begun; exec sleep 1000'
      const running = start(['run', join(FIXTURE_TASKS, 'w-eval.sh'), '--env', script])
      await running.firstOutput
      running.child.kill(signal)
      expect(await running.ended).toEqual({ code: 130, stdout: 'begun\n', stderr: '' })
      expect(processesOf(root)).toEqual(processesOf(join(root, 'data')))
    },
  )

  test('a reader that has seen enough ends the script, and nothing is left', async () => {
    const script = 'SCRIPT=while :; do echo y; sleep 0.01; done'
    const running = start(['run', join(FIXTURE_TASKS, 'w-eval.sh'), '--env', script])
    await running.firstOutput
    running.child.stdout.destroy()
    expect(await running.ended).toMatchObject({ code: 130, stderr: '' })
    expect(processesOf(root)).toEqual(processesOf(join(root, 'data')))
  })
})

describe('with a service', () => {
  test('run submits, follows the log, and exits with the exit code of the task', async () => {
    const ended = await there('run', 'w-eval.sh', '--env', 'SCRIPT=echo over there; exit 5').ended
    expect(ended).toEqual({
      ...{ code: 5, stdout: 'over there\n', stderr: 'task-runner: Exit code 5\n' },
    })
  })

  test('run with an id that has run starts nothing new, and shows what it gave', async () => {
    const again = () => there('run', 'echo.sh', '--id', 'cli-once').ended
    expect(await again()).toMatchObject({ code: 0, stdout: 'hi\n' })
    expect(await again()).toMatchObject({ code: 0, stdout: 'hi\n' })
    const { stdout } = await there('tasks', '--json').ended
    const ids = JSON.parse(stdout).tasks.map((task: { task_id: string }) => task.task_id)
    expect(ids.filter((id: string) => id === 'cli-once')).toHaveLength(1)
  })

  test('Ctrl-C cancels the task', async () => {
    const args = ['run', 'w-eval.sh', '--id', 'cli-interrupted']
    const running = there(...args, '--env', 'SCRIPT=echo begun; exec sleep 1000')
    await running.firstOutput
    running.child.kill('SIGINT')
    expect(await running.ended).toMatchObject({ code: 130 })
    await expect
      .poll(async () => (await there('tasks', '--status', 'cancelled').ended).stdout, {
        timeout: 10_000,
      })
      .toContain('cli-interrupted')
  })

  test('logs, cancel, workers and cleanup do what they say', async () => {
    const args = ['run', 'w-eval.sh', '--id', 'cli-watched']
    const running = there(...args, '--env', 'SCRIPT=echo begun; exec sleep 1000')
    await running.firstOutput
    expect(await there('logs', 'cli-watched').ended).toEqual({
      ...{ code: 0, stdout: 'begun\n', stderr: '' },
    })
    const workers = (await there('workers').ended).stdout
    expect(workers).toMatch(
      /^WORKER +STATUS +BACKEND +TASK +CREATED\ntask-cli-watched-\S+ +Running +local/,
    )
    const following = there('logs', '-f', 'cli-watched')
    await following.firstOutput
    expect(await there('cancel', 'cli-watched').ended).toMatchObject({ code: 0 })
    // The shell may add a line about the end.
    const { code, stdout } = await following.ended
    expect({ code, begins: stdout.startsWith('begun\n') }).toEqual({ code: 0, begins: true })
    expect(await running.ended).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('Cancelled'),
    })
    expect(await there('cleanup', '--older-than', '0').ended).toMatchObject({
      ...{ code: 0, stdout: 'Terminated 0 workers\n' },
    })
  })

  test('a name that would steer the terminal is shown harmless, and nothing is coloured in a pipe', async () => {
    const { stdout } = await there('tasks', '--limit', '1').ended
    expect(stdout).toMatch(/^TASK +FILE +STATUS +REASON +CREATED\n/)
    expect(stdout).not.toContain('\u001b')
    const escaped = there('run', 'echo.sh', '--id', 'red\u001b[31m')
    expect((await escaped.ended).stderr).toContain('task_id: must not contain control characters')
  })

  test('tasks tells what a task waits for', async () => {
    const { stdout } = await there('tasks', '--json', '--limit', '2').ended
    const list = JSON.parse(stdout)
    list.tasks[0].waiting_for = 'The Docker engine does not answer (ECONNREFUSED)'
    const hindered = createServer((_, response) => response.end(JSON.stringify(list)))
    await once(hindered.listen(0, '127.0.0.1'), 'listening')
    // Holds: it listens on TCP.
    const { port } = hindered.address() as { port: number }
    const shown = await run('tasks', '--url', `http://127.0.0.1:${port}`)
    hindered.close()
    const [head, first, second] = shown.stdout.split('\n')
    expect(head).toMatch(/^TASK +FILE +STATUS +REASON +CREATED +WAITS FOR$/)
    expect(first).toMatch(/Z {2}The Docker engine does not answer \(ECONNREFUSED\)$/)
    expect(second).toMatch(/Z {2}$/)
  })

  test('a wrong token, a wrong field and an unknown task are said plainly', async () => {
    const stranger = start(['tasks', '--url', service.url], { env: { TASK_RUNNER_TOKEN: 'wrong' } })
    expect(await stranger.ended).toMatchObject({
      code: 1,
      stdout: '',
      stderr: expect.stringContaining('Set TASK_RUNNER_TOKEN'),
    })
    const { code, stderr } = await there('run', 'echo.sh', '--size', 'two\nlines').ended
    expect({ code, stderr }).toEqual({
      code: 1,
      stderr: expect.stringContaining(
        'worker_config.worker_size: must not contain control characters',
      ),
    })
    expect(await there('logs', 'nothing').ended).toMatchObject({
      ...{ code: 1, stderr: 'task-runner: There is no task "nothing"\n' },
    })
  })
})

describe('worker-config', () => {
  const config = { worker_size: 'X-Small', env_variables: { A: 'b', N: 1 }, email: null }
  const written = `{"worker_size":"X-Small","additional_params":"${Buffer.from('{"env_variables": {"A": "b", "N": 1}}').toString('base64')}"}\n`

  test('writes a worker file from stdin or a file, and shows what one holds', async () => {
    expect(await start(['worker-config'], { input: JSON.stringify(config) }).ended).toEqual({
      ...{ code: 0, stdout: written, stderr: '' },
    })
    const file = join(root, 'written.json')
    await writeFile(file, written)
    const { stdout } = await run('worker-config', '--decode', file)
    expect(JSON.parse(stdout)).toEqual({ worker_size: 'X-Small', env_variables: { A: 'b', N: 1 } })
  })

  test('writes one from options alone', async () => {
    const { stdout } = await run(
      ...['worker-config', '--size', 'X-Small', '--env', 'A=b'],
      ...['--git', 'https://example.com/a.git', '--git-secret', 'token'],
    )
    const hidden = Buffer.from(JSON.parse(stdout).additional_params, 'base64').toString()
    expect(JSON.parse(hidden)).toEqual({
      env_variables: { A: 'b' },
      git_configs: [{ remote_url: 'https://example.com/a.git', secret_name: 'token' }],
    })
  })
})

describe('typed wrong', () => {
  test.each([
    [[], 'task-runner run FILE'],
    [['bogus'], 'there is no command "bogus"'],
    [['run'], 'run: FILE is missing'],
    [['run', 'a.sh', 'b.sh'], 'run: unexpected argument "b.sh"'],
    [['tasks', '--env', 'A=b'], 'tasks has no option --env'],
    [['run', 'a.sh', '--bogus'], '--bogus'],
    [['run', 'a.sh', '--env', 'A'], '--env must be NAME=VALUE'],
    [['run', 'a.sh', '--id', 'x'], '--id requires --url'],
    [['run', 'a.sh', '--git-secret', 'x'], '--git-secret requires --git'],
    [['tasks', '--limit', 'many'], '--limit must be a number'],
    [['tasks', '--url', 'ftp://x'], 'is not an http(s) URL'],
    [['worker-config', '/nowhere.json'], '/nowhere.json cannot be read (ENOENT)'],
  ])('%j exits with 2 and says what is wrong', async (args, message) => {
    const { code, stdout, stderr } = await run(...args)
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' })
    expect(stderr).toContain(message)
    expect(stderr).not.toContain('    at ')
  })

  test('--help teaches, and every command is in it', async () => {
    const { code, stdout } = await run('--help')
    expect(code).toBe(0)
    const commands = ['serve', 'run', 'tasks', 'logs', 'cancel', 'workers', 'cleanup']
    for (const name of [...commands, 'worker-config']) {
      expect(stdout).toMatch(new RegExp(`^  task-runner ${name}\\b`, 'm'))
    }
  })
})

test('serve is the service', async () => {
  const { child, ended } = start(['serve'], {
    env: { DATA_DIR: join(root, 'served'), TASKS_DIR: TASKS, PORT: '0', LOG_LEVEL: 'info' },
  })
  const lines: string[] = []
  child.stdout.on('data', (text) => lines.push(String(text)))
  await expect.poll(() => lines.join(''), { timeout: 10_000 }).toContain('"listening"')
  child.kill('SIGTERM')
  expect((await ended).code).toBe(0)
})
