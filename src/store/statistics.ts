import { sql } from 'kysely'
import type {
  Durations,
  Statistics,
  StatisticsBucket,
  StatisticsStore,
} from '../core/statistics.ts'
import type { FinalStatus, Reason } from '../core/task.ts'
import type { Connection } from './connection.ts'

/** Sums that durations are made from; databases hand some out as text, and null where there was nothing. */
interface Sums {
  count: unknown
  total: unknown
  max: unknown
}

export class SqlStatistics implements StatisticsStore {
  readonly #connection: Connection

  constructor(connection: Connection) {
    this.#connection = connection
  }

  async ended(span: { from: number; bucketMs: number; count: number }): Promise<Statistics> {
    const { from, bucketMs, count } = span
    const wait = sql<number>`tasks.claimed_at - tasks.created_at`
    const delay = sql<number>`first.started_at - tasks.finished_at`
    const groups = await this.#connection.db
      .selectFrom('tasks')
      .leftJoin('delivery_attempts as first', (join) =>
        join.onRef('first.task_id', '=', 'tasks.task_id').on('first.number', '=', 1),
      )
      .select(({ fn }) => [
        // Written out: parameters are floating point numbers to SQLite, which would divide so.
        sql<number>`(tasks.finished_at - ${sql.lit(from)}) / ${sql.lit(bucketMs)}`.as('bucket'),
        'tasks.status',
        'tasks.reason',
        fn.countAll().as('tasks'),
        fn.count(wait).as('waits'),
        fn.sum(wait).as('waited'),
        fn.max(wait).as('longest_wait'),
        fn.count(delay).as('delays'),
        fn.sum(delay).as('delayed'),
        fn.max(delay).as('longest_delay'),
      ])
      .where('tasks.finished_at', '>=', from)
      .where('tasks.finished_at', '<', from + count * bucketMs)
      .groupBy(['bucket', 'tasks.status', 'tasks.reason'])
      .execute()

    const buckets = Array.from({ length: count }, (_, index): StatisticsBucket => {
      const here = groups.filter(({ bucket }) => Number(bucket) === index)
      const ended = (status: FinalStatus) =>
        sumOf(here.filter((group) => group.status === status).map(({ tasks }) => tasks))
      return {
        at: from + index * bucketMs,
        succeeded: ended('succeeded'),
        failed: ended('failed'),
        cancelled: ended('cancelled'),
        queueWait: durations(
          here.map((g) => ({ count: g.waits, total: g.waited, max: g.longest_wait })),
        ),
        callbackDelay: durations(
          here.map((g) => ({ count: g.delays, total: g.delayed, max: g.longest_delay })),
        ),
      }
    })
    const counts = new Map<Reason, number>()
    for (const { status, reason, tasks } of groups) {
      if (status === 'succeeded' || reason === null) continue
      counts.set(reason, (counts.get(reason) ?? 0) + Number(tasks))
    }
    const reasons = [...counts].map(([reason, count]) => ({ reason, count }))
    return { buckets, reasons: reasons.sort((a, b) => b.count - a.count) }
  }
}

function sumOf(values: unknown[]): number {
  return values.reduce<number>((sum, value) => sum + Number(value ?? 0), 0)
}

function durations(groups: Sums[]): Durations {
  const count = sumOf(groups.map((group) => group.count))
  if (count === 0) return { mean: null, max: null }
  const total = sumOf(groups.map((group) => group.total))
  const max = Math.max(...groups.map((group) => Number(group.max ?? 0)))
  // Two clocks may disagree by a little.
  return { mean: Math.max(0, total / count / 1000), max: Math.max(0, max / 1000) }
}
