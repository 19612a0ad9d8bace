/** Settings of the database as a whole: its sealing key and the id of its deployment. */
import { randomBytes } from 'node:crypto'
import type { Kysely } from 'kysely'
import type { Connection } from './connection.ts'
import type { Database } from './schema.ts'
import type { Seal } from './task-store.ts'

const KEY_CHECK = 'key_check'
const DEPLOYMENT = 'deployment'
/** Arbitrary text, sealed to recognise the key. */
const KNOWN_WORD = 'task-runner'
const DEPLOYMENT_BYTES = 8

/**
 * Throws if the database was sealed with another key. The first start stores a word sealed with its
 * key, which every later start must be able to unseal.
 */
export async function verifyKey({ db }: Connection, seal: Seal): Promise<void> {
  if ((await read(db, KEY_CHECK)) === undefined) {
    // A database of the previous release may have tasks but no such word.
    const newest = await db
      .selectFrom('tasks')
      .select(['task_id', 'sealed'])
      .orderBy('seq', 'desc')
      .limit(1)
      .executeTakeFirst()
    if (newest) tryKey(seal, newest.sealed, newest.task_id)
    await insertIfMissing(
      db,
      KEY_CHECK,
      Buffer.from(seal.seal(KNOWN_WORD, KEY_CHECK)).toString('base64'),
    )
  }
  const word = await read(db, KEY_CHECK)
  tryKey(seal, Buffer.from(word ?? '', 'base64'), KEY_CHECK)
}

/**
 * Returns the id that owns workers, 16 hex digits, created once per database. A copy or a restore
 * of the database gets a new id, so that it leaves the workers of the original alone
 * (`Connection.identity` has the limits). A new id does not find the workers of its tasks again, so
 * tasks should have ended before a database moves.
 */
export async function deploymentOf(connection: Connection): Promise<string> {
  const { db } = connection
  const identity = await connection.identity()
  for (;;) {
    const kept = await read(db, DEPLOYMENT)
    const [id = '', ...of] = kept?.split(' ') ?? []
    if (of.join(' ') === identity && kept !== undefined) return id
    const value = `${randomBytes(DEPLOYMENT_BYTES).toString('hex')} ${identity}`
    // If several instances start at once, the first one writes and the others read.
    if (kept === undefined) await insertIfMissing(db, DEPLOYMENT, value)
    else {
      await db
        .updateTable('settings')
        .set({ value })
        .where('name', '=', DEPLOYMENT)
        .where('value', '=', kept)
        .execute()
    }
  }
}

function tryKey(seal: Seal, sealed: Uint8Array, context: string): void {
  try {
    seal.unseal(sealed, context)
  } catch (cause) {
    throw new Error('the stored tasks were encrypted with another SEALING_KEY', { cause })
  }
}

async function read(db: Kysely<Database>, name: string): Promise<string | undefined> {
  const row = await db
    .selectFrom('settings')
    .select('value')
    .where('name', '=', name)
    .executeTakeFirst()
  return row?.value
}

async function insertIfMissing(db: Kysely<Database>, name: string, value: string): Promise<void> {
  await db
    .insertInto('settings')
    .values({ name, value })
    .onConflict((conflict) => conflict.column('name').doNothing())
    .execute()
}
