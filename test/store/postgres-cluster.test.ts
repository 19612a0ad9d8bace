import { sql } from 'kysely'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest'
import type { TaskStore } from '../../src/core/ports.ts'
import type { Connection } from '../../src/store/connection.ts'
import { openPostgres } from '../../src/store/postgres.ts'
import { PostgresCluster, SILENT_MS } from '../../src/store/postgres-cluster.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import { end, newTask, storesOver } from './contract.ts'

const GRACE_MS = 300_000
const DAY_MS = 86_400_000
const HOUR_MS = 3_600_000

let postgres: Postgres
let connection: Connection
/** The steady clock of all instances, which stands still unless it is moved. */
let elapsedMs: number

beforeAll(async () => {
  postgres = await startPostgres()
  connection = await openPostgres(await postgres.database(), { instance: 'test', poolSize: 10 })
}, 60_000)
afterAll(async () => {
  await connection.close()
  await postgres[Symbol.asyncDispose]()
})

beforeEach(async () => {
  elapsedMs = 0
  vi.spyOn(performance, 'now').mockImplementation(() => 1_000_000 + elapsedMs)
})
afterEach(async () => {
  for (const table of ['task_logs', 'tasks', 'instances'] as const) {
    await connection.db.deleteFrom(table).execute()
  }
})

/** An instance, with its store. */
function member(name: string, options: { hostBound?: boolean; hostGraceMs?: number } = {}) {
  const cluster = new PostgresCluster(connection, {
    ...{ instance: name, hostBound: false, hostGraceMs: GRACE_MS },
    ...options,
  })
  return { name, cluster, store: storesOver(connection, name).store }
}

/** Beats as a living instance does, for so long. */
async function lives({ cluster }: { cluster: PostgresCluster }, ms: number): Promise<void> {
  await cluster.beat()
  for (const until = elapsedMs + ms; elapsedMs < until; ) {
    elapsedMs = Math.min(elapsedMs + 2_000, until)
    await cluster.beat()
  }
}

/** By the database's clock, the instance beat last so long ago. */
async function silentFor(name: string, ms: number): Promise<void> {
  const { numUpdatedRows } = await connection.db
    .updateTable('instances')
    .set({ beat_at: sql`(extract(epoch from clock_timestamp()) * 1000)::bigint - ${ms}::bigint` })
    .where('name', '=', name)
    .executeTakeFirst()
  expect(numUpdatedRows).toBe(1n)
}

async function running(store: TaskStore): Promise<string> {
  const { taskId } = newTask()
  await store.insert(newTask({ taskId }))
  expect(await store.claim(taskId, 0)).toMatchObject({ claim: 1 })
  return taskId
}

const names = async () =>
  (await connection.db.selectFrom('instances').select('name').orderBy('name').execute()).map(
    ({ name }) => name,
  )

describe('membership', () => {
  test('the first beat tells that others may know nothing of us, the next ones that they do', async () => {
    const { cluster } = member('a')
    expect(cluster.isMember()).toBe(false)
    expect(await cluster.beat()).toBe(false)
    expect(cluster.isMember()).toBe(true)
    expect(await cluster.beat()).toBe(true)
    expect(await names()).toEqual(['a'])
  })

  test('an instance that was silent for as long as it takes to be thought dead is told so, once', async () => {
    const { cluster } = member('a')
    await cluster.beat()
    elapsedMs += SILENT_MS - 100
    expect(cluster.isMember()).toBe(true)
    elapsedMs += 101
    expect(cluster.isMember()).toBe(false)
    expect(await cluster.beat()).toBe(false)
    expect(cluster.isMember()).toBe(true)
    expect(await cluster.beat()).toBe(true)
  })

  test('a beat counts from when it was sent: while its answer was on the way others saw nothing newer', async () => {
    const { cluster } = member('a')
    await cluster.beat()
    const beating = cluster.beat()
    elapsedMs += SILENT_MS + 1
    expect(await beating).toBe(false)
    expect(cluster.isMember()).toBe(false)
  })

  test('time is the database’s, whatever the host thinks it is', async () => {
    const { cluster } = member('a')
    const before = Date.now()
    vi.spyOn(Date, 'now').mockReturnValue(before + 120_000)
    await cluster.beat()
    expect(Math.abs(cluster.now() - before)).toBeLessThan(5_000)
    elapsedMs += 60_000
    expect(Math.abs(cluster.now() - before - 60_000)).toBeLessThan(5_000)
    const row = await connection.db
      .selectFrom('instances')
      .select('beat_at')
      .executeTakeFirstOrThrow()
    expect(Math.abs(Number(row.beat_at) - before)).toBeLessThan(5_000)
  })
})

