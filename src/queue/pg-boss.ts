import { createHash } from 'node:crypto'
import { setTimeout as pause } from 'node:timers/promises'
import { fromKysely, type KyselyTransactionLike, PgBoss } from 'pg-boss'
import type { Handler, Logger, SeenTask, TaskQueue, WaitingTask } from '../core/ports.ts'
import { type Slot, Slots } from '../core/slots.ts'
import { queuePosition } from '../core/task.ts'
import { until } from '../core/until.ts'

const TASKS = 'task'
const SWEEP = 'sweep'
/** Of our own: what waits, or the id of a task that someone wants ended. */
const CHANNEL = 'task_runner'
const EVERY_MINUTE = '* * * * *'
/** A hint may get lost: how often the queue is looked at all the same. */
const POLL_MS = 2_000
const RETRY_MS = 1_000
/** For an answer, where a server that cannot be reached any more gives none. */
const ANSWER_MS = 12_000
/** For the end of a connection. */
const FAREWELL_MS = 1_000
/** To install the tables may take longer. */
const INSTALL_ANSWER_MS = 60_000
/** Of many hints at once one is followed. */
const HINT_MS = 10
/** Instances that hear of many tasks at once share them. */
const FETCHED_AT_ONCE = 16
/** Of an instance between fetching a task and claiming it, and while it sweeps; the engine takes no less. */
const HEARTBEAT_SECONDS = 10
const SUPERVISE_SECONDS = 5
const TEN_YEARS = 10 * 365 * 86_400
/** The engine's priorities are 32 bits: seconds before and after this. */
const EPOCH_MS = Date.UTC(2026, 0, 1)
const CLUSTER_LIMIT_LOCK = 0x7461736b

/** What belongs to a transaction of the store. */
type InTransaction = (transaction: KyselyTransactionLike) => Promise<void>
type Database = ReturnType<PgBoss['getDb']>
interface Job {
  taskId: string
}
type Fetched = Awaited<ReturnType<typeof PgBoss.prototype.fetch<Job>>>
type Listening = Awaited<ReturnType<NonNullable<Database['listen']>>>

export interface PgBossQueueOptions {
  /** Of its own connections. */
  connection: { connectionString: string; application_name: string }
  /** Of all instances together. */
  runningMax: number | undefined
  queuedMax: number
  log: Logger
}

/**
 * Waiting tasks in Postgres: a job from the transaction that stores the task to the one that claims it, so that what
 * waits and what is queued cannot differ. Instances fetch as many as they have room for.
 */
