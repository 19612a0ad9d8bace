/** Starts the service with workers whose tasks end at once, to measure only the service. */
import { buildApp } from '../src/app.ts'
import { loadConfig } from '../src/config.ts'
import type { Worker, WorkerBackend, WorkerSpec } from '../src/core/ports.ts'

const done = { reason: 'completed', exitCode: 0, signal: null, message: null } as const

function trivialWorker({ name, taskId }: WorkerSpec): Worker {
  return {
    name,
    taskId,
    backend: 'trivial',
    image: null,
    size: null,
    createdAt: Date.now(),
    status: async () => 'Completed',
    completion: async () => done,
    stop: async () => {},
    logs: async () => ({ content: Buffer.from('hi\n'), totalBytes: 3 }),
    async *follow() {
      yield Buffer.from('hi\n')
    },
    terminate: async () => {},
  }
}

const backend: WorkerBackend = {
  name: 'trivial',
  provision: async (spec) => trivialWorker(spec),
  find: async () => undefined,
  list: async () => [],
  check: async () => {},
  close: async () => {},
}

const config = loadConfig()
const app = await buildApp({ config, wrapPorts: (ports) => ({ ...ports, backend }) })
process.once('SIGTERM', async () => {
  await app.http.close()
  process.exit(0)
})
const address = await app.http.listen({ host: config.host, port: config.port })
app.http.log.info({ address }, 'listening')
