import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
import { CompiledQuery } from 'kysely'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Connection } from '../../src/store/connection.ts'
import { openPostgres } from '../../src/store/postgres.ts'
import { PostgresCluster, SILENT_MS } from '../../src/store/postgres-cluster.ts'
import { deploymentOf } from '../../src/store/settings.ts'
import { taskWrites } from '../../src/store/task-writes.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import { startTcpProxy, type TcpProxy } from '../helpers/tcp-proxy.ts'
import { describeStores, end, newTask, ORIGIN, SUCCESS, storesOver } from './contract.ts'
import { describeReleaseBefore } from './release-0.1.0.ts'
import { describeSettings } from './settings.ts'

let postgres: Postgres

beforeAll(async () => {
  postgres = await startPostgres()
}, 60_000)
afterAll(() => postgres[Symbol.asyncDispose]())

const open = async (url: string, poolSize = 10) => openPostgres(url, { instance: 'here', poolSize })

describeStores('Postgres', async () => open(await postgres.database()))

const named = new Map<string, string>()
const urlOf = async (name: string) => {
  const url = named.get(name) ?? (await postgres.database())
  named.set(name, url)
  return url
}
describeReleaseBefore('postgres', async (name) => open(await urlOf(name)))

const databaseOf = (url: string) => new URL(url).pathname.slice(1)
describeSettings('Postgres', {
  open: async (name) => open(await urlOf(name), 2),
  async copy(from, to) {
    const original = await urlOf(from)
    const copy = original.replace(databaseOf(original), `${databaseOf(original)}_copy`)
    const admin = original.replace(databaseOf(original), 'postgres')
    await query(admin, `create database ${databaseOf(copy)} template ${databaseOf(original)}`)
    named.set(to, copy)
  },
  async openFive(name) {
    const url = await urlOf(name)
    return Promise.all(Array.from({ length: 5 }, () => open(url, 2)))
  },
})

describe('the id of a deployment', () => {
  test('goes by the server, too: a dump that another server took in has an id of its own', async () => {
    const url = await postgres.database()
    const here = await open(url)
    const id = await deploymentOf(here)
    const identity = await here.identity()
    expect(identity).toMatch(/^\d{15,20} \d+$/)
    const elsewhere = { ...here, identity: async () => identity.replace(/^\d/, '0') }
    const other = await deploymentOf(elsewhere)
    expect(other).not.toBe(id)
    await here.close()
  })

  test('can be made by an ordinary role, and by one that may not ask for the server', async () => {
    const url = await postgres.database()
    await query(url, `create role ordinary login password 'not-a-secret'`)
    await query(url, 'grant create on schema public to ordinary')
    const asOrdinary = new URL(url)
    asOrdinary.username = 'ordinary'
    const plain = await open(asOrdinary.href)
    const identity = await plain.identity()
    const id = await deploymentOf(plain)
    expect(identity).toMatch(/^\d{15,20} \d+$/)
    expect(id).toMatch(/^[0-9a-f]{16}$/)
    await query(url, 'revoke execute on function pg_control_system() from public')
    expect(await plain.identity()).toBe(identity.split(' ')[1])
    await plain.close()
  })
})

describe('migrations', () => {
  test('five instances that find an empty database at once all find their tables', async () => {
    const url = await postgres.database()
    const connections = await Promise.all(Array.from({ length: 5 }, () => open(url, 2)))
    for (const connection of connections) {
      expect(await storesOver(connection).store.insert(newTask())).toBe(true)
      await connection.close()
    }
    expect(await migrationsOf(url)).toEqual([
      '0001-tasks-and-deliveries',
      '0002-instances',
      '0003-listing',
      '0004-settings',
      '0005-redeliveries',
      '0006-one-queue',
      '0007-no-log-cursors',
    ])
  })

  test('what a newer release has added to is used as it is', async () => {
    const url = await postgres.database()
    await (await open(url)).close()
    await query(url, `alter table tasks add column colour text default 'red'`)
    await query(url, `insert into kysely_migration values ('9999-colours', '2030-01-01')`)
    const connection = await open(url)
    const { store } = storesOver(connection)
    const task = newTask()
    await store.insert(task)
    expect(await store.claim(task.taskId, 0)).toMatchObject({ taskId: task.taskId })
    await connection.close()
    expect(await migrationsOf(url)).toContain('9999-colours')
  })
})

