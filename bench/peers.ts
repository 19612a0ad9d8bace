/** Starts other task runners, for comparison. Where one is not installed, a text says so. */
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { type AddressInfo, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { promisify } from 'node:util'
import { Pool } from 'undici'
import { open } from './open.ts'
import { NodeProcess } from './process.ts'
import type { Row } from './report.ts'
import { ENVIRONMENT, PYTHON, Service } from './service.ts'

const FASTAPI = new URL('./fastapi_app.py', import.meta.url).pathname
const FASTAPI_PACKAGES = 'python3-fastapi python3-uvicorn python3-requests'
export const FASTAPI_NAME = 'FastAPI, a thread per task, nothing kept (fastapi_app.py)'
export const WEBHOOK_NAME =
  'webhook: no callback, no queue, no log or outcome kept, no cancelling; the caller waits for the end'
/** Requests at a time: as many as the service runs tasks by default. */
const WEBHOOK_CLIENTS = 4 * navigator.hardwareConcurrency
const START_MS_MAX = 10_000
const POLL_MS = 20

/** Starts a FastAPI app that takes the same requests as the service. */
export async function startFastApi(options: {
  tasks: Record<string, string>
  callbackUrl: string
}): Promise<Service | string> {
  if (!(await runs(PYTHON, ['-c', 'import fastapi, requests, uvicorn']))) {
    return `FastAPI is left out: apt-get install ${FASTAPI_PACKAGES}`
  }
  return Service.start({ ...options, main: FASTAPI, command: PYTHON, idPrefix: 'fastapi' })
}

/** Runs github.com/adnanh/webhook, which answers with a script's output once it has ended. */
export class Webhook implements AsyncDisposable {
  readonly #folder: string
  readonly #process: NodeProcess
  readonly #pool: Pool

  private constructor(folder: string, process: NodeProcess, port: number) {
    this.#folder = folder
    this.#process = process
    this.#pool = new Pool(`http://127.0.0.1:${port}`, { connections: WEBHOOK_CLIENTS })
    open.add(this)
  }

  /** `tasksDir`: the folder of the scripts. */
  static async start(tasksDir: string): Promise<Webhook | string> {
    if (!(await runs('webhook', ['-version']))) {
      return 'webhook is left out: apt-get install webhook'
    }
    const folder = await mkdtemp(join(tmpdir(), 'task-runner-bench-webhook-'))
    const hook = (id: string, command: string, ...options: string[]) => ({
      id,
      'execute-command': command,
      'command-working-directory': tasksDir,
      'include-command-output-in-response': true,
      'pass-arguments-to-command': [
        ...options.map((name) => ({ source: 'string', name })),
        { source: 'payload', name: 'task_file_name' },
      ],
    })
    const hooks = join(folder, 'hooks.json')
    await writeFile(hooks, JSON.stringify([hook('sh', '/usr/bin/bash'), hook('py', PYTHON, '-u')]))
    const port = await freePort()
    const args = ['-hooks', hooks, '-ip', '127.0.0.1', '-port', String(port)]
    const process = new NodeProcess(args, { folder, env: ENVIRONMENT, command: 'webhook' })
    const webhook = new Webhook(folder, process, port)
    await webhook.#answers()
    return webhook
  }

  /** Returns the scripts per second. */
  async run(file: string, count: number): Promise<number> {
    const path = `/hooks/${file.slice(file.lastIndexOf('.') + 1)}`
    const startedAt = performance.now()
    let left = count
    const client = async () => {
      while (left > 0) {
        left -= 1
        const { statusCode, body } = await this.#pool.request({
          method: 'POST',
          path,
          headers: { 'content-type': 'application/json' },
          body: JSON.stringify({ task_file_name: file }),
        })
        const text = await body.text()
        if (statusCode !== 200 || text === '') throw new Error(`webhook: ${statusCode} ${text}`)
      }
    }
    await Promise.all(Array.from({ length: WEBHOOK_CLIENTS }, client))
    return (count * 1000) / (performance.now() - startedAt)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!open.delete(this)) return
    await this.#pool.destroy()
    await this.#process[Symbol.asyncDispose]()
    await rm(this.#folder, { recursive: true })
  }

  async #answers(): Promise<void> {
    const startedAt = performance.now()
    for (;;) {
      try {
        const { body } = await this.#pool.request({ method: 'GET', path: '/' })
        return await body.dump()
      } catch (err) {
        if (performance.now() - startedAt > START_MS_MAX) throw err
        await pause(POLL_MS)
      }
    }
  }
}

/** Returns the yardstick of a peer. `peer`: a text instead of one says why it is missing. */
export function peer(name: string, figures: number[] | undefined, peer: unknown): Row['yardstick'] {
  return { name: typeof peer === 'string' ? peer : name, figures: figures ?? [] }
}

async function runs(command: string, args: string[]): Promise<boolean> {
  return promisify(execFile)(command, args, { env: ENVIRONMENT }).then(
    () => true,
    () => false,
  )
}

/** Finds a free port: webhook would not report one that the kernel chose. */
async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  // A TCP server that listens has this address.
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}
