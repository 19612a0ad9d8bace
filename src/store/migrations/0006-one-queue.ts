import { type Kysely, sql } from 'kysely'

/** Queues of the version before, in a schema that pg-boss calls its own in every database. */
const ITS_QUEUES = ['task', 'sweep', '__pgboss__send-it']

/**
 * Makes the table of tasks the queue. Waiting tasks are in it already: the version before had a job
 * of pg-boss beside each, which is dropped.
 */
export async function up(db: Kysely<unknown>, { hasSchemas }: { hasSchemas: boolean }) {
  // The status is in front, though the same for all, or SQLite would take the index of statuses.
  await sql`create index tasks_queued on tasks (status, (created_at - priority * 60000), seq)
    where status = 'queued'`.execute(db)
  // A new name, so that an instance of the version before cannot say any more that it lives: it
  // would look for waiting tasks in another place.
  await db.schema.alterTable('instances').renameColumn('seen_at', 'beat_at').execute()
  if (!hasSchemas) return
  const found = await sql<{
    name: string | null
  }>`select to_regclass('pgboss.queue') as name`.execute(db)
  if (!found.rows[0]?.name) return
  const others =
    await sql`select 1 from pgboss.queue where name not in (${sql.join(ITS_QUEUES)})`.execute(db)
  // Another program of the same database uses pg-boss, too.
  if (others.rows.length > 0) return
  await sql`drop schema pgboss cascade`.execute(db)
}
