import pg from 'pg'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import type { SeenTask, TaskStore } from '../../src/core/ports.ts'
import { PgBossQueue, type PgBossQueueOptions } from '../../src/queue/pg-boss.ts'
import type { Connection } from '../../src/store/connection.ts'
import { connectionOptions, openPostgres } from '../../src/store/postgres.ts'
import { SqlTaskStore } from '../../src/store/task-store.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import { QUIET } from '../helpers/stores.ts'
import { startTcpProxy } from '../helpers/tcp-proxy.ts'
import { end, newTask, SEALER, SUCCESS } from '../store/contract.ts'

const MINUTE_MS = 60_000
/** As in the queue itself. */
const CLUSTER_LIMIT_LOCK = 0x7461736b
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
  // One database for all, emptied in between: the engine takes its time to install.
  await direct.query(`truncate tasks cascade; delete from pgboss.job where name = 'task'`)
})

interface Instance {
  name: string
  queue: PgBossQueue
  store: TaskStore
  connection: Connection
}

/** An instance's store and queue, as the service wires them. */
async function instance(
  name: string,
  options: Partial<PgBossQueueOptions> = {},
): Promise<Instance> {
  const connection = await openPostgres(url, { instance: name, poolSize: 5 })
  closing.push(() => connection.close())
  const queue = await PgBossQueue.open({
    connection: connectionOptions(url, name),
    runningMax: undefined,
    queuedMax: 1_000,
    log: QUIET,
    ...options,
  })
  closing.push(() => queue.close())
  const store = new SqlTaskStore(connection, SEALER, { instance: name, queue })
  return { name, connection, queue, store }
}

async function submitted({ store, queue }: Instance, taskId: string, more: object = {}) {
  const task = newTask({ taskId, createdAt: Date.now(), ...more })
  expect(await store.insert(task)).toBe(true)
  queue.enqueue(task)
}

/** Claims what it is handed, notes it, and ends it when the test says so; with `all`, at once. */
function scripted({ store }: Instance, { all = false } = {}) {
  const started: string[] = []
  const ends = new Map<string, () => void>()
  const handler = async ({ taskId, claim }: SeenTask) => {
    const task = await store.claim(taskId, 0, claim)
    if (!task) return false
    const ended = new Promise<void>((resolve) => ends.set(taskId, resolve))
    started.push(taskId)
    if (!all) await ended
    return store.finish(task, end())
  }
  return { started, handler, end: (taskId: string) => ends.get(taskId)?.() }
}

const jobs = async () =>
  (await direct.query(`select data->>'taskId' as id, state from pgboss.job where name = 'task'`))
    .rows as Array<{ id: string; state: string }>

const numberOf = async (text: string) => Number((await direct.query(text)).rows[0]?.number)

