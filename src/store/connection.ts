import type { Compilable, Kysely, SelectQueryBuilder } from 'kysely'
import { StoreFullError, TaskRunnerError } from '../core/errors.ts'
import type { Database } from './schema.ts'

/** An open database. Each dialect creates one. */
export interface Connection {
  readonly db: Kysely<Database>
  /**
   * Runs the statements in one durable transaction and returns the rows of the first. If the first
   * is a compare-and-set that changes no row, skips the others and returns undefined.
   */
  atomically<Row>(
    first: Compilable<Row>,
    others?: readonly Compilable[],
  ): Promise<Row[] | undefined>
  /** Runs the statement in a transaction; all instances run such statements one at a time. */
  inTurn<Row>(statement: Compilable<Row>): Promise<Row[]>
  /** Adds `for update skip locked` where the database has it. */
  skipLocked<Table extends keyof Database, Row>(
    rows: SelectQueryBuilder<Database, Table, Row>,
  ): SelectQueryBuilder<Database, Table, Row>
  /**
   * Returns an id that copies of this database do not share. SQLite: the identity of its file.
   * Postgres: the server's system identifier and the database's oid, which a physical standby
   * shares and a restored dump does not. A snapshot of a volume or machine shares both kinds.
   */
  identity(): Promise<string>
  close(): Promise<void>
}

/** SQLite's result code for a full disk: https://sqlite.org/rescode.html#full */
const SQLITE_FULL = 13

/** Returns the error for callers. It names the problem only if the disk is full; see its cause. */
export function storeUnavailable(cause: unknown): TaskRunnerError {
  const isFull = cause instanceof Error && 'errcode' in cause && cause.errcode === SQLITE_FULL
  if (isFull) return new StoreFullError(cause)
  return new TaskRunnerError('store_unavailable', 'The store is not available at the moment', {
    cause,
    retryAfterSeconds: 5,
  })
}
