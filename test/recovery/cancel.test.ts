import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Ports } from '../../src/app.ts'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'
import { mulberry32 } from '../helpers/random.ts'
import { type Receiver, startReceiver } from '../helpers/receiver.ts'
import { processesOf } from '../helpers/service.ts'

const PATIENTLY = { timeout: 20_000, interval: 20 }

interface Scene extends AsyncDisposable {
  app: TestApp
  receiver: Receiver
  gate: string
  /** Submits a task that is given $GATE and a callback to the receiver; returns its id. */
  submit(
    file: string,
    more?: { env?: Record<string, string>; timeout_seconds?: number },
  ): Promise<string>
  /** Submits one, and waits until it runs and has made `file` in the gate. */
  running(file: string, made: string): Promise<string>
  statusOf(taskId: string): Promise<unknown>
}

async function startScene(
  env: Record<string, string> = {},
  wrapPorts: (ports: Ports) => Ports = (ports) => ports,
): Promise<Scene> {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-cancel-'))
  const gate = join(folder, 'gate')
  await mkdir(gate)
  const receiver = await startReceiver()
  const app = await startApp(env, { wrapPorts })
  const submit: Scene['submit'] = async (file, { env: variables, ...more } = {}) => {
    const request = taskRequest({
      task_file_name: file,
      callback_url: receiver.url,
      worker_config: { env_variables: { GATE: gate, ...variables } },
      ...more,
    })
    expect((await app.submit(request)).status).toBe(200)
    return request.task_id
  }
  const statusOf = async (taskId: string) => (await app.get(`/tasks/${taskId}`)).body.status
  return {
    app,
    receiver,
    gate,
    submit,
    statusOf,
    async running(file, made) {
      const taskId = await submit(file)
      await expect.poll(() => existsSync(join(gate, made)), PATIENTLY).toBe(true)
      await expect.poll(() => statusOf(taskId), PATIENTLY).toBe('running')
      return taskId
    },
    async [Symbol.asyncDispose]() {
      await rm(folder, { recursive: true, force: true })
      await app[Symbol.asyncDispose]()
      await receiver[Symbol.asyncDispose]()
    },
  }
}

/** Its status, its reason, one callback that agrees, and nothing left of its worker. */
async function expectCancelled(scene: Scene, taskId: string): Promise<void> {
  expect(await scene.app.finished(taskId)).toMatchObject({
    status: 'cancelled',
    reason: 'cancelled',
    exit_code: null,
  })
  const { body } = await scene.receiver.callbackOf(taskId)
  expect(body).toMatchObject({ task_id: taskId, success: false })
  await expect
    .poll(async () => (await scene.app.get(`/tasks/${taskId}`)).body.callback_status, PATIENTLY)
    .toBe('delivered')
  expect(idsOf(scene, taskId).size).toBe(1)
}

function idsOf({ receiver }: Scene, taskId: string): Set<unknown> {
  return new Set(
    receiver.received
      .filter(({ body }) => body.task_id === taskId)
      .map(({ headers }) => headers['webhook-id']),
  )
}

async function expectNothingLeft({ app }: Scene): Promise<void> {
  await expect
    .poll(async () => (await app.get('/workers')).body, PATIENTLY)
    .toEqual({ workers: [] })
  await expect.poll(() => processesOf(app.dataDir), PATIENTLY).toEqual([])
}

