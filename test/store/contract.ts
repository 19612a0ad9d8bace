/** What TaskStore and DeliveryStore must do over every database. Each adapter's test calls this. */
import { randomBytes } from 'node:crypto'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import {
  DamagedTaskError,
  type LogTail,
  type NewDelivery,
  type NewTask,
} from '../../src/core/ports.ts'
import type { Outcome } from '../../src/core/task.ts'
import { Sealer } from '../../src/secrets/sealing.ts'
import type { Connection } from '../../src/store/connection.ts'
import { SqlDeliveryStore } from '../../src/store/delivery-store.ts'
import { SqlStatistics } from '../../src/store/statistics.ts'
import { SqlTaskStore } from '../../src/store/task-store.ts'

export const SEALER = new Sealer(Buffer.alloc(32, 7))
export const ORIGIN = 'https://receiver.example'
export const SUCCESS: Outcome = {
  ...{ status: 'succeeded', reason: 'completed' },
  ...{ message: null, exitCode: 0, signal: null },
}
export const EMPTY: LogTail = { content: Buffer.alloc(0), totalBytes: 0 }

let tasks = 0

export function newTask(overrides: Partial<NewTask> = {}): NewTask {
  tasks += 1
  return {
    taskId: `task ${tasks}`,
    taskFileName: 'one.sh',
    workerConfig: {},
    callbackUrl: null,
    callbackUrlToken: null,
    terminateOnCompletion: true,
    timeoutSeconds: 60,
    priority: 0,
    traceparent: null,
    digest: `digest ${tasks}`,
    workerName: `worker-${tasks}`,
    createdAt: 1_000 + tasks,
    ...overrides,
  }
}

export function storesOver(connection: Connection, instance = 'here', isShared = false) {
  const store = new SqlTaskStore(connection, SEALER, { instance, isShared })
  return { store, deliveries: new SqlDeliveryStore(connection, store) }
}

type End = Parameters<SqlTaskStore['finish']>[1]

export function end(overrides: Partial<End> = {}): End {
  return {
    outcome: SUCCESS,
    log: EMPTY,
    logBytes: 0,
    delivery: undefined,
    finishedAt: 5_000,
    keepWorker: false,
    ...overrides,
  }
}

function newDelivery(overrides: Partial<NewDelivery> = {}): NewDelivery {
  return { webhookId: `msg_${tasks}`, origin: ORIGIN, leaseUntil: null, ...overrides }
}

