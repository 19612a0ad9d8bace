import { setTimeout as pause } from 'node:timers/promises'
import {
  type Compilable,
  Kysely,
  PostgresDialect,
  type PostgresPool,
  type PostgresPoolClient,
  sql,
} from 'kysely'
import { Migrator } from 'kysely/migration'
import pg from 'pg'
import { type Connection, storeUnavailable } from './connection.ts'
import { migrations } from './migrations.ts'
import { SILENT_MS } from './postgres-cluster.ts'
import type { Database } from './schema.ts'

const TYPES = { serial: 'bigserial primary key', bytes: 'bytea', hasSchemas: true }
/** The advisory lock of `inTurn`. */
const TURN_LOCK = 0x7461736b
const CONNECT_TIMEOUT_MS = 5_000
/** Time limit of a statement on the server. */
const STATEMENT_TIMEOUT_MS = 10_000
/** Time after which the server ends the transaction of a paused instance, which holds locks. */
const IDLE_TIMEOUT_MS = 10_000
/** Time limit of a statement on the client, for a server that has become unreachable. */
const ANSWER_TIMEOUT_MS = 12_000

/**
 * A server that shuts down may end a session before the pool adds its listener, and without one the
 * `error` event would end the process. The next statement on the client reports the failure.
 */
class SafeClient extends pg.Client {
  constructor(config?: string | pg.ClientConfig) {
    super(config)
    this.on('error', () => {})
  }
}

/** Returns the options that all connections share. */
function connectionOptions(url: string, instance: string) {
  return {
    connectionString: withDurableCommits(url),
    application_name: `task-runner ${instance}`.slice(0, 63),
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    idle_in_transaction_session_timeout: IDLE_TIMEOUT_MS,
    keepAlive: true,
    Client: SafeClient,
  }
}

/** Returns a client outside the pool, not yet connected. A break only emits `end`. */
export function newClient(url: string, instance: string): pg.Client {
  return new SafeClient({
    ...connectionOptions(url, instance),
    query_timeout: ANSWER_TIMEOUT_MS,
  })
}

/** Adds `synchronous_commit=on` to the options in the URL, whatever the server's default. */
function withDurableCommits(url: string): string {
  const parsed = new URL(url)
  const options = [parsed.searchParams.get('options'), '-c synchronous_commit=on']
  parsed.searchParams.set('options', options.filter((each) => each !== null).join(' '))
  // Postgres does not decode a plus sign as a space.
  parsed.search = parsed.search.replaceAll('+', '%20')
  return parsed.href
}

/**
 * Opens the database and migrates its tables, one instance at a time. Migrations of a newer release
 * are left alone. Throws if the database cannot be reached.
 */
export async function openPostgres(
  url: string,
  options: { instance: string; poolSize: number },
): Promise<Connection> {
  const connection = connectionOptions(url, options.instance)
  await migrate(new pg.Pool({ ...connection, max: 2 }))
  const pool = new pg.Pool({
    ...connection,
    max: options.poolSize,
    statement_timeout: STATEMENT_TIMEOUT_MS,
    query_timeout: ANSWER_TIMEOUT_MS,
  })
  // The pool drops an idle connection that breaks; the next statement opens another.
  pool.on('error', () => {})
  const db = new Kysely<Database>({ dialect: new PostgresDialect({ pool: withStoreErrors(pool) }) })
  return {
    db,
    async atomically<Row>(first: Compilable<Row>, others: readonly Compilable[] = []) {
      if (others.length === 0) return changed(db, first)
      return db.transaction().execute(async (transaction) => {
        const rows = await changed(transaction, first)
        if (rows === undefined) return undefined
        for (const other of others) await transaction.executeQuery(other.compile())
        return rows
      })
    },
    inTurn: (statement) =>
      db.transaction().execute(async (transaction) => {
        await sql`select pg_advisory_xact_lock(${sql.lit(TURN_LOCK)})`.execute(transaction)
        return (await transaction.executeQuery(statement.compile())).rows
      }),
    skipLocked: (rows) => rows.forUpdate().skipLocked(),
    identity: () => identityOf(db),
    close: () => db.destroy(),
  }
}

