import { randomBytes } from 'node:crypto'
import { copyFile, mkdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Task } from '../../src/core/task.ts'
import { Sealer } from '../../src/secrets/sealing.ts'
import { openPostgres } from '../../src/store/postgres.ts'
import { SqlTaskStore } from '../../src/store/task-store.ts'
import {
  attemptsFor,
  expectCounted,
  type Instances,
  runnerOf,
  startInstances,
  taskOf,
} from '../helpers/instances.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import {
  eventually,
  exitAfter,
  expectNoWorkers,
  finalTask,
  get,
  logOf,
  post,
} from '../helpers/recovery.ts'
import { processesOf, type Service } from '../helpers/service.ts'
import { newTask } from '../helpers/stores.ts'

const SLOW_MS = 180_000
const SILENT_MS = 15_000
const IDS_MANY = 50
const ORPHANS = 30

let postgres: Postgres

beforeAll(async () => {
  postgres = await startPostgres()
}, 60_000)
afterAll(() => postgres[Symbol.asyncDispose]())

/** The name that the instance has given itself in its data folder. */
async function nameKeptBy(instances: Instances, host: string): Promise<string> {
  const content = await readFile(join(instances.dataDirOf(host), 'instance'), 'utf8')
  return String(content.split('\n')[0])
}

/** The task ended as lost, and its caller was told so. */
async function expectLost(service: Service, taskId: string, host: string) {
  const task = await finalTask(service, taskId)
  expect(task).toMatchObject({ status: 'failed', reason: 'worker_lost', exit_code: null })
  expect(task.message).toBe(
    `The host of instance ${host} has not come back, and the worker ran there`,
  )
  expect(await logOf(service, taskId)).toBe(`[task-runner] ${task.message}\n`)
  return task
}

