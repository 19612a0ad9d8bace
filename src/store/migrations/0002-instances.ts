import { type Kysely, sql } from 'kysely'

/** Only adds: the queries of the release before go on working beside it. */
export async function up(db: Kysely<unknown>): Promise<void> {
  // One column a statement: SQLite takes no more.
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
