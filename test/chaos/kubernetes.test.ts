import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { cp, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { describe, expect, test } from 'vitest'
import { UnavailableError } from '../../src/core/errors.ts'
import { workerNameFor } from '../../src/core/task.ts'
import { KubernetesBackend } from '../../src/workers/kubernetes/kubernetes-backend.ts'
import { presets } from '../fakes/kubernetes/presets.ts'
import {
  type FakeKubernetes,
  type FakeKubernetesOptions,
  startFakeKubernetes,
} from '../fakes/kubernetes/server.ts'
import { FIXTURE_TASKS } from '../helpers/app.ts'
import { kubernetesSettings } from '../helpers/kubernetes.ts'
import {
  eventually,
  exitAfter,
  finalTask,
  get,
  logOf,
  post,
  type Stage,
  startStage,
} from '../helpers/recovery.ts'
import type { Service } from '../helpers/service.ts'
import { NEVER, spec } from '../workers/contract.ts'

const SLOW_MS = 60_000
const KILLED_AMID = 20
const WHOLE_LOG = 'before\nduring\nafter\n'
const POST_JOB = {
  ...{ method: 'POST', path: /\/jobs$/ },
  // A check tries it, and makes none.
  query: (query: URLSearchParams) => !query.has('dryRun'),
}
const POST_SECRET = { method: 'POST', path: /\/secrets$/ }

interface Cluster extends AsyncDisposable {
  stage: Stage
  fake: FakeKubernetes
  start(env?: Record<string, string>): Promise<Service>
}

/** A cluster that runs pods as processes, and a data folder for services that use it. */
async function startCluster(
  options: FakeKubernetesOptions = {},
  env: Record<string, string> = {},
): Promise<Cluster> {
  const fake = await startFakeKubernetes({
    ...{ tls: true, runProcesses: true, namespace: 'workers' },
    ...options,
  })
  const stage = await startStage({
    env: { WORKER_BACKEND: 'kubernetes', KUBECONFIG: fake.kubeconfig.path, ...env },
  })
  return {
    stage,
    fake,
    start: (more) => stage.start(more),
    async [Symbol.asyncDispose]() {
      await stage[Symbol.asyncDispose]()
      await fake[Symbol.asyncDispose]()
    },
  }
}

const isRunning = (service: Service, taskId: string) =>
  eventually(async () =>
    expect((await get(service, `/tasks/${taskId}`)).body.status).toBe('running'),
  )

/** Nothing of a task is left in the cluster. */
const expectNothingLeft = (fake: FakeKubernetes) =>
  eventually(() => {
    for (const kind of ['jobs', 'pods', 'secrets'] as const) {
      expect(fake.objects(kind), kind).toEqual([])
    }
  })

/** The task ended as it should, was told so, with its whole log, and nothing is left of it. */
async function expectSuccess({ stage, fake }: Cluster, service: Service, taskId: string) {
  expect(await finalTask(service, taskId)).toMatchObject({ status: 'succeeded', exit_code: 0 })
  expect(await logOf(service, taskId)).toBe(WHOLE_LOG)
  const callback = await stage.callbackOf(taskId)
  expect(callback.body).toMatchObject({ success: true, logs: WHOLE_LOG })
  const ids = stage.receiver.received
    .filter(({ body }) => body.task_id === taskId)
    .map(({ headers }) => headers['webhook-id'])
  expect(new Set(ids).size).toBe(1)
  await expectNothingLeft(fake)
}

const jobsMade = (fake: FakeKubernetes) =>
  fake.requests.filter(({ method, path, query, status }) => {
    const isMade = status === 201 || status === undefined
    return method === 'POST' && path.endsWith('/jobs') && !query.dryRun && isMade
  }).length

describe.concurrent('one run, whatever happens between us and the cluster', () => {
  test(
    'an answer that is lost on the way: what was made is found, and made once',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const jobs = fake.faults.inject({ ...POST_JOB, drop: 'answer', times: 1 })
      const secrets = fake.faults.inject({ ...POST_SECRET, reset: 'answer', times: 1 })
      const service = await cluster.start()
      await stage.submit(service, 'lost', 'r-story.sh')
      await isRunning(service, 'lost')
      expect([jobs.hits, secrets.hits]).toEqual([1, 1])
      expect(fake.objects('jobs')).toHaveLength(1)
      expect(fake.objects('pods')).toHaveLength(1)
      await stage.open('lost', 'before', 'during', 'after')
      await expectSuccess(cluster, service, 'lost')
      expect(jobsMade(fake)).toBe(1)
    },
    SLOW_MS,
  )

  test.each([
    ['before the Job is asked for', { ...POST_JOB, blackhole: true }],
    ['between the Job and its Secret', { ...POST_SECRET, blackhole: true }],
    ['with the answer on its way', { ...POST_JOB, answerAfterMs: 600_000 }],
  ])(
    'killed %s',
    async (_, fault) => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const injected = fake.faults.inject({ ...fault, times: 1 })
      const first = await cluster.start()
      await stage.submit(first, 'killed', 'r-story.sh')
      await eventually(() => expect(injected.hits).toBe(1))
      await exitAfter(first, 'SIGKILL')
      const second = await cluster.start()
      await stage.open('killed', 'before', 'during', 'after')
      await expectSuccess(cluster, second, 'killed')
      expect(fake.requests.filter(({ status }) => status === 422)).toEqual([])
    },
    SLOW_MS,
  )

  test(
    'killed between Job and Secret, and cancelled before the next start: nothing is left',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const injected = fake.faults.inject({ ...POST_SECRET, blackhole: true, times: 1 })
      const first = await cluster.start()
      await stage.submit(first, 'cancelled', 'r-story.sh')
      await eventually(() => expect(injected.hits).toBe(1))
      await exitAfter(first, 'SIGKILL')
      stage.database((db) => db.prepare('update tasks set cancel_requested_at = ?').run(Date.now()))
      const second = await cluster.start()
      expect(await finalTask(second, 'cancelled')).toMatchObject({ status: 'cancelled' })
      await expectNothingLeft(fake)
    },
    SLOW_MS,
  )

  test(
    'killed while it follows: the log goes on with no line lost or doubled',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const first = await cluster.start()
      await stage.submit(first, 'followed', 'r-story.sh')
      await stage.open('followed', 'before')
      await stage.made('followed', 'said-before')
      await isRunning(first, 'followed')
      await eventually(() => expect(fake.logs.streams.size).toBe(1))
      await exitAfter(first, 'SIGKILL')
      await stage.open('followed', 'during')
      await stage.made('followed', 'said-during')
      const second = await cluster.start()
      await stage.open('followed', 'after')
      await expectSuccess(cluster, second, 'followed')
      expect(jobsMade(fake)).toBe(1)
    },
    SLOW_MS,
  )

  test(
    'an API server that is down while the script ends decides nothing',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const service = await cluster.start()
      await stage.submit(service, 'down', 'r-story.sh')
      await stage.open('down', 'before')
      await stage.made('down', 'said-before')
      await isRunning(service, 'down')
      await fake.down()
      await stage.open('down', 'during', 'after')
      await stage.made('down', 'said-after')
      await eventually(() =>
        expect(
          service.log.filter((line) => line.includes('watching was interrupted')).length,
        ).toBeGreaterThan(1),
      )
      expect((await get(service, '/tasks/down')).body.status).toBe('running')
      expect((await get(service, '/health/live')).status).toBe(200)
      await fake.up()
      await expectSuccess(cluster, service, 'down')
    },
    SLOW_MS,
  )

  test(
    'a storm of 429 is waited out as it asks for, without a rush of calls',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const service = await cluster.start()
      const status = { code: 429, retryAfterSeconds: 1 }
      const storm = fake.faults.inject({ method: 'POST', path: /workers\//, status, times: 4 })
      const tasks = ['storm-1', 'storm-2']
      for (const taskId of tasks) {
        await stage.submit(service, taskId, 'r-story.sh')
        await stage.open(taskId, 'before', 'during', 'after')
      }
      for (const taskId of tasks) await expectSuccess(cluster, service, taskId)
      expect(storm.hits).toBe(4)
      const refused = fake.requests.filter((request) => request.status === 429)
      for (const { path, at } of refused) {
        const again = fake.requests.filter((request) => request.path === path && request.at > at)
        expect(
          again.filter((request) => request.at < at + 900 && request.method === 'POST').length,
        ).toBeLessThanOrEqual(tasks.length)
      }
    },
    SLOW_MS,
  )
})

