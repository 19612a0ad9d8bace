/** The thread that local workers live on: forks, /proc and file copies block it instead of the HTTP loop. */
import { parentPort, workerData } from 'node:worker_threads'
import { type LocalSettings, LocalWorkers } from './local-workers.ts'

export type Methods = Pick<
  LocalWorkers,
  'provision' | 'find' | 'list' | 'completion' | 'tail' | 'stop' | 'terminate' | 'close'
>

export interface Call {
  id: number
  method: keyof Methods
  arguments: unknown[]
}

/** `name`: of the error, which a message between threads loses. */
export type Answer = { id: number; value: unknown } | { id: number; error: Error; name: string }

const port = parentPort
if (!port) throw new Error('runs as a thread only')
// Holds: local-backend.ts starts this thread with it.
const workers: Methods = new LocalWorkers(workerData as LocalSettings)

let answers: Answer[] = []

port.on('message', (calls: Call[]) => {
  for (const call of calls) void answer(call)
})

/** Never rejects. */
async function answer({ id, method, arguments: args }: Call): Promise<void> {
  try {
    // Holds: local-backend.ts types its calls by `Methods`.
    const value = await (workers[method] as (...args: unknown[]) => unknown).apply(workers, args)
    say({ id, value })
  } catch (err) {
    const error = err instanceof Error ? err : new Error(String(err))
    say({ id, error, name: error.name })
  }
  if (method === 'close') setImmediate(() => port?.close())
}

/** Those of a turn of the loop go together, like the calls. */
function say(answer: Answer): void {
  if (answers.length === 0) setImmediate(tell)
  answers.push(answer)
}

function tell(): void {
  const told = answers
  answers = []
  port?.postMessage(told)
}
