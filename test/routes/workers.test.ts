import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Worker } from '../../src/core/ports.ts'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'

const POLL = { timeout: 20_000, interval: 20 }

let folder: string
let app: TestApp

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-runner-workers-'))
  app = await startApp()
})

afterAll(async () => {
  // Ends tasks that a failed test left waiting.
  await rm(folder, { recursive: true, force: true, maxRetries: 10 })
  await app[Symbol.asyncDispose]()
})

/** A task that runs until it is let go. */
async function startWaiting(overrides: object = {}) {
  const gate = await mkdtemp(join(folder, 'gate-'))
  const request = taskRequest({
    task_file_name: 'bad-waits.sh',
    worker_config: { worker_size: 'small', env_variables: { GATE: gate } },
    ...overrides,
  })
  expect(await app.submit(request)).toMatchObject({ status: 200 })
  const { worker_name } = (await app.get(`/tasks/${request.task_id}`)).body
  const name = String(worker_name)
  await expect.poll(() => existsSync(join(gate, `started-${name}`)), POLL).toBe(true)
  await expect
    .poll(async () => (await app.get(`/tasks/${request.task_id}`)).body.status, POLL)
    .toBe('running')
  return {
    taskId: request.task_id,
    name,
    async letGo() {
      await writeFile(join(gate, 'open'), '')
      return app.finished(request.task_id)
    },
  }
}

async function remove(name: string) {
  const reply = await app.http.inject({ method: 'DELETE', url: `/workers/${name}` })
  return { status: reply.statusCode, body: reply.json() as Record<string, unknown> }
}

async function listed(name: string) {
  const { workers } = (await app.get('/workers')).body as { workers: Array<{ name: string }> }
  return workers.filter((worker) => worker.name === name)
}

describe('a running worker', () => {
  test('is listed and shown with name, status, time, backend, size and task', async () => {
    const before = Date.now()
    const task = await startWaiting()
    const { status, body } = await app.get(`/workers/${task.name}`)
    expect({ status, body }).toEqual({
      status: 200,
      body: {
        name: task.name,
        status: 'Running',
        creation_time: expect.any(String),
        backend: 'local',
        image: null,
        size: 'Small',
        task_id: task.taskId,
      },
    })
    expect(Date.parse(String(body.creation_time))).toBeGreaterThanOrEqual(before - 1)
    expect(Date.parse(String(body.creation_time))).toBeLessThanOrEqual(Date.now())
    expect(await listed(task.name)).toEqual([body])
    await task.letGo()
    expect(await listed(task.name)).toEqual([])
  })

  test('shows its log as plain text while the task runs', async () => {
    const task = await startWaiting()
    const reply = await app.http.inject({ method: 'GET', url: `/workers/${task.name}/logs` })
    expect(reply.headers['content-type']).toBe('text/plain; charset=utf-8')
    expect(reply.body).toMatch(/worker_size "Small" is not enforced.*\nwaiting\n$/s)
    await task.letGo()
  })

  test('DELETE cancels its task, and the worker goes', async () => {
    const task = await startWaiting()
    expect(await remove(task.name)).toEqual({
      status: 200,
      body: { success: true, message: expect.stringMatching(/[Cc]ancel/) },
    })
    expect(await app.finished(task.taskId)).toMatchObject({
      status: 'cancelled',
      reason: 'cancelled',
    })
    expect(existsSync(join(app.dataDir, 'workers', task.name))).toBe(false)
    expect((await remove(task.name)).status).toBe(404)
  })

  test('DELETE of one whose task was to keep it ends it as well', async () => {
    const task = await startWaiting({ terminate_on_completion: false })
    await remove(task.name)
    await expect
      .poll(async () => (await app.get(`/tasks/${task.taskId}`)).body.status, POLL)
      .toBe('cancelled')
    await expect.poll(async () => (await app.get(`/workers/${task.name}`)).status, POLL).toBe(404)
  })
})

