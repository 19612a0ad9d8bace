import { type RawBuilder, sql } from 'kysely'
import type { Cluster, OrphanedTask, SeenTask } from '../core/ports.ts'
import type { Connection } from './connection.ts'

/** Time without a heartbeat after which an instance is dead, and others take over its tasks. */
export const SILENT_MS = 15_000
const CLOCK_TOLERANCE_MS = 1_000
const ORPHANS_AT_ONCE = 100
/** Rounds in which an instance takes only its share of orphans; then it takes any that remain. */
const SHARED_ROUNDS = 2
const FORGOTTEN_AFTER_MS = 24 * 60 * 60 * 1000
/** Literals, as in the partial index of running tasks. */
const RUNNING = sql<boolean>`tasks.status in ('provisioning', 'running')`
const CLOCK: RawBuilder<number> = sql`(extract(epoch from clock_timestamp()) * 1000)::bigint`

/**
 * Each instance has a row for its heartbeat, which the others judge by the database's clock. An
 * instance whose own membership is shorter than the time limit declares no other dead: after an
 * outage of the database all heartbeats are old.
 */
export class PostgresCluster implements Cluster {
  readonly #connection: Connection
  readonly #instance: string
  readonly #hostBound: boolean
  readonly #hostGraceMs: number
  /** Time of the last heartbeat, on the steady clock and on the wall clock. */
  #lastBeat = Number.NEGATIVE_INFINITY
  #lastBeatAt = 0
  /** Time of the first heartbeat since the last gap, on the steady clock. */
  #memberSince = Number.POSITIVE_INFINITY
  #clock = { database: 0, steady: 0 }
  /** Rounds in a row that found orphans. */
  #rounds = 0

  constructor(
    connection: Connection,
    options: {
      instance: string
      /** Whether its workers can be reached only from its host. */
      hostBound: boolean
      /** How long such a host may be away before its tasks are lost; at least `SILENT_MS`. */
      hostGraceMs: number
    },
  ) {
    this.#connection = connection
    this.#instance = options.instance
    this.#hostBound = options.hostBound
    this.#hostGraceMs = Math.max(options.hostGraceMs, SILENT_MS)
  }

  /** The database's time in epoch ms, extrapolated from the last heartbeat. */
  readonly now = (): number =>
    Math.round(this.#clock.database + performance.now() - this.#clock.steady)

  async beat(): Promise<boolean> {
    const sentAt = performance.now()
    const sentOn = Date.now()
    const row = await this.#connection.db
      .insertInto('instances')
      .values({ name: this.#instance, host_bound: this.#hostBound ? 1 : 0, beat_at: CLOCK })
      .onConflict((conflict) =>
        conflict.column('name').doUpdateSet((eb) => ({ beat_at: eb.ref('excluded.beat_at') })),
      )
      .returning('beat_at')
      .executeTakeFirstOrThrow()
    const answeredAt = performance.now()
    // A slow answer does not tell when the database read its clock.
    if (this.#clock.database === 0 || answeredAt - sentAt < CLOCK_TOLERANCE_MS) {
      this.#clock = { database: Number(row.beat_at), steady: (sentAt + answeredAt) / 2 }
    }
    const wasMember = this.isMember()
    if (!wasMember) this.#memberSince = sentAt
    this.#lastBeat = sentAt
    this.#lastBeatAt = sentOn
    return wasMember
  }

  isMember(): boolean {
    // The steady clock stops while the machine is suspended.
    const silentMs = Math.max(performance.now() - this.#lastBeat, Date.now() - this.#lastBeatAt)
    return silentMs < SILENT_MS
  }

  async ours(): Promise<SeenTask[]> {
    const rows = await this.#ofThisInstance().select(['task_id', 'claim']).execute()
    return rows.map((row) => ({ taskId: row.task_id, claim: row.claim }))
  }

  async orphans(): Promise<OrphanedTask[]> {
    const memberMs = performance.now() - this.#memberSince
    const { db } = this.#connection
    const silentFor = (ms: number) => sql<boolean>`instances.beat_at < ${CLOCK} - ${ms}::bigint`
    const rows = await db
      .selectFrom('instances')
      .innerJoin('tasks', 'tasks.instance', 'instances.name')
      .select(['tasks.task_id', 'tasks.claim', 'tasks.instance', 'instances.host_bound'])
      .where(RUNNING)
      .where('instances.name', '!=', this.#instance)
      .where((eb) =>
        eb.or([
          // Left on its own.
          eb('beat_at', '=', 0),
          ...(memberMs < SILENT_MS
            ? []
            : [eb.and([eb('host_bound', '=', 0), silentFor(SILENT_MS)])]),
          ...(memberMs < this.#hostGraceMs
            ? []
            : [eb.and([eb('host_bound', '=', 1), silentFor(this.#hostGraceMs)])]),
        ]),
      )
      // Instances that look at the same time try different tasks first.
      .orderBy(sql`random()`)
      .limit(ORPHANS_AT_ONCE)
      .execute()
    this.#rounds = rows.length === 0 ? 0 : this.#rounds + 1
    if (rows.length === 0) {
      await db
        .deleteFrom('instances')
        .where(silentFor(FORGOTTEN_AFTER_MS))
        .where(sql<boolean>`not exists (select 1 from tasks where instance = name and ${RUNNING})`)
        .execute()
    }
    const orphans = rows.map((row) => ({
      taskId: row.task_id,
      claim: row.claim,
      instance: row.instance ?? '',
      isLost: row.host_bound === 1,
    }))
    if (orphans.length === 0 || this.#rounds > SHARED_ROUNDS) return orphans
    // Lost tasks only have their outcome recorded, which is no load.
    const share = await this.#share()
    return orphans.filter(({ isLost }, index) => isLost || index < share)
  }

  /** Returns how many tasks this instance lacks to run the average of all live instances. */
  async #share(): Promise<number> {
    const { db } = this.#connection
    const running = db.selectFrom('tasks').where(RUNNING)
    const row = await db
      .selectNoFrom((eb) => [
        running.select(eb.fn.countAll().as('count')).as('all'),
        this.#ofThisInstance().select(eb.fn.countAll().as('count')).as('ours'),
        db
          .selectFrom('instances')
          .where(sql<boolean>`beat_at >= ${CLOCK} - ${SILENT_MS}::bigint`)
          .select(eb.fn.countAll().as('count'))
          .as('living'),
      ])
      .executeTakeFirstOrThrow()
    return Math.ceil(Number(row.all) / Math.max(Number(row.living), 1)) - Number(row.ours)
  }

  async cancelRequests(): Promise<string[]> {
    const rows = await this.#ofThisInstance()
      .select('task_id')
      .where('cancel_requested_at', 'is not', null)
      .execute()
    return rows.map((row) => row.task_id)
  }

  async leave(): Promise<void> {
    // Other instances cannot reach its workers: its tasks wait until it is back.
    if (this.#hostBound) return
    await this.#connection.db
      .updateTable('instances')
      .set({ beat_at: 0 })
      .where('name', '=', this.#instance)
      .execute()
  }

  #ofThisInstance() {
    return this.#connection.db
      .selectFrom('tasks')
      .where('instance', '=', this.#instance)
      .where(RUNNING)
  }
}
