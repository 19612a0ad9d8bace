import { type Kysely, sql } from 'kysely'

/** `types`: the dialect's names for these types. */
export async function up(
  db: Kysely<unknown>,
  types: { serial: string; bytes: string },
): Promise<void> {
  await db.schema
    .createTable('tasks')
    .addColumn('seq', sql.raw(types.serial))
    .addColumn('task_id', 'text', (column) => column.notNull().unique())
    .addColumn('task_file_name', 'text', (column) => column.notNull())
    .addColumn('status', 'text', (column) => column.notNull())
    .addColumn('reason', 'text')
    .addColumn('message', 'text')
    .addColumn('exit_code', 'integer')
    .addColumn('signal', 'text')
    .addColumn('worker_name', 'text', (column) => column.notNull())
    .addColumn('worker_state', 'text', (column) => column.notNull())
    .addColumn('terminate_on_completion', 'integer', (column) => column.notNull())
    .addColumn('timeout_seconds', 'integer', (column) => column.notNull())
    .addColumn('has_callback', 'integer', (column) => column.notNull())
    .addColumn('claim', 'integer', (column) => column.notNull())
    .addColumn('cancel_requested_at', 'bigint')
    .addColumn('created_at', 'bigint', (column) => column.notNull())
    .addColumn('started_at', 'bigint')
    .addColumn('finished_at', 'bigint')
    .addColumn('log_bytes', 'bigint')
    .addColumn('digest', 'text', (column) => column.notNull())
    .addColumn('sealed', sql.raw(types.bytes), (column) => column.notNull())
    .execute()
  await db.schema.createIndex('tasks_status').on('tasks').columns(['status', 'seq']).execute()
  await db.schema
    .createIndex('tasks_task_file_name')
    .on('tasks')
    .columns(['task_file_name', 'seq'])
    .execute()
  await sql`create index tasks_finished_at on tasks (finished_at) where finished_at is not null`.execute(
    db,
  )
  await sql`create index tasks_live_workers on tasks (seq) where worker_state = 'live'`.execute(db)

  await db.schema
    .createTable('task_logs')
    .addColumn('task_id', 'text', (column) =>
      column.primaryKey().references('tasks.task_id').onDelete('cascade'),
    )
    .addColumn('encoding', 'text', (column) => column.notNull())
    .addColumn('content', sql.raw(types.bytes), (column) => column.notNull())
    .addColumn('total_bytes', 'bigint', (column) => column.notNull())
    .execute()

  await db.schema
    .createTable('deliveries')
    .addColumn('task_id', 'text', (column) =>
      column.primaryKey().references('tasks.task_id').onDelete('cascade'),
    )
    .addColumn('webhook_id', 'text', (column) => column.notNull())
    .addColumn('origin', 'text', (column) => column.notNull())
    .addColumn('status', 'text', (column) => column.notNull())
    .addColumn('attempts', 'integer', (column) => column.notNull())
    .addColumn('manual', 'integer', (column) => column.notNull())
    .addColumn('delivered_at', 'bigint')
    .addColumn('next_attempt_at', 'bigint')
    .addColumn('leased', 'integer', (column) => column.notNull())
    .execute()
  await sql`create index deliveries_due on deliveries (next_attempt_at) where status = 'pending'`.execute(
    db,
  )

  await db.schema
    .createTable('delivery_attempts')
    .addColumn('task_id', 'text', (column) =>
      column.notNull().references('deliveries.task_id').onDelete('cascade'),
    )
    .addColumn('number', 'integer', (column) => column.notNull())
    .addColumn('started_at', 'bigint', (column) => column.notNull())
    .addColumn('duration_ms', 'bigint', (column) => column.notNull())
    .addColumn('status_code', 'integer')
    .addColumn('error', 'text')
    .addPrimaryKeyConstraint('delivery_attempts_pk', ['task_id', 'number'])
    .execute()
}
