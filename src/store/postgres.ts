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
/** On the server. */
const STATEMENT_TIMEOUT_MS = 10_000
/** Of an instance that was paused amid a transaction, and keeps its locks from others. */
const IDLE_TIMEOUT_MS = 10_000
/** Here, where a server that cannot be reached any more ends nothing. */
const ANSWER_TIMEOUT_MS = 12_000

/**
 * A server that shuts down may end a session in the very breath in which it opens it, before whoever asked the pool for it
 * can listen. Unheard that error would end the process; heard, it is told by the first statement.
 */
class HeardClient extends pg.Client {
  constructor(config?: string | pg.ClientConfig) {
    super(config)
    this.on('error', () => {})
  }
}

/** What every connection of ours to the database is made with. */
function connectionOptions(url: string, instance: string) {
  return {
    connectionString: withDurableCommits(url),
    application_name: `task-runner ${instance}`.slice(0, 63),
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    idle_in_transaction_session_timeout: IDLE_TIMEOUT_MS,
    keepAlive: true,
    Client: HeardClient,
  }
}

/** Returns a connection of its own, not yet made, that breaks unheard. */
export function newClient(url: string, instance: string): pg.Client {
  return new HeardClient({
    ...connectionOptions(url, instance),
    query_timeout: ANSWER_TIMEOUT_MS,
  })
}

/** What is acknowledged is on disk, whatever the server's default. The URL's own options stay. */
function withDurableCommits(url: string): string {
  const parsed = new URL(url)
  const options = [parsed.searchParams.get('options'), '-c synchronous_commit=on']
  parsed.searchParams.set('options', options.filter((each) => each !== null).join(' '))
  // Postgres takes no plus for a space.
  parsed.search = parsed.search.replaceAll('+', '%20')
  return parsed.href
}

/**
 * Opens the database and brings its tables up to date, one instance at a time. Tables that a newer release has
 * added to are used as they are. Throws when the database cannot be reached.
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
  // A connection that breaks while nobody uses it is taken out of the pool; the next statement opens another.
  pool.on('error', () => {})
  const db = new Kysely<Database>({ dialect: new PostgresDialect({ pool: telling(pool) }) })
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
    untaken: (rows) => rows.forUpdate().skipLocked(),
    identity: () => identityOf(db),
    close: () => db.destroy(),
  }
}

/** What the statement returned; undefined when it changed no row. */
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
    // Every role may ask for it, unless its administrator or a server that is not quite Postgres
    // says no.
    system.execute(db).catch((err: unknown) => {
      if (isRefusal(err)) return { rows: [] }
      throw err
    }),
    database.execute(db),
  ])
  return [...ofServer.rows, ...ofDatabase.rows].map(({ id }) => id).join(' ')
}

/** `feature_not_supported`, `insufficient_privilege`, `undefined_function`. */
function isRefusal(err: unknown): boolean {
  const cause = err instanceof Error ? err.cause : undefined
  return cause instanceof pg.DatabaseError && ['0A000', '42501', '42883'].includes(cause.code ?? '')
}

/** Without the time limits of every day: to build an index may take long. Kysely holds an advisory lock meanwhile. */
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
 * Waits until instances of the version before are silent, which kept what waits elsewhere: beside
 * ours they would leave it. Throws when they go on. One that was stopped just now may seem alive
 * for a while.
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

/** Migrations of a newer release are no mistake: instances of two releases run side by side while they are exchanged. */
async function applied(pool: pg.Pool): Promise<Record<string, { up: () => Promise<void> }>> {
  const { rows } = await pool.query("select to_regclass('kysely_migration') as name")
  if (rows[0]?.name === null) return {}
  const { rows: known } = await pool.query<{ name: string }>('select name from kysely_migration')
  return Object.fromEntries(known.map(({ name }) => [name, { up: async () => {} }]))
}

/** Makes the pool's failures the store's: callers repeat what they need, HTTP clients are told to. */
function telling(pool: pg.Pool): PostgresPool {
  const connect = async () => {
    const client = await pool.connect().catch(unavailable)
    let isLost = false
    const query = (text: string, parameters: readonly unknown[]) =>
      client.query(text, [...parameters]).catch((err: unknown) => {
        // A statement that was not answered leaves its connection unusable, too.
        isLost ||= !(err instanceof pg.DatabaseError)
        return unavailable(err)
      })
    // Holds: what Kysely uses of it, which is not cursors.
    return { query, release: () => client.release(isLost) } as unknown as PostgresPoolClient
  }
  return { connect, end: () => pool.end(), options: pool.options }
}

function unavailable(err: unknown): never {
  throw storeUnavailable(err)
}
