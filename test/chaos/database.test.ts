import { randomBytes } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { workerNameFor } from '../../src/core/task.ts'
import { presets } from '../fakes/kubernetes/presets.ts'
import {
  attemptsFor,
  expectCounted,
  runnerOf,
  startInstances,
  startKubernetesInstances,
  takenFrom,
  taskOf,
} from '../helpers/instances.ts'
import { podOf } from '../helpers/kubernetes.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import {
  type Answer,
  eventually,
  exitAfter,
  expectNoWorkers,
  finalTask,
  get,
  post,
} from '../helpers/recovery.ts'
import { type Service, startService } from '../helpers/service.ts'
import { startTcpProxy, type TcpProxy } from '../helpers/tcp-proxy.ts'

const TIMEOUT_MS = 90_000
const DAY_MS = 86_400_000
const PASSWORD = 'not-a-secret'
const KEY = randomBytes(32).toString('base64')

let postgres: Postgres

beforeAll(async () => {
  postgres = await startPostgres()
}, 60_000)
afterAll(() => postgres[Symbol.asyncDispose]())

/** The database by way of the proxy. */
const by = (proxy: TcpProxy, url: string) => url.replace(`:${postgres.port}/`, `:${proxy.port}/`)

/** Said of every request while the database is away, and nothing else. */
function expectUnavailable({ status, headers, body }: Answer): void {
  expect(status).toBe(503)
  expect(Number(headers.get('retry-after'))).toBeGreaterThan(0)
  expect(body).toEqual({
    success: false,
    code: expect.stringMatching(/^[a-z_]+$/),
    message: expect.stringMatching(/^[A-Z][^\n]+$/),
  })
}

describe('a service that cannot have its database', () => {
  const port = () => postgres.port

  test.each([
    [
      'a wrong password',
      async (url: string) => url.replace(PASSWORD, 'hunter2-hunter2'),
      /password authentication failed/,
    ],
    [
      'a server that is not there',
      async (url: string) => url.replace(`:${port()}/`, ':1/').replace(PASSWORD, 'hunter2-hunter2'),
      /ECONNREFUSED/,
    ],
    [
      'a database that is not there',
      async (url: string) => `${url}_missing`,
      /database ".*" does not exist/,
    ],
  ])('says so in one sentence, without the password, and ends: %s', async (_, change, why) => {
    const url = await change(await postgres.database())
    const { said, exitCode } = await startOf({ DATABASE_URL: url })
    expect(exitCode).toBe(1)
    expect(said).toHaveLength(1)
    expect(said[0]).toMatch(/^The service cannot start: /)
    expect(said[0]).toMatch(why)
    expect(said.join()).not.toMatch(/hunter2|not-a-secret/)
  })

  test('does not wait for ever for a server that takes connections and never answers', async () => {
    await using proxy = await startTcpProxy(postgres.port)
    await proxy.set('stalled')
    const startedAt = performance.now()
    const { said, exitCode } = await startOf({
      DATABASE_URL: by(proxy, await postgres.database()),
    })
    expect([exitCode, said]).toEqual([1, [expect.stringMatching(/cannot start: .*time/i)]])
    expect(performance.now() - startedAt).toBeLessThan(15_000)
  })

  test('does not start on tasks that were sealed with another key, nor touch them', async () => {
    const url = await postgres.database()
    await using instances = await startInstances(postgres, { env: { DATABASE_URL: url } })
    const first = await instances.start('a')
    await instances.stage.submit(first, 'sealed', 'r-story.sh')
    expect(await exitAfter(first, 'SIGTERM')).toBe(0)
    const { said, exitCode } = await startOf({ DATABASE_URL: url })
    expect(exitCode).toBe(1)
    expect(said).toEqual([expect.stringMatching(/another SEALING_KEY/)])
    await instances.stage.open('sealed', 'before', 'during', 'after')
    const again = await instances.start('a')
    expect(await finalTask(again, 'sealed')).toMatchObject({ status: 'succeeded' })
  })

  /** Of a service that does not come up: what it said, and how it ended. */
  async function startOf(env: Record<string, string>) {
    const dataDir = await mkdtemp(join(tmpdir(), 'task-runner-database-'))
    const service = await startService({ DATA_DIR: dataDir, SEALING_KEY: KEY, ...env })
    const exitCode = await service.ended
    await rm(dataDir, { recursive: true })
    return { said: service.log, exitCode }
  }
})

