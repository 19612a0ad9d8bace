import { randomBytes } from 'node:crypto'
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
}

/** The real stores over an SQLite file of their own. */
export async function openStores(): Promise<Stores> {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-stores-'))
  const connection = await openSqlite(join(folder, 'task-runner.db'))
  const tasks = new SqlTaskStore(connection, new Sealer(randomBytes(32)))
  return {
    connection,
    tasks,
    deliveries: new SqlDeliveryStore(connection, tasks),
    async finished(taskId, { finishedAt, origin, status = 'succeeded', keepWorker = false }) {
      await tasks.insert(newTask(taskId, { callbackUrl: origin ? `${origin}/callback` : null }))
      const task = await tasks.claim(taskId)
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
    digest: taskId,
    workerName: workerNameFor(taskId),
    createdAt: 0,
    ...more,
  }
}
