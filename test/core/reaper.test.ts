import { existsSync } from 'node:fs'
import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Worker, WorkerBackend, WorkerStatus } from '../../src/core/ports.ts'
import { Reaper } from '../../src/core/reaper.ts'
import { workerNameFor } from '../../src/core/task.ts'
import { startApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'
import { processesOf } from '../helpers/service.ts'
import { newTask, openStores, QUIET, type Stores } from '../helpers/stores.ts'

const PATIENTLY = { timeout: 20_000, interval: 20 }
const SECOND_MS = 1_000
const HOUR_MS = 3_600_000
const DAY_MS = 24 * HOUR_MS

/** Workers that exist only here. Terminating one takes it off the list, unless `stuck`. */
function fakeBackend(
  workers: Array<{
    taskId: string
    status: WorkerStatus
    createdAt: number
    stuck?: boolean
    mayBeForeign?: boolean
  }>,
) {
  const there = new Map(workers.map((worker) => [workerNameFor(worker.taskId), worker]))
  const never = () => Promise.reject(new Error('not part of this test'))
  const asWorker = (name: string): Worker | undefined => {
    const known = there.get(name)
    return (
      known && {
        ...{ name, taskId: known.taskId, createdAt: known.createdAt },
        ...(known.mayBeForeign ? { mayBeForeign: true } : {}),
        ...{ backend: 'fake', image: null, size: null },
        status: async () => known.status,
        completion: never,
        stop: never,
        logs: never,
        follow: () => {
          throw new Error('not part of this test')
        },
        async terminate() {
          if (known.stuck) throw new Error('processes of the worker cannot be ended')
          there.delete(name)
        },
      }
    )
  }
  const backend: WorkerBackend = {
    name: 'fake',
    provision: never,
    find: async (name) => asWorker(name),
    list: async () => [...there.keys()].flatMap((name) => asWorker(name) ?? []),
    async check() {},
    async close() {},
  }
  return { backend, left: () => [...there.values()].map(({ taskId }) => taskId).sort() }
}

function reaperOf(stores: Stores, backend: WorkerBackend, now: number): Reaper {
  return new Reaper({
    store: stores.tasks,
    backend,
    keptWorkerMs: 24 * HOUR_MS,
    provisioningTimeoutMs: 59 * SECOND_MS,
    retentionMs: 30 * DAY_MS,
    intervalMs: 60 * SECOND_MS,
    now: () => now,
    log: QUIET,
  })
}

const NOW = Date.UTC(2026, 0, 31)

describe('a sweep', () => {
  test('ends and counts workers that no task knows, ends those that outlived their task, and no others', async () => {
    await using stores = await openStores()
    await stores.tasks.insert(newTask('queued'))
    for (const taskId of ['provisioning', 'running']) {
      await stores.tasks.insert(newTask(taskId))
      const claimed = await stores.tasks.claim(taskId, 0)
      if (claimed && taskId === 'running') await stores.tasks.markRunning(claimed, NOW)
    }
    await stores.finished('just-finished', { finishedAt: NOW - SECOND_MS })
    await stores.finished('outlived', { finishedAt: NOW - HOUR_MS })
    await stores.finished('kept', { finishedAt: NOW - 23 * HOUR_MS, keepWorker: true })
    await stores.finished('kept-long', { finishedAt: NOW - 25 * HOUR_MS, keepWorker: true })
    const known = ['queued', 'provisioning', 'running', 'just-finished', 'outlived', 'kept']
    const { backend, left } = fakeBackend(
      [...known, 'kept-long', 'leaked-1', 'leaked-2'].map((taskId) => ({
        taskId,
        status: 'Running',
        createdAt: 0,
      })),
    )
    const reaper = reaperOf(stores, backend, NOW)
    expect(await reaper.sweep()).toBe(2)
    expect(left()).toEqual(['just-finished', 'kept', 'provisioning', 'queued', 'running'])
    expect(await reaper.sweep(), 'they are counted once').toBe(0)
    expect(left()).toEqual(['just-finished', 'kept', 'provisioning', 'queued', 'running'])
  })

  test('ends workers of live tasks that are stuck in Provisioning, and none that got past it', async () => {
    await using stores = await openStores()
    for (const taskId of ['stuck', 'slow', 'young', 'hindered']) {
      await stores.tasks.insert(newTask(taskId))
      await stores.tasks.claim(taskId, 0)
    }
    await stores.tasks.noteWaiting({ taskId: 'hindered', claim: 1 }, 'The engine is away')
    const { backend, left } = fakeBackend([
      { taskId: 'stuck', status: 'Provisioning', createdAt: NOW - 60 * SECOND_MS },
      { taskId: 'slow', status: 'Running', createdAt: NOW - HOUR_MS },
      { taskId: 'young', status: 'Provisioning', createdAt: NOW - 58 * SECOND_MS },
      { taskId: 'hindered', status: 'Provisioning', createdAt: NOW - HOUR_MS },
    ])
    expect(await reaperOf(stores, backend, NOW).sweep()).toBe(0)
    expect(left()).toEqual(['hindered', 'slow', 'young'])
  })

  test("leaves workers that may be another service's alone, unless the store knows their task", async () => {
    await using stores = await openStores()
    await stores.finished('outlived', { finishedAt: NOW - HOUR_MS })
    await stores.tasks.insert(newTask('stuck'))
    const { backend, left } = fakeBackend(
      [
        { taskId: 'outlived', status: 'Running' as const },
        { taskId: 'stuck', status: 'Provisioning' as const },
        { taskId: 'unknown', status: 'Running' as const },
        { taskId: 'unknown and stuck', status: 'Provisioning' as const },
      ].map((worker) => ({ ...worker, createdAt: 0, mayBeForeign: true })),
    )
    const reaper = reaperOf(stores, backend, NOW)
    expect(await reaper.sweep(), 'none of them is a leak').toBe(0)
    expect(left()).toEqual(['unknown', 'unknown and stuck'])
    expect(await reaper.cleanup(0)).toEqual([])
    expect(left()).toEqual(['unknown', 'unknown and stuck'])
  })

  test('goes on with the others, and with old tasks, when one worker cannot be ended', async () => {
    await using stores = await openStores()
    await stores.finished('old', { finishedAt: NOW - 31 * DAY_MS })
    await stores.tasks.workerTerminated('old')
    const { backend, left } = fakeBackend([
      { taskId: 'stuck', status: 'Running', createdAt: 0, stuck: true },
      { taskId: 'leaked', status: 'Running', createdAt: 0 },
    ])
    await reaperOf(stores, backend, NOW)
      .sweep()
      .catch(() => {})
    expect(left()).toEqual(['stuck'])
    expect(await stores.tasks.get('old')).toBeUndefined()
  })

  test('removes tasks past their retention with their logs, never with a delivery pending, a worker kept or a worker to end', async () => {
    await using stores = await openStores()
    const old = NOW - 31 * DAY_MS
    const origin = 'http://receiver.test'
    await stores.finished('old', { finishedAt: old })
    await stores.finished('delivered', { finishedAt: old, origin })
    await stores.finished('given-up', { finishedAt: old, origin })
    await stores.finished('pending', { finishedAt: old, origin })
    await stores.finished('kept', { finishedAt: old, keepWorker: true })
    await stores.finished('worker-there', { finishedAt: old })
    await stores.finished('young', { finishedAt: NOW - 29 * DAY_MS })
    for (const taskId of ['old', 'delivered', 'given-up', 'pending', 'young']) {
      await stores.tasks.workerTerminated(taskId)
    }
    const attempt = { number: 1, startedAt: old, durationMs: 1, error: null, manual: false }
    await stores.deliveries.recordAttempt(
      'delivered',
      { ...attempt, statusCode: 200 },
      { status: 'delivered', nextAttemptAt: null },
    )
    await stores.deliveries.recordAttempt(
      'given-up',
      { ...attempt, statusCode: 410 },
      { status: 'given_up', nextAttemptAt: null },
    )
    const { backend } = fakeBackend(
      ['kept', 'worker-there'].map((taskId) => {
        return { taskId, status: 'Completed', createdAt: old, stuck: true }
      }),
    )
    await reaperOf(stores, backend, NOW).sweep()

    const rows = async (table: 'tasks' | 'task_logs' | 'deliveries' | 'delivery_attempts') =>
      (await stores.connection.db.selectFrom(table).select('task_id').execute())
        .map(({ task_id }) => task_id)
        .sort()
    const stay = ['kept', 'pending', 'worker-there', 'young']
    expect(await rows('tasks')).toEqual(stay)
    expect(await rows('task_logs')).toEqual(stay)
    expect(await rows('deliveries')).toEqual(['pending'])
    expect(await rows('delivery_attempts')).toEqual([])
  })

  test('notes workers that are gone though nobody told: their tasks do not outlast their retention', async () => {
    await using stores = await openStores()
    const old = NOW - 31 * DAY_MS
    await stores.finished('removed-and-killed', { finishedAt: old })
    await stores.finished('kept-and-removed', { finishedAt: old, keepWorker: true })
    await stores.finished('there', { finishedAt: old })
    const { backend } = fakeBackend([
      { taskId: 'there', status: 'Completed', createdAt: old, stuck: true },
    ])
    await reaperOf(stores, backend, NOW).sweep()
    expect((await stores.tasks.list({ limit: 9 })).map(({ taskId }) => taskId)).toEqual(['there'])
  })
})

describe('a cleanup', () => {
  test('ends the workers that are stuck in Provisioning for that long, and no others', async () => {
    await using stores = await openStores()
    const { backend, left } = fakeBackend([
      { taskId: 'stuck', status: 'Provisioning', createdAt: NOW - 61 * SECOND_MS },
      { taskId: 'young', status: 'Provisioning', createdAt: NOW - 59 * SECOND_MS },
      { taskId: 'running', status: 'Running', createdAt: NOW - HOUR_MS },
      { taskId: 'completed', status: 'Completed', createdAt: NOW - HOUR_MS },
      { taskId: 'terminating', status: 'Terminating', createdAt: NOW - HOUR_MS },
    ])
    const ended = await reaperOf(stores, backend, NOW).cleanup(60 * SECOND_MS)
    expect(ended).toEqual([workerNameFor('stuck')])
    expect(left()).toEqual(['completed', 'running', 'terminating', 'young'])
  })
})

describe('with real workers', () => {
  test('a kept worker ends after KEPT_WORKER_HOURS, and a pending delivery keeps its task past RETENTION_DAYS', async () => {
    await using receiver = await startReceiver((_, response) => {
      response.statusCode = 500
      response.end()
    })
    let setBy = 0
    await using app = await startApp(
      { KEPT_WORKER_HOURS: '48', RETENTION_DAYS: '1', CALLBACK_RETRY_SECONDS: '2000000' },
      { now: () => Date.now() + setBy },
    )
    const kept = taskRequest({ terminate_on_completion: false })
    const pending = taskRequest({ callback_url: receiver.url })
    const plain = taskRequest()
    for (const request of [kept, pending, plain]) {
      expect((await app.submit(request)).status).toBe(200)
      await app.finished(request.task_id)
    }
    await receiver.callbackOf(pending.task_id)
    const { worker_name } = (await app.get(`/tasks/${kept.task_id}`)).body
    const there = async () => ({
      kept: (await app.get(`/tasks/${kept.task_id}`)).status,
      worker: (await app.get(`/workers/${worker_name}`)).status,
      pending: (await app.get(`/tasks/${pending.task_id}`)).status,
      plain: (await app.get(`/tasks/${plain.task_id}`)).status,
    })
    await app.app.reaper.sweep()
    expect(await there()).toEqual({ kept: 200, worker: 200, pending: 200, plain: 200 })

    setBy = 47 * HOUR_MS
    await app.app.reaper.sweep()
    expect(await there()).toEqual({ kept: 200, worker: 200, pending: 200, plain: 404 })
    expect((await app.get(`/tasks/${plain.task_id}/logs`)).status).toBe(404)
    expect(await app.text(`/tasks/${pending.task_id}/logs`)).toBe('hi\n')

    setBy = 49 * HOUR_MS
    await app.app.reaper.sweep()
    expect(await there()).toMatchObject({ worker: 404, pending: 200 })
    expect(await readdir(join(app.dataDir, 'workers'))).toEqual([])
  })

  test('a worker that no task knows is ended, with its processes', async () => {
    const gate = await mkdtemp(join(tmpdir(), 'task-runner-reaper-'))
    try {
      await using app = await startApp()
      const request = taskRequest({
        task_file_name: 'r-deaf.sh',
        worker_config: { env_variables: { GATE: gate } },
      })
      await app.submit(request)
      await expect.poll(() => existsSync(join(gate, 'started')), PATIENTLY).toBe(true)
      await app.stop()
      // The database is lost, the workers are not.
      for (const name of await readdir(app.dataDir)) {
        if (name.startsWith('task-runner.db')) await rm(join(app.dataDir, name))
      }
      expect(processesOf(app.dataDir)).not.toEqual([])

      await using next = await startApp({}, { dataDir: app.dataDir })
      await next.app.reaper.sweep()
      await expect
        .poll(async () => (await next.get('/workers')).body, PATIENTLY)
        .toEqual({ workers: [] })
      await expect.poll(() => processesOf(app.dataDir), PATIENTLY).toEqual([])
    } finally {
      await rm(gate, { recursive: true, force: true })
    }
  })

  test('sweeps at the same time as provisioning never end a new worker', async () => {
    await using app = await startApp({ MAX_CONCURRENT_TASKS: '4' })
    const requests = Array.from({ length: 40 }, () => taskRequest())
    let busy = true
    let sweeps = 0
    const sweeping = (async () => {
      while (busy) {
        expect(await app.app.reaper.sweep()).toBe(0)
        sweeps += 1
      }
    })()
    for (const request of requests) expect((await app.submit(request)).status).toBe(200)
    for (const { task_id } of requests) {
      expect(await app.finished(task_id)).toMatchObject({ status: 'succeeded', exit_code: 0 })
    }
    busy = false
    await sweeping
    expect(sweeps).toBeGreaterThan(10)
  }, 60_000)
})