describe('a worker kept by terminate_on_completion=false', () => {
  test('is listed as Completed, with its log, until it is deleted', async () => {
    const task = await startWaiting({ terminate_on_completion: false })
    expect(await task.letGo()).toMatchObject({
      status: 'succeeded',
      terminate_on_completion: false,
    })
    expect(await listed(task.name)).toMatchObject([
      { name: task.name, status: 'Completed', task_id: task.taskId },
    ])
    expect((await app.get(`/workers/${task.name}`)).body.status).toBe('Completed')
    expect(await app.text(`/workers/${task.name}/logs`)).toMatch(/waiting\nthrough\n$/)

    expect(await remove(task.name)).toEqual({
      status: 200,
      body: { success: true, message: 'Terminated' },
    })
    expect(await listed(task.name)).toEqual([])
    expect((await app.get(`/workers/${task.name}`)).status).toBe(404)
    expect((await app.get(`/workers/${task.name}/logs`)).status).toBe(404)
    expect((await remove(task.name)).status).toBe(404)
    expect(existsSync(join(app.dataDir, 'workers', task.name))).toBe(false)
    expect(await app.text(`/tasks/${task.taskId}/logs`)).toMatch(/waiting\nthrough\n$/)
  })

  test('is kept after a failure too', async () => {
    const request = taskRequest({ task_file_name: 'bad-pieces.sh', terminate_on_completion: false })
    await app.submit(request)
    const task = await app.finished(request.task_id)
    expect(task).toMatchObject({ status: 'failed', exit_code: 3 })
    expect(await listed(String(task.worker_name))).toMatchObject([{ status: 'Completed' }])
    expect((await remove(String(task.worker_name))).status).toBe(200)
  })

  test('survives a cleanup, which is for workers stuck in Provisioning', async () => {
    const request = taskRequest({ terminate_on_completion: false })
    await app.submit(request)
    const { worker_name } = await app.finished(request.task_id)
    const waiting = await startWaiting()
    expect(await app.post('/workers/cleanup', { older_than_seconds: 0 })).toEqual({
      status: 200,
      body: { success: true, message: 'Terminated 0 workers', workers: [] },
    })
    expect((await app.get(`/workers/${worker_name}`)).body.status).toBe('Completed')
    expect((await app.get(`/workers/${waiting.name}`)).body.status).toBe('Running')
    await waiting.letGo()
    await remove(String(worker_name))
  })
})

test("a worker that may be another service's is shown and ended only where its task is known", async () => {
  await using other = await startApp(
    {},
    {
      wrapPorts: (ports) => {
        const { backend } = ports
        const foreign = (worker: Worker): Worker => ({ ...worker, mayBeForeign: true })
        const unknown = (worker: Worker): Worker => ({
          ...foreign(worker),
          ...{ name: 'task-of-another', taskId: 'another' },
          terminate: () => Promise.reject(new Error('it is not ours')),
        })
        return {
          ...ports,
          backend: {
            name: backend.name,
            provision: (...given) => backend.provision(...given),
            find: async (name) => {
              const [any] = await backend.list()
              if (name === 'task-of-another') return any && unknown(any)
              const real = await backend.find(name)
              return real && foreign(real)
            },
            list: async () => {
              const workers = await backend.list()
              return [...workers.map(foreign), ...workers.map(unknown)]
            },
            check: () => backend.check(),
            close: () => backend.close(),
          },
        }
      },
    },
  )
  const request = taskRequest({ terminate_on_completion: false })
  await other.submit(request)
  const { worker_name } = await other.finished(request.task_id)
  expect((await other.get('/workers')).body.workers).toMatchObject([{ name: worker_name }])
  expect((await other.get('/workers/task-of-another')).status).toBe(404)
  const ended = async (name: unknown) =>
    (await other.http.inject({ method: 'DELETE', url: `/workers/${name}` })).statusCode
  expect(await ended('task-of-another')).toBe(404)
  expect(await ended(worker_name)).toBe(200)
})

