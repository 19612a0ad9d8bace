import { type Kysely, sql } from 'kysely'

/** Only adds: queries of the previous release keep working. */
export async function up(db: Kysely<unknown>): Promise<void> {
  // SQLite adds one column per statement.
  const addColumn = db.schema.alterTable('tasks')
  await addColumn
    .addColumn('priority', 'integer', (column) => column.notNull().defaultTo(0))
    .execute()
  await addColumn.addColumn('instance', 'text').execute()
  await addColumn.addColumn('log_cursor', 'text').execute()
  await addColumn.addColumn('traceparent', 'text').execute()
  await addColumn.addColumn('claimed_at', 'bigint').execute()
  await sql`create index tasks_running on tasks (instance) where status in ('provisioning', 'running')`.execute(
    db,
  )
  await db.schema
    .createTable('instances')
    .addColumn('name', 'text', (column) => column.primaryKey())
    .addColumn('host_bound', 'integer', (column) => column.notNull())
    .addColumn('seen_at', 'bigint', (column) => column.notNull())
    .execute()
}
