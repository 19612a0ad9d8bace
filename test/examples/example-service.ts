import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, onTestFinished, vi } from 'vitest'
import { startService } from '../helpers/service.ts'

export const ROOT = new URL('../..', import.meta.url).pathname
export const EXAMPLES = join(ROOT, 'examples')
export const PYTHON = '/usr/bin/python3'

export interface ExampleService extends AsyncDisposable {
  url: string
  token: string
  /** What the examples read. */
  env: { TASK_RUNNER_URL: string; TASK_RUNNER_TOKEN: string }
  task(taskId: string): Promise<Record<string, unknown>>
  /** Waits until the task has this status. */
  expectStatus(taskId: string, status: string): Promise<void>
  get(path: string): Promise<Record<string, unknown>>
}

/** The real service with the project's own task files and a token, on a data folder of its own. */
export async function startExampleService(
  env: Record<string, string> = {},
): Promise<ExampleService> {
  const dataDir = await mkdtemp(join(tmpdir(), 'task-runner-examples-'))
  const token = env.API_TOKENS ?? randomBytes(24).toString('hex')
  const service = await startService({
    DATA_DIR: dataDir,
    TASKS_DIR: join(ROOT, 'tasks'),
    API_TOKENS: token,
    ...env,
  })
  if (service.url === '') throw new Error(service.log.join('\n'))
  const get = async (path: string) => {
    const headers = { authorization: `Bearer ${token}` }
    return (await (await fetch(service.url + path, { headers })).json()) as Record<string, unknown>
  }
  const task = (taskId: string) => get(`/tasks/${encodeURIComponent(taskId)}`)
  return {
    ...{ url: service.url, token, get, task },
    env: { TASK_RUNNER_URL: service.url, TASK_RUNNER_TOKEN: token },
    async expectStatus(taskId, status) {
      await expect.poll(() => task(taskId), { timeout: 20_000 }).toMatchObject({ status })
    },
    async [Symbol.asyncDispose]() {
      // Its tasks would outlive a kill.
      for (const status of ['queued', 'provisioning', 'running']) {
        const { tasks } = (await get(`/tasks?status=${status}`)) as { tasks: { task_id: string }[] }
        for (const { task_id } of tasks) {
          const path = `/tasks/${encodeURIComponent(task_id)}/cancel`
          const headers = { authorization: `Bearer ${token}` }
          await fetch(service.url + path, { method: 'POST', headers })
        }
      }
      await vi.waitFor(async () => expect(await get('/workers')).toEqual({ workers: [] }), 20_000)
      await service.kill('SIGTERM')
      await rm(dataDir, { recursive: true, force: true, maxRetries: 10 })
    },
  }
}

export interface Run {
  pid: number
  stdout: string
  stderr: string
  kill(signal: NodeJS.Signals): void
  /** With nothing of it left: whoever holds its output open is waited for. */
  ended: Promise<{ code: number | null; stdout: string; stderr: string }>
}

/** Runs a program with no more than PATH and these variables. */
export function run(
  command: string,
  args: string[],
  options: { env?: Record<string, string>; cwd?: string } = {},
): Run {
  const child = spawn(command, args, {
    cwd: options.cwd ?? ROOT,
    env: {
      PATH: process.env.PATH ?? '',
      LANG: 'C.UTF-8',
      PYTHONDONTWRITEBYTECODE: '1',
      ...options.env,
    },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const ended = Promise.withResolvers<{ code: number | null; stdout: string; stderr: string }>()
  const result: Run = {
    // Holds for whatever could be started; otherwise `ended` rejects.
    pid: child.pid as number,
    stdout: '',
    stderr: '',
    kill: (signal) => child.kill(signal),
    ended: ended.promise,
  }
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    result.stdout += text
  })
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    result.stderr += text
  })
  child.on('error', ended.reject)
  // Of a test that failed nothing is left to run on.
  onTestFinished(() => void child.kill('SIGTERM'))
  child.on('close', (code) => ended.resolve({ code, stdout: result.stdout, stderr: result.stderr }))
  return result
}
