/**
 * What holds for a database as a whole: the key its tasks are sealed with, and the id of its
 * deployment.
 */
import { randomBytes } from 'node:crypto'
import type { Kysely } from 'kysely'
import type { Connection } from './connection.ts'
import type { Database } from './schema.ts'
import type { Seal } from './task-store.ts'

const KEY_CHECK = 'key_check'
const DEPLOYMENT = 'deployment'
/** Says nothing: only whether it can be unsealed counts. */
const KNOWN_WORD = 'task-runner'
const DEPLOYMENT_BYTES = 8

/**
 * Throws when the database belongs to another key: better at the start than task by task. The
 * first start leaves a word sealed with its key, and every start must be able to read it; of
 * several first starts, one leaves it.
 */
export async function verifyKey({ db }: Connection, seal: Seal): Promise<void> {
  if ((await read(db, KEY_CHECK)) === undefined) {
    // A database of the release before has tasks and no such word.
    const newest = await db
      .selectFrom('tasks')
      .select(['task_id', 'sealed'])
      .orderBy('seq', 'desc')
      .limit(1)
      .executeTakeFirst()
    if (newest) tryKey(seal, newest.sealed, newest.task_id)
    await insert(db, KEY_CHECK, Buffer.from(seal.seal(KNOWN_WORD, KEY_CHECK)).toString('base64'))
  }
  const word = await read(db, KEY_CHECK)
  tryKey(seal, Buffer.from(word ?? '', 'base64'), KEY_CHECK)
}

/**
 * Returns the id that owns workers, 16 hex digits: services that share the database share their
 * workers, and two databases never do, whatever keys they use. It is made once. A database that was
 * copied or restored elsewhere gets another, so that the copy leaves the workers of its original
 * alone; `Connection.identity` says how far a copy can be told. A service with a new id does not
 * find the workers of its tasks again, so tasks should have ended before a database moves.
 */
export async function deploymentOf(connection: Connection): Promise<string> {
  const { db } = connection
  const identity = await connection.identity()
  for (;;) {
    const kept = await read(db, DEPLOYMENT)
    const [id = '', ...of] = kept?.split(' ') ?? []
    if (of.join(' ') === identity && kept !== undefined) return id
    const value = `${randomBytes(DEPLOYMENT_BYTES).toString('hex')} ${identity}`
    // Of several starts one is the first; the others read what it has written.
    if (kept === undefined) await insert(db, DEPLOYMENT, value)
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

/** Changes nothing when there is one of this name. */
async function insert(db: Kysely<Database>, name: string, value: string): Promise<void> {
  await db
    .insertInto('settings')
    .values({ name, value })
    .onConflict((conflict) => conflict.column('name').doNothing())
    .execute()
}
