import { setTimeout as pause } from 'node:timers/promises'
import type pg from 'pg'
import type { Hints, Logger } from '../core/ports.ts'
import { until } from '../core/until.ts'

const CHANNEL = 'task_runner'
const LEADER_LOCK = 0x6c656164
const RETRY_MS = 1_000
/** Pause between looks whether the session lives: a server that vanished says nothing. */
const PROBE_MS = 10_000
/** Time without a probe after which the server ends the session: a paused instance must not lead. */
const IDLE_SESSION_MS = 30_000
/** Many tasks that come at once are told of once. */
const TOLD_AFTER_MS = 10
/** Time for the end of a connection that may be dead. */
const FAREWELL_MS = 1_000

/**
 * The session that an instance keeps open: in it the instance hears and sends hints, and holds the
 * lock of the one instance that does periodic work. It is opened again whenever it breaks.
 */
export class PostgresSession implements Hints {
  readonly #newClient: () => pg.Client
  readonly #log: Logger
  readonly #closing = new AbortController()
  /** Undefined while there is no connection. */
  #client: pg.Client | undefined
  /** Settles with the statement under way: a client takes one at a time. */
  #statement: Promise<unknown> = Promise.resolve()
  #leads = false
  #told: NodeJS.Timeout | undefined
  #kept: Promise<void> = Promise.resolve()

  constructor(newClient: () => pg.Client, log: Logger) {
    this.#newClient = newClient
    this.#log = log
  }

  /** Passes on what other instances say, from now on. */
  listen(hear: Hints): void {
    this.#kept = this.#keep(hear)
  }

  tasksWait(): void {
    this.#told ??= setTimeout(() => {
      this.#told = undefined
      this.#notify('')
    }, TOLD_AFTER_MS)
  }

  cancelRequested(taskId: string): void {
    this.#notify(taskId)
  }

  /** Whether this instance is the one that does periodic work. It stays so until its session ends. */
  async leads(): Promise<boolean> {
    const client = this.#client
    if (!client || this.#leads) return this.#leads
    const asking = `select pg_try_advisory_lock(${LEADER_LOCK}) as leads`
    const { rows } = await this.#query(client, asking)
    if (client === this.#client) this.#leads = rows[0]?.leads === true
    return this.#leads
  }

  async close(): Promise<void> {
    clearTimeout(this.#told)
    this.#closing.abort()
    await this.#kept
  }

  async #keep(hear: Hints): Promise<void> {
    const { signal } = this.#closing
    while (!signal.aborted) {
      const client = this.#newClient()
      await this.#use(client, hear).catch((err: unknown) => {
        if (!signal.aborted) this.#log.warn({ err }, 'the session with Postgres broke')
      })
      this.#client = undefined
      this.#leads = false
      await until(client.end(), AbortSignal.timeout(FAREWELL_MS)).catch(() => {})
      await pause(RETRY_MS, undefined, { signal }).catch(() => {})
    }
  }

  /** Throws when the session breaks, or on `close`. */
  async #use(client: pg.Client, hear: Hints): Promise<void> {
    const broken = new AbortController()
    client.on('end', () => broken.abort())
    client.on('notification', ({ payload = '' }) => {
      if (payload === '') hear.tasksWait()
      else hear.cancelRequested(payload)
    })
    await client.connect()
    await client.query(`set idle_session_timeout = ${IDLE_SESSION_MS}; listen ${CHANNEL}`)
    this.#client = client
    // While nobody listened there may have been something.
    hear.tasksWait()
    const signal = AbortSignal.any([this.#closing.signal, broken.signal])
    for (;;) {
      await pause(PROBE_MS, undefined, { signal })
      await this.#query(client, 'select pg_listening_channels()')
    }
  }

  #notify(payload: string): void {
    if (!this.#client) return
    this.#query(this.#client, 'select pg_notify($1, $2)', [CHANNEL, payload]).catch(
      (err: unknown) => this.#log.debug({ err }, 'a hint was not sent'),
    )
  }

  #query(client: pg.Client, text: string, values: string[] = []): Promise<pg.QueryResult> {
    const answer = this.#statement.then(() => client.query(text, values))
    this.#statement = answer.catch(() => {})
    return answer
  }
}
