import type { Compilable, Kysely } from 'kysely'
import { TaskRunnerError } from '../core/errors.ts'
import type { Database } from './schema.ts'

/** A database, as the stores use it. Each dialect makes one. */
export interface Connection {
  readonly db: Kysely<Database>
  /**
   * Runs the statements in one transaction, durable when it resolves. When the first changes no row, nothing
   * is done and the answer is false: the compare-and-set that the others depend on.
   */
  atomically(statements: readonly Compilable[]): Promise<boolean>
  close(): Promise<void>
}

/** Tells callers that the store failed, without telling them how. The cause is for the log. */
export function storeUnavailable(cause: unknown): TaskRunnerError {
  return new TaskRunnerError('store_unavailable', 'The store is not available at the moment', {
    cause,
    retryAfterSeconds: 5,
  })
}
