import type { Kysely } from 'kysely'

/** Only adds: the queries of the release before go on working beside it. */
export async function up(db: Kysely<unknown>): Promise<void> {
  await db.schema
    .createTable('settings')
    .addColumn('name', 'text', (column) => column.primaryKey())
    .addColumn('value', 'text', (column) => column.notNull())
    .execute()
  await db.schema.alterTable('tasks').addColumn('waiting_for', 'text').execute()
}