test(
  'a restart of the database amid a load: what was accepted runs once, all else is told to come again',
  async () => {
    await using server = await startPostgres()
    await using instances = await startInstances(server, {
      // An attempt that could not be recorded is made again when its lease is over: two of these, and ten seconds.
      env: { MAX_CONCURRENT_TASKS: '4', CALLBACK_TIMEOUT_SECONDS: '1' },
    })
    const { stage } = instances
    const services = await Promise.all([instances.start('a'), instances.start('b')])
    const accepted: string[] = []
    const refused: Answer[] = []
    let slowestMs = 0
    let isOver = false
    const client = async (service: Service, name: string) => {
      for (let count = 0; !isOver; count += 1) {
        const taskId = `${name}-${count}`
        await stage.open(taskId, 'open')
        // As a careful client does: again, until it is taken.
        for (let isTaken = false; !isTaken && !isOver; ) {
          const startedAt = performance.now()
          const answer = await post(service, '/task-runner', stage.request(taskId, 'r-count.sh'))
          slowestMs = Math.max(slowestMs, performance.now() - startedAt)
          isTaken = answer.status === 200
          if (isTaken) accepted.push(taskId)
          else refused.push(answer)
        }
      }
    }
    const clients = services.flatMap((service, at) =>
      ['x', 'y'].map((name) => client(service, `restart-${at}-${name}`)),
    )
    await eventually(() => expect(accepted.length).toBeGreaterThan(10))
    await server.stop()
    await eventually(() => expect(refused.length).toBeGreaterThan(10))
    for (const service of services) {
      const { status, body } = await get(service, '/health/ready')
      expect([status, body.message]).toEqual([503, 'not ready: store'])
      expect((await get(service, '/health/live')).status).toBe(200)
      expectUnavailable(await get(service, '/tasks'))
    }
    await server.start()
    const before = accepted.length
    await eventually(() => expect(accepted.length).toBeGreaterThan(before + 10))
    isOver = true
    await Promise.all(clients)

    for (const answer of refused) expectUnavailable(answer)
    expect(slowestMs).toBeLessThan(15_000)
    const [one, other] = services as [Service, Service]
    for (const taskId of accepted) {
      await eventually(async () =>
        expect(await taskOf(one, taskId)).toMatchObject({
          ...{ status: 'succeeded', callback_status: 'delivered' },
        }),
      )
    }
    const ran = await Promise.all(
      accepted.map((taskId) => readFile(join(stage.gateOf(taskId), 'runs'), 'utf8')),
    )
    expect(new Set(ran)).toEqual(new Set(['once\n']))
    for (const [service, host] of [
      [one, 'a'],
      [other, 'b'],
    ] as const) {
      await expectNoWorkers(service, instances.dataDirOf(host))
      expect((await get(service, '/health/ready')).status).toBe(200)
      expectSparing(service)
    }
  },
  TIMEOUT_MS,
)