describe('the version before, whose waiting tasks were jobs of pg-boss', () => {
  const SEEN_AT = `(extract(epoch from clock_timestamp()) * 1000)::bigint`
  /** What takes our tables back to those of migration 0005, with a queue as it kept it. */
  const BACK = `
    drop index tasks_queued;
    alter table instances rename column beat_at to seen_at;
    alter table tasks add column log_cursor text;
    delete from kysely_migration where name >= '0006';
    create schema pgboss;
    create table pgboss.queue (name text);
    insert into pgboss.queue values ('task'), ('sweep'), ('__pgboss__send-it');
    create table pgboss.job (name text, data jsonb);`
  const beats = (url: string, seenAt = SEEN_AT) =>
    query(
      url,
      `insert into instances (name, host_bound, seen_at) values ('old-1', 1, ${seenAt})
       on conflict (name) do update set seen_at = excluded.seen_at`,
    )
  const schemas = async (url: string) =>
    (await query(url, `select 1 from pg_namespace where nspname = 'pgboss'`)).rowCount

  async function oldDatabase() {
    const url = await postgres.database()
    const connection = await open(url, 2)
    const { store } = storesOver(connection)
    await store.insert(newTask({ taskId: 'second', createdAt: 2 }))
    await store.insert(newTask({ taskId: 'first', createdAt: 1 }))
    await store.insert(newTask({ taskId: 'runs' }))
    await store.claim('runs', 0)
    await connection.close()
    await query(url, BACK)
    return url
  }

  test('leaves its waiting tasks and those that run; its queue is dropped', async () => {
    const url = await oldDatabase()
    // It has left.
    await beats(url, '0')
    const connection = await open(url)
    const { store } = storesOver(connection)
    expect(await store.claimNext({ at: 1, limit: 5 })).toMatchObject([
      { taskId: 'first', claim: 1 },
      { taskId: 'second', claim: 1 },
    ])
    expect(await store.get('runs')).toMatchObject({ status: 'provisioning', claim: 1 })
    expect(await schemas(url)).toBe(0)
    // Should it start now, it cannot say that it lives, and does nothing.
    await expect(beats(url)).rejects.toThrow('seen_at')
    await connection.close()
  })

  test('is waited for while it may have stopped just now', async () => {
    const url = await oldDatabase()
    await beats(url)
    const startedAt = performance.now()
    await (await open(url)).close()
    expect(performance.now() - startedAt).toBeGreaterThan(SILENT_MS - 1_000)
    expect(await schemas(url)).toBe(0)
  })

  test('keeps a new instance from starting for as long as it goes on, and nothing is changed', async () => {
    const url = await oldDatabase()
    await beats(url)
    const beating = setInterval(() => beats(url), 2_000)
    try {
      await expect(open(url)).rejects.toThrow(
        'instances of an earlier version still use this database: old-1. Stop all of them',
      )
    } finally {
      clearInterval(beating)
    }
    expect(await schemas(url)).toBe(1)
    expect(await migrationsOf(url)).not.toContain('0006-one-queue')
  })

  test('may share its schema with another program, which keeps it', async () => {
    const url = await oldDatabase()
    await query(url, `insert into pgboss.queue values ('mails')`)
    await (await open(url)).close()
    expect(await schemas(url)).toBe(1)
  })
})

test('the next waiting tasks are found in the order of their index', async () => {
  const connection = await open(await postgres.database(), 1)
  const { sql: text, parameters } = taskWrites(connection)
    .claimNext({ at: 1, limit: 2, instance: 'here' })
    .compile()
  const run = (statement: string, values: readonly unknown[] = []) =>
    connection.db.executeQuery<Record<string, string>>(CompiledQuery.raw(statement, [...values]))
  await run(
    `insert into tasks (task_id, task_file_name, status, worker_name, worker_state,
       terminate_on_completion, timeout_seconds, has_callback, claim, created_at, digest, sealed)
     select n, '', 'queued', '', 'none', 1, 1, 0, 0, n, '', '' from generate_series(1, 5000) as n`,
  )
  await run('analyze tasks')
  const { rows } = await run(`explain ${text}`, parameters)
  const plan = rows.map((row) => row['QUERY PLAN']).join('\n')
  expect(plan).toMatch(/LockRows .*\n *-> +Index (Only )?Scan using tasks_queued/)
  expect(plan).not.toContain('Seq Scan')
  await connection.close()
})