test(
  `${KILLED_AMID} tasks end as they did, call back and leave nothing, though the service is killed amid them`,
  async () => {
    await using cluster = await startCluster({}, { MAX_CONCURRENT_TASKS: '6' })
    const { stage, fake } = cluster
    const { receiver } = stage
    let service = await cluster.start()
    const ids = Array.from({ length: KILLED_AMID }, (_, index) => `amid-${index}`)
    const codeOf = (index: number) => [0, 0, 1, 42, 255][index % 5] as number
    for (const [index, taskId] of ids.entries()) {
      const SCRIPT = `echo "ran $TASK_ID"; exit ${codeOf(index)}`
      await stage.submit(service, taskId, 'w-eval.sh', { env: { SCRIPT } })
    }
    for (const share of [0.2, 0.5]) {
      await eventually(() => expect(receiver.received.length).toBeGreaterThan(KILLED_AMID * share))
      await exitAfter(service, 'SIGKILL')
      service = await cluster.start()
    }
    for (const [index, taskId] of ids.entries()) {
      expect(await finalTask(service, taskId)).toMatchObject({ exit_code: codeOf(index) })
      expect(await logOf(service, taskId)).toBe(`ran ${taskId}\n`)
      const { body } = await stage.callbackOf(taskId)
      expect(body.success).toBe(codeOf(index) === 0)
    }
    const webhooks = new Set(receiver.received.map(({ headers }) => headers['webhook-id']))
    expect(webhooks.size).toBe(KILLED_AMID)
    expect(jobsMade(fake)).toBe(KILLED_AMID)
    await expectNothingLeft(fake)
  },
  SLOW_MS,
)

