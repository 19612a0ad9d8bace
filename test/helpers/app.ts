import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { FastifyInstance } from 'fastify'
import { expect } from 'vitest'
import { type App, type AppOptions, buildApp } from '../../src/app.ts'
import { loadConfig } from '../../src/config.ts'

export const FIXTURE_TASKS = new URL('../fixtures/tasks', import.meta.url).pathname

/** An environment for `loadConfig` that leaves the machine alone. */
export function testEnv(env: Record<string, string> = {}): Record<string, string> {
  return {
    PATH: process.env.PATH ?? '/usr/bin:/bin',
    TASKS_DIR: FIXTURE_TASKS,
    LOG_LEVEL: 'silent',
    PYTHON_COMMAND: '/usr/bin/python3',
    CALLBACK_RETRY_SECONDS: '0.05,0.05,0.05',
    TERMINATION_GRACE_SECONDS: '1',
    ...env,
  }
}

export interface TestApp extends AsyncDisposable {
  app: App
  http: FastifyInstance
  dataDir: string
  /** Closes the service and keeps its data folder, as a restart would. */
  stop(): Promise<void>
  submit(request: object): Promise<{ status: number; body: Record<string, unknown> }>
  get(url: string): Promise<{ status: number; body: Record<string, unknown> }>
  post(url: string, body?: object): Promise<{ status: number; body: Record<string, unknown> }>
  text(url: string): Promise<string>
  /** Waits until the task has ended, and its worker with it, and returns it. */
  finished(taskId: string): Promise<Record<string, unknown>>
}

/** The service on a data folder of its own, answering through `inject`, cleaned up at the end of the test. */
export async function startApp(
  env: Record<string, string> = {},
  options: Omit<Partial<AppOptions>, 'config'> & { dataDir?: string } = {},
): Promise<TestApp> {
  const dataDir = options.dataDir ?? (await mkdtemp(join(tmpdir(), 'task-runner-test-')))
  const config = loadConfig(testEnv({ DATA_DIR: dataDir, ...env }))
  const app = await buildApp({ ...options, config })
  const { http } = app
  const json = async (method: 'GET' | 'POST' | 'DELETE', url: string, body?: object) => {
    const reply = await http.inject({
      method,
      url,
      ...(body === undefined ? {} : { payload: body }),
    })
    return { status: reply.statusCode, body: reply.json() as Record<string, unknown> }
  }
  return {
    app,
    http,
    dataDir,
    stop: () => http.close(),
    submit: (request) => json('POST', '/task-runner', request),
    get: (url) => json('GET', url),
    post: (url, body) => json('POST', url, body),
    text: async (url) => (await http.inject({ method: 'GET', url })).body,
    async finished(taskId) {
      const url = `/tasks/${encodeURIComponent(taskId)}`
      const task = await expect
        .poll(async () => (await json('GET', url)).body, { timeout: 20_000, interval: 20 })
        .toMatchObject({ status: expect.stringMatching(/succeeded|failed|cancelled/) })
        .then(async () => (await json('GET', url)).body)
      if (task.terminate_on_completion !== false) {
        const worker = `/workers/${task.worker_name}`
        await expect
          .poll(async () => (await json('GET', worker)).status, { timeout: 20_000, interval: 20 })
          .toBe(404)
      }
      return task
    },
    async [Symbol.asyncDispose]() {
      await http.close()
      await rm(dataDir, { recursive: true, force: true, maxRetries: 10 })
    },
  }
}

let requests = 0

/** A valid request under an id of its own. */
export function taskRequest(overrides: object = {}): Record<string, unknown> & { task_id: string } {
  requests += 1
  return {
    task_id: `task-${process.pid}-${requests}`,
    task_file_name: 'echo.sh',
    worker_config: {},
    ...overrides,
  }
}