describe('cleanup', () => {
  test('ends workers that have been in Provisioning for longer than asked, and names them', async () => {
    let stuck = ''
    await using other = await startApp(
      {},
      {
        wrapPorts: (ports) => {
          const { backend } = ports
          const worker = (real: Worker): Worker => ({
            ...real,
            createdAt: Date.now() - 60_000,
            status: async () => (real.name === stuck ? 'Provisioning' : real.status()),
          })
          return {
            ...ports,
            backend: {
              name: backend.name,
              provision: (...given) => backend.provision(...given),
              find: async (name) => {
                const real = await backend.find(name)
                return real && worker(real)
              },
              list: async () => (await backend.list()).map(worker),
              check: () => backend.check(),
              close: () => backend.close(),
            },
          }
        },
      },
    )
    const kept: string[] = []
    for (let count = 0; count < 2; count += 1) {
      const request = taskRequest({ terminate_on_completion: false })
      await other.submit(request)
      kept.push(String((await other.finished(request.task_id)).worker_name))
    }
    const [first = '', second = ''] = kept
    stuck = first
    const cleanup = (body?: object) => other.post('/workers/cleanup', body)
    expect((await cleanup({ older_than_seconds: 61 })).body.workers).toEqual([])
    expect((await other.get(`/workers/${first}`)).body.status).toBe('Provisioning')
    expect(await cleanup()).toEqual({
      status: 200,
      body: { success: true, message: expect.stringContaining('1 worker'), workers: [first] },
    })
    expect((await other.get(`/workers/${first}`)).status).toBe(404)
    expect((await other.get(`/workers/${second}`)).body.status).toBe('Completed')
    expect(existsSync(join(other.dataDir, 'workers', first))).toBe(false)
  })

  test('a folder that never became a worker is not shown as one', async () => {
    const name = 'task-half-made-ba9876543210'
    await mkdir(join(app.dataDir, 'workers', name))
    expect(await listed(name)).toEqual([])
    expect((await app.get(`/workers/${name}`)).status).toBe(404)
    await rm(join(app.dataDir, 'workers', name), { recursive: true })
  })

  test.each([[undefined], [{}], [{ older_than_seconds: null }], [{ older_than_seconds: 0.5 }]])(
    'takes the body %j',
    async (body) => {
      expect(await app.post('/workers/cleanup', body)).toMatchObject({ status: 200 })
    },
  )

  test.each([
    [{ older_than_seconds: -1 }, 'older_than_seconds'],
    [{ older_than_seconds: '59' }, 'older_than_seconds'],
    [{ older_than_seconds: 1e12 }, 'older_than_seconds'],
    [{ older_than: 59 }, 'older_than'],
    [[], ''],
  ])('refuses the body %j', async (body, path) => {
    expect(await app.post('/workers/cleanup', body)).toMatchObject({
      status: 422,
      body: { success: false, errors: [{ path }] },
    })
  })
})

describe('names', () => {
  test.each(['GET /workers/nobody', 'GET /workers/nobody/logs', 'DELETE /workers/nobody'])(
    '%s answers 404 that names the worker',
    async (line) => {
      const [method, url] = line.split(' ') as ['GET' | 'DELETE', string]
      const reply = await app.http.inject({ method, url })
      expect(reply.statusCode).toBe(404)
      expect(reply.json()).toEqual({
        ...{ success: false, code: 'worker_not_found' },
        message: 'There is no worker "nobody"',
      })
    },
  )

  test.each(['..%2F..%2Fetc', '%2e%2e%2fa', 'a%00b', 'A', 'a.b', 'a%20b', 'x'.repeat(64)])(
    'the name %s is refused under every method, and touches no file',
    async (name) => {
      const marker = join(app.dataDir, 'workers', 'a')
      await mkdir(marker, { recursive: true })
      for (const [method, part] of [
        ['GET', ''],
        ['GET', '/logs'],
        ['DELETE', ''],
      ] as const) {
        const reply = await app.http.inject({ method, url: `/workers/${name}${part}` })
        expect(reply.statusCode).toBe(422)
        const { errors } = reply.json() as { errors: Array<{ path: string }> }
        expect([...new Set(errors.map(({ path }) => path))]).toEqual(['name'])
      }
      expect(existsSync(marker)).toBe(true)
      await rm(marker, { recursive: true })
    },
  )

  test('DELETE works for clients that send Content-Type with an empty body', async () => {
    const reply = await app.http.inject({
      method: 'DELETE',
      url: '/workers/nobody',
      headers: { 'content-type': 'application/json' },
    })
    expect(reply.statusCode).toBe(404)
  })
})