/** Returns the rows of the statement; undefined if it changed none. */
async function changed<Row>(
  db: Kysely<Database>,
  statement: Compilable<Row>,
): Promise<Row[] | undefined> {
  const { rows, numAffectedRows } = await db.executeQuery(statement.compile())
  return numAffectedRows === 0n ? undefined : rows
}

async function identityOf(db: Kysely<Database>): Promise<string> {
  const system = sql<{ id: string }>`select system_identifier::text as id from pg_control_system()`
  const database = sql<{
    id: string
  }>`select oid::text as id from pg_database where datname = current_database()`
  const [ofServer, ofDatabase] = await Promise.all([
    // All roles may call it by default, but administrators and Postgres-compatible servers differ.
    system.execute(db).catch((err: unknown) => {
      if (isRefusal(err)) return { rows: [] }
      throw err
    }),
    database.execute(db),
  ])
  return [...ofServer.rows, ...ofDatabase.rows].map(({ id }) => id).join(' ')
}

/** Matches `feature_not_supported`, `insufficient_privilege` and `undefined_function`. */
function isRefusal(err: unknown): boolean {
  const cause = err instanceof Error ? err.cause : undefined
  return cause instanceof pg.DatabaseError && ['0A000', '42501', '42883'].includes(cause.code ?? '')
}

/** Migrates under Kysely's advisory lock, without a statement timeout: an index may take long. */
async function migrate(pool: pg.Pool): Promise<void> {
  pool.on('error', () => {})
  const db = new Kysely<unknown>({ dialect: new PostgresDialect({ pool }) })
  try {
    await untilOldInstancesEnded(pool)
    const provider = { getMigrations: async () => ({ ...(await applied(pool)), ...ours }) }
    const ours = migrations(TYPES)
    const { error } = await new Migrator({ db, provider }).migrateToLatest()
    if (error) throw error
  } finally {
    await db.destroy()
  }
}

/**
 * Waits until instances of the previous version, which has another queue, are silent; a stopped one
 * may seem alive for a while. Throws if they continue.
 */
async function untilOldInstancesEnded(pool: pg.Pool): Promise<void> {
  const { rowCount: isOld } = await pool.query(
    `select from pg_attribute where attrelid = to_regclass('instances') and attname = 'seen_at'`,
  )
  if (!isOld) return
  const alive = async () => {
    const { rows } = await pool.query<{ name: string }>(
      `select name from instances
       where seen_at > extract(epoch from clock_timestamp()) * 1000 - ${SILENT_MS}`,
    )
    return rows.map(({ name }) => name).join(', ')
  }
  if ((await alive()) === '') return
  await pause(SILENT_MS)
  const names = await alive()
  if (names === '') return
  throw new Error(
    `instances of an earlier version still use this database: ${names}. ` +
      'Stop all of them, then start this version',
  )
}

/** Returns the applied migrations: during a rolling update a newer release may have added some. */
async function applied(pool: pg.Pool): Promise<Record<string, { up: () => Promise<void> }>> {
  const { rows } = await pool.query("select to_regclass('kysely_migration') as name")
  if (rows[0]?.name === null) return {}
  const { rows: known } = await pool.query<{ name: string }>('select name from kysely_migration')
  return Object.fromEntries(known.map(({ name }) => [name, { up: async () => {} }]))
}

/** Wraps the pool so that its failures become `store_unavailable` errors, which callers retry. */
function withStoreErrors(pool: pg.Pool): PostgresPool {
  const connect = async () => {
    const client = await pool.connect().catch(unavailable)
    let isLost = false
    const query = (text: string, parameters: readonly unknown[]) =>
      client.query(text, [...parameters]).catch((err: unknown) => {
        // A connection whose statement got no answer is unusable.
        isLost ||= !(err instanceof pg.DatabaseError)
        return unavailable(err)
      })
    // Safe: Kysely uses only these two, since nothing here uses cursors.
    return { query, release: () => client.release(isLost) } as unknown as PostgresPoolClient
  }
  return { connect, end: () => pool.end(), options: pool.options }
}

function unavailable(err: unknown): never {
  throw storeUnavailable(err)
}
