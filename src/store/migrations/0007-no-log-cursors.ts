import type { Kysely } from 'kysely'

/** Logs are read again after a restart. No released version queries the column. */
export async function up(db: Kysely<unknown>): Promise<void> {
  await db.schema.alterTable('tasks').dropColumn('log_cursor').execute()
}
