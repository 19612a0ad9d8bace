import { type Kysely, sql } from 'kysely'

/** Indexes for the filters of `list`: without them, one page may read a million ended tasks. */
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