describe('what is ours', () => {
  test('tasks that this instance has claimed and not ended, with their claims', async () => {
    const a = member('a')
    const b = member('b')
    const first = await running(a.store)
    const second = await running(b.store)
    expect(await a.store.claim(second, 0, 1)).toMatchObject({ claim: 2 })
    await running(b.store)
    await a.store.insert(newTask())
    const ended = await a.store.claim(await running(a.store), 0, 1)
    if (!ended) throw new Error('not claimed')
    await a.store.finish(ended, end())
    const seen = await a.cluster.ours()
    expect(seen.sort((one, two) => one.claim - two.claim)).toEqual([
      { taskId: first, claim: 1 },
      { taskId: second, claim: 2 },
    ])
  })

  test('cancel requests are told to the instance that runs the task', async () => {
    const a = member('a')
    const b = member('b')
    const taskId = await running(a.store)
    await running(a.store)
    expect(await a.cluster.cancelRequests()).toEqual([])
    await b.store.requestCancel(taskId, 1)
    expect(await a.cluster.cancelRequests()).toEqual([taskId])
    expect(await b.cluster.cancelRequests()).toEqual([])
  })
})

describe('tasks of the dead', () => {
  test('those of an instance that was silent for so long are for others; of one that lives they are not', async () => {
    const [dead, alive, heir] = [member('dead'), member('alive'), member('heir')]
    await dead.cluster.beat()
    const taskId = await running(dead.store)
    const claimedAgain = await running(dead.store)
    await dead.store.claim(claimedAgain, 0, 1)
    await alive.cluster.beat()
    await running(alive.store)
    await lives(heir, SILENT_MS + 1)
    await silentFor('dead', SILENT_MS - 1_000)
    expect(await heir.cluster.orphans()).toEqual([])
    await silentFor('dead', SILENT_MS + 1)
    const orphans = await heir.cluster.orphans()
    expect(orphans.sort((one, two) => one.claim - two.claim)).toEqual([
      { taskId, claim: 1, instance: 'dead', isLost: false },
      { taskId: claimedAgain, claim: 2, instance: 'dead', isLost: false },
    ])
  })

  test('tasks that wait or have ended are nobody’s to take over', async () => {
    const [dead, heir] = [member('dead'), member('heir')]
    await dead.cluster.beat()
    await dead.store.insert(newTask())
    const ended = await dead.store.claim(await running(dead.store), 0, 1)
    if (!ended) throw new Error('not claimed')
    await dead.store.finish(ended, end())
    await lives(heir, SILENT_MS + 1)
    await silentFor('dead', HOUR_MS)
    expect(await heir.cluster.orphans()).toEqual([])
  })

  test('whoever has just come declares nobody dead', async () => {
    const [dead, heir] = [member('dead'), member('heir')]
    await dead.cluster.beat()
    await running(dead.store)
    await silentFor('dead', HOUR_MS)
    expect(await heir.cluster.orphans()).toEqual([])
    await lives(heir, SILENT_MS - 100)
    expect(await heir.cluster.orphans()).toEqual([])
    await lives(heir, 200)
    expect(await heir.cluster.orphans()).toHaveLength(1)
  })

  test('whoever was away itself declares nobody dead: after an outage of the database all were silent', async () => {
    const [dead, heir] = [member('dead'), member('heir')]
    await dead.cluster.beat()
    await running(dead.store)
    await lives(heir, 60_000)
    elapsedMs += SILENT_MS + 1
    await silentFor('dead', SILENT_MS + 1)
    await heir.cluster.beat()
    expect(await heir.cluster.orphans()).toEqual([])
    await lives(heir, SILENT_MS - 100)
    expect(await heir.cluster.orphans()).toEqual([])
    await lives(heir, 200)
    expect(await heir.cluster.orphans()).toHaveLength(1)
  })

  test('the host of local workers has its grace to come back; then what ran there is lost', async () => {
    const [dead, heir] = [member('dead', { hostBound: true }), member('heir', { hostBound: true })]
    await dead.cluster.beat()
    const taskId = await running(dead.store)
    await lives(heir, GRACE_MS + 1)
    await silentFor('dead', GRACE_MS - 1_000)
    expect(await heir.cluster.orphans()).toEqual([])
    await silentFor('dead', GRACE_MS + 1)
    const lost = [{ taskId, claim: 1, instance: 'dead', isLost: true }]
    expect(await heir.cluster.orphans()).toEqual(lost)
    await dead.cluster.beat()
    expect(await heir.cluster.orphans()).toEqual([])
  })

  test('a grace shorter than the silence of the dead is as long as that: who lives is not given up between two beats', async () => {
    const [host, heir] = [
      member('host', { hostBound: true }),
      member('heir', { hostGraceMs: 1_000 }),
    ]
    await host.cluster.beat()
    await running(host.store)
    await lives(heir, SILENT_MS + 1)
    await silentFor('host', SILENT_MS - 1_000)
    expect(await heir.cluster.orphans()).toEqual([])
    await silentFor('host', SILENT_MS + 1)
    expect(await heir.cluster.orphans()).toMatchObject([{ isLost: true }])
  })

  test('a host is given up by nobody who has not been there for its grace', async () => {
    const [dead, heir] = [member('dead', { hostBound: true }), member('heir')]
    await dead.cluster.beat()
    await running(dead.store)
    await silentFor('dead', DAY_MS * 2)
    await lives(heir, GRACE_MS - 100)
    expect(await heir.cluster.orphans()).toEqual([])
    await lives(heir, 200)
    expect(await heir.cluster.orphans()).toHaveLength(1)
  })

  test('there may be thousands: some are told at a time, and to each other ones first', async () => {
    const [dead, heir] = [member('dead'), member('heir')]
    await dead.cluster.beat()
    const template = newTask()
    await dead.store.insert(template)
    await dead.store.claim(template.taskId, 0)
    const { seq: _, ...row } = await connection.db
      .selectFrom('tasks')
      .selectAll()
      .executeTakeFirstOrThrow()
    const rows = Array.from({ length: 400 }, (_, at) => ({ ...row, task_id: `orphan-${at}` }))
    await connection.db.insertInto('tasks').values(rows).execute()
    await lives(heir, SILENT_MS + 1)
    await silentFor('dead', SILENT_MS + 1)
    const idsOf = async () => (await heir.cluster.orphans()).map(({ taskId }) => taskId)
    const [one, two] = [await idsOf(), await idsOf()]
    expect([one.length, two.length]).toEqual([100, 100])
    expect(one).not.toEqual(two)
  })
})

