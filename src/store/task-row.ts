/** Converts the row of a task to a task. */
import type { Selectable } from 'kysely'
import type { CallbackStatus, Task, TaskSummary } from '../core/task.ts'
import type { TasksTable } from './schema.ts'

/** Fields that are encrypted in a row. */
export type Sealed = Pick<
  Task,
  'workerConfig' | 'callbackUrl' | 'callbackUrlToken' | 'secretValues'
>

export const SUMMARY_COLUMNS = [
  'tasks.seq',
  'tasks.task_id',
  'tasks.task_file_name',
  'tasks.status',
  'tasks.reason',
  'tasks.message',
  'tasks.exit_code',
  'tasks.signal',
  'tasks.worker_name',
  'tasks.terminate_on_completion',
  'tasks.timeout_seconds',
  'tasks.has_callback',
  'tasks.priority',
  'tasks.claim',
  'tasks.instance',
  'tasks.traceparent',
  'tasks.created_at',
  'tasks.claimed_at',
  'tasks.started_at',
  'tasks.finished_at',
  'tasks.waiting_for',
  'tasks.log_bytes',
] as const

export type SummaryRow = Pick<
  Selectable<TasksTable>,
  (typeof SUMMARY_COLUMNS)[number] extends `tasks.${infer Name}` ? Name & keyof TasksTable : never
> & { delivery_status?: Exclude<CallbackStatus, 'none'> | null }

export type ClaimedRow = SummaryRow & { sealed: Uint8Array; cancel_requested_at: number | null }

/** Removes the secrets that an ended task needs no more: all but the token, for redeliveries. */
export function withoutSpentSecrets(task: Task): Task {
  const { envVariables, imageConfig, ...config } = task.workerConfig
  const names = Object.keys(envVariables ?? {})
  const { password, ...image } = imageConfig ?? {}
  const workerConfig = {
    ...config,
    ...(envVariables && { envVariables: Object.fromEntries(names.map((name) => [name, ''])) }),
    ...(imageConfig && {
      imageConfig: password === undefined ? image : { ...image, password: '' },
    }),
  }
  const callbackUrlToken = task.callbackUrl === null ? null : task.callbackUrlToken
  return { ...task, workerConfig, callbackUrlToken, secretValues: [] }
}

export function summaryFromRow(row: SummaryRow): TaskSummary {
  return {
    seq: Number(row.seq),
    taskId: row.task_id,
    taskFileName: row.task_file_name,
    status: row.status,
    reason: row.reason,
    message: row.message,
    exitCode: row.exit_code,
    signal: row.signal,
    workerName: row.worker_name,
    terminateOnCompletion: row.terminate_on_completion === 1,
    timeoutSeconds: row.timeout_seconds,
    priority: row.priority,
    claim: row.claim,
    instance: row.instance,
    traceparent: row.traceparent,
    createdAt: Number(row.created_at),
    claimedAt: numberOrNull(row.claimed_at),
    startedAt: numberOrNull(row.started_at),
    finishedAt: numberOrNull(row.finished_at),
    waitingFor: row.waiting_for,
    callbackStatus: row.delivery_status ?? (row.has_callback === 1 ? 'pending' : 'none'),
    logBytes: numberOrNull(row.log_bytes),
  }
}

/** Converts a bigint, which Postgres returns as text. */
export function numberOrNull(value: number | null): number | null {
  return value === null ? null : Number(value)
}
