/** Between a task's row and a task: the only place that knows both spellings. */
import type { Selectable } from 'kysely'
import type { CallbackStatus, Task, TaskSummary } from '../core/task.ts'
import type { TasksTable } from './schema.ts'

/** What is encrypted in a row. */
export type Sealed = Pick<Task, 'workerConfig' | 'callbackUrl' | 'callbackUrlToken'>

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
  'tasks.claim',
  'tasks.created_at',
  'tasks.started_at',
  'tasks.finished_at',
  'tasks.log_bytes',
] as const

type SummaryRow = Pick<
  Selectable<TasksTable>,
  (typeof SUMMARY_COLUMNS)[number] extends `tasks.${infer Name}` ? Name & keyof TasksTable : never
> & { delivery_status?: Exclude<CallbackStatus, 'none'> | null }

/** The values of variables have served. The token may be needed for a delivery on request, or to mask a kept log. */
export function withoutSpentSecrets(task: Task, workerIsKept: boolean): Task {
  const { envVariables, ...config } = task.workerConfig
  const names = Object.keys(envVariables ?? {})
  const workerConfig = envVariables
    ? { ...config, envVariables: Object.fromEntries(names.map((name) => [name, ''])) }
    : config
  const isNeeded = task.callbackUrl !== null || workerIsKept
  return { ...task, workerConfig, callbackUrlToken: isNeeded ? task.callbackUrlToken : null }
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
    claim: row.claim,
    createdAt: Number(row.created_at),
    startedAt: numberOrNull(row.started_at),
    finishedAt: numberOrNull(row.finished_at),
    callbackStatus: row.delivery_status ?? (row.has_callback === 1 ? 'pending' : 'none'),
    logBytes: numberOrNull(row.log_bytes),
  }
}

/** Postgres hands out bigint as text. */
export function numberOrNull(value: number | null): number | null {
  return value === null ? null : Number(value)
}