describe.concurrent('an instance with local workers', () => {
  test(
    'that was killed is not judged before its time, and goes on as if nothing had happened',
    async () => {
      await using instances = await startInstances(postgres)
      const { stage, sql } = instances
      const first = await instances.start('a')
      const codes = new Map([
        ['ends', 3],
        ['goes-on', 0],
      ])
      for (const [taskId, code] of codes) {
        await stage.submit(first, taskId, 'r-count.sh', { env: { CODE: String(code) } })
      }
      const owner = await runnerOf(first, 'ends')
      expect(owner).toBe(await nameKeptBy(instances, 'a'))
      await runnerOf(first, 'goes-on')
      const before = await taskOf(first, 'goes-on')
      const second = await instances.start('b')
      await exitAfter(first, 'SIGKILL')
      await stage.open('ends', 'open')
      // Longer than containers wait, and long enough for some more beats of the other.
      await eventually(async () => {
        const [row] = await sql(
          'select extract(epoch from clock_timestamp()) * 1000 - beat_at as ms from instances where name = $1',
          [owner],
        )
        expect(Number(row?.ms)).toBeGreaterThan(SILENT_MS + 4_000)
      })
      expect(await taskOf(second, 'ends')).toMatchObject({ status: 'running', instance: owner })

      const again = await instances.start('a')
      await expectCounted(second, stage, 'ends', 3)
      expect(await taskOf(second, 'goes-on')).toEqual(before)
      await stage.open('goes-on', 'open')
      await expectCounted(second, stage, 'goes-on')
      expect(await taskOf(second, 'goes-on')).toMatchObject({ instance: owner })
      await expectNoWorkers(again, instances.dataDirOf('a'))
    },
    SLOW_MS,
  )

  test(
    'whose data folder was copied to another host goes on: the copy is another instance, and judges none of its tasks',
    async () => {
      await using instances = await startInstances(postgres)
      const { stage } = instances
      const original = await instances.start('a')
      await stage.submit(original, 'runs', 'r-count.sh')
      const owner = await runnerOf(original, 'runs')
      // Without its workers, whose processes another host does not have.
      await mkdir(instances.dataDirOf('copy'))
      const fileOf = (host: string) => join(instances.dataDirOf(host), 'instance')
      await copyFile(fileOf('a'), fileOf('copy'))
      const copy = await instances.start('copy')
      const copied = await nameKeptBy(instances, 'copy')
      expect(copied).not.toBe(owner)
      await instances.beats(copied)
      expect(await taskOf(copy, 'runs')).toMatchObject({ status: 'running', instance: owner })
      await stage.open('runs', 'open')
      await expectCounted(copy, stage, 'runs')
      expect(await taskOf(copy, 'runs')).toMatchObject({ instance: owner })
      await expectNoWorkers(original, instances.dataDirOf('a'))
    },
    SLOW_MS,
  )

  test(
    'that does not come back in time has lost its tasks; who comes back late, or was paused, ends what is left of them',
    async () => {
      await using instances = await startInstances(postgres, { env: { HOST_GRACE_SECONDS: '3' } })
      const { stage, sql } = instances
      const [killed, paused] = await Promise.all([instances.start('a'), instances.start('p')])
      const submit = async (service: Service, taskId: string) => {
        await stage.submit(service, taskId, 'r-count.sh')
        return runnerOf(service, taskId)
      }
      // None takes what is the other's.
      paused.process.kill('SIGSTOP')
      const owners = new Map([['killed', await submit(killed, 'killed')]])
      killed.process.kill('SIGSTOP')
      paused.process.kill('SIGCONT')
      owners.set('paused', await submit(paused, 'paused'))
      paused.process.kill('SIGSTOP')
      await exitAfter(killed, 'SIGKILL')
      const last = await instances.start('b')
      for (const [taskId, owner] of owners) {
        const task = await expectLost(last, taskId, owner)
        const { body } = await stage.callbackOf(taskId)
        expect(body).toMatchObject({ success: false, logs: `[task-runner] ${task.message}\n` })
      }
      const read = async () => [await taskOf(last, 'killed'), await taskOf(last, 'paused')]
      await eventually(async () => {
        expect((await read()).map((task) => task.callback_status)).toEqual([
          'delivered',
          'delivered',
        ])
      })
      const before = await read()
      for (const host of ['a', 'p']) expect(processesOf(instances.dataDirOf(host))).not.toEqual([])

      paused.process.kill('SIGCONT')
      await expectNoWorkers(paused, instances.dataDirOf('p'))
      expect(await read()).toEqual(before)

      // A worker whose task has just ended is left to its run, for a minute.
      await sql('update tasks set finished_at = finished_at - 120000')
      const back = await instances.start('a')
      await expectNoWorkers(back, instances.dataDirOf('a'))
      for (const taskId of ['killed', 'paused']) {
        await expectLost(back, taskId, String(owners.get(taskId)))
        expect(attemptsFor(stage, taskId)).toBe(1)
      }
    },
    SLOW_MS,
  )

  test(
    'has its data folder to itself: a second one says so and ends, and the first goes on',
    async () => {
      await using instances = await startInstances(postgres)
      const { stage } = instances
      const first = await instances.start('a')
      const second = await instances.start('a')
      expect(await second.ended).toBe(1)
      expect(second.log.join('\n')).toContain(
        `The service cannot start: another service is using ${instances.dataDirOf('a')}/lock`,
      )
      await stage.open('after', 'before', 'during', 'after')
      await stage.submit(first, 'after', 'r-story.sh')
      expect(await finalTask(first, 'after')).toMatchObject({ status: 'succeeded' })
    },
    SLOW_MS,
  )

  test(
    'alone reads its logs and ends its tasks: others say where, follow, and pass a cancel on',
    async () => {
      await using instances = await startInstances(postgres)
      const { stage } = instances
      const first = await instances.start('a')
      for (const taskId of ['read', 'ended']) await stage.submit(first, taskId, 'r-count.sh')
      const owner = await runnerOf(first, 'read')
      await runnerOf(first, 'ended')
      const second = await instances.start('b')
      const elsewhere = `[task-runner] The task runs on instance ${owner}; its log is available there, and here once the task has ended\n`
      expect(await logOf(second, 'read')).toBe(elsewhere)
      const following = await fetch(`${second.url}/tasks/read/logs?follow=true`)
      const events = following.text()
      expect((await post(second, '/tasks/ended/cancel')).status).toBe(200)
      expect(await finalTask(second, 'ended')).toMatchObject({ status: 'cancelled' })
      await eventually(async () => expect(await logOf(first, 'read')).toContain('line 2\n'))
      await stage.open('read', 'open')
      await expectCounted(second, stage, 'read')
      const log = await logOf(first, 'read')
      const told = (await events).split('\n\n').filter((event) => event !== '')
      expect(told.at(0)).toBe(asEvent(elsewhere))
      expect(told.slice(1, -1)).toEqual([`id: ${log.length}\n${asEvent(log)}`])
      expect(told.at(-1)).toBe('event: end\ndata: {"status":"succeeded","reason":"completed"}')
      await expectNoWorkers(first, instances.dataDirOf('a'))
    },
    SLOW_MS,
  )

  test(
    `${IDS_MANY} ids, each posted to three instances at once, are ${IDS_MANY} tasks with one run and one outcome`,
    async () => {
      await using instances = await startInstances(postgres)
      const { stage } = instances
      const hosts = ['a', 'b', 'c']
      const all = await Promise.all(hosts.map((host) => instances.start(host)))
      const ids = Array.from({ length: IDS_MANY }, (_, index) => `raced-${index}`)
      for (const taskId of ids) await stage.open(taskId, 'open')
      const requestFor = (taskId: string, more = {}) => stage.request(taskId, 'r-count.sh', more)
      await Promise.all(
        ids.map(async (taskId) => {
          const answers = await Promise.all(
            all.map((service) => post(service, '/task-runner', requestFor(taskId))),
          )
          const words = answers.map(({ status, body }) => `${status} ${body.message}`).sort()
          expect(words).toEqual([
            expect.stringMatching(/^200 Already accepted: /),
            expect.stringMatching(/^200 Already accepted: /),
            '200 Started Task successfully',
          ])
        }),
      )
      for (const [index, taskId] of ids.entries()) {
        await expectCounted(all[index % 3] as Service, stage, taskId)
      }
      for (const service of all) {
        const other = await post(service, '/task-runner', requestFor('raced-0', { priority: 3 }))
        expect(other.status).toBe(409)
        expect((await get(service, '/tasks?limit=500')).body.tasks).toHaveLength(IDS_MANY)
      }
      expect(stage.receiver.received).toHaveLength(IDS_MANY)
      for (const [index, host] of hosts.entries()) {
        await expectNoWorkers(all[index] as Service, instances.dataDirOf(host))
      }
    },
    SLOW_MS,
  )

  test(
    'that is paused while it claims holds up nobody, though they are limited together',
    async () => {
      await using instances = await startInstances(postgres, { env: { MAX_CLUSTER_TASKS: '5' } })
      const { stage, sql } = instances
      const first = await instances.start('a')
      const blocking = new pg.Client(instances.databaseUrl)
      await blocking.connect()
      try {
        await blocking.query('begin; lock table tasks in exclusive mode')
        await eventually(async () => {
          // It has the turn to claim, and waits for the table.
          const waiting = await sql(
            `select from pg_locks as held join pg_locks as wanted using (pid)
             where held.locktype = 'advisory' and held.granted and not wanted.granted`,
          )
          expect(waiting.length).toBeGreaterThan(0)
        })
        first.process.kill('SIGSTOP')
      } finally {
        await blocking.end()
      }
      const second = await instances.start('b')
      await stage.open('waits', 'open')
      await stage.submit(second, 'waits', 'r-count.sh')
      await expectCounted(second, stage, 'waits')
    },
    SLOW_MS,
  )
})