describe('a network between a service and its database that fails', () => {
  test(
    'refuses for a while: what ended meanwhile keeps its outcome, and is told afterwards',
    async () => {
      await using proxy = await startTcpProxy(postgres.port)
      const url = await postgres.database()
      await using instances = await startInstances(postgres, {
        env: { DATABASE_URL: by(proxy, url), CALLBACK_TIMEOUT_SECONDS: '1' },
      })
      const { stage } = instances
      const service = await instances.start('a')
      const codes = { seven: 7, zero: 0, stays: 0 }
      for (const [taskId, code] of Object.entries(codes)) {
        await stage.open(taskId, 'before')
        await stage.submit(service, taskId, 'r-story.sh', { env: { CODE: String(code) } })
        await stage.made(taskId, 'said-before')
        await eventually(async () => expect((await taskOf(service, taskId)).status).toBe('running'))
      }
      await proxy.set('refused')
      for (const taskId of ['seven', 'zero']) await stage.open(taskId, 'during', 'after')
      for (const taskId of ['seven', 'zero']) await stage.made(taskId, 'said-after')
      await eventually(() =>
        expect(service.log.join('\n')).toContain('committing an outcome failed, trying again'),
      )
      const { status, body } = await get(service, '/health/ready')
      expect([status, body.message]).toEqual([503, 'not ready: store'])
      expectUnavailable(await post(service, '/task-runner', stage.request('not', 'r-story.sh')))
      expectUnavailable(await post(service, '/tasks/stays/cancel'))
      expect(stage.receiver.received).toEqual([])
      await proxy.set('open')

      for (const taskId of ['seven', 'zero'] as const) {
        expect(await finalTask(service, taskId)).toMatchObject({
          ...{ reason: codes[taskId] === 0 ? 'completed' : 'exit_code', exit_code: codes[taskId] },
        })
        const { body } = await stage.callbackOf(taskId)
        expect(body).toMatchObject({
          ...{ success: codes[taskId] === 0, logs: 'before\nduring\nafter\n' },
        })
      }
      expect(await taskOf(service, 'stays')).toMatchObject({ status: 'running' })
      await stage.open('stays', 'during', 'after')
      expect(await finalTask(service, 'stays')).toMatchObject({ status: 'succeeded' })
      expect((await get(service, '/tasks/not')).status).toBe(404)
      await expectNoWorkers(service, instances.dataDirOf('a'))
      expectSparing(service)
    },
    TIMEOUT_MS,
  )

  test(
    'loses the answer of a commit: what it stored is found, so is a repetition, and it runs once',
    async () => {
      await using proxy = await startTcpProxy(postgres.port)
      const url = by(proxy, await postgres.database())
      await using instances = await startInstances(postgres, { env: { DATABASE_URL: url } })
      const { stage } = instances
      const service = await instances.start('a')
      await stage.open('once', 'open')
      const request = stage.request('once', 'r-count.sh')
      const answer = proxy.lose('answer', 'insert into "tasks"')
      const known = { status: 200, body: { message: expect.stringMatching(/^Already accepted/) } }
      // Looked up when its storing could not be told.
      expect(await post(service, '/task-runner', request)).toMatchObject(known)
      expect(answer.hits).toBe(1)
      expect(await post(service, '/task-runner', request)).toMatchObject(known)
      expect(await finalTask(service, 'once')).toMatchObject({ status: 'succeeded' })
      expect(await readFile(join(stage.gateOf('once'), 'runs'), 'utf8')).toBe('once\n')
    },
    TIMEOUT_MS,
  )

  test.each(['refused', 'stalled'] as const)(
    'is away (%s) when the service is told to stop: it ends all the same, and goes on at the next start',
    async (mode) => {
      await using proxy = await startTcpProxy(postgres.port)
      const url = by(proxy, await postgres.database())
      await using instances = await startInstances(postgres, { env: { DATABASE_URL: url } })
      const { stage } = instances
      const first = await instances.start('a')
      await stage.submit(first, 'goes-on', 'r-story.sh')
      await eventually(async () => expect((await taskOf(first, 'goes-on')).status).toBe('running'))
      await proxy.set(mode)
      // Within what a cluster gives a pod.
      expect(await exitAfter(first, 'SIGTERM', 30_000)).toBe(0)
      await proxy.set('open')
      const second = await instances.start('a')
      expect(await taskOf(second, 'goes-on')).toMatchObject({ status: 'running' })
      await stage.open('goes-on', 'before', 'during', 'after')
      expect(await finalTask(second, 'goes-on')).toMatchObject({ status: 'succeeded' })
    },
    TIMEOUT_MS,
  )

  test(
    'swallows everything for half a minute: nobody waits for long, and nothing is lost or doubled',
    async () => {
      await using proxy = await startTcpProxy(postgres.port)
      const url = by(proxy, await postgres.database())
      await using instances = await startInstances(postgres, {
        env: { DATABASE_URL: url, CALLBACK_TIMEOUT_SECONDS: '1', MAX_CONCURRENT_TASKS: '2' },
      })
      const { stage } = instances
      const services = await Promise.all(['a', 'b'].map((host) => instances.start(host)))
      const [one, other] = services as [Service, Service]
      const before = ['ends-1', 'ends-2', 'stays-1', 'stays-2']
      for (const taskId of before) await stage.submit(one, taskId, 'r-count.sh')
      for (const taskId of before) await stage.made(taskId, 'runs')
      await stage.open('waits', 'open')
      await stage.submit(one, 'waits', 'r-count.sh')
      await proxy.set('stalled')
      const stalledAt = performance.now()
      for (const taskId of ['ends-1', 'ends-2']) await stage.open(taskId, 'open')
      const refused: string[] = []
      while (performance.now() - stalledAt < 30_000) {
        const ids = services.map((_, at) => `refused-${refused.length + at}`)
        const askedAt = performance.now()
        const answers = await Promise.all(
          services.map((service, at) => {
            const request = stage.request(ids[at] ?? '', 'r-count.sh')
            return post(service, '/task-runner', request)
          }),
        )
        for (const answer of answers) expectUnavailable(answer)
        expect(performance.now() - askedAt).toBeLessThan(20_000)
        refused.push(...ids)
        for (const service of services) {
          expect((await get(service, '/health/live')).status).toBe(200)
        }
      }
      expect(stage.receiver.received).toEqual([])
      await proxy.set('open')

      for (const taskId of refused) {
        await stage.open(taskId, 'open')
        await eventually(async () => {
          const request = stage.request(taskId, 'r-count.sh')
          expect((await post(other, '/task-runner', request)).status).toBe(200)
        })
      }
      for (const taskId of ['stays-1', 'stays-2']) {
        expect(await taskOf(other, taskId)).toMatchObject({ status: 'running' })
        await stage.open(taskId, 'open')
      }
      for (const taskId of [...before, 'waits', ...refused]) {
        await expectCounted(other, stage, taskId)
        expect(attemptsFor(stage, taskId), taskId).toBe(1)
      }
      await expectNoWorkers(one, instances.dataDirOf('a'))
      await expectNoWorkers(other, instances.dataDirOf('b'))
      for (const service of services) {
        expect((await get(service, '/health/ready')).status).toBe(200)
        expectSparing(service)
      }
    },
    2 * TIMEOUT_MS,
  )

  test.each([
    ['accepted', 'insert into "tasks"'],
    ['claimed', 'with "next" as'],
    ['ended', 'insert into "task_logs"'],
  ])(
    'goes silent in the moment in which a task is %s: it runs once, and is told once',
    async (_, statement) => {
      await using proxy = await startTcpProxy(postgres.port)
      const url = by(proxy, await postgres.database())
      await using instances = await startInstances(postgres, { env: { DATABASE_URL: url } })
      const { stage } = instances
      const service = await instances.start('a')
      await stage.open('once', 'open')
      const loss = proxy.lose('silently', statement)
      // As a careful client does: again, until it is taken.
      await eventually(async () => {
        const answer = await post(service, '/task-runner', stage.request('once', 'r-count.sh'))
        if (answer.status !== 200) expectUnavailable(answer)
        expect(answer.status).toBe(200)
      }, 30_000)
      await eventually(() => finalTask(service, 'once'), 40_000)
      expect(loss.hits).toBe(1)
      await expectCounted(service, stage, 'once')
      expect(attemptsFor(stage, 'once')).toBe(1)
      await expectNoWorkers(service, instances.dataDirOf('a'))
    },
    TIMEOUT_MS,
  )

  test(
    'lets the connection die that hears of tasks: they start soon all the same, and it is made anew',
    async () => {
      await using proxy = await startTcpProxy(postgres.port)
      await using instances = await startInstances(postgres)
      const { stage, sql, databaseUrl } = instances
      const full = await instances.start('a', { MAX_CONCURRENT_TASKS: '1' })
      await stage.submit(full, 'fills', 'r-story.sh')
      const filled = await eventually(async () => {
        const task = await taskOf(full, 'fills')
        expect(task.status).toBe('running')
        return task
      })
      await instances.start('b', { DATABASE_URL: by(proxy, databaseUrl) })
      const listening = () =>
        sql(
          `select pid from pg_stat_activity where datname = current_database()
             and application_name like 'task-runner %' and application_name not like $1
             and query like '%listen%'`,
          [`%${filled.instance}`],
        )
      // Asked every ten seconds by who listens; the server goes on telling a connection that is none any more.
      const dead = proxy.lose('silently', 'pg_listening_channels')
      await eventually(() => expect(dead.hits).toBe(1))
      const before = (await listening()).map(({ pid }) => pid)
      expect(before).toHaveLength(1)
      for (const taskId of ['deaf-1', 'deaf-2', 'deaf-3']) {
        await stage.open(taskId, 'before', 'during', 'after')
        await stage.submit(full, taskId, 'r-story.sh')
        await eventually(
          async () => expect((await taskOf(full, taskId)).status).toMatch(/running|succeeded/),
          5_000,
        )
      }
      await eventually(async () => {
        const now = (await listening()).map(({ pid }) => pid)
        expect(now.filter((pid) => !before.includes(pid))).toHaveLength(1)
      }, 40_000)
      await stage.open('fills', 'before', 'during', 'after')
      for (const taskId of ['fills', 'deaf-1', 'deaf-2', 'deaf-3']) {
        expect(await finalTask(full, taskId)).toMatchObject({ status: 'succeeded' })
      }
    },
    TIMEOUT_MS,
  )
})

