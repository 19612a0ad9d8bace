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

export type Answer = { id: number; value: unknown } | { id: number; error: Error }

const port = parentPort
if (!port) throw new Error('runs as a thread only')
// Holds: local-backend.ts starts this thread with it.
const workers: Methods = new LocalWorkers(workerData as LocalSettings)

port.on('message', async (call: Call) => {
  try {
    // Holds: local-backend.ts types its calls by `Methods`.
    const method = workers[call.method] as (...args: unknown[]) => unknown
    const value = await method.apply(workers, call.arguments)
    port.postMessage({ id: call.id, value } satisfies Answer)
  } catch (err) {
    const error = err instanceof Error ? err : new Error(String(err))
    port.postMessage({ id: call.id, error } satisfies Answer)
  }
  if (call.method === 'close') port.close()
})