describe('a cancel', () => {
  test('of a queued task ends it at once, and it never runs', async () => {
    await using scene = await startScene({ MAX_CONCURRENT_TASKS: '1' })
    const blocker = await scene.running('r-deaf.sh', 'started')
    const queued = await scene.submit('echo.sh')
    const answer = await scene.app.post(`/tasks/${queued}/cancel`)
    expect(answer).toMatchObject({ status: 200, body: { success: true, status: 'cancelled' } })
    await expectCancelled(scene, queued)
    await rm(scene.gate, { recursive: true })
    expect(await scene.app.finished(blocker)).toMatchObject({ status: 'succeeded' })
    const after = await scene.submit('echo.sh')
    expect(await scene.app.finished(after)).toMatchObject({ status: 'succeeded' })
    expect((await scene.app.get(`/tasks/${queued}`)).body).toMatchObject({
      status: 'cancelled',
      started_at: null,
    })
    expect(await scene.app.text(`/tasks/${queued}/logs`)).toBe(
      '[task-runner] Cancelled on request\n',
    )
    await expectNothingLeft(scene)
  })

  test('of queued tasks gives their places in the queue to others', async () => {
    await using scene = await startScene({ MAX_CONCURRENT_TASKS: '1', MAX_QUEUED_TASKS: '2' })
    await scene.running('r-deaf.sh', 'started')
    const queued = [await scene.submit('echo.sh'), await scene.submit('echo.sh')]
    expect((await scene.app.submit(taskRequest())).status).toBe(429)
    for (const taskId of queued) await scene.app.post(`/tasks/${taskId}/cancel`)
    for (const taskId of queued) await expectCancelled(scene, taskId)
    expect(await scene.app.submit(taskRequest())).toMatchObject({ status: 200 })
  })

  test('of a task whose worker is long in coming ends it without waiting for that', async () => {
    const provisioning = Promise.withResolvers<void>()
    await using scene = await startScene({}, (ports) => ({
      ...ports,
      backend: {
        name: 'slow',
        provision: async (_, signal) => {
          provisioning.resolve()
          return new Promise((_, reject) =>
            signal.addEventListener('abort', () => reject(signal.reason)),
          )
        },
        find: (name) => ports.backend.find(name),
        list: () => ports.backend.list(),
        check: () => ports.backend.check(),
        close: () => ports.backend.close(),
      },
    }))
    const taskId = await scene.submit('echo.sh')
    await provisioning.promise
    expect(await scene.statusOf(taskId)).toBe('provisioning')
    expect((await scene.app.post(`/tasks/${taskId}/cancel`)).status).toBe(200)
    await expectCancelled(scene, taskId)
    await expectNothingLeft(scene)
  })

  test('of a running task ends its processes, keeps its log, and its worker goes', async () => {
    await using scene = await startScene()
    const taskId = await scene.running('bad-waits.sh', '.')
    await expect.poll(() => scene.app.text(`/tasks/${taskId}/logs`), PATIENTLY).toBe('waiting\n')
    expect((await scene.app.post(`/tasks/${taskId}/cancel`)).status).toBe(200)
    await expectCancelled(scene, taskId)
    // Its shell may add that it was terminated.
    expect((await scene.receiver.callbackOf(taskId)).body.logs).toMatch(
      /^waiting\n(.*\n)?\[task-runner\] Cancelled on request\n$/,
    )
    await expectNothingLeft(scene)
  })

  test('of a final task changes nothing, and tells what it is', async () => {
    await using scene = await startScene()
    const taskId = await scene.submit('echo.sh')
    const before = await scene.app.finished(taskId)
    expect(await scene.app.post(`/tasks/${taskId}/cancel`)).toMatchObject({
      status: 200,
      body: { success: true, status: 'succeeded' },
    })
    const after = (await scene.app.get(`/tasks/${taskId}`)).body
    expect(after).toEqual({ ...before, callback_status: after.callback_status })
    expect(idsOf(scene, taskId).size).toBe(1)
  })

  test('of a task that nobody knows is a 404', async () => {
    await using scene = await startScene()
    expect(await scene.app.post('/tasks/nobody/cancel')).toMatchObject({
      status: 404,
      body: { success: false },
    })
  })

  test('asked for many times at once has one outcome and one callback', async () => {
    await using scene = await startScene({ MAX_CONCURRENT_TASKS: '1' })
    const running = await scene.running('r-deaf.sh', 'started')
    const queued = await scene.submit('echo.sh')
    const answers = await Promise.all(
      [queued, running, queued, running].map((id) => scene.app.post(`/tasks/${id}/cancel`)),
    )
    expect(answers.map(({ status }) => status)).toEqual([200, 200, 200, 200])
    for (const taskId of [queued, running]) await expectCancelled(scene, taskId)
    await expectNothingLeft(scene)
  })

  test('of a task that ignores TERM is bounded by the grace period', async () => {
    await using scene = await startScene({ TERMINATION_GRACE_SECONDS: '1' })
    const taskId = await scene.running('r-deaf.sh', 'started')
    const startedAt = performance.now()
    await scene.app.post(`/tasks/${taskId}/cancel`)
    await expectCancelled(scene, taskId)
    const tookMs = performance.now() - startedAt
    expect(tookMs, 'it was given its time').toBeGreaterThan(950)
    expect(tookMs).toBeLessThan(6_000)
    await expectNothingLeft(scene)
  })

  test('ends children as well that started sessions of their own', async () => {
    await using scene = await startScene()
    const taskId = await scene.running('r-sessions.sh', 'started')
    expect(processesOf(scene.app.dataDir).length).toBeGreaterThanOrEqual(4)
    await scene.app.post(`/tasks/${taskId}/cancel`)
    await expectCancelled(scene, taskId)
    await expectNothingLeft(scene)
  })

  test('ends nothing of a task of the same id that another service of this machine runs', async () => {
    await using scene = await startScene()
    await using other = await startScene()
    const taskId = await scene.running('r-deaf.sh', 'started')
    const request = taskRequest({
      task_id: taskId,
      task_file_name: 'r-deaf.sh',
      worker_config: { env_variables: { GATE: other.gate } },
    })
    expect((await other.app.submit(request)).status).toBe(200)
    await expect.poll(() => existsSync(join(other.gate, 'started')), PATIENTLY).toBe(true)
    await scene.app.post(`/tasks/${taskId}/cancel`)
    await expectCancelled(scene, taskId)
    expect(await other.statusOf(taskId)).toBe('running')
    await rm(other.gate, { recursive: true })
    expect(await other.app.finished(taskId)).toMatchObject({ status: 'succeeded', exit_code: 0 })
  })
})