describe('handing out', () => {
  test('by priority, of which a step is worth a minute of waiting, then by age', async () => {
    const one = await instance('one')
    const { started, handler, end: endTask } = scripted(one)
    const now = Date.now()
    const at = (minutes: number, priority = 0) => ({
      createdAt: now + minutes * MINUTE_MS,
      priority,
    })
    await submitted(one, 'old', at(0))
    await submitted(one, 'newer', at(5))
    await submitted(one, 'urgent', at(8, 9))
    await submitted(one, 'a little', at(6, 2))
    await submitted(one, 'too late', at(15, 9))
    one.queue.work(1, handler)
    const order = ['urgent', 'old', 'a little', 'newer', 'too late']
    for (const [index, taskId] of order.entries()) {
      await expect.poll(() => started, WAIT).toEqual(order.slice(0, index + 1))
      endTask(taskId)
    }
    await expect.poll(jobs).toEqual([])
  })

  test('of tasks of one second the first is the first, however many there are', async () => {
    const one = await instance('one')
    const { started, handler } = scripted(one, { all: true })
    const createdAt = Date.UTC(2026, 5, 1)
    const ids = Array.from({ length: 20 }, (_, at) => `same-${at}`)
    for (const taskId of ids) await submitted(one, taskId, { createdAt })
    one.queue.work(1, handler)
    await expect.poll(() => started, WAIT).toEqual(ids)
  })

  test('each of 120 tasks once, to the instances that have room, and none beyond it', async () => {
    const instances = await Promise.all(['a', 'b', 'c', 'd'].map((name) => instance(name)))
    const [first] = instances as [Instance]
    const ids = Array.from({ length: 120 }, (_, at) => `task-${at}`)
    await Promise.all(ids.map((taskId) => submitted(first, taskId)))
    const handed: string[] = []
    const most = new Map<string, number>()
    for (const { name, queue, store } of instances) {
      let running = 0
      queue.work(3, async ({ taskId, claim }) => {
        handed.push(taskId)
        running += 1
        most.set(name, Math.max(most.get(name) ?? 0, running))
        const task = await store.claim(taskId, 0, claim)
        if (task) await store.finish(task, end())
        running -= 1
        return task !== undefined
      })
    }
    await expect.poll(() => handed.length, WAIT).toBe(120)
    await expect.poll(jobs, WAIT).toEqual([])
    expect([...handed].sort()).toEqual([...ids].sort())
    expect([...most.values()].every((each) => each <= 3)).toBe(true)
    expect(await numberOf(`select count(*) as number from tasks where claim = 1`)).toBe(120)
  })

  test('a task that comes while there is room is handed out soon, also where it did not come in', async () => {
    const [one, two] = [await instance('one'), await instance('two')]
    const { started, handler } = scripted(two)
    two.queue.work(10, handler)
    const tookMs: number[] = []
    // Each comes when the queue has just looked in vain, and would look again in two seconds.
    for (const taskId of ['x', 'y', 'z']) {
      const before = performance.now()
      await submitted(one, taskId)
      await expect.poll(() => started, { timeout: 10_000, interval: 5 }).toContain(taskId)
      tookMs.push(performance.now() - before)
    }
    expect(Math.min(...tookMs.slice(1))).toBeLessThan(1_000)
  })

  test('a task that runs already is resumed beyond the limit, and counts against it', async () => {
    const one = await instance('one')
    await submitted(one, 'r1')
    await submitted(one, 'r2')
    for (const taskId of ['r1', 'r2']) expect(await one.store.claim(taskId, 0)).toBeDefined()
    await submitted(one, 'a')
    const { started, handler, end: endTask } = scripted(one)
    one.queue.work(1, handler)
    await expect.poll(() => started, WAIT).toEqual(['a'])
    endTask('a')
    for (const taskId of ['r1', 'r2']) one.queue.resume({ taskId, claim: 1 })
    await expect.poll(() => started, WAIT).toEqual(['a', 'r1', 'r2'])
    await submitted(one, 'b')
    endTask('r1')
    await expect.poll(async () => (await one.store.get('r1'))?.status, WAIT).toBe('succeeded')
    expect(started).not.toContain('b')
    endTask('r2')
    await expect.poll(() => started, WAIT).toContain('b')
  })
})

describe('a limit over all instances', () => {
  const LIMIT = 3

  test('is reached and never passed by four that race for 60 tasks', async () => {
    const options = { runningMax: LIMIT }
    const instances = await Promise.all(['a', 'b', 'c', 'd'].map((name) => instance(name, options)))
    const [first] = instances as [Instance]
    await Promise.all(Array.from({ length: 60 }, (_, at) => submitted(first, `task-${at}`)))
    let running = 0
    let most = 0
    let done = 0
    const full = Promise.withResolvers<void>()
    for (const { queue, store } of instances) {
      queue.work(LIMIT, async ({ taskId, claim }) => {
        running += 1
        most = Math.max(most, running)
        if (running === LIMIT) full.resolve()
        const task = await store.claim(taskId, 0, claim)
        // The first ones stay until there are as many as may be; whoever looks meanwhile gets none.
        await full.promise
        running -= 1
        if (task && (await store.finish(task, end()))) done += 1
        return task !== undefined
      })
    }
    await expect.poll(() => done, { ...WAIT, timeout: 25_000 }).toBe(60)
    expect(most).toBe(LIMIT)
  })

  test('counts what was fetched and is not claimed yet, and what others run', async () => {
    const [one, two] = [
      await instance('one', { runningMax: LIMIT }),
      await instance('two', { runningMax: LIMIT }),
    ]
    for (const taskId of ['a', 'b', 'c', 'd', 'e']) await submitted(one, taskId)
    expect(await one.store.claim('a', 0)).toBeDefined()
    const fetched: string[] = []
    one.queue.work(1, async ({ taskId }) => {
      fetched.push(taskId)
      return new Promise<boolean>(() => {})
    })
    await expect.poll(() => fetched, WAIT).toEqual(['b'])
    const { started, handler, end: endTask } = scripted(two)
    two.queue.work(5, handler)
    await expect.poll(() => started, WAIT).toEqual(['c'])
    // It looks again by itself every two seconds; whatever it may fetch now it fetches by then.
    endTask('c')
    await expect.poll(() => started, WAIT).toEqual(['c', 'd'])
    expect((await jobs()).map(({ id }) => id).sort()).toEqual(['b', 'e'])
  })
})

