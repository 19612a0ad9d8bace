import { sql } from 'kysely'
import type { ClaimedTask, LogTail, NewTask, TaskFilter, TaskStore } from '../core/ports.ts'
import { LIVE_STATUSES, type Task, type TaskSummary } from '../core/task.ts'
import type { Connection } from './connection.ts'
import { decodeLog, encodeLog } from './log-codec.ts'
import {
  numberOrNull,
  type Sealed,
  SUMMARY_COLUMNS,
  summaryFromRow,
  withoutSpentSecrets,
} from './task-row.ts'

/** Rows removed in one transaction: a long one would hold up everybody else's. */
const REMOVED_AT_ONCE = 500

export interface Seal {
  seal(text: string, context: string): Uint8Array
  unseal(sealed: Uint8Array, context: string): string
}

/** The `TaskStore` of both databases. */
export class SqlTaskStore implements TaskStore {
  readonly #connection: Connection
  readonly #sealer: Seal

  constructor(connection: Connection, sealer: Seal) {
    this.#connection = connection
    this.#sealer = sealer
  }

  get #db() {
    return this.#connection.db
  }

  async insert(task: NewTask): Promise<boolean> {
    const { numInsertedOrUpdatedRows } = await this.#db
      .insertInto('tasks')
      .values({
        task_id: task.taskId,
        task_file_name: task.taskFileName,
        status: 'queued',
        reason: null,
        message: null,
        exit_code: null,
        signal: null,
        worker_name: task.workerName,
        worker_state: 'none',
        terminate_on_completion: task.terminateOnCompletion ? 1 : 0,
        timeout_seconds: task.timeoutSeconds,
        has_callback: task.callbackUrl === null ? 0 : 1,
        claim: 0,
        cancel_requested_at: null,
        created_at: task.createdAt,
        started_at: null,
        finished_at: null,
        log_bytes: null,
        digest: task.digest,
        sealed: this.#seal({ ...task, secretValues: [] }),
      })
      .onConflict((conflict) => conflict.column('task_id').doNothing())
      .executeTakeFirst()
    return numInsertedOrUpdatedRows === 1n
  }

  async digestOf(taskId: string) {
    return this.#db
      .selectFrom('tasks')
      .select(['digest', 'status'])
      .where('task_id', '=', taskId)
      .executeTakeFirst()
  }

  async get(taskId: string): Promise<Task | undefined> {
    const row = await this.#summaries()
      .select('tasks.sealed')
      .where('tasks.task_id', '=', taskId)
      .executeTakeFirst()
    return row && { ...summaryFromRow(row), ...this.#unseal(row) }
  }

  async list(filter: TaskFilter): Promise<TaskSummary[]> {
    let query = this.#summaries().orderBy('tasks.seq', 'desc').limit(filter.limit)
    if (filter.status !== undefined) query = query.where('tasks.status', '=', filter.status)
    if (filter.taskFileName !== undefined) {
      query = query.where('tasks.task_file_name', '=', filter.taskFileName)
    }
    const { callbackStatus } = filter
    if (callbackStatus === 'none') query = query.where('tasks.has_callback', '=', 0)
    else if (callbackStatus === 'pending') {
      // Also of tasks that have not ended: their delivery is still to be made.
      query = query
        .where('tasks.has_callback', '=', 1)
        .where((eb) =>
          eb.or([eb('deliveries.status', 'is', null), eb('deliveries.status', '=', 'pending')]),
        )
    } else if (callbackStatus) query = query.where('deliveries.status', '=', callbackStatus)
    if (filter.before !== undefined) query = query.where('tasks.seq', '<', filter.before)
    return (await query.execute()).map(summaryFromRow)
  }

  async log(taskId: string): Promise<LogTail | undefined> {
    const row = await this.#db
      .selectFrom('task_logs')
      .selectAll()
      .where('task_id', '=', taskId)
      .executeTakeFirst()
    return row && { content: await decodeLog(row), totalBytes: Number(row.total_bytes) }
  }

  async claim(taskId: string): Promise<ClaimedTask | undefined> {
    const row = await this.#db
      .updateTable('tasks')
      .set((eb) => ({
        claim: eb('claim', '+', 1),
        status: sql<
          'provisioning' | 'running'
        >`case when status = 'queued' then 'provisioning' else status end`,
        worker_state: 'live' as const,
      }))
      .where('task_id', '=', taskId)
      .where('status', 'in', LIVE_STATUSES)
      .returning([...SUMMARY_COLUMNS, 'sealed', 'cancel_requested_at'])
      .executeTakeFirst()
    return (
      row && {
        ...summaryFromRow(row),
        ...this.#unseal(row),
        cancelRequested: row.cancel_requested_at !== null,
      }
    )
  }

  async keepSecretValues(task: Task, secretValues: readonly string[]): Promise<void> {
    await this.#db
      .updateTable('tasks')
      .set({ sealed: this.#seal({ ...task, secretValues }) })
      .where('task_id', '=', task.taskId)
      .where('claim', '=', task.claim)
      .where('status', 'in', LIVE_STATUSES)
      .execute()
  }

  async markRunning(task: Task, startedAt: number): Promise<boolean> {
    const { numUpdatedRows } = await this.#db
      .updateTable('tasks')
      .set({ status: 'running', started_at: startedAt })
      .where('task_id', '=', task.taskId)
      .where('claim', '=', task.claim)
      .where('status', 'in', LIVE_STATUSES)
      .executeTakeFirst()
    return numUpdatedRows === 1n
  }

  async finish(
    task: Parameters<TaskStore['finish']>[0],
    end: Parameters<TaskStore['finish']>[1],
  ): Promise<boolean> {
    const { outcome, log, delivery, finishedAt } = end
    const setOutcome = this.#db
      .updateTable('tasks')
      .set({
        status: outcome.status,
        reason: outcome.reason,
        message: outcome.message,
        exit_code: outcome.exitCode,
        signal: outcome.signal,
        finished_at: finishedAt,
        log_bytes: end.logBytes,
        sealed: this.#seal(withoutSpentSecrets(task)),
        ...(end.keepWorker ? { worker_state: 'kept' as const } : {}),
      })
      .where('task_id', '=', task.taskId)
      .where('claim', '=', task.claim)
      .where('status', 'in', LIVE_STATUSES)
    const keepLog = this.#db.insertInto('task_logs').values({
      task_id: task.taskId,
      ...(await encodeLog(log.content)),
      total_bytes: log.totalBytes,
    })
    if (!delivery) return this.#connection.atomically([setOutcome, keepLog])
    const openDelivery = this.#db.insertInto('deliveries').values({
      task_id: task.taskId,
      webhook_id: delivery.webhookId,
      origin: delivery.origin,
      status: 'pending',
      attempts: 0,
      manual: 0,
      delivered_at: null,
      next_attempt_at: delivery.leaseUntil ?? finishedAt,
      leased: delivery.leaseUntil === null ? 0 : 1,
    })
    return this.#connection.atomically([setOutcome, keepLog, openDelivery])
  }

  async requestCancel(taskId: string, at: number): Promise<TaskSummary | undefined> {
    const row = await this.#db
      .updateTable('tasks')
      .set((eb) => ({ cancel_requested_at: eb.fn.coalesce('cancel_requested_at', eb.val(at)) }))
      .where('task_id', '=', taskId)
      .where('status', 'in', LIVE_STATUSES)
      .returning(SUMMARY_COLUMNS)
      .executeTakeFirst()
    return row && summaryFromRow(row)
  }

  async live() {
    const rows = await this.#db
      .selectFrom('tasks')
      .select(['task_id', 'status', 'cancel_requested_at'])
      .where('status', 'in', LIVE_STATUSES)
      .orderBy('seq')
      .execute()
    return rows.map((row) => ({
      taskId: row.task_id,
      status: row.status,
      cancelRequested: row.cancel_requested_at !== null,
    }))
  }

  async workerOwner(taskId: string) {
    const row = await this.#db
      .selectFrom('tasks')
      .select(['status', 'finished_at', 'worker_state'])
      .where('task_id', '=', taskId)
      .executeTakeFirst()
    return (
      row && {
        status: row.status,
        finishedAt: numberOrNull(row.finished_at),
        kept: row.worker_state === 'kept',
      }
    )
  }

  async workersToTerminate() {
    const rows = await this.#db
      .selectFrom('tasks')
      .select(['task_id', 'worker_name'])
      .where('worker_state', '=', 'live')
      .where('status', 'not in', LIVE_STATUSES)
      .execute()
    return rows.map(({ task_id, worker_name }) => ({ taskId: task_id, workerName: worker_name }))
  }

  async workerTerminated(taskId: string): Promise<void> {
    await this.#db
      .updateTable('tasks')
      .set({ worker_state: 'gone' })
      .where('task_id', '=', taskId)
      .execute()
  }

  async removeFinishedBefore(at: number): Promise<number> {
    const { numDeletedRows } = await this.#db
      .deleteFrom('tasks')
      .where('task_id', 'in', (eb) =>
        eb
          .selectFrom('tasks')
          .leftJoin('deliveries', 'deliveries.task_id', 'tasks.task_id')
          .select('tasks.task_id')
          .where('tasks.finished_at', '<', at)
          .where('tasks.worker_state', 'not in', ['live', 'kept'])
          .where((eb) =>
            eb.or([eb('deliveries.status', 'is', null), eb('deliveries.status', '!=', 'pending')]),
          )
          .limit(REMOVED_AT_ONCE),
      )
      .executeTakeFirst()
    return Number(numDeletedRows)
  }

  /** Throws when the newest task was sealed with another key: better at the start than task by task. */
  async verifyKey(): Promise<void> {
    const row = await this.#db
      .selectFrom('tasks')
      .select(['task_id', 'sealed'])
      .orderBy('seq', 'desc')
      .limit(1)
      .executeTakeFirst()
    if (!row) return
    try {
      this.#unseal(row)
    } catch (cause) {
      throw new Error('the stored tasks were encrypted with another SEALING_KEY', { cause })
    }
  }

  async check(): Promise<void> {
    await this.#db.selectFrom('tasks').select('seq').limit(1).execute()
  }

  #summaries() {
    return this.#db
      .selectFrom('tasks')
      .leftJoin('deliveries', 'deliveries.task_id', 'tasks.task_id')
      .select([...SUMMARY_COLUMNS, 'deliveries.status as delivery_status'])
  }

  #seal(task: Sealed & { taskId: string }): Uint8Array {
    const { workerConfig, callbackUrl, callbackUrlToken, secretValues } = task
    const sealed: Sealed = { workerConfig, callbackUrl, callbackUrlToken, secretValues }
    return this.#sealer.seal(JSON.stringify(sealed), task.taskId)
  }

  #unseal(row: { task_id: string; sealed: Uint8Array }): Sealed {
    // Holds: nobody else has the key. What was sealed before there were named secrets has none.
    const sealed = JSON.parse(this.#sealer.unseal(row.sealed, row.task_id)) as Sealed
    return { ...sealed, secretValues: sealed.secretValues ?? [] }
  }
}
