import { type RawBuilder, sql } from 'kysely'
import type { NewDelivery, NewTask } from '../core/ports.ts'
import { LIVE_STATUSES, type Outcome, PRIORITY_STEP_MS } from '../core/task.ts'
import type { Connection } from './connection.ts'
import type { encodeLog } from './log-codec.ts'
import { prepared } from './prepared.ts'
import { SUMMARY_COLUMNS } from './task-row.ts'

/** `queuePosition` in SQL, as in the index of waiting tasks. */
const POSITION = sql<number>`created_at - priority * ${sql.lit(PRIORITY_STEP_MS)}`
/** A literal, so that the partial index is used. */
const QUEUED = sql.lit('queued' as const)

/** Prepares the statements that every task runs. */
export const taskWrites = ({ db, skipLocked }: Connection) => ({
  insert: prepared((p: NewTask & { sealed: Uint8Array; terminates: 0 | 1; hasCallback: 0 | 1 }) =>
    db
      .insertInto('tasks')
      .values({
        task_id: p.taskId,
        task_file_name: p.taskFileName,
        status: 'queued',
        reason: null,
        message: null,
        exit_code: null,
        signal: null,
        worker_name: p.workerName,
        worker_state: 'none',
        terminate_on_completion: p.terminates,
        timeout_seconds: p.timeoutSeconds,
        has_callback: p.hasCallback,
        priority: p.priority,
        claim: 0,
        instance: null,
        traceparent: p.traceparent,
        cancel_requested_at: null,
        created_at: p.createdAt,
        claimed_at: null,
        started_at: null,
        finished_at: null,
        log_bytes: null,
        digest: p.digest,
        sealed: p.sealed,
        waiting_for: null,
      })
      .onConflict((conflict) => conflict.column('task_id').doNothing()),
  ),

  claimNext: prepared((p: NextClaim) => claimNext({ db, skipLocked }, p, p.limit)),

  /** Postgres only. Must run through `inTurn`, since it counts the running tasks. */
  claimNextWithin: prepared((p: NextClaim & { runningMax: number }) => {
    const running = sql`(select count(*) from tasks where status in ('provisioning', 'running'))`
    const room = sql<number>`greatest(0, least(${p.limit}::int, ${p.runningMax}::int - ${running}))`
    return claimNext({ db, skipLocked }, p, room)
  }),

  claim: prepared(
    (p: { taskId: string; at: number; seen: number; next: number; instance: string }) =>
      db
        .updateTable('tasks')
        .set({
          claim: p.next,
          instance: p.instance,
          claimed_at: sql<number>`coalesce(claimed_at, ${p.at})`,
          status: sql<
            'provisioning' | 'running'
          >`case when status = 'queued' then 'provisioning' else status end`,
          worker_state: 'live' as const,
          waiting_for: null,
        })
        .where('task_id', '=', p.taskId)
        .where('status', 'in', LIVE_STATUSES)
        .where((eb) =>
          eb.or([
            eb('claim', '=', p.seen),
            // An earlier attempt made the claim, and its answer was lost.
            eb.and([eb('claim', '=', p.next), eb('instance', '=', p.instance)]),
          ]),
        )
        .returning([...SUMMARY_COLUMNS, 'sealed', 'cancel_requested_at']),
  ),

  markRunning: prepared((p: { taskId: string; claim: number; startedAt: number }) =>
    db
      .updateTable('tasks')
      .set({ status: 'running', started_at: p.startedAt, waiting_for: null })
      .where('task_id', '=', p.taskId)
      .where('claim', '=', p.claim)
      .where('status', 'in', LIVE_STATUSES),
  ),

  setOutcome: prepared(
    (
      p: Outcome & {
        finishedAt: number
        logBytes: number
        sealed: Uint8Array
        /** Null: unchanged. */
        workerState: 'kept' | null
        taskId: string
        claim: number
      },
    ) =>
      db
        .updateTable('tasks')
        .set({
          status: p.status,
          reason: p.reason,
          message: p.message,
          exit_code: p.exitCode,
          signal: p.signal,
          finished_at: p.finishedAt,
          waiting_for: null,
          log_bytes: p.logBytes,
          sealed: p.sealed,
          worker_state: sql<'kept'>`coalesce(${p.workerState}, worker_state)`,
        })
        .where('task_id', '=', p.taskId)
        .where('claim', '=', p.claim)
        .where('status', 'in', LIVE_STATUSES),
  ),

  keepLog: prepared(
    (p: { taskId: string; totalBytes: number } & Awaited<ReturnType<typeof encodeLog>>) =>
      db.insertInto('task_logs').values({
        task_id: p.taskId,
        encoding: p.encoding,
        content: p.content,
        total_bytes: p.totalBytes,
      }),
  ),

  openDelivery: prepared(
    (
      p: Omit<NewDelivery, 'leaseUntil'> & { taskId: string; nextAttemptAt: number; leased: 0 | 1 },
    ) =>
      db.insertInto('deliveries').values({
        task_id: p.taskId,
        webhook_id: p.webhookId,
        origin: p.origin,
        status: 'pending',
        attempts: 0,
        manual: 0,
        resume_at: null,
        delivered_at: null,
        next_attempt_at: p.nextAttemptAt,
        leased: p.leased,
      }),
  ),

  workerTerminated: prepared((p: { taskId: string }) =>
    db.updateTable('tasks').set({ worker_state: 'gone' }).where('task_id', '=', p.taskId),
  ),
})

interface NextClaim {
  at: number
  limit: number
  instance: string
}

function claimNext(
  { db, skipLocked }: Pick<Connection, 'db' | 'skipLocked'>,
  { at, instance }: NextClaim,
  limit: number | RawBuilder<number>,
) {
  const next = db
    .selectFrom('tasks')
    .select('seq')
    .where('status', '=', QUEUED)
    .orderBy(POSITION)
    .orderBy('seq')
    .limit(limit)
  // Postgres runs a common table expression once, but may repeat a subquery that locks.
  return db
    .with('next', () => skipLocked(next))
    .updateTable('tasks')
    .set({
      claim: sql<number>`claim + 1`,
      instance,
      claimed_at: at,
      status: 'provisioning',
      worker_state: 'live',
      waiting_for: null,
    })
    .where('seq', 'in', (eb) => eb.selectFrom('next').select('next.seq'))
    .returning([...SUMMARY_COLUMNS, 'sealed', 'cancel_requested_at'])
}
