import { join } from 'node:path'
import type { FinalStatus, Reason } from '../../src/core/task.ts'
import { workerNameFor } from '../../src/core/task.ts'
import { Sealer } from '../../src/secrets/sealing.ts'
import { openSqlite } from '../../src/store/sqlite.ts'

/** A task that has ended. Instants are epoch ms. */
export interface PastTask {
  taskId: string
  taskFileName: string
  status?: FinalStatus
  reason?: Reason
  message?: string
  exitCode?: number | null
  createdAt: number
  claimedAt: number
  startedAt: number
  finishedAt: number
  log?: string
  callback?: { status: 'delivered' | 'given_up'; delayMs: number }
}

const ROWS_AT_ONCE = 500
const CALLBACK_MS = 12

/** Puts tasks into the data folder of a service that does not run, and will be started with this SEALING_KEY (base64). */
export async function putPastTasks(
  dataDir: string,
  sealingKey: string,
  tasks: readonly PastTask[],
): Promise<void> {
  const sealer = new Sealer(Buffer.from(sealingKey, 'base64'))
  const connection = await openSqlite(join(dataDir, 'task-runner.db'))
  const { db } = connection
  for (let from = 0; from < tasks.length; from += ROWS_AT_ONCE) {
    const some = tasks.slice(from, from + ROWS_AT_ONCE)
    const logs = some.filter(({ log }) => log !== undefined)
    const called = some.flatMap(({ taskId, finishedAt, callback }) =>
      callback === undefined ? [] : [{ taskId, finishedAt, ...callback }],
    )
    await db
      .insertInto('tasks')
      .values(some.map((task) => rowOf(task, sealer)))
      .execute()
    if (logs.length > 0) {
      const values = logs.map(({ taskId, log = '' }) => ({
        task_id: taskId,
        encoding: 'plain' as const,
        content: Buffer.from(log),
        total_bytes: Buffer.byteLength(log),
      }))
      await db.insertInto('task_logs').values(values).execute()
    }
    if (called.length > 0) {
      const deliveries = called.map(({ taskId, finishedAt, delayMs, status }) => ({
        task_id: taskId,
        webhook_id: `msg_${taskId}`,
        origin: 'http://127.0.0.1:9',
        status,
        attempts: 1,
        manual: 0,
        delivered_at: status === 'delivered' ? finishedAt + delayMs : null,
        next_attempt_at: null,
        leased: 0,
      }))
      const attempts = called.map(({ taskId, finishedAt, delayMs, status }) => ({
        task_id: taskId,
        number: 1,
        started_at: finishedAt + delayMs,
        duration_ms: CALLBACK_MS,
        status_code: status === 'delivered' ? 200 : 410,
        error: null,
      }))
      await db.insertInto('deliveries').values(deliveries).execute()
      await db.insertInto('delivery_attempts').values(attempts).execute()
    }
  }
  await connection.close()
}

function rowOf(task: PastTask, sealer: Sealer) {
  const { taskId, status = 'succeeded', log, callback } = task
  const callbackUrl = callback === undefined ? null : 'http://127.0.0.1:9/callback'
  const sealed = { workerConfig: {}, callbackUrl, callbackUrlToken: null, secretValues: [] }
  return {
    task_id: taskId,
    task_file_name: task.taskFileName,
    status,
    reason: task.reason ?? (status === 'succeeded' ? ('completed' as const) : null),
    message: task.message ?? null,
    exit_code: task.exitCode ?? (status === 'succeeded' ? 0 : null),
    signal: null,
    worker_name: workerNameFor(taskId),
    worker_state: 'gone' as const,
    terminate_on_completion: 1,
    timeout_seconds: 3600,
    has_callback: callback === undefined ? 0 : 1,
    priority: 0,
    claim: 1,
    instance: 'here',
    traceparent: null,
    cancel_requested_at: null,
    created_at: task.createdAt,
    claimed_at: task.claimedAt,
    started_at: task.startedAt,
    finished_at: task.finishedAt,
    log_bytes: log === undefined ? 0 : Buffer.byteLength(log),
    digest: taskId,
    sealed: sealer.seal(JSON.stringify(sealed), taskId),
  }
}
