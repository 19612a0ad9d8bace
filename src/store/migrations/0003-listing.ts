import { type Kysely, sql } from 'kysely'

/** Indices for what `list` filters by, where a million tasks have ended: without them, a page of few reads them all. */
export async function up(db: Kysely<unknown>): Promise<void> {
  await db.schema
    .createIndex('tasks_task_file_name_status')
    .on('tasks')
    .columns(['task_file_name', 'status', 'seq'])
    .execute()
  await db.schema
    .createIndex('tasks_has_callback')
    .on('tasks')
    .columns(['has_callback', 'seq'])
    .execute()
  await sql`create index deliveries_given_up on deliveries (task_id) where status = 'given_up'`.execute(
    db,
  )
}