test(
  'what waits is limited over all instances: one whose own queue is empty refuses as well',
  async () => {
    await using instances = await startInstances(postgres, {
      env: { MAX_CONCURRENT_TASKS: '1', MAX_QUEUED_TASKS: '2' },
    })
    const { stage } = instances
    const one = await instances.start('a')
    await stage.submit(one, 'runs', 'r-story.sh')
    await eventually(async () => expect((await taskOf(one, 'runs')).status).toBe('running'))
    for (const taskId of ['waits-1', 'waits-2']) await stage.submit(one, taskId, 'r-story.sh')
    const refused = async (service: Service, taskId: string) => {
      const answer = await post(service, '/task-runner', stage.request(taskId, 'r-story.sh'))
      expect(answer).toMatchObject({ status: 429, body: { success: false } })
      expect(Number(answer.headers.get('retry-after'))).toBeGreaterThan(0)
    }
    await refused(one, 'more')
    // Takes none of those that wait, as it has no room: it came to a full queue.
    const other = await instances.start('b', { MAX_CLUSTER_TASKS: '1' })
    await refused(other, 'more')
    // A repeated request is not one more.
    const again = await post(other, '/task-runner', stage.request('waits-1', 'r-story.sh'))
    expect(again).toMatchObject({ status: 200, body: { success: true } })
    await post(one, '/tasks/waits-1/cancel')
    await eventually(async () => {
      const answer = await post(other, '/task-runner', stage.request('more', 'r-story.sh'))
      expect(answer.status).toBe(200)
    }, 5_000)
    for (const taskId of ['more', 'waits-2', 'runs']) await post(one, `/tasks/${taskId}/cancel`)
    for (const taskId of ['more', 'waits-2', 'runs']) await finalTask(one, taskId)
  },
  TIMEOUT_MS,
)

