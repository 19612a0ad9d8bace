import type { Kysely } from 'kysely'

/** Only adds: queries of the previous release keep working. */
export async function up(db: Kysely<unknown>): Promise<void> {
  await db.schema
    .createTable('settings')
    .addColumn('name', 'text', (column) => column.primaryKey())
    .addColumn('value', 'text', (column) => column.notNull())
    .execute()
  await db.schema.alterTable('tasks').addColumn('waiting_for', 'text').execute()
}