describe('what becomes of a job', () => {
  test('it goes with the claim, and with a cancel of the waiting task', async () => {
    const one = await instance('one')
    for (const taskId of ['claimed', 'cancelled', 'waits']) await submitted(one, taskId)
    expect((await jobs()).map(({ id }) => id).sort()).toEqual(['cancelled', 'claimed', 'waits'])
    await one.store.claim('claimed', 0)
    await one.store.requestCancel('cancelled', 1)
    const cancelled = await one.store.get('cancelled')
    if (!cancelled) throw new Error('not stored')
    const outcome = { ...SUCCESS, status: 'cancelled', reason: 'cancelled' } as const
    expect(await one.store.finish(cancelled, end({ outcome }))).toBe(true)
    expect(await jobs()).toEqual([{ id: 'waits', state: 'created' }])
  })

  test('a claim that comes too late leaves the job to the task that it belongs to', async () => {
    const one = await instance('one')
    await submitted(one, 'waits')
    expect(await one.store.claim('waits', 0, 1)).toBeUndefined()
    expect(await jobs()).toEqual([{ id: 'waits', state: 'created' }])
  })

  test('an insert that is undone leaves none; a repeated one makes no second', async () => {
    const one = await instance('one')
    const failing = new SqlTaskStore(one.connection, SEALER, {
      instance: 'one',
      queue: {
        add: (task) => async (transaction) => {
          await one.queue.add(task)(transaction)
          throw new Error('after the job')
        },
        taken: (taskId) => one.queue.taken(taskId),
        cancelRequested: (taskId) => one.queue.cancelRequested(taskId),
      },
    })
    const task = newTask({ taskId: 'once' })
    await expect(failing.insert(task)).rejects.toMatchObject({ code: 'store_unavailable' })
    expect(await jobs()).toEqual([])
    expect(await one.store.digestOf('once')).toBeUndefined()
    expect(await one.store.insert(task)).toBe(true)
    expect(await one.store.insert(task)).toBe(false)
    expect(await jobs()).toEqual([{ id: 'once', state: 'created' }])
  })

  test('fetched by an instance that dies before it claims, it comes back', async () => {
    const [one, two] = [await instance('one'), await instance('two')]
    await submitted(one, 'a')
    const fetched: string[] = []
    one.queue.work(1, async ({ taskId }) => {
      fetched.push(taskId)
      return new Promise<boolean>(() => {})
    })
    await expect.poll(() => fetched, WAIT).toEqual(['a'])
    expect(await jobs()).toEqual([{ id: 'a', state: 'active' }])
    await one.queue.close()
    const { started, handler } = scripted(two)
    two.queue.work(1, handler)
    // It tells that it lives every so often: the last time was long ago.
    await direct.query(
      `update pgboss.job set heartbeat_on = heartbeat_on - interval '20 seconds' where name = 'task'`,
    )
    await expect.poll(() => started, WAIT).toEqual(['a'])
  })

  test('fetched while its instance stops, it is for others at once', async () => {
    const [one, two] = [await instance('one', { runningMax: 5 }), await instance('two')]
    await submitted(one, 'a')
    // What a fetch waits for where there is a limit.
    await direct.query('select pg_advisory_lock($1)', [CLUSTER_LIMIT_LOCK])
    const started: string[] = []
    one.queue.work(1, async ({ taskId }) => started.push(taskId) > 0)
    await expect
      .poll(() => numberOf(`select count(*) as number from pg_locks where not granted`), WAIT)
      .toBe(1)
    const stopped = one.queue.stop()
    await direct.query('select pg_advisory_unlock($1)', [CLUSTER_LIMIT_LOCK])
    await stopped
    expect(started).toEqual([])
    expect(await jobs()).toEqual([{ id: 'a', state: 'retry' }])
    const other = scripted(two)
    two.queue.work(1, other.handler)
    await expect.poll(() => other.started, { ...WAIT, timeout: 3_000 }).toEqual(['a'])
  })
})

test('connections that died in silence hold up neither what waits nor the end for long', async () => {
  await using proxy = await startTcpProxy(postgres.port)
  const connection = connectionOptions(url.replace(`:${postgres.port}/`, `:${proxy.port}/`), 'one')
  const [one, two] = [await instance('one', { connection }), await instance('two')]
  const { started, handler } = scripted(one)
  one.queue.work(5, handler)
  await submitted(two, 'before')
  await expect.poll(() => started, WAIT).toEqual(['before'])
  proxy.deaden()
  await submitted(two, 'after')
  await expect.poll(() => started, { ...WAIT, timeout: 20_000 }).toEqual(['before', 'after'])
  proxy.deaden()
  const endsAt = performance.now()
  await one.queue.close()
  expect(performance.now() - endsAt).toBeLessThan(20_000)
}, 60_000)