describe('hosts whose clocks are two minutes apart', () => {
  const shifted = (ms: number) => ({
    NODE_OPTIONS: `--import ${new URL('../helpers/shifted-clock.ts', import.meta.url).pathname}`,
    CLOCK_SHIFT_MS: String(ms),
  })
  const SKEW_MS = 120_000

  test(
    'go by the database’s: times that are listed, time limits, callbacks that are due',
    async () => {
      await using instances = await startInstances(postgres, {
        env: { MAX_CONCURRENT_TASKS: '3', CALLBACK_RETRY_SECONDS: '1,1,1' },
        answer: (_, response, count) => response.writeHead(count === 1 ? 500 : 200).end('{}'),
      })
      const { stage } = instances
      const services = {
        slow: await instances.start('slow', shifted(-SKEW_MS)),
        fast: await instances.start('fast', shifted(SKEW_MS)),
      }
      const runs: Array<{ taskId: string; from: number; to: number }> = []
      for (const [name, service] of Object.entries(services)) {
        for (const taskId of [`${name}-1`, `${name}-2`]) {
          await stage.open(taskId, 'before', 'during', 'after')
          const from = Date.now()
          await stage.submit(service, taskId, 'r-story.sh')
          await finalTask(service, taskId)
          runs.push({ taskId, from, to: Date.now() })
        }
        await stage.submit(service, `${name}-limited`, 'r-story.sh', { timeout_seconds: 2 })
      }
      for (const { taskId, from, to } of runs) {
        const task = await taskOf(services.fast, taskId)
        for (const at of ['created_at', 'started_at', 'finished_at']) {
          const time = Date.parse(String(task[at]))
          expect(time, `${taskId} ${at}`).toBeGreaterThan(from - 1_000)
          expect(time, `${taskId} ${at}`).toBeLessThan(to + 1_000)
        }
      }
      for (const name of ['slow', 'fast']) {
        const task = await finalTask(services.slow, `${name}-limited`)
        expect(task).toMatchObject({ reason: 'timed_out' })
        const ranMs = Date.parse(String(task.finished_at)) - Date.parse(String(task.started_at))
        expect(ranMs).toBeGreaterThan(1_900)
        expect(ranMs).toBeLessThan(12_000)
      }
      // The first attempt of all failed, and is made again soon, by whichever instance.
      await eventually(async () => {
        const { body } = await get(services.slow, '/tasks?callback_status=pending')
        expect(body.tasks).toEqual([])
      })
      expect(stage.receiver.received.length).toBeGreaterThan(6)
    },
    TIMEOUT_MS,
  )

  test(
    'judge by it alone: whose worker is stuck, who is dead, which task is old',
    async () => {
      await using instances = await startKubernetesInstances(postgres, {
        env: { RETENTION_DAYS: '1', PROVISIONING_TIMEOUT_SECONDS: '600' },
        fake: { runProcesses: false, behave: () => presets.creating() },
      })
      const { stage, fake, sql } = instances
      const slow = await instances.start('slow', shifted(-SKEW_MS))
      for (const taskId of ['old', 'young', 'taken-over']) {
        await stage.submit(slow, taskId, 'r-nap.sh')
      }
      const pods = new Map<string, string>()
      for (const taskId of ['old', 'young', 'taken-over']) {
        pods.set(taskId, await podOf(fake, workerNameFor(taskId)))
      }
      const fast = await instances.start('fast', shifted(SKEW_MS))
      const { body } = await post(fast, '/workers/cleanup', { older_than_seconds: 59 })
      expect(body.workers).toEqual([])
      for (const taskId of ['old', 'young']) {
        fake.kubelet.play(pods.get(taskId) ?? '', presets.exits(0, { message: 'task 0\n' }))
        expect(await finalTask(slow, taskId)).toMatchObject({ status: 'succeeded' })
      }
      fake.kubelet.play(pods.get('taken-over') ?? '', presets.runs())
      const owner = await runnerOf(slow, 'taken-over')
      await slow.kill('SIGKILL')
      await takenFrom(owner, fast, 'taken-over', 30_000)
      // By either host's clock both would be on the same side.
      for (const [taskId, olderMs] of [
        ['old', SKEW_MS / 2],
        ['young', -SKEW_MS / 2],
      ] as const) {
        const finishedAt = Date.now() - DAY_MS - olderMs
        await sql('update tasks set finished_at = $1 where task_id = $2', [finishedAt, taskId])
      }
      await eventually(async () => {
        expect((await get(fast, '/tasks/old')).status).toBe(404)
      }, TIMEOUT_MS)
      expect((await get(fast, '/tasks/young')).status).toBe(200)
      await post(fast, '/tasks/taken-over/cancel')
      expect(await finalTask(fast, 'taken-over')).toMatchObject({ status: 'cancelled' })
      await instances.expectNothingLeft(30_000)
    },
    3 * TIMEOUT_MS,
  )
})

/** Nothing secret is in its log, and nothing that nobody can read. */
function expectSparing({ log }: Service): void {
  expect(log.join('\n')).not.toContain(PASSWORD)
  const longest = log.reduce((one, other) => (one.length > other.length ? one : other), '')
  expect(longest.length, longest.slice(0, 2_000)).toBeLessThan(10_000)
}
