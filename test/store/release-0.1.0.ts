/** What the release before sent to its database still has to work: its instances run beside ours while they are exchanged. */
import { readFileSync } from 'node:fs'
import { CompiledQuery } from 'kysely'
import { afterEach, describe, expect, test } from 'vitest'
import type { Connection } from '../../src/store/connection.ts'
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
  open: (name: 'beside' | 'before') => Promise<Connection>,
): void {
  describe(`release 0.1.0, on ${dialect}`, () => {
    const closing: Connection[] = []
    afterEach(async () => {
      for (const connection of closing.splice(0)) await connection.close()
    })

    async function opened(name: 'beside' | 'before') {
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

    test('its queries do on our tables what they did on its own', async () => {
      const connection = await opened('beside')
      expect(new Set(steps.map(({ step }) => step)).size).toBe(25)
      for (const [index, step] of steps.entries()) {
        const { rows, numAffectedRows } = await run(connection, step)
        const what = `${index} ${step.step}`
        // It asks for all columns, and makes nothing of ours.
        if (step.rows) expect(rows.map(plain), what).toMatchObject(step.rows)
        if (step.changes !== undefined) expect(Number(numAffectedRows), what).toBe(step.changes)
      }
    })

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
      expect(await store.live()).toMatchObject([{ taskId: 'waits', claim: 0, priority: 0 }])
    })
  })
}

/** What takes our tables back to those of 0.1.0: there was only one migration then. */
const BACK = [
  'drop table settings',
  'drop table instances',
  ...[
    'tasks_running',
    'tasks_task_file_name_status',
    'tasks_has_callback',
    'deliveries_given_up',
  ].map((name) => `drop index ${name}`),
  ...['priority', 'instance', 'log_cursor', 'traceparent', 'claimed_at', 'waiting_for'].map(
    (name) => `alter table tasks drop column ${name}`,
  ),
  ...['manual_attempts', 'resume_at'].map((name) => `alter table deliveries drop column ${name}`),
  'alter table delivery_attempts drop column manual',
  `delete from kysely_migration where name <> '0001-tasks-and-deliveries'`,
]

/** As it was recorded: Postgres hands out bigint as text. */
function plain(row: Record<string, unknown>): Record<string, unknown> {
  const values = Object.entries(row).map(([name, value]) => {
    if (value instanceof Uint8Array) return [name, { bytes: Buffer.from(value).toString('base64') }]
    return [name, typeof value === 'string' && /^\d+$/.test(value) ? Number(value) : value]
  })
  return Object.fromEntries(values)
}
