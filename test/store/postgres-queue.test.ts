/** The queue over a real Postgres: several instances, their hints, and a limit for all. */
import pg from 'pg'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import type { ClaimedTask } from '../../src/core/ports.ts'
import type { Slot } from '../../src/core/slots.ts'
import { TaskQueue, type TaskQueueOptions } from '../../src/core/task-queue.ts'
import { newClient, openPostgres } from '../../src/store/postgres.ts'
import { PostgresSession } from '../../src/store/postgres-session.ts'
import { SqlTaskStore } from '../../src/store/task-store.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import { QUIET } from '../helpers/stores.ts'
import { startTcpProxy } from '../helpers/tcp-proxy.ts'
import { end, newTask, SEALER } from './contract.ts'

const WAIT = { timeout: 15_000, interval: 10 }

let postgres: Postgres
let url: string
let direct: pg.Client
const closing: Array<() => Promise<void>> = []

beforeAll(async () => {
  postgres = await startPostgres()
  url = await postgres.database()
  direct = new pg.Client(url)
  await direct.connect()
}, 60_000)
afterAll(async () => {
  await direct.end()
  await postgres[Symbol.asyncDispose]()
})
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close()
  await direct.query('truncate tasks cascade')
})

/** An instance's store, session and queue, as the service wires them. */
async function instance(
  name: string,
  { by = url, ...options }: Partial<TaskQueueOptions> & { by?: string } = {},
) {
  const connection = await openPostgres(by, { instance: name, poolSize: 5 })
  closing.push(() => connection.close())
  const session = new PostgresSession(() => newClient(by, name), QUIET)
  closing.push(() => session.close())
  const store = new SqlTaskStore(connection, SEALER, { instance: name, isShared: true })
  const queue = new TaskQueue({
    ...{
      store,
      hints: session,
      concurrency: 10,
      length: 0,
      queuedMax: 1_000,
      now: Date.now,
      log: QUIET,
    },
    ...options,
  })
  closing.push(() => queue.stop())
  const heard: string[] = []
  session.listen({
    tasksWait: () => queue.look(),
    cancelRequested: (taskId) => heard.push(taskId),
  })
  await expect.poll(() => sessionsOf(name, LISTENS), WAIT).toBe(1)
  return { name, session, queue, store, heard }
}
type Instance = Awaited<ReturnType<typeof instance>>

async function submitted({ store, queue }: Instance, taskId: string) {
  expect(await store.insert(newTask({ taskId, createdAt: Date.now() }))).toBe(true)
  queue.added()
}

/** Starts the queue, and notes what it hands out; the test ends it. */
function scripted({ queue, store }: Instance) {
  const started: string[] = []
  const ends = new Map<string, () => Promise<void>>()
  queue.start((task: ClaimedTask, slot: Slot) => {
    started.push(task.taskId)
    ends.set(task.taskId, async () => {
      await store.finish(task, end())
      slot.release()
    })
  })
  return { started, end: async (taskId: string) => ends.get(taskId)?.() }
}

const numberOf = async (text: string) => Number((await direct.query(text)).rows[0]?.number)
const sessionsOf = (name: string, where = 'true') =>
  numberOf(
    `select count(*) as number from pg_stat_activity
     where application_name = 'task-runner ${name}' and ${where}`,
  )
const LISTENS = `query like '%listen%'`

