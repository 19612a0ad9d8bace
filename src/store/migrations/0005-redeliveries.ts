import type { Kysely } from 'kysely'

/** Only adds: queries of the previous release keep working. */
export async function up(db: Kysely<unknown>): Promise<void> {
  await db.schema
    .alterTable('deliveries')
    .addColumn('manual_attempts', 'integer', (column) => column.notNull().defaultTo(0))
    .execute()
  await db.schema.alterTable('deliveries').addColumn('resume_at', 'bigint').execute()
  await db.schema
    .alterTable('delivery_attempts')
    .addColumn('manual', 'integer', (column) => column.notNull().defaultTo(0))
    .execute()
}