/** `open` gives an empty database each time. */
export function describeStores(name: string, open: () => Promise<Connection>): void {
  describe(`${name}, as a TaskStore and DeliveryStore`, () => {
    let connection: Connection
    let store: SqlTaskStore
    let deliveries: SqlDeliveryStore

    beforeAll(async () => {
      connection = await open()
      ;({ store, deliveries } = storesOver(connection))
    })
    // One database for all, emptied in between: opening one takes longer than most tests.
    beforeEach(async () => {
      for (const table of ['delivery_attempts', 'deliveries', 'task_logs', 'tasks'] as const) {
        await connection.db.deleteFrom(table).execute()
      }
    })
    afterAll(() => connection.close())

    async function inserted(overrides: Partial<NewTask> = {}): Promise<NewTask> {
      const task = newTask(overrides)
      expect(await store.insert(task)).toBe(true)
      return task
    }

    async function claimed(overrides: Partial<NewTask> = {}) {
      const { taskId } = await inserted(overrides)
      const task = await store.claim(taskId, 0)
      if (!task) throw new Error('not claimed')
      return task
    }

    async function finished(
      overrides: Partial<NewTask> = {},
      how: Partial<End> = {},
    ): Promise<string> {
      const task = await claimed(overrides)
      expect(await store.finish(task, end(how))).toBe(true)
      return task.taskId
    }

    /** A finished task whose callback is due at `dueAt`. */
    async function due(dueAt: number, overrides: Partial<NewDelivery> = {}): Promise<string> {
      return finished(
        { callbackUrl: `${overrides.origin ?? ORIGIN}/hook` },
        { finishedAt: dueAt, delivery: newDelivery(overrides) },
      )
    }

    test('what ended within a span of time is counted and measured', async () => {
      const waited = async (claimedAt: number, how: Partial<End>, callbackAfter?: number) => {
        const callbackUrl = callbackAfter === undefined ? null : `${ORIGIN}/hook`
        const { taskId } = await inserted({ createdAt: 1_000, callbackUrl })
        const task = await store.claim(taskId, claimedAt)
        if (!task) throw new Error('not claimed')
        // A claim that follows changes nothing of how long it waited.
        const again = await store.claim(taskId, claimedAt + 500, task.claim)
        const finishedAt = how.finishedAt ?? 0
        const leaseUntil = finishedAt + 60_000
        const delivery = callbackAfter === undefined ? undefined : newDelivery({ leaseUntil })
        await store.finish(again ?? task, end({ ...how, delivery }))
        if (callbackAfter === undefined) return
        const startedAt = finishedAt + callbackAfter
        await deliveries.recordAttempt(
          taskId,
          { ...attempt(1), startedAt, durationMs: 5 },
          { status: 'delivered', nextAttemptAt: null },
          leaseUntil,
        )
      }
      const failed: Outcome = { ...SUCCESS, status: 'failed', reason: 'exit_code', exitCode: 3 }
      await waited(1_100, { finishedAt: 9_999 })
      await waited(1_100, { finishedAt: 10_000 }, 40)
      await waited(1_300, { finishedAt: 10_999, outcome: failed }, 60)
      await waited(3_000, { finishedAt: 12_000, outcome: failed })
      await waited(1_000, { finishedAt: 13_000 })
      await inserted({ createdAt: 10_000 })
      const statistics = new SqlStatistics(connection)
      expect(await statistics.ended(10_000, 11_000)).toEqual({
        ...{ succeeded: 1, failed: 1, cancelled: 0 },
        reasons: [{ reason: 'exit_code', count: 1 }],
        queueWait: { mean: 0.2, max: 0.3 },
        callbackDelay: { mean: 0.05, max: 0.06 },
      })
      expect(await statistics.ended(12_000, 13_000)).toMatchObject({
        ...{ succeeded: 0, failed: 1 },
        queueWait: { mean: 2, max: 2 },
      })
      const none = { mean: null, max: null }
      expect(await statistics.ended(11_000, 12_000)).toEqual({
        ...{ succeeded: 0, failed: 0, cancelled: 0, reasons: [] },
        ...{ queueWait: none, callbackDelay: none },
      })
    })

    describe('taking tasks in', () => {
      test('a task comes back as it went in', async () => {
        const task = await inserted({
          workerConfig: { envVariables: { A: 'é' }, startupScript: 'x' },
          callbackUrl: 'https://receiver.example/hook?a=b',
          callbackUrlToken: 'a token',
          terminateOnCompletion: false,
        })
        const { digest: _, ...seen } = task
        expect(await store.get(task.taskId)).toEqual({
          ...seen,
          seq: expect.any(Number),
          status: 'queued',
          claim: 0,
          instance: null,
          callbackStatus: 'pending',
          waitingFor: null,
          secretValues: [],
          ...{ reason: null, message: null, exitCode: null, signal: null },
          ...{ claimedAt: null, startedAt: null, finishedAt: null, logBytes: null },
        })
      })

      test('an id is taken once; the second insert changes nothing', async () => {
        const task = await inserted({ taskFileName: 'first.sh' })
        expect(await store.insert({ ...task, taskFileName: 'second.sh' })).toBe(false)
        expect(await store.get(task.taskId)).toMatchObject({ taskFileName: 'first.sh' })
      })

      test('of twenty inserts of one id at once, one is the first', async () => {
        const task = newTask()
        const answers = await Promise.all(Array.from({ length: 20 }, () => store.insert(task)))
        expect(answers.filter((isFirst) => isFirst)).toEqual([true])
        expect(await store.list({ limit: 100 })).toHaveLength(1)
      })

      test('the digest is told with the status; an unknown task has none', async () => {
        const task = await inserted()
        expect(await store.digestOf(task.taskId)).toEqual({ digest: task.digest, status: 'queued' })
        expect(await store.digestOf('unknown')).toBeUndefined()
        expect(await store.get('unknown')).toBeUndefined()
      })

      test.each([
        "it's",
        'a"b',
        '%',
        'é😀',
        'x'.repeat(255),
        '__proto__',
        "'; drop table tasks; --",
      ])('the id %j is like any other', async (taskId) => {
        await inserted({ taskId })
        expect(await store.get(taskId)).toMatchObject({ taskId, status: 'queued' })
        expect(await store.claim(taskId, 0)).toMatchObject({ taskId, claim: 1 })
      })
    })

    describe('claiming', () => {
      test('a claim moves a queued task to provisioning and raises its number', async () => {
        const { taskId } = await inserted({ callbackUrlToken: 'a token' })
        expect(await store.claim(taskId, 0)).toMatchObject({
          ...{ taskId, status: 'provisioning', claim: 1 },
          ...{ cancelRequested: false, callbackUrlToken: 'a token' },
        })
        expect(await store.claim(taskId, 0, 1)).toMatchObject({ status: 'provisioning', claim: 2 })
      })

      test('a claim whose answer was lost is given again, to the same instance only', async () => {
        const { taskId } = await inserted()
        const other = storesOver(connection, 'there').store
        expect(await store.claim(taskId, 0)).toMatchObject({ claim: 1, instance: 'here' })
        expect(await store.claim(taskId, 0)).toMatchObject({ claim: 1, instance: 'here' })
        expect(await other.claim(taskId, 0)).toBeUndefined()
        expect(await other.claim(taskId, 0, 1)).toMatchObject({ claim: 2, instance: 'there' })
        expect(await store.claim(taskId, 0)).toBeUndefined()
        expect(await store.claim(taskId, 0, 1)).toBeUndefined()
      })

      test('a claim leaves a running task running, and remembers since when', async () => {
        const task = await claimed()
        expect(await store.markRunning(task, 4_000)).toBe(true)
        expect(await store.claim(task.taskId, 0, 1)).toMatchObject({
          ...{ status: 'running', claim: 2, startedAt: 4_000 },
        })
      })

      test('a final or unknown task cannot be claimed', async () => {
        expect(await store.claim(await finished(), 0)).toBeUndefined()
        expect(await store.claim('unknown', 0)).toBeUndefined()
      })

      test('of many instances that claim a task at once one gets it', async () => {
        const { taskId } = await inserted()
        const stores = Array.from({ length: 10 }, (_, at) => storesOver(connection, `i${at}`).store)
        const claims = await Promise.all(stores.map((each) => each.claim(taskId, 0)))
        expect(claims.filter((task) => task !== undefined)).toEqual([
          expect.objectContaining({ claim: 1 }),
        ])
      })
    })

    describe('claiming the next', () => {
      const next = async (limit: number, more: { runningMax?: number } = {}) =>
        (await store.claimNext({ at: 7_000, limit, ...more })).map(({ taskId }) => taskId)

      test('moves them to provisioning, with all that a claim tells', async () => {
        const { taskId } = await inserted({ callbackUrlToken: 'a token' })
        await store.requestCancel(taskId, 1)
        expect(await store.claimNext({ at: 7_000, limit: 10 })).toEqual([
          expect.objectContaining({
            ...{ taskId, status: 'provisioning', claim: 1, instance: 'here' },
            ...{ claimedAt: 7_000, cancelRequested: true, callbackUrlToken: 'a token' },
          }),
        ])
        expect(await store.get(taskId)).toMatchObject({ status: 'provisioning', claim: 1 })
        expect(await store.workersToTerminate()).toEqual([])
      })

      test('goes by age, of which a step of priority is worth a minute, then by arrival', async () => {
        const minute = 60_000
        const at = async (taskId: string, minutes: number, priority = 0) =>
          inserted({ taskId, createdAt: 1e12 + minutes * minute, priority })
        await at('too late', 15, 9)
        await at('old', 0)
        await at('newer', 5)
        await at('urgent', 8, 9)
        await at('a little', 6, 2)
        await at('newer, too', 5)
        expect(await next(2)).toEqual(['urgent', 'old'])
        expect(await next(3)).toEqual(['a little', 'newer', 'newer, too'])
        expect(await next(3)).toEqual(['too late'])
        expect(await next(3)).toEqual([])
      })

      test('takes neither what runs nor what has ended', async () => {
        await claimed()
        await finished()
        const { taskId } = await inserted()
        expect(await next(10)).toEqual([taskId])
      })

      test('gives each of 60 tasks to one of many who ask at once', async () => {
        const ids: string[] = []
        for (let count = 0; count < 60; count += 1) ids.push((await inserted()).taskId)
        const stores = Array.from({ length: 10 }, (_, at) => storesOver(connection, `i${at}`).store)
        const claims = await Promise.all(
          [...stores, ...stores].map((each) => each.claimNext({ at: 0, limit: 7 })),
        )
        expect(claims.every((tasks) => tasks.length <= 7)).toBe(true)
        expect(claims.flatMap((tasks) => tasks.map(({ taskId }) => taskId)).sort()).toEqual(
          ids.sort(),
        )
      })

      test('says which parameters are damaged, and claims the others', async () => {
        const [damaged, sound] = [await inserted(), await inserted()]
        await damage(connection, damaged.taskId)
        const tasks = await store.claimNext({ at: 0, limit: 5 })
        expect(tasks).toMatchObject([
          { taskId: damaged.taskId, damage: expect.any(DamagedTaskError), callbackUrl: null },
          { taskId: sound.taskId, claim: 1 },
        ])
        expect(tasks[1]?.damage).toBeUndefined()
      })

      test('a task that is put back waits where it was, and keeps its claim', async () => {
        const [first] = [await inserted(), await inserted()]
        const [task] = await store.claimNext({ at: 0, limit: 1 })
        if (!task) throw new Error('not claimed')
        expect(task.taskId).toBe(first.taskId)
        await store.putBack(task)
        expect(await store.get(first.taskId)).toMatchObject({
          ...{ status: 'queued', instance: null, claimedAt: null, claim: 1 },
        })
        expect(await store.claimNext({ at: 9, limit: 1 })).toMatchObject([
          { taskId: first.taskId, claim: 2, claimedAt: 9 },
        ])
        // Another one has it by now.
        await store.putBack(task)
        expect(await store.get(first.taskId)).toMatchObject({ status: 'provisioning', claim: 2 })
      })

      test('what waits is counted, up to a maximum', async () => {
        expect(await store.countQueued(10)).toBe(0)
        for (let count = 0; count < 4; count += 1) await inserted()
        await claimed()
        expect(await store.countQueued(10)).toBe(4)
        expect(await store.countQueued(3)).toBe(3)
      })
    })

    describe('a task whose parameters are damaged', () => {
      test('is claimed with words that say so, and can be noted as waiting and ended', async () => {
        const { taskId } = await inserted({ callbackUrl: `${ORIGIN}/hook` })
        await damage(connection, taskId)
        for (const attempt of ['first', 'second']) {
          const task = await store.claim(taskId, 0)
          if (!task?.damage) throw new Error(`${attempt}: not claimed as damaged`)
          expect(task.damage.message).toBe(`The stored parameters of task "${taskId}" are damaged`)
          expect(task).toMatchObject({ taskId, claim: 1, callbackUrl: null })
          await store.noteWaiting(task, task.damage.message)
        }
        const error = await store.get(taskId).catch((err: unknown) => err)
        if (!(error instanceof DamagedTaskError)) throw error
        expect(error.task).toMatchObject({ status: 'provisioning', waitingFor: error.message })
        const outcome: Outcome = { ...SUCCESS, status: 'failed', reason: 'internal_error' }
        expect(await store.finish(error.task, end({ outcome }))).toBe(true)
        expect(await store.get(taskId)).toMatchObject({ ...outcome, callbackUrl: null })
      })

      test('hinders no other', async () => {
        const damaged = await inserted()
        const other = await inserted()
        await damage(connection, damaged.taskId)
        expect(await store.list({ limit: 10 })).toHaveLength(2)
        expect(await store.claim(other.taskId, 0)).toMatchObject({ claim: 1 })
      })
    })

    describe('an instance whose claim was taken over', () => {
      test('does not mark the task running', async () => {
        const stale = await claimed()
        await store.claim(stale.taskId, 0, stale.claim)
        expect(await store.markRunning(stale, 4_000)).toBe(false)
        expect(await store.get(stale.taskId)).toMatchObject({
          ...{ status: 'provisioning', startedAt: null },
        })
      })

      test('does not finish it: no outcome, no log, no delivery', async () => {
        const stale = await claimed({ callbackUrl: `${ORIGIN}/hook` })
        const task = await store.claim(stale.taskId, 0, stale.claim)
        const log = { content: Buffer.from('stale'), totalBytes: 5 }
        expect(await store.finish(stale, end({ log, delivery: newDelivery() }))).toBe(false)
        expect(await store.get(stale.taskId)).toMatchObject({ status: 'provisioning' })
        expect(await store.log(stale.taskId)).toBeUndefined()
        expect(await deliveries.state(stale.taskId)).toBeUndefined()
        expect(task && (await store.finish(task, end()))).toBe(true)
      })
    })

    describe('what a task waits for', () => {
      const waitingFor = async (taskId: string) => {
        const [listed] = await store.list({ limit: 1 })
        const { waitingFor } = (await store.get(taskId)) ?? {}
        expect(listed, 'the list says the same').toMatchObject({ taskId, waitingFor })
        return waitingFor
      }

      test('is kept, replaced and cleared, of tasks in the queue, too', async () => {
        const { taskId } = await inserted()
        await store.noteWaiting({ taskId, claim: 0 }, 'No disk space is left')
        expect(await waitingFor(taskId)).toBe('No disk space is left')
        const task = await store.claim(taskId, 0)
        if (!task) throw new Error('not claimed')
        for (const words of ['The engine does not answer', 'a\0b', null]) {
          await store.noteWaiting(task, words)
          expect(await waitingFor(taskId)).toBe(words?.replace('\0', '') ?? null)
        }
      })

      test('is over once the task is claimed, runs, or has ended', async () => {
        const { taskId } = await inserted()
        await store.noteWaiting({ taskId, claim: 0 }, 'words')
        expect(await store.claim(taskId, 0)).toMatchObject({ claim: 1, waitingFor: null })
        const task = await store.claim(taskId, 0)
        if (!task) throw new Error('not claimed')
        await store.noteWaiting(task, 'words')
        expect(await store.markRunning(task, 1)).toBe(true)
        expect(await waitingFor(taskId)).toBeNull()
        await store.noteWaiting(task, 'words')
        expect(await waitingFor(taskId)).toBe('words')
        expect(await store.finish(task, end())).toBe(true)
        expect(await waitingFor(taskId)).toBeNull()
      })

      test('is not noted by an instance whose claim was taken over, nor after the end', async () => {
        const stale = await claimed()
        const task = await store.claim(stale.taskId, 0, stale.claim)
        if (!task) throw new Error('not claimed')
        await store.noteWaiting(stale, 'stale words')
        expect(await waitingFor(stale.taskId)).toBeNull()
        await store.noteWaiting(task, 'words')
        await store.noteWaiting(stale, null)
        expect(await waitingFor(stale.taskId)).toBe('words')
        await store.finish(task, end())
        await store.noteWaiting(task, 'late words')
        expect(await waitingFor(stale.taskId)).toBeNull()
      })
    })

    describe('finishing', () => {
      test('outcome, log and delivery are there together', async () => {
        const task = await claimed({ callbackUrl: `${ORIGIN}/hook` })
        const outcome: Outcome = {
          ...{ status: 'failed', reason: 'signal', message: 'Ended by SIGKILL' },
          ...{ exitCode: 137, signal: 'SIGKILL' },
        }
        const log = { content: Buffer.from('the log'), totalBytes: 99 }
        const delivery = newDelivery({ webhookId: 'msg_a' })
        expect(await store.finish(task, end({ outcome, log, logBytes: 99, delivery }))).toBe(true)
        expect(await store.get(task.taskId)).toMatchObject({
          ...outcome,
          ...{ finishedAt: 5_000, logBytes: 99, callbackStatus: 'pending' },
        })
        expect(await store.log(task.taskId)).toEqual(log)
        expect(await deliveries.state(task.taskId)).toEqual({
          ...{ status: 'pending', webhookId: 'msg_a', nextAttemptAt: 5_000, attempts: [] },
        })
      })

      test('of ten outcomes at once one wins, whole', async () => {
        const task = await claimed({ callbackUrl: `${ORIGIN}/hook` })
        const answers = await Promise.all(
          Array.from({ length: 10 }, (_, index) =>
            store.finish(
              task,
              end({
                outcome: { ...SUCCESS, status: 'failed', reason: 'exit_code', exitCode: index },
                log: { content: Buffer.from(`log ${index}`), totalBytes: index },
                logBytes: index,
                delivery: newDelivery({ webhookId: `msg_${index}` }),
              }),
            ),
          ),
        )
        expect(answers.filter((won) => won)).toEqual([true])
        const winner = answers.indexOf(true)
        expect(await store.get(task.taskId)).toMatchObject({ exitCode: winner, logBytes: winner })
        expect((await store.log(task.taskId))?.content.toString()).toBe(`log ${winner}`)
        expect((await deliveries.state(task.taskId))?.webhookId).toBe(`msg_${winner}`)
      })

      test('the values of variables, which have served, are forgotten; their names are not', async () => {
        const taskId = await finished({
          workerConfig: {
            ...{ envVariables: { NAME: 'secret' }, startupScript: 'echo' },
            imageConfig: { username: 'robot', password: 'secret' },
          },
          callbackUrl: `${ORIGIN}/hook`,
          callbackUrlToken: 'token',
        })
        expect(await store.get(taskId)).toMatchObject({
          workerConfig: {
            ...{ envVariables: { NAME: '' }, startupScript: 'echo' },
            imageConfig: { username: 'robot', password: '' },
          },
          ...{ callbackUrl: `${ORIGIN}/hook`, callbackUrlToken: 'token' },
        })
      })

      test('a finished task is not finished, run or claimed again', async () => {
        const task = await claimed()
        await store.finish(task, end())
        const again = end({ outcome: { ...SUCCESS, status: 'failed', reason: 'worker_lost' } })
        expect(await store.finish(task, again)).toBe(false)
        expect(await store.markRunning(task, 1)).toBe(false)
        expect(await store.get(task.taskId)).toMatchObject(SUCCESS)
      })

      test('when a part cannot be written, nothing is', async () => {
        const task = await claimed({ callbackUrl: `${ORIGIN}/hook` })
        await connection.db
          .insertInto('task_logs')
          .values({
            ...{ task_id: task.taskId, encoding: 'plain', total_bytes: 1 },
            content: Buffer.from('x'),
          })
          .execute()
        await expect(store.finish(task, end({ delivery: newDelivery() }))).rejects.toThrow()
        expect(await store.get(task.taskId)).toMatchObject({ status: 'provisioning' })
        expect(await deliveries.state(task.taskId)).toBeUndefined()
      })

      test.each([
        ['empty', Buffer.alloc(0)],
        ['of one byte', Buffer.from('x')],
        ['binary', Buffer.from([0, 255, 128, 10, 0, 195])],
        ['of every byte', Buffer.from(Array.from({ length: 256 }, (_, byte) => byte))],
        ['just plain', Buffer.alloc(1024, 'a')],
        ['just compressed', Buffer.alloc(1025, 'a')],
        ['large and random', randomBytes(5 * 1024 * 1024)],
        ['a part of a larger buffer', Buffer.from('0123456789').subarray(3, 6)],
      ])('a log that is %s comes back byte for byte', async (_, content) => {
        const log = { content, totalBytes: content.length + 7 }
        const stored = await store.log(await finished({}, { log }))
        expect(stored?.totalBytes).toBe(log.totalBytes)
        expect(stored && Buffer.compare(stored.content, content)).toBe(0)
      })
    })

    describe('cancelling', () => {
      test('a request is noted, told with the next claim, and may be repeated', async () => {
        const { taskId } = await inserted()
        expect(await store.requestCancel(taskId, 2_000)).toMatchObject({ taskId, status: 'queued' })
        expect(await store.requestCancel(taskId, 3_000)).toMatchObject({ taskId })
        expect(await store.claim(taskId, 0)).toMatchObject({ cancelRequested: true })
      })

      test('a final or unknown task has nothing to cancel', async () => {
        expect(await store.requestCancel(await finished(), 2_000)).toBeUndefined()
        expect(await store.requestCancel('unknown', 2_000)).toBeUndefined()
      })
    })

    describe('lists', () => {
      test('they are newest first, in pages that neither repeat nor miss a task', async () => {
        const ids: string[] = []
        for (let count = 0; count < 7; count += 1) ids.push((await inserted()).taskId)
        const seen: string[] = []
        let before: number | undefined
        for (let page = 0; page < 3; page += 1) {
          const tasks_ = await store.list({ limit: 3, before })
          expect(tasks_).toHaveLength(page === 2 ? 1 : 3)
          seen.push(...tasks_.map(({ taskId }) => taskId))
          before = tasks_.at(-1)?.seq
        }
        expect(seen).toEqual(ids.toReversed())
        expect(await store.list({ limit: 3, before })).toEqual([])
      })

      test('they are filtered by status and by file, and both', async () => {
        const queued = await inserted({ taskFileName: 'a.sh' })
        const running = await claimed({ taskFileName: 'a.sh' })
        await store.markRunning(running, 1)
        const done = await finished({ taskFileName: 'b.sh' })
        const idsOf = async (filter: object) =>
          (await store.list({ limit: 10, ...filter })).map(({ taskId }) => taskId)
        expect(await idsOf({ status: 'succeeded' })).toEqual([done])
        expect(await idsOf({ taskFileName: 'a.sh' })).toEqual([running.taskId, queued.taskId])
        expect(await idsOf({ taskFileName: 'a.sh', status: 'queued' })).toEqual([queued.taskId])
        expect(await idsOf({ taskFileName: 'b.sh', status: 'queued' })).toEqual([])
      })

      test('nothing secret is in them', async () => {
        await inserted({
          callbackUrl: `${ORIGIN}/secret-path`,
          callbackUrlToken: 'secret-token',
          workerConfig: { envVariables: { A: 'secret-value' } },
        })
        expect(JSON.stringify(await store.list({ limit: 10 }))).not.toContain('secret')
      })

      test('the callback state goes with a task', async () => {
        const none = await inserted()
        const pending = await inserted({ callbackUrl: `${ORIGIN}/hook` })
        const given = await due(1)
        await deliveries.recordAttempt(given, attempt(1), {
          ...{ status: 'given_up', nextAttemptAt: null },
        })
        const statuses = new Map(
          (await store.list({ limit: 10 })).map((task) => [task.taskId, task.callbackStatus]),
        )
        expect(statuses.get(none.taskId)).toBe('none')
        expect(statuses.get(pending.taskId)).toBe('pending')
        expect(statuses.get(given)).toBe('given_up')
      })

      test('what is to be taken up was claimed, or waits and is to be ended, in its order', async () => {
        const one = await claimed()
        const two = await inserted()
        await finished()
        await inserted()
        const five = await claimed()
        await store.markRunning(one, 1)
        await store.requestCancel(two.taskId, 1)
        const all = [
          { taskId: one.taskId, status: 'running', claim: 1 },
          { taskId: two.taskId, status: 'queued', claim: 0 },
          { taskId: five.taskId, status: 'provisioning', claim: 1 },
        ]
        expect(await store.live()).toEqual(all)
        expect(await storesOver(connection, 'there').store.live()).toEqual(all)
        // What other instances have claimed is theirs.
        expect(await storesOver(connection, 'here', true).store.live()).toEqual(all)
        expect(await storesOver(connection, 'there', true).store.live()).toEqual([all[1]])
      })
    })

    describe('workers', () => {
      test('the worker of a finished task is to be terminated, until it was', async () => {
        const task = await claimed()
        expect(await store.workersToTerminate()).toEqual([])
        await store.finish(task, end())
        const { taskId, workerName } = task
        expect(await store.workersToTerminate()).toEqual([{ taskId, workerName }])
        await store.workerTerminated(taskId)
        expect(await store.workersToTerminate()).toEqual([])
      })

      test('neither a kept worker nor one that was never made is to be terminated', async () => {
        const kept = await finished({}, { keepWorker: true })
        const { taskId } = await inserted()
        const cancelled = await store.get(taskId)
        if (!cancelled) throw new Error('not stored')
        await store.finish(
          cancelled,
          end({ outcome: { ...SUCCESS, status: 'cancelled', reason: 'cancelled' } }),
        )
        expect(await store.workersToTerminate()).toEqual([])
        expect(await store.workerOwner(kept)).toMatchObject({
          ...{ status: 'succeeded', finishedAt: 5_000, kept: true },
        })
        expect(await store.workerOwner(cancelled.taskId)).toMatchObject({ kept: false })
        expect(await store.workerOwner('unknown')).toBeUndefined()
      })
    })

    describe('retention', () => {
      const gone = async (how: Partial<End>, overrides: Partial<NewTask> = {}) => {
        const taskId = await finished(overrides, how)
        await store.workerTerminated(taskId)
        return taskId
      }

      test('finished tasks go with their logs and deliveries; younger and live ones stay', async () => {
        const old = await gone({ finishedAt: 1_999 })
        const delivered = await gone(
          { finishedAt: 1_999, delivery: newDelivery() },
          { callbackUrl: `${ORIGIN}/hook` },
        )
        await deliveries.recordAttempt(delivered, attempt(1), {
          ...{ status: 'delivered', nextAttemptAt: null },
        })
        const young = await gone({ finishedAt: 2_000 })
        const live = await claimed({ createdAt: 0 })
        expect(await store.removeFinishedBefore(2_000)).toBe(2)
        for (const taskId of [old, delivered]) {
          expect(await store.get(taskId)).toBeUndefined()
          expect(await store.log(taskId)).toBeUndefined()
          expect(await deliveries.state(taskId)).toBeUndefined()
        }
        for (const taskId of [young, live.taskId]) expect(await store.get(taskId)).toBeDefined()
        expect(await store.removeFinishedBefore(2_000)).toBe(0)
      })

      test('a task whose delivery is pending stays, however old', async () => {
        const taskId = await gone(
          { finishedAt: 1, delivery: newDelivery() },
          { callbackUrl: `${ORIGIN}/hook` },
        )
        expect(await store.removeFinishedBefore(1e15)).toBe(0)
        expect(await store.get(taskId)).toBeDefined()
        await deliveries.recordAttempt(taskId, attempt(1), {
          ...{ status: 'given_up', nextAttemptAt: null },
        })
        expect(await store.removeFinishedBefore(1e15)).toBe(1)
      })

      test('a task whose worker is still there stays', async () => {
        const left = await finished({}, { finishedAt: 1 })
        const kept = await finished({}, { finishedAt: 1, keepWorker: true })
        expect(await store.removeFinishedBefore(1e15)).toBe(0)
        for (const taskId of [left, kept]) await store.workerTerminated(taskId)
        expect(await store.removeFinishedBefore(1e15)).toBe(2)
      })
    })

    describe('deliveries', () => {
      const take = (now: number, exceptOrigins: string[] = [], leaseUntil = now + 1e6) =>
        deliveries.takeDue({ now, leaseUntil, exceptOrigins })

      test('the oldest that is due is taken first, and none before its time', async () => {
        const later = await due(3_000)
        const first = await due(1_000)
        const second = await due(2_000)
        expect(await take(999)).toBeUndefined()
        expect((await take(2_500))?.taskId).toBe(first)
        expect((await take(2_500))?.taskId).toBe(second)
        expect(await take(2_500)).toBeUndefined()
        expect((await take(3_000))?.taskId).toBe(later)
      })

      test('what is taken tells what is needed for the attempt', async () => {
        const taskId = await due(1_000, { webhookId: 'msg_x' })
        expect(await take(1_000)).toEqual({
          ...{ taskId, webhookId: 'msg_x', origin: ORIGIN },
          ...{ manualAttempts: 0, resumeAt: null },
          ...{ attempts: 0, manual: false, deliveredBefore: false, leaseUntil: 1_001_000 },
        })
      })

      test('origins may be left out', async () => {
        const a = await due(1_000, { origin: 'https://a.example' })
        const b = await due(2_000, { origin: 'https://b.example' })
        expect(await take(5_000, ['https://a.example', 'https://b.example'])).toBeUndefined()
        expect((await take(5_000, ['https://a.example']))?.taskId).toBe(b)
        expect((await take(5_000, ['https://c.example']))?.taskId).toBe(a)
      })

      test('takers at once never take the same', async () => {
        for (let count = 0; count < 5; count += 1) await due(1_000)
        const taken = await Promise.all(Array.from({ length: 10 }, () => take(1_000)))
        const ids = taken.flatMap((each) => (each ? [each.taskId] : []))
        expect(ids).toHaveLength(5)
        expect(new Set(ids).size).toBe(5)
      })

      test('a lease that runs out makes the delivery due again', async () => {
        const taskId = await due(1_000)
        await take(1_000, [], 1_500)
        expect(await take(1_499)).toBeUndefined()
        expect((await take(1_500))?.taskId).toBe(taskId)
      })

      test('the lease of whoever commits holds from the start', async () => {
        const taskId = await due(1_000, { leaseUntil: 9_000 })
        expect(await take(8_999)).toBeUndefined()
        expect((await deliveries.state(taskId))?.nextAttemptAt).toBeNull()
        expect((await take(9_000))?.taskId).toBe(taskId)
      })

      test('the next due time is that of the earliest pending one', async () => {
        expect(await deliveries.nextDueAt()).toBeUndefined()
        const early = await due(1_000)
        await due(2_000)
        expect(await deliveries.nextDueAt()).toBe(1_000)
        await deliveries.recordAttempt(early, attempt(1), {
          ...{ status: 'delivered', nextAttemptAt: null },
        })
        expect(await deliveries.nextDueAt()).toBe(2_000)
      })

      test('its content is the stored outcome and log, with address and token', async () => {
        const log = { content: Buffer.from('the log'), totalBytes: 8 }
        const task = await claimed({
          taskFileName: 'b.sh',
          callbackUrl: `${ORIGIN}/hook?x=1`,
          callbackUrlToken: 'token',
        })
        await store.finish(task, end({ log, delivery: newDelivery() }))
        const { taskId } = task
        const content = await deliveries.content(taskId)
        expect(await content?.payload.logs.read()).toEqual(log)
        expect(content).toEqual({
          ...{ url: `${ORIGIN}/hook?x=1`, token: 'token', isCut: false },
          facts: { status: 'succeeded', reason: 'completed', exitCode: 0, durationMs: null },
          traceparent: null,
          payload: {
            ...{ taskName: 'b.sh', taskId, success: true },
            logs: { bytes: expect.any(Number), read: expect.any(Function) },
          },
        })
        expect(await deliveries.content('unknown')).toBeUndefined()
      })

      test('attempts are recorded in order, and decide what comes next', async () => {
        const taskId = await due(1_000)
        await take(1_000)
        await deliveries.recordAttempt(
          taskId,
          { ...attempt(1), statusCode: null, error: 'no connection' },
          { status: 'pending', nextAttemptAt: 7_000 },
        )
        expect(await take(6_999)).toBeUndefined()
        expect(await take(7_000)).toMatchObject({ taskId, attempts: 1 })
        await deliveries.recordAttempt(taskId, attempt(2), {
          ...{ status: 'delivered', nextAttemptAt: null },
        })
        expect(await deliveries.state(taskId)).toEqual({
          status: 'delivered',
          webhookId: expect.any(String),
          nextAttemptAt: null,
          attempts: [{ ...attempt(1), statusCode: null, error: 'no connection' }, attempt(2)],
        })
        expect(await store.get(taskId)).toMatchObject({ callbackStatus: 'delivered' })
        expect(await take(1e15)).toBeUndefined()
      })

      test('an attempt that was overtaken changes nothing', async () => {
        const taskId = await due(1_000)
        await take(1_000)
        await deliveries.recordAttempt(taskId, attempt(1), {
          ...{ status: 'delivered', nextAttemptAt: null },
        })
        const before = await deliveries.state(taskId)
        await deliveries.recordAttempt(
          taskId,
          { ...attempt(1), statusCode: 500, error: 'late' },
          { status: 'pending', nextAttemptAt: 1 },
        )
        await deliveries.recordAttempt(taskId, attempt(5), {
          ...{ status: 'given_up', nextAttemptAt: null },
        })
        expect(await deliveries.state(taskId)).toEqual(before)
      })

      test('a clock that was set back takes pending deliveries with it, and no others', async () => {
        const taskId = await due(9_000)
        const ended = await due(9_000)
        await deliveries.recordAttempt(ended, attempt(1), {
          ...{ status: 'delivered', nextAttemptAt: null },
        })
        await deliveries.shiftDue(-8_000)
        expect(await take(999)).toBeUndefined()
        expect((await take(1_000))?.taskId).toBe(taskId)
        expect(await deliveries.state(ended)).toMatchObject({
          ...{ status: 'delivered', nextAttemptAt: null },
        })
      })

      test('a clock that was set back meanwhile puts off none for longer than its schedule', async () => {
        const bounds = { now: 10_000, toleranceMs: 100, longestDelaysMs: [0, 500, 7_000] }
        const nextAttemptAt = async (taskId: string) =>
          (await deliveries.state(taskId))?.nextAttemptAt
        /** Ended at `at`, or attempted then for the last time. */
        const pending = async (attempts: number, at: number, nextAt: number) => {
          const taskId = await due(at)
          for (let number = 1; number <= attempts; number += 1) {
            await deliveries.recordAttempt(
              taskId,
              { ...attempt(number), startedAt: at - 12 },
              { status: 'pending', nextAttemptAt: nextAt },
            )
          }
          return taskId
        }
        const first = await pending(0, 90_000, 90_000)
        const second = await pending(1, 90_000, 90_300)
        const third = await pending(2, 90_000, 95_000)
        const byHand = await pending(3, 90_000, 95_000)
        const soon = await pending(2, 90_000, 10_400)
        const asked = await pending(1, 10_050, 60_000)
        const given = await due(90_000)
        await deliveries.recordAttempt(
          given,
          { ...attempt(1), startedAt: 90_000 },
          {
            ...{ status: 'given_up', nextAttemptAt: null },
          },
        )
        const leased = await due(90_000, { leaseUntil: 95_000 })
        for (const _ of ['once', 'again']) {
          await deliveries.boundDue(bounds)
          expect(await nextAttemptAt(first)).toBe(10_000)
          expect(await nextAttemptAt(second)).toBe(10_500)
          expect(await nextAttemptAt(third)).toBe(17_000)
          expect(await nextAttemptAt(byHand), 'the schedule has ended').toBe(10_000)
          expect(await nextAttemptAt(soon)).toBe(10_400)
          expect(await nextAttemptAt(asked), 'the clock is right').toBe(60_000)
          expect(await nextAttemptAt(given)).toBeNull()
        }
        const taken = [await take(10_000), await take(10_000)].map((each) => each?.taskId)
        expect(taken.sort()).toEqual([first, byHand].sort())
        expect(await take(10_000)).toBeUndefined()
        await deliveries.release(leased, 95_000)
        expect((await take(10_000))?.taskId, 'its lease was left alone').toBe(leased)
      })

      test('a released delivery is due at once, without an attempt', async () => {
        const taskId = await due(1_000)
        await take(1_000)
        await deliveries.release(taskId)
        expect(await take(1)).toMatchObject({ taskId, attempts: 0 })
      })

      test('releasing a delivery that has ended does not open it again', async () => {
        const taskId = await due(1_000)
        await deliveries.recordAttempt(taskId, attempt(1), {
          ...{ status: 'delivered', nextAttemptAt: null },
        })
        await deliveries.release(taskId)
        expect(await take(1e15)).toBeUndefined()
      })

      test('redelivering one that was given up makes it due now, for one attempt by hand', async () => {
        const taskId = await due(1_000)
        await deliveries.recordAttempt(taskId, attempt(1), {
          ...{ status: 'given_up', nextAttemptAt: null },
        })
        expect(await deliveries.redeliver(taskId, 4_000)).toBe('queued')
        expect(await deliveries.redeliver(taskId, 4_000)).toBe('queued')
        expect(await take(4_000)).toMatchObject({
          ...{ taskId, attempts: 1, manual: true, deliveredBefore: false },
        })
      })

      test('redelivering one that was delivered remembers that it was', async () => {
        const taskId = await due(1_000)
        await deliveries.recordAttempt(taskId, attempt(1), {
          ...{ status: 'delivered', nextAttemptAt: null },
        })
        expect(await deliveries.redeliver(taskId, 4_000)).toBe('queued')
        expect(await take(4_000)).toMatchObject({ manual: true, deliveredBefore: true })
      })

      test('redelivering one whose schedule goes on remembers when, however often it is asked for', async () => {
        const taskId = await due(9_000)
        expect(await deliveries.redeliver(taskId, 4_000)).toBe('queued')
        expect(await deliveries.redeliver(taskId, 4_100)).toBe('queued')
        expect(await take(4_100)).toMatchObject({ taskId, manual: true, resumeAt: 9_000 })
        await deliveries.recordAttempt(
          taskId,
          { ...attempt(1), manual: true },
          { status: 'pending', nextAttemptAt: 9_000 },
        )
        expect(await deliveries.state(taskId)).toMatchObject({
          nextAttemptAt: 9_000,
          attempts: [{ number: 1, manual: true }],
        })
        expect(await take(9_000)).toMatchObject({
          ...{ taskId, attempts: 1, manualAttempts: 1, manual: false, resumeAt: null },
        })
      })

      test('when the schedule goes on moves with a clock that is set', async () => {
        const taskId = await due(9_000)
        await deliveries.redeliver(taskId, 4_000)
        await deliveries.shiftDue(-1_000)
        expect(await take(4_000)).toMatchObject({ taskId, resumeAt: 8_000 })
      })

      test('once the receiver has answered 413, the content is cut', async () => {
        const taskId = await due(1_000)
        expect(await deliveries.content(taskId)).toMatchObject({ isCut: false })
        await deliveries.recordAttempt(
          taskId,
          { ...attempt(1), statusCode: 413 },
          { status: 'pending', nextAttemptAt: 2_000 },
        )
        expect(await deliveries.content(taskId)).toMatchObject({ isCut: true })
      })

      test('one whose attempt is under way is not made due, until its lease has run out', async () => {
        const taskId = await due(1_000)
        await take(1_000, [], 2_000)
        expect(await deliveries.redeliver(taskId, 1_999)).toBe('in_flight')
        expect(await take(1_999)).toBeUndefined()
        expect(await deliveries.redeliver(taskId, 2_000)).toBe('queued')
      })

      test('there is nothing to redeliver, nor a state, without a delivery', async () => {
        const { taskId } = await inserted()
        for (const id of [taskId, 'unknown']) {
          expect(await deliveries.redeliver(id, 1)).toBeUndefined()
          expect(await deliveries.state(id)).toBeUndefined()
        }
      })
    })

    test('the check resolves while the store can be read', async () => {
      await expect(store.check()).resolves.toBeUndefined()
    })
  })
}

function attempt(number: number) {
  return {
    number,
    startedAt: 1_000 * number,
    durationMs: 12,
    statusCode: 200,
    error: null,
    manual: false,
  }
}

/** As a disk does that gives back other bytes than it was given. */
export async function damage({ db }: Connection, taskId: string): Promise<void> {
  const row = await db
    .selectFrom('tasks')
    .select('sealed')
    .where('task_id', '=', taskId)
    .executeTakeFirstOrThrow()
  const sealed = Buffer.from(row.sealed)
  sealed[sealed.length - 1] = Number(sealed.at(-1)) ^ 1
  await db.updateTable('tasks').set({ sealed }).where('task_id', '=', taskId).execute()
}
