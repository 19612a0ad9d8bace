/** The thread that owns the SQLite file. Batches that wait together share one commit. */
import { DatabaseSync, type SQLInputValue, type StatementSync } from 'node:sqlite'
import { workerData } from 'node:worker_threads'
import { type Answer, type Call, failed } from '../threads/messages.ts'
import { perTurn } from '../threads/per-turn.ts'
import { serve } from '../threads/serving.ts'

export interface Batch {
  statements: Array<{ sql: string; parameters: readonly unknown[] }>
  /** If the first statement changes no row, the batch is rolled back and returns no results. */
  guarded: boolean
}

export interface StatementResult {
  rows: unknown[]
  changes: number
}

const STATEMENTS_CACHED_MAX = 200

// Safe: store/sqlite.ts starts this thread with it.
const { path } = workerData as { path: string }

const db = new DatabaseSync(path, { timeout: 2_000 })
// Locks the file from the first write on: no second process can work on the same tasks.
db.exec('pragma locking_mode = exclusive')
db.exec('pragma journal_mode = wal')
db.exec('pragma synchronous = full')
db.exec('pragma foreign_keys = on')
db.exec('begin immediate; commit')

interface Prepared {
  statement: StatementSync
  hasRows: boolean
}

const known = new Map<string, Prepared>()
let inTransaction = false

const waiting = perTurn(runAll)
const { tell } = serve<Batch>(
  (calls) => waiting.add(...calls),
  () => {
    waiting.flush()
    db.close()
  },
)

function runAll(calls: Call<Batch>[]): void {
  const statements = calls.flatMap(({ request }) => request.statements)
  const alone = statements.some(({ sql }) => isControl(sql))
  const reads = statements.every(({ sql }) => isRead(sql))
  if (alone || inTransaction || reads) tell(calls.map(runAlone))
  else runTogether(calls)
}

/** Runs the batches in one transaction. Savepoints roll back only the batch that failed. */
function runTogether(calls: Call<Batch>[]): void {
  const answers: Answer[] = []
  try {
    db.exec('begin immediate')
    for (const { id, request: batch } of calls) {
      try {
        // A single statement that fails changes nothing.
        const needsSavepoint = batch.statements.length > 1
        if (needsSavepoint) db.exec('savepoint batch')
        const results = run(batch)
        if (needsSavepoint && results.length === 0) db.exec('rollback to batch')
        if (needsSavepoint) db.exec('release batch')
        answers.push({ id, value: results })
      } catch (err) {
        // A full disk rolls back the whole transaction.
        if (!db.isTransaction) throw err
        if (batch.statements.length > 1) db.exec('rollback to batch; release batch')
        answers.push(failed(id, err))
      }
    }
    db.exec('commit')
    tell(answers)
  } catch (err) {
    if (db.isTransaction) db.exec('rollback')
    tell(calls.map(({ id }) => failed(id, err)))
  }
}

function runAlone({ id, request }: Call<Batch>): Answer {
  try {
    return { id, value: run(request) }
  } catch (err) {
    return failed(id, err)
  }
}

function run(batch: Batch): StatementResult[] {
  const results: StatementResult[] = []
  for (const { sql, parameters } of batch.statements) {
    if (isControl(sql)) {
      db.exec(sql)
      inTransaction = db.isTransaction
      results.push({ rows: [], changes: 0 })
      continue
    }
    const { statement, hasRows } = prepare(sql)
    // Safe: the stores use only text, numbers, bytes and null as parameters.
    const values = parameters as SQLInputValue[]
    if (hasRows) {
      const rows = statement.all(...values)
      results.push({ rows, changes: rows.length })
    } else {
      results.push({ rows: [], changes: Number(statement.run(...values).changes) })
    }
    if (batch.guarded && results.length === 1 && results[0]?.changes === 0) return []
  }
  return results
}

function prepare(sql: string): Prepared {
  let prepared = known.get(sql)
  if (prepared) return prepared
  if (known.size >= STATEMENTS_CACHED_MAX) known.clear()
  const statement = db.prepare(sql)
  prepared = { statement, hasRows: statement.columns().length > 0 }
  known.set(sql, prepared)
  return prepared
}

function isControl(sql: string): boolean {
  return sql === 'begin immediate' || sql === 'commit' || sql === 'rollback'
}

function isRead(sql: string): boolean {
  return sql.startsWith('select')
}
