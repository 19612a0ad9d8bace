import { sql } from 'kysely'
import type { Durations, EndedTasks, StatisticsStore } from '../core/statistics.ts'
import type { FinalStatus } from '../core/task.ts'
import type { Connection } from './connection.ts'

export class SqlStatistics implements StatisticsStore {
  readonly #connection: Connection

  constructor(connection: Connection) {
    this.#connection = connection
  }

  async ended(from: number, to: number): Promise<EndedTasks> {
    const wait = sql<number>`tasks.claimed_at - tasks.created_at`
    const delay = sql<number>`first.started_at - tasks.finished_at`
    const groups = await this.#connection.db
      .selectFrom('tasks')
      .leftJoin('delivery_attempts as first', (join) =>
        join.onRef('first.task_id', '=', 'tasks.task_id').on('first.number', '=', 1),
      )
      .select(({ fn }) => [
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
      .where('tasks.finished_at', '<', to)
      .groupBy(['tasks.status', 'tasks.reason'])
      .execute()
    const count = (wanted: FinalStatus) =>
      total(groups.filter(({ status }) => status === wanted).map(({ tasks }) => tasks))
    return {
      succeeded: count('succeeded'),
      failed: count('failed'),
      cancelled: count('cancelled'),
      reasons: groups.flatMap(({ status, reason, tasks }) =>
        status === 'succeeded' || reason === null ? [] : [{ reason, count: Number(tasks) }],
      ),
      queueWait: durations(
        groups.map((g) => ({ count: g.waits, sum: g.waited, max: g.longest_wait })),
      ),
      callbackDelay: durations(
        groups.map((g) => ({ count: g.delays, sum: g.delayed, max: g.longest_delay })),
      ),
    }
  }
}

/** Adds up values, which databases return as numbers, bigints, text or null. */
function total(values: unknown[]): number {
  return values.reduce<number>((sum, value) => sum + Number(value ?? 0), 0)
}

function durations(groups: Array<{ count: unknown; sum: unknown; max: unknown }>): Durations {
  const count = total(groups.map((group) => group.count))
  if (count === 0) return { mean: null, max: null }
  const ms = total(groups.map((group) => group.sum)) / count
  const longestMs = Math.max(...groups.map(({ max }) => Number(max ?? 0)))
  // Clocks of instances may differ slightly.
  return { mean: Math.max(0, ms / 1000), max: Math.max(0, longestMs / 1000) }
}
