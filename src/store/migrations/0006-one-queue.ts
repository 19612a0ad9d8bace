import { type Kysely, sql } from 'kysely'

/** Queues of the previous version, in the schema that pg-boss uses by default. */
const ITS_QUEUES = ['task', 'sweep', '__pgboss__send-it']

/**
 * Makes the table of tasks the queue, which already holds the waiting tasks. Drops the pg-boss jobs
 * that the previous version kept beside them.
 */
export async function up(db: Kysely<unknown>, { hasSchemas }: { hasSchemas: boolean }) {
  // The status comes first, though always the same, or SQLite would use the index of statuses.
  await sql`create index tasks_queued on tasks (status, (created_at - priority * 60000), seq)
    where status = 'queued'`.execute(db)
  // The new name makes heartbeats of the previous version fail: it reads waiting tasks elsewhere.
  await db.schema.alterTable('instances').renameColumn('seen_at', 'beat_at').execute()
  if (!hasSchemas) return
  const found = await sql<{
    name: string | null
  }>`select to_regclass('pgboss.queue') as name`.execute(db)
  if (!found.rows[0]?.name) return
  const others =
    await sql`select 1 from pgboss.queue where name not in (${sql.join(ITS_QUEUES)})`.execute(db)
  // Another program uses pg-boss in this database.
  if (others.rows.length > 0) return
  await sql`drop schema pgboss cascade`.execute(db)
}