test('of instances that race for an orphan one gets it; the others, and the one that had it, write nothing', async () => {
  const url = await postgres.database()
  const sealer = new Sealer(randomBytes(32))
  const names = ['dead', 'one', 'two', 'three']
  const connections = await Promise.all(
    names.map((instance) => openPostgres(url, { instance, poolSize: 5 })),
  )
  const stores = connections.map(
    (connection, index) => new SqlTaskStore(connection, sealer, { instance: names[index] ?? '' }),
  )
  const [dead, ...others] = stores as [SqlTaskStore, ...SqlTaskStore[]]
  try {
    await Promise.all(
      Array.from({ length: ORPHANS }, async (_, index) => {
        const taskId = `orphan-${index}`
        await dead.insert(newTask(taskId))
        const before = (await dead.claim(taskId, 0)) as Task
        const claimed = await Promise.all(
          others.map((store) => store.claim(taskId, 0, before.claim)),
        )
        const winners = claimed.flatMap((task) => (task ? [task] : []))
        expect(winners).toHaveLength(1)
        const winner = winners[0] as Task
        expect(await dead.markRunning(before, 1)).toBe(false)
        await dead.keepSecretValues(before, ['value'])
        expect(await dead.finish(before, endOf('worker_lost'))).toBe(false)
        expect(await dead.get(taskId)).toMatchObject({
          ...{ claim: 2, instance: winner.instance, status: 'provisioning' },
          ...{ startedAt: null, secretValues: [] },
        })
        expect(await dead.log(taskId)).toBeUndefined()
        const store = others[claimed.indexOf(winner as never)] as SqlTaskStore
        expect(await store.finish(winner, endOf('completed'))).toBe(true)
        expect(await dead.get(taskId)).toMatchObject({ status: 'failed', reason: 'completed' })
      }),
    )
  } finally {
    for (const connection of connections) await connection.close()
  }
})

function endOf(reason: 'completed' | 'worker_lost') {
  const content = Buffer.from('log\n')
  return {
    outcome: { status: 'failed' as const, reason, message: null, exitCode: null, signal: null },
    log: { content, totalBytes: content.length },
    ...{ logBytes: content.length, delivery: undefined, finishedAt: 1, keepWorker: false },
  }
}

/** As an event holds it: each line as data. */
function asEvent(text: string): string {
  return text
    .split('\n')
    .map((line) => `data: ${line}`)
    .join('\n')
}