test('a server that ends a session in the breath in which it opens it ends nobody else', async () => {
  const message = (type: string, body: Buffer) => {
    const head = Buffer.alloc(5)
    head.write(type)
    head.writeInt32BE(body.length + 4, 1)
    return Buffer.concat([head, body])
  }
  const shutdown =
    'SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0'
  const farewell = Buffer.concat([
    message('R', Buffer.alloc(4)),
    message('Z', Buffer.from('I')),
    message('E', Buffer.from(shutdown)),
  ])
  const server = createServer((socket) => {
    socket.on('error', () => {})
    socket.once('data', () => socket.end(farewell))
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const uncaught: unknown[] = []
  const onUncaught = (err: unknown) => uncaught.push(err)
  process.prependListener('uncaughtException', onUncaught)
  await expect(open(`postgres://user@127.0.0.1:${port}/any`)).rejects.toThrow()
  process.off('uncaughtException', onUncaught)
  expect(uncaught).toEqual([])
  server.close()
})

describe('a connection that fails', () => {
  let url: string
  let proxy: TcpProxy
  let connection: Connection
  /** Of the same database, by a way that does not fail. */
  let safe: Connection

  beforeAll(async () => {
    url = await postgres.database()
    proxy = await startTcpProxy(postgres.port)
    connection = await open(url.replace(`:${postgres.port}/`, `:${proxy.port}/`), 2)
    safe = await open(url)
  })
  afterAll(async () => {
    await connection.close()
    await safe.close()
    await proxy[Symbol.asyncDispose]()
  })

  const stores = () => storesOver(connection)

  async function claimed(overrides: Parameters<typeof newTask>[0] = {}) {
    const { taskId } = newTask()
    await stores().store.insert(newTask({ taskId, ...overrides }))
    const task = await stores().store.claim(taskId, 0)
    if (!task) throw new Error('not claimed')
    return task
  }

  const UNAVAILABLE = { code: 'store_unavailable', retryAfterSeconds: expect.any(Number) }

  test('while nobody uses it is replaced unnoticed, whoever ends it', async () => {
    const { store } = stores()
    const terminate = `select pg_terminate_backend(pid) from pg_stat_activity where ${OURS}`
    for (const end of [async () => proxy.cut(), () => query(url, terminate)]) {
      const task = newTask()
      // Both of the pool's are open.
      await Promise.all([store.get('x'), store.get('y')])
      await end()
      await expect.poll(() => store.get('x').catch((err: unknown) => err)).toBeUndefined()
      expect(await store.insert(task)).toBe(true)
      expect(await store.get(task.taskId)).toMatchObject({ taskId: task.taskId })
    }
  })

  test('under a statement is told, and the next one has another', async () => {
    const { store } = stores()
    await Promise.all([store.get('x'), store.get('y')])
    await losing('request', 'where "tasks"."task_id"', async () => {
      await expect(store.get('x')).rejects.toMatchObject(UNAVAILABLE)
    })
    expect(await store.get('x')).toBeUndefined()
  })

  test('in the middle of many transactions leaves none half done, and the pool as large as it was', async () => {
    const { store } = stores()
    const tasks = await Promise.all(Array.from({ length: 10 }, () => claimed()))
    const losses = tasks.map(() => proxy.lose('request', 'insert into "task_logs"'))
    const answers = await Promise.allSettled(tasks.map((task) => store.finish(task, end())))
    expect(losses.map(({ hits }) => hits)).toEqual(tasks.map(() => 1))
    for (const answer of answers) {
      expect(answer).toMatchObject({ status: 'rejected', reason: UNAVAILABLE })
    }
    for (const { taskId } of tasks) {
      expect(await store.get(taskId)).toMatchObject({ status: 'provisioning' })
    }
    expect(await Promise.all(tasks.map((task) => store.finish(task, end())))).toEqual(
      tasks.map(() => true),
    )
  })

  describe.each(['answer', 'request'] as const)('when the %s of a commit is lost', (what) => {
    const isDone = what === 'answer'

    test('an insert is told as not done, and is found when it was', async () => {
      const { store } = stores()
      const task = newTask()
      await losing(what, 'insert into "tasks"', async () => {
        await expect(store.insert(task)).rejects.toMatchObject(UNAVAILABLE)
      })
      expect(await store.digestOf(task.taskId)).toEqual(
        isDone ? { digest: task.digest, status: 'queued' } : undefined,
      )
      expect(await store.insert(task)).toBe(!isDone)
    })

    test('a claim is made again, and is the same', async () => {
      const { store } = stores()
      const { taskId } = newTask()
      await store.insert(newTask({ taskId }))
      await losing(what, 'update "tasks" set "claim"', async () => {
        await expect(store.claim(taskId, 0)).rejects.toMatchObject(UNAVAILABLE)
      })
      expect(await store.claim(taskId, 0)).toMatchObject({ claim: 1, status: 'provisioning' })
    })

    test('a claim of the next is found among what is ours', async () => {
      const { store } = stores()
      const { taskId } = newTask()
      await connection.db.deleteFrom('tasks').execute()
      await store.insert(newTask({ taskId }))
      await losing(what, 'with "next" as', async () => {
        await expect(store.claimNext({ at: 1, limit: 5 })).rejects.toMatchObject(UNAVAILABLE)
      })
      const cluster = new PostgresCluster(safe, {
        ...{ instance: 'here', hostBound: false, hostGraceMs: 0 },
      })
      expect(await cluster.ours()).toEqual(isDone ? [{ taskId, claim: 1 }] : [])
      expect(await store.claimNext({ at: 1, limit: 5 })).toHaveLength(isDone ? 0 : 1)
    })

    test('an outcome is set once: the repetition says yes, and changes nothing that was kept', async () => {
      const { store, deliveries } = stores()
      const task = await claimed({ callbackUrl: `${ORIGIN}/hook` })
      const log = { content: Buffer.from('the log'), totalBytes: 7 }
      const delivery = { webhookId: 'msg_once', origin: ORIGIN, leaseUntil: null }
      const outcome = end({ log, logBytes: 7, delivery })
      await losing(what, 'commit', async () => {
        await expect(store.finish(task, outcome)).rejects.toMatchObject(UNAVAILABLE)
      })
      expect((await store.get(task.taskId))?.status).toBe(isDone ? 'succeeded' : 'provisioning')
      expect(await store.finish(task, outcome)).toBe(true)
      expect(await store.log(task.taskId)).toEqual(log)
      expect(await deliveries.state(task.taskId)).toMatchObject({ webhookId: 'msg_once' })
      // It is known to be done now.
      expect(await store.finish(task, outcome)).toBe(false)
    })

    test('an outcome that another instance set meanwhile is not taken for ours', async () => {
      const task = newTask({ callbackUrl: `${ORIGIN}/hook` })
      const [here, there] = [stores().store, storesOver(safe, 'there')]
      await here.insert(task)
      const waiting = await here.get(task.taskId)
      if (!waiting) throw new Error('not stored')
      // Two that end it while it waits, as two requests to cancel it do: the same claim.
      const ending = (webhookId: string) =>
        end({
          outcome: { ...SUCCESS, status: 'cancelled', reason: 'cancelled' },
          delivery: { webhookId, origin: ORIGIN, leaseUntil: null },
        })
      await losing(what, 'commit', async () => {
        await expect(here.finish(waiting, ending('msg_here'))).rejects.toMatchObject(UNAVAILABLE)
      })
      expect(await there.store.finish(waiting, ending('msg_there'))).toBe(!isDone)
      expect(await here.finish(waiting, ending('msg_here'))).toBe(isDone)
      expect(await there.deliveries.state(task.taskId)).toMatchObject({
        webhookId: isDone ? 'msg_here' : 'msg_there',
      })
    })

    test('an attempt is recorded once', async () => {
      const { store, deliveries } = stores()
      const task = await claimed({ callbackUrl: `${ORIGIN}/hook` })
      const delivery = { webhookId: 'msg_attempt', origin: ORIGIN, leaseUntil: null }
      await store.finish(task, end({ delivery }))
      const attempt = {
        number: 1,
        startedAt: 1,
        durationMs: 1,
        statusCode: 200,
        error: null,
        manual: false,
      }
      const recorded = () =>
        deliveries.recordAttempt(task.taskId, attempt, { status: 'delivered', nextAttemptAt: null })
      await losing(what, 'commit', async () => {
        await expect(recorded()).rejects.toMatchObject(UNAVAILABLE)
      })
      const state = await deliveries.state(task.taskId)
      expect(state).toMatchObject(
        isDone ? { status: 'delivered', attempts: [attempt] } : { status: 'pending', attempts: [] },
      )
      await recorded()
      expect(await deliveries.state(task.taskId)).toMatchObject({
        ...{ status: 'delivered', attempts: [attempt] },
      })
    })
  })

  test('an outcome of which it cannot be told at once whether it was set is told later', async () => {
    const { store } = stores()
    const task = await claimed()
    await losing('answer', 'commit', async () => {
      await expect(store.finish(task, end())).rejects.toMatchObject(UNAVAILABLE)
    })
    await losing('request', 'select "tasks"."claim"', async () => {
      await expect(store.finish(task, end())).rejects.toMatchObject(UNAVAILABLE)
    })
    expect(await store.finish(task, end())).toBe(true)
  })

  test('the answer to a single statement may be lost as well, and it may be sent again', async () => {
    const { store } = stores()
    const task = await claimed()
    await losing('answer', 'update "tasks" set "status"', async () => {
      await expect(store.markRunning(task, 4_000)).rejects.toMatchObject(UNAVAILABLE)
    })
    expect(await store.get(task.taskId)).toMatchObject({ status: 'running', startedAt: 4_000 })
    expect(await store.markRunning(task, 4_000)).toBe(true)
  })

  async function losing(what: 'answer' | 'request', bytes: string, work: () => Promise<void>) {
    const loss = proxy.lose(what, bytes)
    await work()
    expect(loss.hits).toBe(1)
  }
})

const OURS = `application_name = 'task-runner here'`

async function query(url: string, text: string): Promise<pg.QueryResult> {
  const client = new pg.Client(url)
  await client.connect()
  try {
    return await client.query(text)
  } finally {
    await client.end()
  }
}

async function migrationsOf(url: string): Promise<string[]> {
  const { rows } = await query(url, 'select name from kysely_migration order by name')
  return rows.map(({ name }) => name)
}
