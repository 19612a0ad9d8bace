import { randomBytes } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startInstances, taskOf } from '../helpers/instances.ts'
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
  expect(body).toEqual({ success: false, message: expect.stringMatching(/^[A-Z][^\n]+$/) })
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
    'loses the answer of a commit: the repeated request is told that it was accepted, and it runs once',
    async () => {
      await using proxy = await startTcpProxy(postgres.port)
      const url = by(proxy, await postgres.database())
      await using instances = await startInstances(postgres, { env: { DATABASE_URL: url } })
      const { stage } = instances
      const service = await instances.start('a')
      await stage.open('once', 'open')
      const request = stage.request('once', 'r-count.sh')
      const answer = proxy.lose('answer', 'commit')
      expectUnavailable(await post(service, '/task-runner', request))
      expect(answer.hits).toBe(1)
      expect(await post(service, '/task-runner', request)).toMatchObject({
        ...{ status: 200, body: { message: expect.stringMatching(/^Already accepted/) } },
      })
      expect(await finalTask(service, 'once')).toMatchObject({ status: 'succeeded' })
      expect(await readFile(join(stage.gateOf('once'), 'runs'), 'utf8')).toBe('once\n')
    },
    TIMEOUT_MS,
  )

  test(
    'is away when the service is told to stop: it ends all the same, and goes on at the next start',
    async () => {
      await using proxy = await startTcpProxy(postgres.port)
      const url = by(proxy, await postgres.database())
      await using instances = await startInstances(postgres, { env: { DATABASE_URL: url } })
      const { stage } = instances
      const first = await instances.start('a')
      await stage.submit(first, 'goes-on', 'r-story.sh')
      await eventually(async () => expect((await taskOf(first, 'goes-on')).status).toBe('running'))
      await proxy.set('refused')
      expect(await exitAfter(first, 'SIGTERM')).toBe(0)
      await proxy.set('open')
      const second = await instances.start('a')
      expect(await taskOf(second, 'goes-on')).toMatchObject({ status: 'running' })
      await stage.open('goes-on', 'before', 'during', 'after')
      expect(await finalTask(second, 'goes-on')).toMatchObject({ status: 'succeeded' })
    },
    TIMEOUT_MS,
  )
})

/** Nothing secret is in its log, and nothing that nobody can read. */
function expectSparing({ log }: Service): void {
  expect(log.join('\n')).not.toContain(PASSWORD)
  const longest = log.reduce((one, other) => (one.length > other.length ? one : other), '')
  expect(longest.length, longest.slice(0, 2_000)).toBeLessThan(10_000)
}