test('those who live share what the dead have left; what one does not take, others do soon', async () => {
  const [dead, one, other] = [member('dead'), member('one'), member('other')]
  await dead.cluster.beat()
  for (let count = 0; count < 12; count += 1) await running(dead.store)
  for (let count = 0; count < 4; count += 1) await running(one.store)
  await lives(one, SILENT_MS + 1)
  await lives(other, SILENT_MS + 1)
  await silentFor('dead', SILENT_MS + 1)
  const take = async ({ cluster, store }: typeof one) => {
    const orphans = await cluster.orphans()
    for (const { taskId, claim } of orphans) await store.claim(taskId, 0, claim)
    return orphans.length
  }
  // Both have eight then.
  expect(await take(one)).toBe(4)
  expect(await one.cluster.orphans()).toEqual([])
  expect(await other.cluster.orphans()).toHaveLength(8)
  expect(await take(one)).toBe(8)
  expect(await one.cluster.orphans()).toEqual([])
})

describe('leaving', () => {
  test('what an instance with container workers leaves is for others at once', async () => {
    const [leaving, heir] = [member('leaving'), member('heir')]
    await leaving.cluster.beat()
    const taskId = await running(leaving.store)
    await lives(heir, SILENT_MS + 1)
    await leaving.cluster.leave()
    expect(await heir.cluster.orphans()).toMatchObject([{ taskId, isLost: false }])
  })

  test('local workers wait for their host all the same', async () => {
    const [leaving, heir] = [member('leaving', { hostBound: true }), member('heir')]
    await leaving.cluster.beat()
    await running(leaving.store)
    await lives(heir, GRACE_MS + 1)
    await leaving.cluster.leave()
    expect(await heir.cluster.orphans()).toEqual([])
  })
})

test('workers that a host alone can see are for it to look after, until it is forgotten', async () => {
  const [here, there] = [member('here', { hostBound: true }), member('there', { hostBound: true })]
  const ids: string[] = []
  for (const { cluster, store } of [here, there]) {
    await cluster.beat()
    const task = await store.claim(await running(store), 0, 1)
    if (!task) throw new Error('not claimed')
    await store.finish(task, end({ finishedAt: 5_000 }))
    ids.push(task.taskId)
  }
  expect(await here.store.workersRemembered(5_000, 'here')).toEqual([])
  expect(await here.store.workersRemembered(5_001, 'here')).toEqual([ids[0]])
  expect((await here.store.workersRemembered(5_001)).sort()).toEqual([...ids].sort())
  await connection.db.deleteFrom('instances').where('name', '=', 'there').execute()
  expect((await here.store.workersRemembered(5_001, 'here')).sort()).toEqual([...ids].sort())
})

describe('instances that are gone', () => {
  test('are forgotten a day later, or once they left, unless they have tasks still', async () => {
    const heir = member('heir')
    for (const name of ['young', 'old', 'left', 'busy']) await member(name).cluster.beat()
    const away = member('away', { hostBound: true })
    await away.cluster.beat()
    await lives(heir, SILENT_MS + 1)
    await silentFor('young', DAY_MS - HOUR_MS)
    await silentFor('old', DAY_MS + 1_000)
    await member('left').cluster.leave()
    await running(away.store)
    await silentFor('away', DAY_MS + 1_000)
    await running(member('busy').store)
    expect(await heir.cluster.orphans()).toEqual([])
    expect(await names()).toEqual(['away', 'busy', 'heir', 'young'])
  })
})
