import { mkdir, open } from 'node:fs/promises'
import { dirname } from 'node:path'
import {
  type Compilable,
  type CompiledQuery,
  type DatabaseConnection,
  type Driver,
  Kysely,
  type QueryResult,
  SqliteAdapter,
  SqliteIntrospector,
  SqliteQueryCompiler,
} from 'kysely'
import { Migrator } from 'kysely/migration'
import { ServiceThread } from '../threads/service-thread.ts'
import { type Connection, storeUnavailable } from './connection.ts'
import { fileIdentity } from './file-identity.ts'
import { migrations } from './migrations.ts'
import type { Database } from './schema.ts'
import type { Batch, StatementResult } from './sqlite-thread.ts'

const TYPES = { serial: 'integer primary key autoincrement', bytes: 'blob', hasSchemas: false }

/**
 * Opens the SQLite file, creates it if missing, and migrates its tables. Throws if the file is
 * damaged (it is never replaced) or another process has it open. `onThreadDeath` is called if the
 * database's thread ends unexpectedly, after which the store cannot be used.
 */
export async function openSqlite(
  path: string,
  onThreadDeath?: (err: Error) => void,
): Promise<Connection> {
  await mkdir(dirname(path), { recursive: true, mode: 0o700 })
  // Created here to set its mode, which SQLite also gives to its other files.
  const file = await open(path, 'a', 0o600)
  await file.chmod(0o600)
  await file.close()
  const thread = new SqliteThread(path, onThreadDeath)
  const db = new Kysely<Database>({
    dialect: {
      createAdapter: () => new ThreadedAdapter(),
      createDriver: () => new ThreadDriver(thread),
      createIntrospector: (db) => new SqliteIntrospector(db),
      createQueryCompiler: () => new SqliteQueryCompiler(),
    },
  })
  try {
    await thread.ready
    const { error } = await new Migrator({
      db,
      provider: { getMigrations: async () => migrations(TYPES) },
    }).migrateToLatest()
    if (error) throw error
    // The holder of any lease has ended: only one process opens the file.
    await db
      .updateTable('deliveries')
      .set({ leased: 0, next_attempt_at: 0 })
      .where('status', '=', 'pending')
      .where('leased', '=', 1)
      .execute()
  } catch (err) {
    await db.destroy()
    if (!(err instanceof Error && err.message.includes('database is locked'))) throw err
    throw new Error(`another service is using ${path}`, { cause: err })
  }
  return {
    db,
    // No other process uses the file, and statements run one at a time.
    inTurn: async (statement) => (await db.executeQuery(statement.compile())).rows,
    async atomically<Row>(first: Compilable<Row>, others: readonly Compilable[] = []) {
      const statements = [first, ...others].map((statement) => toStatement(statement.compile()))
      const [result] = await thread.run({ statements, guarded: true })
      // Safe: Kysely derives the row type from the query.
      return result?.rows as Row[] | undefined
    },
    skipLocked: (rows) => rows,
    identity: () => fileIdentity(path),
    close: () => db.destroy(),
  }
}

/** Runs node:sqlite, which is synchronous and waits for the disk, on a thread of its own. */
class SqliteThread {
  readonly ready: Promise<void>
  readonly #thread: ServiceThread<Batch>

  constructor(path: string, onDeath?: (err: Error) => void) {
    this.#thread = new ServiceThread('./sqlite-thread', import.meta.url, {
      name: 'sqlite',
      workerData: { path },
      onDeath,
    })
    this.ready = this.#thread.ready
  }

  async run(batch: Batch): Promise<StatementResult[]> {
    try {
      // Safe: sqlite-thread.ts answers a batch with these.
      return (await this.#thread.call(batch)) as StatementResult[]
    } catch (err) {
      throw storeUnavailable(err)
    }
  }

  close(): Promise<void> {
    return this.#thread.close()
  }
}

/** Allows concurrent statements, since each is a transaction of its own. */
class ThreadedAdapter extends SqliteAdapter {
  override get supportsMultipleConnections(): boolean {
    return true
  }
}

class ThreadDriver implements Driver {
  readonly #thread: SqliteThread

  constructor(thread: SqliteThread) {
    this.#thread = thread
  }

  async init(): Promise<void> {}

  async acquireConnection(): Promise<DatabaseConnection> {
    return {
      executeQuery: async <R>(query: CompiledQuery): Promise<QueryResult<R>> => {
        const [result] = await this.#thread.run({
          statements: [toStatement(query)],
          guarded: false,
        })
        return {
          // Safe: Kysely derives the row type from the query.
          rows: (result?.rows ?? []) as R[],
          numAffectedRows: BigInt(result?.changes ?? 0),
        }
      },
      streamQuery: () => {
        throw new Error('streaming is not supported')
      },
    }
  }

  async releaseConnection(): Promise<void> {}

  // Only migrations use transactions, before anything else runs.
  async beginTransaction(connection: DatabaseConnection): Promise<void> {
    await connection.executeQuery(rawQuery('begin immediate'))
  }

  async commitTransaction(connection: DatabaseConnection): Promise<void> {
    await connection.executeQuery(rawQuery('commit'))
  }

  async rollbackTransaction(connection: DatabaseConnection): Promise<void> {
    await connection.executeQuery(rawQuery('rollback'))
  }

  destroy(): Promise<void> {
    return this.#thread.close()
  }
}

function rawQuery(text: string): CompiledQuery {
  return {
    sql: text,
    parameters: [],
    query: { kind: 'RawNode', sqlFragments: [text], parameters: [] },
    queryId: { queryId: text },
  }
}

function toStatement(query: CompiledQuery): Batch['statements'][number] {
  return { sql: query.sql, parameters: query.parameters }
}
