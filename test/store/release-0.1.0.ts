/** What release 0.1.0 has stored is taken over. */
import { readFileSync } from 'node:fs'
import { CompiledQuery } from 'kysely'
import { afterEach, describe, expect, test } from 'vitest'
import type { Connection } from '../../src/store/connection.ts'
import { newTask } from '../helpers/stores.ts'
import { storesOver } from './contract.ts'

type Value = string | number | null
type Stored = Value | { bytes: string }

/**
 * Recorded from the stores of release 0.1.0, which were led through all their methods, on tables that
 * only its own migration had made. `postgres` only where the text differs.
 */
interface Step {
  step: string
  sqlite: string
  postgres?: string
  parameters: Stored[]
  changes?: number
  rows?: Array<Record<string, Stored>>
}

const steps: Step[] = JSON.parse(
  readFileSync(new URL('../fixtures/release-0.1.0/store-queries.json', import.meta.url), 'utf8'),
)

/** `open` opens the database of that name, an empty one the first time. */
export function describeReleaseBefore(
  dialect: 'sqlite' | 'postgres',
  open: (name: 'before' | 'cursors') => Promise<Connection>,
): void {
  describe(`release 0.1.0, on ${dialect}`, () => {
    const closing: Connection[] = []
    afterEach(async () => {
      for (const connection of closing.splice(0)) await connection.close()
    })

    async function opened(name: 'before' | 'cursors') {
      const connection = await open(name)
      closing.push(connection)
      return connection
    }

    const run = ({ db }: Connection, { sqlite, postgres, parameters }: Step) => {
      const text = dialect === 'postgres' ? (postgres ?? sqlite) : sqlite
      const values = parameters.map((each) =>
        typeof each === 'object' && each ? Buffer.from(each.bytes, 'base64') : each,
      )
      return db.executeQuery<Record<string, unknown>>(CompiledQuery.raw(text, values))
    }

    test('what it stored is kept, and waits for us', async () => {
      const before = await opened('before')
      for (const text of BACK) await before.db.executeQuery(CompiledQuery.raw(text))
      const stored = steps.slice(
        0,
        steps.findIndex(({ step }) => step === 'takeDue'),
      )
      for (const step of stored) await run(before, step)
      const waiting = steps.find(({ step, parameters: [id] }) => step === 'insert' && id === 'd')
      if (!waiting) throw new Error('nothing waits')
      await run(before, { ...waiting, parameters: ['waits', ...waiting.parameters.slice(1)] })
      await before.close()

      const { store, deliveries } = storesOver(await opened('before'))
      expect((await store.list({ limit: 10 })).map(({ taskId }) => taskId)).toEqual([
        ...['waits', 'd', 'c', 'b', 'a'],
      ])
      expect(await store.get('b')).toMatchObject({ status: 'succeeded', claim: 1, priority: 0 })
      expect((await store.log('a'))?.content.toString()).toBe('a log\n')
      expect(await deliveries.state('b')).toMatchObject({ webhookId: 'msg_b', status: 'pending' })
      expect(await store.live()).toEqual([])
      expect(await store.claimNext({ at: 1, limit: 5 })).toMatchObject([
        { taskId: 'waits', claim: 1, priority: 0 },
      ])
    })

    test('log cursors that a later version kept go, and their tasks stay', async () => {
      const before = await opened('cursors')
      await storesOver(before).store.insert(newTask('waits'))
      for (const text of [
        'alter table tasks add column log_cursor text',
        `update tasks set log_cursor = '{"bytes":7}'`,
        `delete from kysely_migration where name = '0007-no-log-cursors'`,
      ]) {
        await before.db.executeQuery(CompiledQuery.raw(text))
      }
      await before.close()

      const after = await opened('cursors')
      expect(await storesOver(after).store.get('waits')).toMatchObject({ status: 'queued' })
      const { rows } = await after.db.executeQuery(CompiledQuery.raw('select * from tasks'))
      expect(Object.keys(Object(rows[0]))).not.toContain('log_cursor')
    })
  })
}

/** What takes our tables back to those of 0.1.0: there was only one migration then. */
const BACK = [
  'drop table settings',
  'drop table instances',
  ...[
    'tasks_running',
    'tasks_queued',
    'tasks_task_file_name_status',
    'tasks_has_callback',
    'deliveries_given_up',
  ].map((name) => `drop index ${name}`),
  ...['priority', 'instance', 'traceparent', 'claimed_at', 'waiting_for'].map(
    (name) => `alter table tasks drop column ${name}`,
  ),
  ...['manual_attempts', 'resume_at'].map((name) => `alter table deliveries drop column ${name}`),
  'alter table delivery_attempts drop column manual',
  `delete from kysely_migration where name <> '0001-tasks-and-deliveries'`,
]
