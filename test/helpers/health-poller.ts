/**
 * Measures from outside how long the HTTP loop of a service keeps its callers waiting: asks for `/health/live` on one
 * kept connection, every INTERVAL_MS. Runs in a thread of its own, so that a busy test does not count.
 */
import { Agent, get } from 'node:http'
import { setTimeout as pause } from 'node:timers/promises'
import { parentPort, Worker, workerData } from 'node:worker_threads'

const INTERVAL_MS = 10
const POLLER = 'health poller'

export interface HealthPoller extends AsyncDisposable {
  /** Asks this service from now on; undefined: nobody. */
  ask(url: string | undefined): void
  /** Delays of all answers until now, in ms, shortest first. */
  delays(): Promise<number[]>
}

export function startHealthPoller(): HealthPoller {
  const worker = new Worker(new URL(import.meta.url), { workerData: POLLER })
  return {
    ask: (url) => worker.postMessage({ url }),
    delays: () =>
      new Promise((resolve, reject) => {
        worker.once('message', resolve)
        worker.once('error', reject)
        worker.postMessage('report')
      }),
    async [Symbol.asyncDispose]() {
      await worker.terminate()
    },
  }
}

/** The value that `share` of the sorted values do not exceed. */
export function percentile(sorted: readonly number[], share: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN
}

if (workerData === POLLER && parentPort) {
  const port = parentPort
  const agent = new Agent({ keepAlive: true, maxSockets: 1 })
  const delays: number[] = []
  let url: string | undefined
  port.on('message', (message: 'report' | { url: string | undefined }) => {
    if (message !== 'report') url = message.url
    else port.postMessage(delays.toSorted((a, b) => a - b))
  })
  // One that was killed does not answer, and has kept its caller waiting until then.
  const answerOf = (from: string) =>
    new Promise<void>((resolve) => {
      get(`${from}/health/live`, { agent }, (answer) => {
        answer.resume().on('close', resolve)
      }).on('error', () => resolve())
    })
  for (;;) {
    await pause(INTERVAL_MS)
    if (url === undefined) continue
    const startedAt = performance.now()
    await answerOf(url)
    const delay = performance.now() - startedAt
    // Who asks only after an answer asks seldom while answers are late: those that it did not ask count, too.
    for (let late = delay; late > 0; late -= INTERVAL_MS) delays.push(late)
  }
}