describe.concurrent('ending', () => {
  test(
    'a task that waits for its pod, asked for twice, with the API server down',
    async () => {
      await using cluster = await startCluster({ behave: () => presets.pending() })
      const { stage, fake } = cluster
      const service = await cluster.start()
      await stage.submit(service, 'pending', 'r-story.sh')
      await eventually(() => expect(fake.objects('pods')).toHaveLength(1))
      await fake.down()
      for (const _ of ['once', 'twice']) {
        expect((await post(service, '/tasks/pending/cancel')).status).toBe(200)
      }
      await eventually(() =>
        expect(service.log.some((line) => /(finding|terminating) a worker failed/.test(line))).toBe(
          true,
        ),
      )
      expect(await finalTask(service, 'pending')).toMatchObject({ status: 'cancelled' })
      await fake.up()
      await expectNothingLeft(fake)
    },
    SLOW_MS,
  )

  test(
    'a task that runs over its time while the API server is down has timed out',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const service = await cluster.start()
      await stage.submit(service, 'late', 'r-story.sh', { timeout_seconds: 2 })
      await stage.open('late', 'before')
      await isRunning(service, 'late')
      await stage.made('late', 'said-before')
      await eventually(async () => expect(await logOf(service, 'late')).toMatch(/^before\n/))
      await fake.down()
      await eventually(() => {
        const isWaiting = service.log.some((line) =>
          line.includes('waiting for the Kubernetes API'),
        )
        expect(isWaiting).toBe(true)
      })
      await fake.up()
      expect(await finalTask(service, 'late')).toMatchObject({
        ...{ status: 'failed', reason: 'timed_out' },
      })
      // A shell may have more to say when it is ended.
      expect(await logOf(service, 'late')).toMatch(/^before\n/)
      await expectNothingLeft(fake)
    },
    SLOW_MS,
  )

  test(
    'a worker that is kept is listed and can be read after a restart, until it is removed',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const first = await cluster.start()
      const name = workerNameFor('kept')
      await stage.open('kept', 'before', 'during', 'after')
      await stage.submit(first, 'kept', 'r-story.sh', { terminate_on_completion: false })
      expect(await finalTask(first, 'kept')).toMatchObject({ status: 'succeeded' })
      await stage.callbackOf('kept')
      await exitAfter(first, 'SIGKILL')
      const second = await cluster.start()
      expect((await get(second, '/workers')).body.workers).toMatchObject([
        { name, task_id: 'kept', status: 'Completed' },
      ])
      expect(fake.object('jobs', name)?.spec.ttlSecondsAfterFinished).toBe(86_400)
      expect(fake.objects('pods')).toHaveLength(1)
      const read = await fetch(`${second.url}/workers/${name}/logs`)
      expect(await read.text()).toBe(WHOLE_LOG)
      for (const expected of [200, 404]) {
        const removed = await fetch(`${second.url}/workers/${name}`, { method: 'DELETE' })
        expect(removed.status).toBe(expected)
      }
      await expectNothingLeft(fake)
    },
    SLOW_MS,
  )
})

