import { setTimeout as pause } from 'node:timers/promises'
import type pg from 'pg'
import type { Hints, Logger } from '../core/ports.ts'
import { until } from '../core/until.ts'

const CHANNEL = 'task_runner'
const LEADER_LOCK = 0x6c656164
const RETRY_MS = 1_000
/** Time between probes: a server that vanished closes no connection. */
const PROBE_MS = 10_000
/** Time without a probe after which the server ends the session, so no paused instance leads. */
const IDLE_SESSION_MS = 30_000
/** Tasks accepted within this time share one hint. */
const HINT_DEBOUNCE_MS = 10
/** Time limit for closing a connection that may be dead. */
const CLOSE_TIMEOUT_MS = 1_000

/**
 * A session that stays open to send and receive hints, and to hold the lock of the leader, which
 * does the periodic work. It is opened again whenever it breaks.
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
  #hint: NodeJS.Timeout | undefined
  #running: Promise<void> = Promise.resolve()

  constructor(newClient: () => pg.Client, log: Logger) {
    this.#newClient = newClient
    this.#log = log
  }

  /** Opens the session and passes the hints of other instances to `hear`. */
  listen(hear: Hints): void {
    this.#running = this.#run(hear)
  }

  tasksWait(): void {
    this.#hint ??= setTimeout(() => {
      this.#hint = undefined
      this.#notify('')
    }, HINT_DEBOUNCE_MS)
  }

  cancelRequested(taskId: string): void {
    this.#notify(taskId)
  }

  /** Returns whether this instance is the leader, which it stays until its session ends. */
  async leads(): Promise<boolean> {
    const client = this.#client
    if (!client || this.#leads) return this.#leads
    const asking = `select pg_try_advisory_lock(${LEADER_LOCK}) as leads`
    const { rows } = await this.#query(client, asking)
    if (client === this.#client) this.#leads = rows[0]?.leads === true
    return this.#leads
  }

  async close(): Promise<void> {
    clearTimeout(this.#hint)
    this.#closing.abort()
    await this.#running
  }

  async #run(hear: Hints): Promise<void> {
    const { signal } = this.#closing
    while (!signal.aborted) {
      const client = this.#newClient()
      await this.#use(client, hear).catch((err: unknown) => {
        if (!signal.aborted) this.#log.warn({ err }, 'the session with Postgres broke')
      })
      this.#client = undefined
      this.#leads = false
      await until(client.end(), AbortSignal.timeout(CLOSE_TIMEOUT_MS)).catch(() => {})
      await pause(RETRY_MS, undefined, { signal }).catch(() => {})
    }
  }

  /** Uses the session until it breaks, or until `close`. Always throws. */
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
    // Hints may have been missed while there was no session.
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
