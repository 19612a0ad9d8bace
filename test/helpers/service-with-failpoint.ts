/**
 * The service as a process of its own, as src/main.ts starts it, with one difference: it kills itself with
 * SIGKILL at the moment that KILL_AT names, the KILL_ON-th time it comes there.
 */
import { buildApp, type Ports } from '../../src/app.ts'
import { loadConfig } from '../../src/config.ts'
import type { Worker } from '../../src/core/ports.ts'

export const FAILPOINTS = [
  'inserted',
  'claimed',
  'provisioning',
  'provisioned',
  'running',
  'exited',
  'log taken',
  'committed',
  'sending',
  'sent',
  'recorded',
  'terminating',
  'terminated',
  'settled',
] as const
export type Failpoint = (typeof FAILPOINTS)[number]

const killAt = process.env.KILL_AT
let passes = Number(process.env.KILL_ON ?? 1)

if (import.meta.main) {
  const listen = { host: '127.0.0.1', port: 0 }
  const app = await buildApp({ config: loadConfig(), wrapPorts, listen })
  app.http.log.info({ address: app.address }, 'listening')
  process.on('SIGTERM', async () => {
    await app.stop()
    await app.http.close()
    process.exit(0)
  })
}

function pass(failpoint: Failpoint): void {
  if (failpoint !== killAt) return
  passes -= 1
  if (passes === 0) process.kill(process.pid, 'SIGKILL')
}

function wrapPorts({ tasks, deliveries, backend, sender }: Ports): Ports {
  return {
    tasks: around(tasks, {
      insert: { after: 'inserted' },
      claim: { after: 'claimed' },
      claimNext: { after: 'claimed' },
      markRunning: { after: 'running' },
      finish: { after: 'committed' },
      workerTerminated: { after: 'settled' },
    }),
    deliveries: around(deliveries, { recordAttempt: { after: 'recorded' } }),
    backend: around(
      backend,
      { provision: { before: 'provisioning', after: 'provisioned' } },
      (result) => (isWorker(result) ? aroundWorker(result) : result),
    ),
    sender: around(sender, { send: { before: 'sending', after: 'sent' } }),
  }
}

function isWorker(value: unknown): value is Worker {
  return typeof value === 'object' && value !== null && 'completion' in value
}

function aroundWorker(worker: Worker): Worker {
  return around(worker, {
    completion: { after: 'exited' },
    logs: { after: 'log taken' },
    terminate: { before: 'terminating', after: 'terminated' },
  })
}

/** The same object, passing failpoints before and after some of its methods. */
function around<T extends object>(
  target: T,
  points: { [K in keyof T]?: { before?: Failpoint; after?: Failpoint } },
  mapResult: (result: unknown) => unknown = (result) => result,
): T {
  return new Proxy(target, {
    get(_, name) {
      const value = Reflect.get(target, name, target)
      if (typeof value !== 'function') return value
      const point = points[name as keyof T]
      return (...args: unknown[]) => {
        if (point?.before) pass(point.before)
        const result = value.apply(target, args)
        if (!(result instanceof Promise)) return result
        return result.then((settled: unknown) => {
          // A claim that found nothing is none.
          const isNone = Array.isArray(settled) && settled.length === 0
          if (point?.after && !isNone) pass(point.after)
          return mapResult(settled)
        })
      }
    },
  })
}