describe.concurrent('what we may do', () => {
  test(
    'a token that was replaced is read anew',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      const service = await cluster.start()
      await stage.submit(service, 'rotated', 'r-story.sh')
      await isRunning(service, 'rotated')
      const before = readFileSync(fake.kubeconfig.path, 'utf8')
      await writeFile(fake.kubeconfig.path, before.replace(fake.token, 'another-token'))
      fake.token = 'another-token'
      for (const watch of fake.watches.open) watch.cut()
      await stage.open('rotated', 'before', 'during', 'after')
      await expectSuccess(cluster, service, 'rotated')
      expect(fake.requests.filter(({ status }) => status === 401).length).toBeLessThan(5)
    },
    SLOW_MS,
  )

  test(
    'a right that is missing is named, and a task has its whole log once it is granted',
    async () => {
      await using cluster = await startCluster()
      const { stage, fake } = cluster
      fake.denied.add('get pods/log')
      const service = await cluster.start()
      const ready = await get(service, '/health/ready')
      expect(ready.status).toBe(503)
      expect(JSON.stringify(ready.body)).toContain('get pods/log')
      await stage.submit(service, 'unread', 'r-story.sh')
      await stage.open('unread', 'before', 'during', 'after')
      fake.denied.clear()
      await expectSuccess(cluster, service, 'unread')
      await eventually(async () => expect((await get(service, '/health/ready')).status).toBe(200))
    },
    SLOW_MS,
  )

  test.each([
    ['never answers', { blackhole: true }],
    ['answers with a page of a proxy', { html: '<h1>Bad Gateway</h1>' }],
  ])(
    'the service ends on SIGTERM with an API that %s',
    async (_, fault) => {
      await using cluster = await startCluster()
      const { fake } = cluster
      fake.faults.inject(fault)
      const service = await cluster.start()
      expect((await get(service, '/health/ready')).status).toBe(503)
      const began = performance.now()
      await exitAfter(service, 'SIGTERM')
      expect(performance.now() - began).toBeLessThan(15_000)
    },
    SLOW_MS,
  )

  test(
    'task files that no ConfigMap takes are told when a task is submitted',
    async () => {
      const tasks = await mkdtemp(join(tmpdir(), 'kubernetes-tasks-'))
      try {
        await cp(FIXTURE_TASKS, tasks, { recursive: true, verbatimSymlinks: true })
        await writeFile(join(tasks, 'large.bin'), randomBytes(2 ** 20))
        await using cluster = await startCluster({}, { TASKS_DIR: tasks })
        const service = await cluster.start()
        const request = cluster.stage.request('large', 'r-story.sh')
        const { status, body } = await post(service, '/task-runner', request)
        expect(status).toBe(422)
        expect(JSON.stringify(body)).toMatch(
          /has 10\d{5} bytes when compressed.* has at most 921600/,
        )
        expect(cluster.fake.objects('jobs')).toEqual([])
      } finally {
        await rm(tasks, { recursive: true })
      }
    },
    SLOW_MS,
  )
})

