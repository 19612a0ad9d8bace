import { sql } from 'kysely'
import {
  type ClaimedTask,
  DamagedTaskError,
  type LiveTask,
  type LogTail,
  type NewDelivery,
  type NewTask,
  type TaskFilter,
  type TaskStore,
} from '../core/ports.ts'
import { LIVE_STATUSES, queuePosition, type Task, type TaskSummary } from '../core/task.ts'
import type { Connection } from './connection.ts'
import { decodeLog, encodeLog } from './log-codec.ts'
import {
  type ClaimedRow,
  numberOrNull,
  type Sealed,
  SUMMARY_COLUMNS,
  type SummaryRow,
  summaryFromRow,
  withoutSpentSecrets,
} from './task-row.ts'
import { taskWrites } from './task-writes.ts'

/** Maximum rows removed in one transaction: a long one would block others. */
const REMOVED_AT_ONCE = 500
const PENDING = sql.lit('pending' as const)

export interface Seal {
  seal(text: string, context: string): Uint8Array
  unseal(sealed: Uint8Array, context: string): string
}

/** The `TaskStore` of both databases. */
export class SqlTaskStore implements TaskStore {
  readonly #connection: Connection
  readonly #writes: ReturnType<typeof taskWrites>
  readonly #sealer: Seal
  readonly #instance: string
  readonly #isShared: boolean
  /** Ids of tasks whose outcome may have been committed, though the answer was lost. */
  readonly #unanswered = new Set<string>()

  /** `isShared`: other instances use the database, too. */
  constructor(
    connection: Connection,
    sealer: Seal,
    { instance, isShared = false }: { instance: string; isShared?: boolean },
  ) {
    this.#connection = connection
    this.#writes = taskWrites(connection)
    this.#sealer = sealer
    this.#instance = instance
    this.#isShared = isShared
  }