describe('hints', () => {
  test('a cancel is heard by every instance', async () => {
    const [one, two] = [await instance('one'), await instance('two')]
    const heard: string[] = []
    for (const { name, queue } of [one, two]) {
      queue.onCancel((taskId) => heard.push(`${name} ${taskId}`))
    }
    await submitted(one, 'a')
    await one.store.claim('a', 0)
    await two.store.requestCancel('a', 1)
    await expect.poll(() => heard.sort(), WAIT).toEqual(['one a', 'two a'])
  })

  test('without them tasks are found all the same, and they are listened to again', async () => {
    const [one, two] = [await instance('one'), await instance('two')]
    const { started, handler } = scripted(two)
    const heard: string[] = []
    two.queue.onCancel((taskId) => heard.push(taskId))
    two.queue.work(10, handler)
    const deaf = `from pg_stat_activity where application_name = 'task-runner two' and query like 'LISTEN%'`
    const { rows } = await direct.query(`select pg_terminate_backend(pid) as ended, pid ${deaf}`)
    expect(rows).toMatchObject([{ ended: true }])
    await submitted(one, 'unheard')
    await expect.poll(() => started, WAIT).toEqual(['unheard'])
    await expect.poll(() => numberOf(`select count(*) as number ${deaf}`), WAIT).toBe(1)
    await one.store.requestCancel('unheard', 1)
    await expect.poll(() => heard, WAIT).toEqual(['unheard'])
  })
})

test('a job that has outlived its task is taken out, and keeps nobody waiting', async () => {
  const one = await instance('one', { runningMax: 1 })
  await submitted(one, 'left')
  await submitted(one, 'next')
  // As when the engine had the job in hand while its task was claimed.
  await direct.query(`update tasks set status = 'failed', claim = 1 where task_id = 'left'`)
  const { started, handler } = scripted(one, { all: true })
  one.queue.work(1, handler)
  await expect.poll(() => started, WAIT).toEqual(['next'])
  await expect.poll(jobs).toEqual([])
})

describe('length', () => {
  test('is what waits: at once where it was taken in, soon elsewhere, and without what runs or has ended', async () => {
    const [one, two] = [await instance('one'), await instance('two')]
    two.queue.work(0, async () => true)
    expect([one.queue.length, two.queue.length]).toEqual([0, 0])
    for (const taskId of ['a', 'b', 'c', 'd']) await submitted(one, taskId)
    expect(one.queue.length).toBe(4)
    await expect.poll(() => two.queue.length, WAIT).toBe(4)
    const task = await one.store.claim('a', 0)
    if (!task) throw new Error('not claimed')
    await one.store.finish(task, end())
    await one.store.claim('b', 0)
    await expect.poll(() => two.queue.length, WAIT).toBe(2)
    const late = await instance('late')
    expect(late.queue.length).toBe(2)
  })

  test('is counted up to where no more are taken in', async () => {
    const one = await instance('one')
    for (const taskId of ['a', 'b', 'c', 'd']) await submitted(one, taskId)
    const small = await instance('small', { queuedMax: 3 })
    expect(small.queue.length).toBe(3)
  })
})

describe('closing', () => {
  const sessions = (name: string) =>
    numberOf(
      `select count(*) as number from pg_stat_activity where application_name = 'task-runner ${name}'`,
    )

  test('lets go of the database, and may be repeated', async () => {
    const one = await instance('one')
    one.queue.work(3, async () => true)
    await one.queue.everyMinute(async () => {})
    await submitted(one, 'a')
    expect(await sessions('one')).toBeGreaterThan(2)
    await one.queue.close()
    await one.queue.close()
    await one.connection.close()
    await expect.poll(() => sessions('one'), WAIT).toBe(0)
  })

  test('an opening that fails lets go of it as well', async () => {
    const empty = await postgres.database()
    const connection = connectionOptions(empty, 'failing')
    const options = { connection, runningMax: undefined, queuedMax: 10, log: QUIET }
    // The tables that it counts in are not there.
    await expect(PgBossQueue.open(options)).rejects.toThrow('"tasks" does not exist')
    await expect.poll(() => sessions('failing'), WAIT).toBe(0)
  })
})