const TASKS = 1_000
const AFTERWARDS = 300
/** Job and Secret made, log followed and read to its end, Job removed; and a few for all. */
const CALLS_PER_TASK_MAX = 5.5
const MEMORY_PER_TASK_KB_MAX = 20

test(
  `${TASKS} tasks at once share two watches and need few calls`,
  async () => {
    const log = 'a line\n'.repeat(20)
    await using fake = await startFakeKubernetes({
      ...{ tls: false, namespace: 'workers', historySize: 500 },
      behave: () => presets.exits(0, { log, message: 'task 0\n', afterMs: 500 }),
    })
    const perSecond = 800
    const settings = kubernetesSettings(fake.kubeconfig.path, {
      ...{ callsPerSecond: perSecond, callsAtOnce: 100 },
      provisioningTimeoutMs: SLOW_MS,
      // Waiting for one's turn takes its time, too. A call that is given up on a busy machine may
      // still take effect: a Job that comes after its worker was removed is left to the reaper.
      waits: { callMs: 2 * SLOW_MS, lastLogMs: SLOW_MS, rideMs: SLOW_MS },
    })
    const backend = new KubernetesBackend(settings)
    await backend.check()
    const asked = fake.requests.length
    const runOne = async () => {
      const wanted = spec('true')
      const worker = await again(() => backend.provision(wanted, NEVER))
      const end = await worker.completion(NEVER)
      const { content } = await again(() => worker.logs({ maxBytes: 1_000_000 }))
      await again(() => worker.terminate())
      return { end, isWhole: content.toString() === log }
    }
    await runOne()
    let watchesMax = 0
    const watching = setInterval(() => {
      watchesMax = Math.max(watchesMax, fake.watches.open.size)
    }, 10)
    const began = performance.now()
    const ends = await Promise.all(Array.from({ length: TASKS }, runOne))
    const seconds = (performance.now() - began) / 1000
    clearInterval(watching)
    expect(ends.map(({ end }) => end).filter(({ reason }) => reason !== 'completed')).toEqual([])
    expect(ends.filter(({ isWhole }) => !isWhole)).toEqual([])
    expect(watchesMax).toBe(2)
    const calls = fake.requests.length - asked
    console.log(`${(calls / TASKS).toFixed(2)} calls per task, ${seconds.toFixed(1)} s`)
    expect(calls / TASKS).toBeLessThan(CALLS_PER_TASK_MAX)
    expect(calls / seconds, 'calls a second').toBeLessThan(perSecond + 100 / seconds + 5)
    for (const kind of ['jobs', 'pods', 'secrets'] as const) expect(fake.objects(kind)).toEqual([])

    // What the first thousand took for good is there by now.
    const heapBefore = heapUsed(fake)
    await Promise.all(Array.from({ length: AFTERWARDS }, runOne))
    const growthKb = (heapUsed(fake) - heapBefore) / 1024
    expect(growthKb / AFTERWARDS, 'KB that stay of a task').toBeLessThan(MEMORY_PER_TASK_KB_MAX)
    await backend.close()
  },
  2 * SLOW_MS,
)

/** As the core does it: on a busy machine the fake may be late. */
async function again<T>(step: () => Promise<T>): Promise<T> {
  for (;;) {
    try {
      return await step()
    } catch (err) {
      if (!(err instanceof UnavailableError)) throw err
      await setImmediate()
    }
  }
}

/** Without what the fake remembers, and what nobody can reach. */
function heapUsed(fake: FakeKubernetes): number {
  fake.requests.length = 0
  for (const { metadata } of fake.objects('events')) fake.delete('events', metadata.name)
  setFlagsFromString('--expose-gc')
  runInNewContext('gc')()
  return process.memoryUsage().heapUsed
}