describe('instances', () => {
  test('get each of 120 tasks once, as many as they have room for', async () => {
    const names = ['a', 'b', 'c', 'd']
    const instances = await Promise.all(names.map((name) => instance(name, { concurrency: 3 })))
    const [first] = instances as [Instance]
    const ids = Array.from({ length: 120 }, (_, at) => `task-${at}`)
    await Promise.all(ids.map((taskId) => submitted(first, taskId)))
    const handed: string[] = []
    const most = new Map<string, number>()
    for (const { name, queue, store } of instances) {
      let running = 0
      queue.start(async (task, slot) => {
        handed.push(task.taskId)
        running += 1
        most.set(name, Math.max(most.get(name) ?? 0, running))
        await store.finish(task, end())
        running -= 1
        slot.release()
      })
    }
    await expect
      .poll(() => numberOf(`select count(*) as number from tasks where status = 'succeeded'`), WAIT)
      .toBe(120)
    expect([...handed].sort()).toEqual([...ids].sort())
    expect([...most.values()].every((each) => each <= 3)).toBe(true)
    expect(await numberOf('select count(*) as number from tasks where claim = 1')).toBe(120)
  })

  test('hear at once of tasks that another one has no room for', async () => {
    const [full, other] = [await instance('full', { concurrency: 0 }), await instance('other')]
    const { started } = scripted(other)
    scripted(full)
    const tookMs: number[] = []
    for (const taskId of ['v', 'w', 'x', 'y', 'z']) {
      const before = performance.now()
      await submitted(full, taskId)
      await expect.poll(() => started, { timeout: 10_000, interval: 5 }).toContain(taskId)
      tookMs.push(performance.now() - before)
    }
    // A look by itself comes within a second, and so half of them after more than half of one.
    expect(tookMs.sort((a, b) => a - b)[2]).toBeLessThan(400)
  })

  test('hear of a cancel', async () => {
    const [one, two] = [await instance('one'), await instance('two')]
    await expect.poll(() => sessionsOf('two', LISTENS), WAIT).toBe(1)
    one.session.cancelRequested('any')
    await expect.poll(() => [one.heard, two.heard], WAIT).toEqual([['any'], ['any']])
  })

  test('find tasks without hearing of them, and listen again', async () => {
    const [one, two] = [await instance('one', { concurrency: 0 }), await instance('two')]
    const { started } = scripted(two)
    await expect.poll(() => sessionsOf('two', LISTENS), WAIT).toBe(1)
    const { rows } = await direct.query(
      `select pg_terminate_backend(pid) as ended from pg_stat_activity
       where application_name = 'task-runner two' and ${LISTENS}`,
    )
    expect(rows).toEqual([{ ended: true }])
    await submitted(one, 'unheard')
    await expect.poll(() => started, WAIT).toEqual(['unheard'])
    await expect.poll(() => sessionsOf('two', LISTENS), WAIT).toBe(1)
    one.session.cancelRequested('any')
    await expect.poll(() => two.heard, WAIT).toEqual(['any'])
  })

  test('whose connections died in silence are held up neither in their work nor at their end for long', async () => {
    await using proxy = await startTcpProxy(postgres.port)
    const by = url.replace(`:${postgres.port}/`, `:${proxy.port}/`)
    const [one, two] = [await instance('one', { by }), await instance('two', { concurrency: 0 })]
    const { started } = scripted(one)
    await submitted(two, 'before')
    await expect.poll(() => started, WAIT).toEqual(['before'])
    proxy.deaden()
    await submitted(two, 'after')
    await expect.poll(() => started, { ...WAIT, timeout: 30_000 }).toEqual(['before', 'after'])
    proxy.deaden()
    const endsAt = performance.now()
    await one.queue.stop()
    await one.session.close()
    expect(performance.now() - endsAt).toBeLessThan(20_000)
  }, 60_000)

  test('count what waits: at once where it was taken in, soon elsewhere', async () => {
    const [one, two] = [
      await instance('one', { concurrency: 0 }),
      await instance('two', { concurrency: 0 }),
    ]
    scripted(two)
    for (const taskId of ['a', 'b', 'c', 'd']) await submitted(one, taskId)
    expect(one.queue.length).toBe(4)
    await expect.poll(() => two.queue.length, WAIT).toBe(4)
    const [task] = await one.store.claimNext({ at: 0, limit: 2 })
    if (!task) throw new Error('not claimed')
    await one.store.finish(task, end())
    await expect.poll(() => two.queue.length, WAIT).toBe(2)
    const small = await instance('small', { concurrency: 0, queuedMax: 1 })
    scripted(small)
    await expect.poll(() => small.queue.length, WAIT).toBe(1)
  })
})

describe('a limit over all instances', () => {
  const runningMax = 3

  test('is reached and never passed by four that race for 60 tasks', async () => {
    const instances = await Promise.all(
      ['a', 'b', 'c', 'd'].map((name) => instance(name, { concurrency: 3, runningMax })),
    )
    const [first] = instances as [Instance]
    await Promise.all(Array.from({ length: 60 }, (_, at) => submitted(first, `task-${at}`)))
    let running = 0
    let most = 0
    let done = 0
    const full = Promise.withResolvers<void>()
    for (const { queue, store } of instances) {
      queue.start(async (task, slot) => {
        running += 1
        most = Math.max(most, running)
        if (running === runningMax) full.resolve()
        // The first ones stay until there are as many as may be; whoever looks meanwhile gets none.
        await full.promise
        running -= 1
        if (await store.finish(task, end())) done += 1
        slot.release()
      })
    }
    await expect.poll(() => done, { ...WAIT, timeout: 40_000 }).toBe(60)
    expect(most).toBe(runningMax)
  }, 60_000)

  test('counts what others run, and its own end makes room at once', async () => {
    const one = await instance('one', { concurrency: 0 })
    for (const taskId of ['a', 'b', 'c', 'd', 'e']) await submitted(one, taskId)
    expect(await one.store.claimNext({ at: 0, limit: 2 })).toHaveLength(2)
    const two = await instance('two', { runningMax })
    const { started, end: endTask } = scripted(two)
    await expect.poll(() => started, WAIT).toEqual(['c'])
    expect(await two.store.claimNext({ at: 0, limit: 5, runningMax })).toEqual([])
    await endTask('c')
    await expect.poll(() => started, WAIT).toEqual(['c', 'd'])
    expect(await one.store.countQueued(10)).toBe(1)
  })
})

describe('periodic work', () => {
  test('is for one instance, and for another when the session of the first has ended', async () => {
    const [one, two] = [await instance('one'), await instance('two')]
    await expect.poll(() => one.session.leads(), WAIT).toBe(true)
    await expect.poll(() => sessionsOf('two', LISTENS), WAIT).toBe(1)
    expect(await two.session.leads()).toBe(false)
    expect(await one.session.leads()).toBe(true)
    await one.session.close()
    expect(await one.session.leads()).toBe(false)
    await expect.poll(() => two.session.leads(), WAIT).toBe(true)
  })
})

test('closing a session leaves no connection, and may be repeated', async () => {
  const one = await instance('one')
  await expect.poll(() => sessionsOf('one', LISTENS), WAIT).toBe(1)
  await one.session.close()
  await one.session.close()
  await expect.poll(() => sessionsOf('one', LISTENS), WAIT).toBe(0)
})
