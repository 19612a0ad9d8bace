import { sql } from 'kysely'
import { factsOf } from '../core/callbacks.ts'
import type {
  AttemptRecord,
  CallbackPayload,
  DeliveryState,
  DeliveryStore,
  DueDelivery,
  LogTail,
  TaskStore,
} from '../core/ports.ts'
import type { Connection } from './connection.ts'
import { prepared } from './prepared.ts'
import { numberOrNull } from './task-row.ts'

/** Bytes of the log that are sent after the receiver rejected the whole log as too large. */
const CUT_LOG_BYTES = 64 * 1024

/** A literal, so that prepared statements use the partial index of pending deliveries. */
const PENDING = sql.lit('pending' as const)

/**
 * The `DeliveryStore` of both databases. Taking a delivery moves its `next_attempt_at` to the end
 * of the lease, so it becomes due again if no attempt is recorded.
 */
export class SqlDeliveryStore implements DeliveryStore {
  readonly #connection: Connection
  readonly #tasks: Pick<TaskStore, 'get' | 'log'>

  constructor(connection: Connection, tasks: Pick<TaskStore, 'get' | 'log'>) {
    this.#connection = connection
    this.#tasks = tasks
  }

  get #db() {
    return this.#connection.db
  }

  readonly #countAttempt = prepared(
    (p: {
      taskId: string
      status: 'pending' | 'delivered' | 'given_up'
      nextAttemptAt: number | null
      number: number
      before: number
      manual: 0 | 1
      deliveredAt: number | null
      leaseUntil: number | null
    }) =>
      this.#db
        .updateTable('deliveries')
        .set({
          status: p.status,
          attempts: p.number,
          next_attempt_at: p.nextAttemptAt,
          leased: 0,
          manual: 0,
          manual_attempts: sql<number>`manual_attempts + ${p.manual}`,
          resume_at: null,
          delivered_at: sql<number>`coalesce(${p.deliveredAt}, delivered_at)`,
        })
        .where('task_id', '=', p.taskId)
        // An attempt that outlived its lease may find a newer one recorded, and changes nothing.
        .where('attempts', '=', p.before)
        // A given lease must still be held. Postgres cannot infer the type in `$1 is null`.
        .where(
          sql`coalesce(${p.leaseUntil}, next_attempt_at, 0)`,
          '=',
          sql`coalesce(next_attempt_at, 0)`,
        ),
  )

  readonly #addAttempt = prepared(
    (p: Omit<AttemptRecord, 'manual'> & { taskId: string; manual: 0 | 1 }) =>
      this.#db.insertInto('delivery_attempts').values({
        task_id: p.taskId,
        number: p.number,
        started_at: p.startedAt,
        duration_ms: p.durationMs,
        status_code: p.statusCode,
        error: p.error,
        manual: p.manual,
      }),
  )

  async takeDue(options: {
    now: number
    leaseUntil: number
    exceptOrigins: readonly string[]
    onlyOrigins?: readonly string[] | undefined
  }): Promise<DueDelivery | undefined> {
    const { exceptOrigins, onlyOrigins } = options
    if (onlyOrigins?.length === 0) return undefined
    const row = await this.#db
      .updateTable('deliveries')
      .set({ next_attempt_at: options.leaseUntil, leased: 1 })
      .where('task_id', '=', (eb) => {
        const due = eb
          .selectFrom('deliveries')
          .select('task_id')
          .where('status', '=', PENDING)
          .where('next_attempt_at', '<=', options.now)
          .orderBy('next_attempt_at')
          .limit(1)
        return this.#connection.skipLocked(
          due
            .$if(exceptOrigins.length > 0, (query) =>
              query.where('origin', 'not in', exceptOrigins),
            )
            .$if(onlyOrigins !== undefined, (query) =>
              query.where('origin', 'in', onlyOrigins ?? []),
            ),
        )
      })
      .returning(['task_id', 'webhook_id', 'origin', 'attempts', 'manual_attempts'])
      .returning(['manual', 'resume_at', 'delivered_at'])
      .executeTakeFirst()
    return (
      row && {
        taskId: row.task_id,
        webhookId: row.webhook_id,
        origin: row.origin,
        attempts: row.attempts,
        manualAttempts: row.manual_attempts,
        manual: row.manual === 1,
        resumeAt: numberOrNull(row.resume_at),
        deliveredBefore: row.delivered_at !== null,
        leaseUntil: options.leaseUntil,
      }
    )
  }

  async nextDueAt(): Promise<number | undefined> {
    const row = await this.#db
      .selectFrom('deliveries')
      .select('next_attempt_at')
      .where('status', '=', PENDING)
      .orderBy('next_attempt_at')
      .limit(1)
      .executeTakeFirst()
    return row?.next_attempt_at == null ? undefined : Number(row.next_attempt_at)
  }

  async content(taskId: string) {
    const task = await this.#tasks.get(taskId)
    if (!task || task.callbackUrl === null) return undefined
    const isCut = await this.#wasTooLarge(taskId)
    const success = task.status === 'succeeded'
    const logs = { bytes: task.logBytes ?? 0, read: () => this.#logOf(taskId, isCut) }
    const payload: CallbackPayload = { taskName: task.taskFileName, taskId, success, logs }
    const { callbackUrl: url, callbackUrlToken: token, traceparent } = task
    return { url, token, traceparent, payload, facts: factsOf(task), isCut }
  }

  async #wasTooLarge(taskId: string): Promise<boolean> {
    const refused = await this.#db
      .selectFrom('delivery_attempts')
      .select('number')
      .where('task_id', '=', taskId)
      .where('status_code', '=', 413)
      .limit(1)
      .executeTakeFirst()
    return refused !== undefined
  }

  async #logOf(taskId: string, isCut: boolean): Promise<LogTail> {
    const log = await this.#tasks.log(taskId)
    if (!log) throw new Error('The task and its log have been removed')
    return isCut ? { ...log, content: log.content.subarray(-CUT_LOG_BYTES) } : log
  }

  async recordAttempt(
    taskId: string,
    attempt: AttemptRecord,
    next: Parameters<DeliveryStore['recordAttempt']>[2],
    leaseUntil?: number,
  ): Promise<void> {
    const { status, nextAttemptAt } = next
    const manual = attempt.manual ? 1 : 0
    const deliveredAt = status === 'delivered' ? attempt.startedAt + attempt.durationMs : null
    const before = attempt.number - 1
    await this.#connection.atomically(
      this.#countAttempt({
        taskId,
        status,
        nextAttemptAt,
        number: attempt.number,
        before,
        manual,
        deliveredAt,
        leaseUntil: leaseUntil ?? null,
      }),
      [
        this.#addAttempt({
          ...attempt,
          taskId,
          manual,
          durationMs: Math.round(attempt.durationMs),
        }),
      ],
    )
  }

  async shiftDue(byMs: number): Promise<void> {
    await this.#db
      .updateTable('deliveries')
      .set((eb) => ({
        next_attempt_at: eb('next_attempt_at', '+', byMs),
        resume_at: eb('resume_at', '+', byMs),
      }))
      .where('status', '=', PENDING)
      // The outcome of an attempt under way sets the next time itself.
      .where('leased', '=', 0)
      .execute()
  }

  async boundDue(options: Parameters<DeliveryStore['boundDue']>[0]): Promise<void> {
    const { now, toleranceMs, longestDelaysMs } = options
    const delays = longestDelaysMs.map(
      (delayMs, attempts) => sql`when ${sql.lit(attempts)} then ${sql.lit(delayMs)}`,
    )
    const latest = sql<number>`${sql.lit(now)} + case attempts - manual_attempts ${sql.join(delays, sql` `)} else 0 end`
    const lastEventAt = sql<number>`coalesce(
      (select max(started_at + duration_ms) from delivery_attempts
       where delivery_attempts.task_id = deliveries.task_id),
      (select finished_at from tasks where tasks.task_id = deliveries.task_id))`
    await this.#db
      .updateTable('deliveries')
      .set({ next_attempt_at: latest })
      .where('status', '=', PENDING)
      .where('leased', '=', 0)
      .where('next_attempt_at', '>', latest)
      .where(lastEventAt, '>', now + toleranceMs)
      .execute()
  }

  async release(taskId: string, leaseUntil?: number): Promise<void> {
    await this.#db
      .updateTable('deliveries')
      .set({ next_attempt_at: 0, leased: 0 })
      .where('task_id', '=', taskId)
      .where('status', '=', PENDING)
      .$if(leaseUntil !== undefined, (query) =>
        query.where('next_attempt_at', '=', leaseUntil ?? 0),
      )
      .execute()
  }

  async redeliver(taskId: string, now: number): Promise<'queued' | 'in_flight' | undefined> {
    const { numUpdatedRows } = await this.#db
      .updateTable('deliveries')
      .set((eb) => ({
        resume_at: eb
          .case()
          .when('status', '!=', 'pending')
          .then(null)
          // Two requests cause one attempt.
          .when('manual', '=', 1)
          .then(eb.ref('resume_at'))
          .else(eb.ref('next_attempt_at'))
          .end(),
        manual: 1,
        status: 'pending' as const,
        next_attempt_at: now,
        leased: 0,
      }))
      .where('task_id', '=', taskId)
      .where((eb) => eb.or([eb('leased', '=', 0), eb('next_attempt_at', '<=', now)]))
      .executeTakeFirst()
    if (numUpdatedRows === 1n) return 'queued'
    return (await this.state(taskId)) ? 'in_flight' : undefined
  }

  async state(taskId: string): Promise<DeliveryState | undefined> {
    const [delivery, attempts] = await Promise.all([
      this.#db
        .selectFrom('deliveries')
        .select(['status', 'webhook_id', 'next_attempt_at', 'leased'])
        .where('task_id', '=', taskId)
        .executeTakeFirst(),
      this.#db
        .selectFrom('delivery_attempts')
        .selectAll()
        .where('task_id', '=', taskId)
        .orderBy('number')
        .execute(),
    ])
    if (!delivery) return undefined
    const { next_attempt_at: nextAt, leased } = delivery
    return {
      status: delivery.status,
      webhookId: delivery.webhook_id,
      nextAttemptAt: nextAt === null || leased === 1 ? null : Number(nextAt),
      attempts: attempts.map((attempt) => ({
        number: attempt.number,
        startedAt: Number(attempt.started_at),
        durationMs: Number(attempt.duration_ms),
        statusCode: attempt.status_code,
        error: attempt.error,
        manual: attempt.manual === 1,
      })),
    }
  }
}