describe('a race', () => {
  test('between cancel and exit has exactly one outcome, and one callback that agrees with it', async () => {
    await using scene = await startScene({ MAX_CONCURRENT_TASKS: '4' })
    const random = mulberry32(20_260_101)
    // When each is cancelled: at once, while it runs, when it says its last word, or after its end.
    const moments = [/./, /^(?!queued|provisioning)/, /rested/, /^(?!queued|provisioning|running)/]
    const tasks = Array.from({ length: 60 }, async (_, index) => {
      const taskId = await scene.submit('r-nap.sh', { env: { NAP: (random() * 0.1).toFixed(3) } })
      const moment = moments[index % moments.length] ?? /./
      const options = { timeout: 30_000, interval: 1 + Math.floor(random() * 10) }
      await expect
        .poll(async () => {
          const log = await scene.app.text(`/tasks/${taskId}/logs`)
          return `${await scene.statusOf(taskId)} ${log}`
        }, options)
        .toMatch(moment)
      expect((await scene.app.post(`/tasks/${taskId}/cancel`)).status).toBe(200)
      return taskId
    })
    const statuses = new Map<string, unknown>()
    for (const taskId of await Promise.all(tasks)) {
      const task = await scene.app.finished(taskId)
      expect([task.status, task.reason, task.exit_code]).toBeOneOf([
        ['cancelled', 'cancelled', null],
        ['succeeded', 'completed', 0],
      ])
      statuses.set(taskId, task.status)
    }
    for (const [taskId, status] of statuses) {
      const { body } = await scene.receiver.callbackOf(taskId)
      expect(body.success).toBe(status === 'succeeded')
      await expect
        .poll(async () => (await scene.app.get(`/tasks/${taskId}`)).body, PATIENTLY)
        .toMatchObject({ status, callback_status: 'delivered' })
    }
    for (const taskId of statuses.keys()) expect(idsOf(scene, taskId).size).toBe(1)
    const bodies = scene.receiver.received.map(({ body }) => `${body.task_id} ${body.success}`)
    expect(new Set(bodies).size, 'no two callbacks contradict each other').toBe(statuses.size)
    expect(new Set(statuses.values()), 'both outcomes occurred').toEqual(
      new Set(['cancelled', 'succeeded']),
    )
    await expectNothingLeft(scene)
  }, 90_000)

  test('between cancel and time limit has exactly one outcome, and one callback that agrees with it', async () => {
    await using scene = await startScene({
      MAX_CONCURRENT_TASKS: '8',
      TERMINATION_GRACE_SECONDS: '0.2',
    })
    const tasks = Array.from({ length: 8 }, async (_, index) => {
      const taskId = await scene.submit('r-deaf.sh', { timeout_seconds: 1 })
      await expect.poll(() => scene.statusOf(taskId), PATIENTLY).toBe('running')
      const { started_at } = (await scene.app.get(`/tasks/${taskId}`)).body
      // Some 80 ms before the limit to some 80 ms after it.
      const at = Date.parse(String(started_at)) + 1_000 + (index - 4) * 20
      await expect.poll(() => Date.now(), { timeout: 10_000, interval: 1 }).toBeGreaterThan(at)
      expect((await scene.app.post(`/tasks/${taskId}/cancel`)).status).toBe(200)
      return taskId
    })
    for (const taskId of await Promise.all(tasks)) {
      const task = await scene.app.finished(taskId)
      expect([task.status, task.reason]).toBeOneOf([
        ['cancelled', 'cancelled'],
        ['failed', 'timed_out'],
      ])
      expect((await scene.receiver.callbackOf(taskId)).body.success).toBe(false)
      expect(idsOf(scene, taskId).size).toBe(1)
    }
    await expectNothingLeft(scene)
  }, 60_000)
})