  get #db() {
    return this.#connection.db
  }

  async insert(task: NewTask): Promise<boolean> {
    const sealed = this.#seal({ ...task, secretValues: [] })
    const row = this.#writes.insert({
      ...task,
      sealed,
      terminates: task.terminateOnCompletion ? 1 : 0,
      hasCallback: task.callbackUrl === null ? 0 : 1,
    })
    return (await this.#connection.atomically(row)) !== undefined
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
    return row && this.#unsealed(row)
  }

  async list(filter: TaskFilter): Promise<TaskSummary[]> {
    let query = this.#summaries().orderBy('tasks.seq', 'desc').limit(filter.limit)
    if (filter.status !== undefined) query = query.where('tasks.status', '=', filter.status)
    if (filter.taskFileName !== undefined) {
      query = query.where('tasks.task_file_name', '=', filter.taskFileName)
    }
    const { callbackStatus } = filter
    if (callbackStatus === 'none') query = query.where('tasks.has_callback', '=', 0)
    else if (callbackStatus === 'delivered') {
      // The `coalesce` makes the planner start from the tasks, in whose order the list is.
      query = query
        .where('tasks.has_callback', '=', 1)
        .where((eb) => eb(eb.fn.coalesce('deliveries.status', PENDING), '=', callbackStatus))
    } else if (callbackStatus)
      query = query.where('tasks.task_id', 'in', this.#withCallback(callbackStatus))
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

  async claimNext(options: Parameters<TaskStore['claimNext']>[0]): Promise<ClaimedTask[]> {
    const { at, limit, runningMax } = options
    const claim = { at, limit, instance: this.#instance }
    const rows =
      runningMax === undefined
        ? await this.#connection.atomically(this.#writes.claimNext(claim))
        : await this.#connection.inTurn(this.#writes.claimNextWithin({ ...claim, runningMax }))
    const tasks = (rows ?? []).map((row) => this.#claimed(row))
    // Databases return changed rows in no particular order.
    return tasks.sort((a, b) => queuePosition(a) - queuePosition(b) || a.seq - b.seq)
  }

  async putBack({ taskId, claim }: Pick<Task, 'taskId' | 'claim'>): Promise<void> {
    await this.#db
      .updateTable('tasks')
      .set({ status: 'queued', instance: null, worker_state: 'none', claimed_at: null })
      .where('task_id', '=', taskId)
      .where('claim', '=', claim)
      .where('status', '=', 'provisioning')
      .execute()
  }

  async countQueued(max: number): Promise<number> {
    const waiting = this.#db.selectFrom('tasks').select('seq').where('status', '=', 'queued')
    const { count } = await this.#db
      .selectFrom(waiting.limit(max).as('waiting'))
      .select(({ fn }) => fn.countAll().as('count'))
      .executeTakeFirstOrThrow()
    return Number(count)
  }

  async claim(taskId: string, at: number, seen = 0): Promise<ClaimedTask | undefined> {
    const taken = this.#writes.claim({ taskId, at, seen, next: seen + 1, instance: this.#instance })
    const [row] = (await this.#connection.atomically(taken)) ?? []
    return row && this.#claimed(row)
  }

  #claimed(row: ClaimedRow): ClaimedTask {
    const cancelRequested = row.cancel_requested_at !== null
    try {
      return { ...this.#unsealed(row), cancelRequested }
    } catch (err) {
      if (!(err instanceof DamagedTaskError)) throw err
      return { ...err.task, cancelRequested, damage: err }
    }
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

  async noteWaiting(
    task: Pick<Task, 'taskId' | 'claim'>,
    waitingFor: string | null,
  ): Promise<void> {
    await this.#db
      .updateTable('tasks')
      .set({ waiting_for: withoutNul(waitingFor) })
      .where('task_id', '=', task.taskId)
      .where('claim', '=', task.claim)
      .where('status', 'in', LIVE_STATUSES)
      .execute()
  }

  async markRunning(task: Task, startedAt: number): Promise<boolean> {
    return (
      (await this.#connection.atomically(this.#writes.markRunning({ ...task, startedAt }))) !==
      undefined
    )
  }

  async finish(
    task: Parameters<TaskStore['finish']>[0],
    end: Parameters<TaskStore['finish']>[1],
  ): Promise<boolean> {
    const { outcome, log, delivery, finishedAt } = end
    const setOutcome = this.#writes.setOutcome({
      ...outcome,
      message: withoutNul(outcome.message),
      finishedAt,
      logBytes: end.logBytes,
      sealed: this.#seal(withoutSpentSecrets(task)),
      workerState: end.keepWorker ? 'kept' : null,
      taskId: task.taskId,
      claim: task.claim,
    })
    const { taskId } = task
    const { totalBytes } = log
    const keepLog = this.#writes.keepLog({ taskId, totalBytes, ...(await encodeLog(log.content)) })
    const openDelivery =
      delivery &&
      this.#writes.openDelivery({
        taskId,
        ...delivery,
        nextAttemptAt: delivery.leaseUntil ?? finishedAt,
        leased: delivery.leaseUntil === null ? 0 : 1,
      })
    const rows = openDelivery ? [keepLog, openDelivery] : [keepLog]
    let isDone: boolean
    try {
      isDone = (await this.#connection.atomically(setOutcome, rows)) !== undefined
      // An earlier call may have committed it before its answer was lost.
      if (!isDone && this.#unanswered.has(task.taskId))
        isDone = await this.#isCommitted(task, delivery)
    } catch (err) {
      this.#unanswered.add(task.taskId)
      throw err
    }
    this.#unanswered.delete(task.taskId)
    return isDone
  }

  /** Returns whether this call committed the outcome; for an unclaimed task, by its delivery. */
  async #isCommitted(task: Task, delivery: NewDelivery | undefined): Promise<boolean> {
    const row = await this.#db
      .selectFrom('tasks')
      .leftJoin('deliveries', 'deliveries.task_id', 'tasks.task_id')
      .select(['tasks.claim', 'deliveries.webhook_id'])
      .where('tasks.task_id', '=', task.taskId)
      .executeTakeFirst()
    return row?.claim === task.claim && (!delivery || row.webhook_id === delivery.webhookId)
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

  async countLive() {
    const rows = await this.#db
      .selectFrom('tasks')
      .select(({ fn }) => ['status', fn.countAll().as('count'), fn.min('created_at').as('oldest')])
      .where('status', 'in', LIVE_STATUSES)
      .groupBy('status')
      .execute()
    return rows.map(({ status, count, oldest }) => {
      return { status, count: Number(count), oldestCreatedAt: Number(oldest) }
    })
  }

  async live(): Promise<LiveTask[]> {
    const live = this.#db.selectFrom('tasks').select(['task_id', 'status', 'claim', 'seq'])
    let claimed = live.where('status', 'in', ['provisioning', 'running'])
    if (this.#isShared) claimed = claimed.where('instance', '=', this.#instance)
    const cancelled = live
      .where('status', '=', 'queued')
      .where('cancel_requested_at', 'is not', null)
    const rows = await claimed.unionAll(cancelled).orderBy('seq').execute()
    return rows.map(({ task_id: taskId, status, claim }) => ({ taskId, status, claim }))
  }

  async workerOwner(taskId: string) {
    const row = await this.#db
      .selectFrom('tasks')
      .select(['status', 'finished_at', 'worker_state', 'waiting_for'])
      .where('task_id', '=', taskId)
      .executeTakeFirst()
    return (
      row && {
        status: row.status,
        finishedAt: numberOrNull(row.finished_at),
        kept: row.worker_state === 'kept',
        isHindered: row.waiting_for !== null,
      }
    )
  }

  async workersToTerminate() {
    let query = this.#db
      .selectFrom('tasks')
      .select(['task_id', 'worker_name'])
      .where('worker_state', '=', 'live')
      .where('status', 'not in', LIVE_STATUSES)
    if (this.#isShared) query = query.where('instance', '=', this.#instance)
    return (await query.execute()).map(({ task_id, worker_name }) => ({
      taskId: task_id,
      workerName: worker_name,
    }))
  }

  async workerTerminated(taskId: string): Promise<void> {
    await this.#connection.atomically(this.#writes.workerTerminated({ taskId }))
  }

  async workersRemembered(at: number, instance?: string): Promise<string[]> {
    const rows = await this.#db
      .selectFrom('tasks')
      .select('task_id')
      .where('finished_at', '<', at)
      .where('worker_state', 'in', ['live', 'kept'])
      .$if(instance !== undefined, (query) =>
        query.where((eb) =>
          eb.or([
            eb('instance', '=', instance ?? ''),
            eb('instance', 'not in', eb.selectFrom('instances').select('name')),
          ]),
        ),
      )
      .execute()
    return rows.map((row) => row.task_id)
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

  async check(): Promise<void> {
    await this.#db.selectFrom('tasks').select('seq').limit(1).execute()
  }

  /** Selects the ids of tasks by callback status: a literal, so that partial indexes are used. */
  #withCallback(status: 'pending' | 'given_up') {
    const deliveries = this.#db
      .selectFrom('deliveries')
      .select('task_id')
      .where('status', '=', sql.lit(status))
    if (status === 'given_up') return deliveries
    // Live tasks have no row in `deliveries` yet.
    return deliveries.unionAll(
      this.#db
        .selectFrom('tasks as live')
        .select('live.task_id')
        .where('live.status', 'in', LIVE_STATUSES)
        // The sum makes the planner use the index of the status.
        .where(sql<number>`live.has_callback + 0`, '=', 1),
    )
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

  #unsealed(row: SummaryRow & { sealed: Uint8Array }): Task {
    const summary = summaryFromRow(row)
    try {
      // Safe: only this service has the key. Older rows have no `secretValues`.
      const sealed = JSON.parse(this.#sealer.unseal(row.sealed, row.task_id)) as Sealed
      return { ...summary, ...sealed, secretValues: sealed.secretValues ?? [] }
    } catch (cause) {
      throw new DamagedTaskError({ ...summary, ...NOTHING_SEALED }, { cause })
    }
  }
}

const NOTHING_SEALED: Sealed = {
  workerConfig: {},
  callbackUrl: null,
  callbackUrlToken: null,
  secretValues: [],
}

/** Removes NUL, which Postgres rejects and the output of a program may contain. */
function withoutNul(text: string | null): string | null {
  return text?.replaceAll('\0', '') ?? null
}
