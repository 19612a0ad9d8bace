import type { Kysely } from 'kysely'

/** Logs are read anew after a restart. No release has queries that name the column. */
export async function up(db: Kysely<unknown>): Promise<void> {
  await db.schema.alterTable('tasks').dropColumn('log_cursor').execute()
}
