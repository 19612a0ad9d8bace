import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { keyFromFolder, Sealer } from '../src/secrets/sealing.ts'

const TABLES = ['tasks', 'task_logs', 'deliveries', 'delivery_attempts']

/**
 * Adds `count` copies of tasks to the database of a stopped service, in turns of the models. So
 * every row is as the service itself writes it.
 */
export async function fill(dataDir: string, models: string[], count: number): Promise<void> {
  const sealer = new Sealer(await keyFromFolder(dataDir))
  using db = new DatabaseSync(join(dataDir, 'task-runner.db'))
  db.exec('pragma foreign_keys = off; pragma synchronous = off; begin')
  const sealed = new Map<string, string>()
  for (const id of models) {
    const row = db.prepare('select sealed from tasks where task_id = ?').get(id)
    // The column is a blob.
    sealed.set(id, sealer.unseal(row?.sealed as Uint8Array, id))
  }
  // The sealed fields of a task are bound to its id.
  db.function('sealed_anew', (model, id) =>
    sealer.seal(sealed.get(String(model)) ?? '', String(id)),
  )
  db.exec('create temp table models (turn integer primary key, task_id text)')
  const addModel = db.prepare('insert into models values (?, ?)')
  for (const [turn, id] of models.entries()) addModel.run(turn, id)
  for (const table of TABLES) {
    const columns = db
      .prepare('select name from pragma_table_info(?)')
      .all(table)
      .map(({ name }) => String(name))
      .filter((name) => name !== 'seq')
    const id = "'filled-' || n"
    const values = columns.map((name) => {
      if (name === 'task_id') return id
      return name === 'sealed' ? `sealed_anew(model.task_id, ${id})` : `model.${name}`
    })
    db.exec(
      `with recursive counter (n) as (select 1 union all select n + 1 from counter where n < ${count})
       insert into ${table} (${columns}) select ${values} from counter
       cross join models on models.turn = n % ${models.length}
       cross join ${table} as model on model.task_id = models.task_id`,
    )
  }
  db.exec('commit')
}
