import { type RawBuilder, sql } from 'kysely'
import type { Cluster, OrphanedTask, SeenTask } from '../core/ports.ts'
import type { Connection } from './connection.ts'

/** An instance that was silent for so long is dead: others take over what it left. */
export const SILENT_MS = 15_000
const CLOCK_TOLERANCE_MS = 1_000
const ORPHANS_AT_ONCE = 100
/** So many times an instance leaves to others what is more than its share; then whoever looks takes what is left. */
const SHARED_LOOKS = 2
const FORGOTTEN_AFTER_MS = 24 * 60 * 60 * 1000
/** Written out, as the index of running tasks is. */
const RUNNING = sql<boolean>`tasks.status in ('provisioning', 'running')`
const CLOCK: RawBuilder<number> = sql`(extract(epoch from clock_timestamp()) * 1000)::bigint`

/**
 * Instances tell that they live by a row each, and judge each other by the database's clock alone. One that has not
 * been a member itself for as long as it takes to be declared dead declares nobody dead: after an outage of the
 * database all were silent. One that leaves says so.
 */
export class PostgresCluster implements Cluster {
  readonly #connection: Connection
  readonly #instance: string
  readonly #hostBound: boolean
  readonly #hostGraceMs: number
  /** By our steady clock, when the last beat was sent, and the first of those without a gap. */
  #lastBeat = Number.NEGATIVE_INFINITY
  #lastBeatAt = 0
  #memberSince = Number.POSITIVE_INFINITY
  #clock = { database: 0, steady: 0 }
  /** How often in a row orphans were found. */
  #looks = 0

  constructor(
    connection: Connection,
    options: {
      instance: string
      /** Its workers can be reached from its host only. */
      hostBound: boolean
      /** How long the host of such an instance may be away before its tasks are lost: no less than the dead are silent. */
      hostGraceMs: number
    },
  ) {
    this.#connection = connection
    this.#instance = options.instance
    this.#hostBound = options.hostBound
    this.#hostGraceMs = Math.max(options.hostGraceMs, SILENT_MS)
  }

  /** The database's time in epoch ms, as of the last beat: hosts need not agree on theirs. */
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
    // Of an answer that was long on its way nobody knows when it was true.
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
    // While a machine is suspended its steady clock stands still.
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
          // Those that have left are not waited for.
          eb('beat_at', '=', 0),
          ...(memberMs < SILENT_MS
            ? []
            : [eb.and([eb('host_bound', '=', 0), silentFor(SILENT_MS)])]),
          ...(memberMs < this.#hostGraceMs
            ? []
            : [eb.and([eb('host_bound', '=', 1), silentFor(this.#hostGraceMs)])]),
        ]),
      )
      // Whoever else looks takes others first.
      .orderBy(sql`random()`)
      .limit(ORPHANS_AT_ONCE)
      .execute()
    this.#looks = rows.length === 0 ? 0 : this.#looks + 1
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
    if (orphans.length === 0 || this.#looks > SHARED_LOOKS) return orphans
    // To give tasks up is no load.
    const share = await this.#share()
    return orphans.filter(({ isLost }, index) => isLost || index < share)
  }

  /** How many more tasks this instance may run until it has as many as all that live have on average. */
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
    // Its host may come back, and nobody else can go on.
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