export class PgBossQueue implements TaskQueue {
  readonly #options: PgBossQueueOptions
  readonly #boss: PgBoss
  readonly #slots = new Slots(() => {
    if (!this.#isDrained) this.#wake.resolve()
  })
  #isHeld = false
  #handler: Handler | undefined
  #onCancel: (taskId: string) => void = () => {}
  #length = 0
  #counting: NodeJS.Timeout | undefined
  #fetching: Promise<void> = Promise.resolve()
  #wake = Promise.withResolvers<void>()
  /** A fetch got less than there was room for, and nothing has been heard of since. */
  #isDrained = false
  #hint: NodeJS.Timeout | undefined
  #listener: Listening | undefined

  private constructor(options: PgBossQueueOptions) {
    this.#options = options
    this.#boss = new PgBoss({
      ...{ ...options.connection, query_timeout: ANSWER_MS },
      max: 4,
      superviseIntervalSeconds: SUPERVISE_SECONDS,
      monitorIntervalSeconds: SUPERVISE_SECONDS,
    })
    this.#boss.on('error', (err) => options.log.warn({ err }, 'pg-boss failed, and goes on'))
    this.#boss.on('warning', ({ message, data }) => options.log.warn({ data }, message))
  }

  /** Installs the engine's tables, or brings them up to date, one instance at a time. */
  static async open(options: PgBossQueueOptions): Promise<PgBossQueue> {
    await install(options.connection)
    const queue = new PgBossQueue(options)
    try {
      await queue.#open()
      return queue
    } catch (err) {
      await queue.close()
      throw err
    }
  }

  async #open(): Promise<void> {
    const boss = this.#boss
    await boss.start()
    await boss.createQueue(TASKS, {
      heartbeatSeconds: HEARTBEAT_SECONDS,
      // Nothing that waits is ever given up.
      retryLimit: 1_000_000,
      retentionSeconds: TEN_YEARS,
    })
    await boss.createQueue(SWEEP, {
      policy: 'exclusive',
      // One that died amid its sweep keeps others from theirs no longer than this.
      heartbeatSeconds: HEARTBEAT_SECONDS,
      retryLimit: 0,
      deleteAfterSeconds: 3_600,
    })
    await this.#count()
    this.#listener = await boss.getDb().listen?.(CHANNEL, this.#onNotification, this.#onMissed)
  }

  get length(): number {
    return this.#length
  }

  // ---------------------------------------------------------------- with the store

  add(task: WaitingTask): InTransaction {
    const priority = Math.round((EPOCH_MS - queuePosition(task)) / 1000)
    return async (transaction) => {
      const db = fromKysely(transaction)
      const options = { id: jobId(task.taskId), priority, db }
      const id = await this.#boss.send(TASKS, { taskId: task.taskId } satisfies Job, options)
      if (id === null) throw new Error(`a job of ${task.taskId} is there already`)
      await notify(db, '')
    }
  }

  taken(taskId: string): InTransaction {
    return async (transaction) => {
      await this.#boss.deleteJob(TASKS, jobId(taskId), { db: fromKysely(transaction) })
    }
  }

  cancelRequested(taskId: string): InTransaction {
    return (transaction) => notify(fromKysely(transaction), taskId)
  }

  // ---------------------------------------------------------------- with the instance

  /** It is stored, and with it in the queue. */
  enqueue(_task: WaitingTask): void {
    this.#length += 1
    this.#look()
  }

  /** Whoever ends it takes it out. */
  remove(_taskId: string): void {}

  resume(task: SeenTask): void {
    this.#hand(task)
  }

  work(concurrency: number, handler: Handler): void {
    this.#slots.limit = concurrency
    this.#handler = handler
    this.#fetching = this.#fetchWhileThereIsRoom()
    this.#counting = setInterval(() => {
      this.#count().catch((err: unknown) => {
        this.#options.log.warn({ err }, 'counting waiting tasks failed, trying again')
      })
    }, POLL_MS)
  }

  hold(): void {
    this.#isHeld = true
  }

  goOn(): void {
    this.#isHeld = false
    this.#look()
  }

  async stop(): Promise<void> {
    this.#handler = undefined
    clearInterval(this.#counting)
    clearTimeout(this.#hint)
    this.#look()
    await this.#fetching
  }

  /** Calls back with the ids of tasks that someone wants ended. A hint: some get lost. */
  onCancel(hear: (taskId: string) => void): void {
    this.#onCancel = hear
  }

  /** Calls once a minute, on one of the instances. */
  async everyMinute(sweep: () => Promise<unknown>): Promise<void> {
    await this.#boss.schedule(SWEEP, EVERY_MINUTE)
    await this.#boss.work(SWEEP, async () => {
      // The engine would keep it to itself.
      await sweep().catch((err: unknown) => this.#options.log.error({ err }, 'sweep failed'))
    })
  }

  /** Lets go of the database. */
  async close(): Promise<void> {
    await this.stop()
    // One whose connection has died would be waited for as long as the system tries to reach the server.
    const late = AbortSignal.timeout(FAREWELL_MS)
    if (this.#listener) await until(this.#listener.close(), late).catch(() => {})
    await this.#boss.stop()
  }

  async #fetchWhileThereIsRoom(): Promise<void> {
    while (this.#handler) {
      this.#wake = Promise.withResolvers()
      const room = this.#isHeld ? 0 : Math.min(this.#slots.free, FETCHED_AT_ONCE)
      if (room > 0) {
        // Where all instances together may run no more, the end of any task makes room.
        this.#isDrained = this.#options.runningMax === undefined
        const jobs = await this.#fetch(room)
        for (const job of jobs) this.#hand({ taskId: job.data.taskId, claim: 0 }, job)
        if (jobs.length === room) {
          this.#isDrained = false
          continue
        }
      }
      const idle = new AbortController()
      const poll = pause(POLL_MS, undefined, idle).catch(() => {})
      await Promise.race([this.#wake.promise, poll])
      idle.abort()
    }
  }

  /** There may be something to fetch. */
  #look(): void {
    this.#isDrained = false
    this.#wake.resolve()
  }

  async #fetch(most: number): Promise<Fetched> {
    try {
      const jobs = await this.#fetchWithin(most)
      if (this.#handler) return jobs
      // Stopped meanwhile: for others, at once.
      if (jobs.length > 0) await this.#boss.fail(TASKS, jobs)
    } catch (err) {
      this.#options.log.warn({ err }, 'fetching waiting tasks failed, trying again')
      await pause(RETRY_MS)
    }
    return []
  }

  async #fetchWithin(most: number): Promise<Fetched> {
    const { runningMax } = this.#options
    if (runningMax === undefined) return this.#boss.fetch<Job>(TASKS, { batchSize: most })
    // Holds: an engine with a pool of its own can.
    const transaction = await this.#boss.getDb().beginTransaction?.()
    if (!transaction) throw new Error('the database takes no transactions')
    const { db } = transaction
    try {
      await db.executeSql('select pg_advisory_xact_lock($1)', [CLUSTER_LIMIT_LOCK])
      // What was fetched is claimed soon, and counts. Claiming moves a task from one to the other at once.
      const running = await numberOf(
        db,
        `select (select count(*) from tasks where status in ('provisioning', 'running'))
              + (select count(*) from pgboss.job where name = $1 and state = 'active') as number`,
        [TASKS],
      )
      const room = Math.min(most, runningMax - running)
      const jobs = room > 0 ? await this.#boss.fetch<Job>(TASKS, { batchSize: room, db }) : []
      await transaction.commit()
      return jobs
    } catch (err) {
      await transaction.rollback()
      throw err
    }
  }

  #hand(task: SeenTask, job?: Fetched[number]): void {
    if (!this.#handler) return
    if (job) this.#length = Math.max(0, this.#length - 1)
    const slot = this.#slots.take()
    void this.#run({ handler: this.#handler, task, slot }, job).finally(() => slot.release())
  }

  async #run(
    { handler, task, slot }: { handler: Handler; task: SeenTask; slot: Slot },
    job?: Fetched[number],
  ): Promise<void> {
    if ((await handler(task, slot)) || !job) return
    // Its task waits no more, and it is still there: the engine had it in hand when it was to be taken out.
    await this.#boss.deleteJob(TASKS, job).catch((err: unknown) => {
      this.#options.log.warn({ err, taskId: task.taskId }, 'a job of no use stays, and comes again')
    })
  }

  /** As many as matter: beyond the limit none is taken in. */
  async #count(): Promise<void> {
    this.#length = await numberOf(
      this.#boss.getDb(),
      `select count(*) as number from
         (select 1 from tasks where status = 'queued' limit $1) as waiting`,
      [this.#options.queuedMax],
    )
  }

  readonly #onNotification = (taskId: string) => {
    if (taskId !== '') this.#onCancel(taskId)
    // The instance that took the task in has it by then, if it has room: not all need to ask.
    else this.#hint ??= setTimeout(this.#onMissed, HINT_MS * (1 + Math.random()))
  }

  /** While nobody listened there may have been something. */
  readonly #onMissed = () => {
    this.#hint = undefined
    this.#look()
  }
}

async function install(connection: PgBossQueueOptions['connection']): Promise<void> {
  const boss = new PgBoss({
    ...connection,
    ...{ query_timeout: INSTALL_ANSWER_MS, max: 2, supervise: false, schedule: false },
  })
  // Told by the start as well.
  boss.on('error', () => {})
  await boss.start().finally(() => boss.stop())
}

async function numberOf(db: Database, text: string, values: unknown[]): Promise<number> {
  const { rows } = await db.executeSql(text, values)
  return Number(rows[0]?.number)
}

async function notify(db: Database, payload: string): Promise<void> {
  await db.executeSql('select pg_notify($1, $2)', [CHANNEL, payload])
}

/** A job's id comes from the task's: nobody has to remember it. */
function jobId(taskId: string): string {
  const hex = createHash('sha256').update(taskId).digest('hex')
  // Version 8 and the variant of RFC 9562, section 5.8.
  const parts = [
    hex.slice(0, 8),
    hex.slice(8, 12),
    `8${hex.slice(13, 16)}`,
    `8${hex.slice(17, 20)}`,
  ]
  return [...parts, hex.slice(20, 32)].join('-')
}
