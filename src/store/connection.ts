import type { Compilable, Kysely, SelectQueryBuilder } from 'kysely'
import { StoreFullError, TaskRunnerError } from '../core/errors.ts'
import type { Database } from './schema.ts'

/** A database, as the stores use it. Each dialect makes one. */
export interface Connection {
  readonly db: Kysely<Database>
  /**
   * Runs the statements in one transaction, durable when it resolves with what the first returned. When that
   * changes no row, nothing is done and the answer is undefined: the compare-and-set that the others depend on.
   */
  atomically<Row>(
    first: Compilable<Row>,
    others?: readonly Compilable[],
  ): Promise<Row[] | undefined>
  /** Runs the statement while no instance runs another one in this way. */
  inTurn<Row>(statement: Compilable<Row>): Promise<Row[]>
  /** Of rows to be taken, leaves out those that someone else is taking. */
  untaken<Table extends keyof Database, Row>(
    rows: SelectQueryBuilder<Database, Table, Row>,
  ): SelectQueryBuilder<Database, Table, Row>
  /**
   * Returns what tells this database from its copies. SQLite: the identity of its file. Postgres:
   * its server's system identifier, which a physical standby shares and a restored dump does not,
   * and its own number on that server. Neither tells a snapshot of a whole volume or machine from
   * its original.
   */
  identity(): Promise<string>
  close(): Promise<void>
}

/** SQLite's result code for a full disk: https://sqlite.org/rescode.html#full */
const SQLITE_FULL = 13

/** Tells callers that the store failed; how, only where its disk is full. The cause is for the log. */
export function storeUnavailable(cause: unknown): TaskRunnerError {
  const isFull = cause instanceof Error && 'errcode' in cause && cause.errcode === SQLITE_FULL
  if (isFull) return new StoreFullError(cause)
  return new TaskRunnerError('store_unavailable', 'The store is not available at the moment', {
    cause,
    retryAfterSeconds: 5,
  })
}
