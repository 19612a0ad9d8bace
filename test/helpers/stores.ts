import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Logger, NewTask } from '../../src/core/ports.ts'
import { type FinalStatus, workerNameFor } from '../../src/core/task.ts'
import { Sealer } from '../../src/secrets/sealing.ts'
import type { Connection } from '../../src/store/connection.ts'
import { SqlDeliveryStore } from '../../src/store/delivery-store.ts'
import { openSqlite } from '../../src/store/sqlite.ts'
import { SqlTaskStore } from '../../src/store/task-store.ts'

export const QUIET: Logger = { debug() {}, info() {}, warn() {}, error() {} }

export interface Stores extends AsyncDisposable {
  connection: Connection
  tasks: SqlTaskStore
  deliveries: SqlDeliveryStore
  /** A finished task; with `origin`, its delivery is due from `finishedAt` on. */
  finished(
    taskId: string,
    options: { finishedAt: number; origin?: string; status?: FinalStatus; keepWorker?: boolean },
  ): Promise<void>
  /** Many finished tasks at once, each with a delivery that is due from `finishedAt` on. */
  overdue(tasks: Array<{ taskId: string; finishedAt: number; origin: string }>): Promise<void>
}

const MEMORY = '/dev/shm'
const ROWS_AT_ONCE = 500

/** The real stores over an SQLite file of their own; in memory where that can be, since nothing crashes here. */
export async function openStores(): Promise<Stores> {
  const folder = await mkdtemp(join(existsSync(MEMORY) ? MEMORY : tmpdir(), 'task-runner-stores-'))
  const connection = await openSqlite(join(folder, 'task-runner.db'))
  const sealer = new Sealer(randomBytes(32))
  const tasks = new SqlTaskStore(connection, sealer, { instance: 'here' })
  return {
    connection,
    tasks,
    deliveries: new SqlDeliveryStore(connection, tasks),
    async finished(taskId, { finishedAt, origin, status = 'succeeded', keepWorker = false }) {
      await tasks.insert(newTask(taskId, { callbackUrl: origin ? `${origin}/callback` : null }))
      const task = await tasks.claim(taskId, 0)
      if (!task) throw new Error(`${taskId} could not be claimed`)
      await tasks.finish(task, {
        outcome: { status, reason: 'completed', message: null, exitCode: 0, signal: null },
        log: { content: Buffer.from(`log of ${taskId}\n`), totalBytes: 8 + taskId.length },
        logBytes: 8 + taskId.length,
        delivery: origin ? { webhookId: `msg_${taskId}`, origin, leaseUntil: null } : undefined,
        finishedAt,
        keepWorker,
      })
    },
    async overdue(all) {
      const { db } = connection
      for (let from = 0; from < all.length; from += ROWS_AT_ONCE) {
        const some = all.slice(from, from + ROWS_AT_ONCE)
        await db
          .insertInto('tasks')
          .values(some.map((each) => finishedRow(each, sealer)))
          .execute()
        await db
          .insertInto('task_logs')
          .values(
            some.map(({ taskId }) => ({
              task_id: taskId,
              encoding: 'plain' as const,
              content: Buffer.from('log\n'),
              total_bytes: 4,
            })),
          )
          .execute()
        await db
          .insertInto('deliveries')
          .values(
            some.map(({ taskId, finishedAt, origin }) => ({
              task_id: taskId,
              webhook_id: `msg_${taskId}`,
              origin,
              status: 'pending' as const,
              attempts: 0,
              manual: 0,
              delivered_at: null,
              next_attempt_at: finishedAt,
              leased: 0,
            })),
          )
          .execute()
      }
    },
    async [Symbol.asyncDispose]() {
      await connection.close()
      await rm(folder, { recursive: true, force: true })
    },
  }
}

export function newTask(taskId: string, more: Partial<NewTask> = {}): NewTask {
  return {
    taskId,
    taskFileName: 'echo.sh',
    workerConfig: {},
    callbackUrl: null,
    callbackUrlToken: null,
    terminateOnCompletion: true,
    timeoutSeconds: 60,
    priority: 0,
    traceparent: null,
    digest: taskId,
    workerName: workerNameFor(taskId),
    createdAt: 0,
    ...more,
  }
}

/** What `insert`, `claim` and `finish` leave behind. */
function finishedRow(
  { taskId, finishedAt, origin }: { taskId: string; finishedAt: number; origin: string },
  sealer: Sealer,
) {
  const sealed = { workerConfig: {}, callbackUrl: `${origin}/callback`, callbackUrlToken: null }
  return {
    task_id: taskId,
    task_file_name: 'echo.sh',
    status: 'succeeded' as const,
    reason: 'completed' as const,
    message: null,
    exit_code: 0,
    signal: null,
    worker_name: workerNameFor(taskId),
    worker_state: 'gone' as const,
    terminate_on_completion: 1,
    timeout_seconds: 60,
    has_callback: 1,
    priority: 0,
    traceparent: null,
    claim: 1,
    instance: 'here',
    cancel_requested_at: null,
    created_at: finishedAt,
    claimed_at: finishedAt,
    started_at: finishedAt,
    finished_at: finishedAt,
    log_bytes: 4,
    digest: taskId,
    sealed: sealer.seal(JSON.stringify(sealed), taskId),
  }
}
