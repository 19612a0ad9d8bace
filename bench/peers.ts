/** What people would run instead, as far as it is installed. A text in place of one says why it is not there. */
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
/** As many as the service runs at a time by default. */
const WEBHOOK_CLIENTS = 4 * navigator.hardwareConcurrency
const START_MS_MAX = 10_000
const POLL_MS = 20

/** The old app's shape, which takes the same requests as the service. */
export async function startFastApi(options: {
  tasks: Record<string, string>
  callbackUrl: string
}): Promise<Service | string> {
  if (!(await runs(PYTHON, ['-c', 'import fastapi, requests, uvicorn']))) {
    return `FastAPI is left out: apt-get install ${FASTAPI_PACKAGES}`
  }
  return Service.start({ ...options, main: FASTAPI, command: PYTHON, idPrefix: 'fastapi' })
}

/** github.com/adnanh/webhook: answers with what the script printed, once it has ended. */
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

  /** `tasksDir`: where the scripts are. */
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

  /** Scripts per second. */
  async run(file: string, count: number): Promise<number> {
    const path = `/hooks/${file.slice(file.lastIndexOf('.') + 1)}`
    const startedAt = performance.now()
    let left = count
    const client = async () => {
      while (left > 0) {
        left -= 1
        const { statusCode, body } = await this.#pool.request({
          ...{ method: 'POST', path, headers: { 'content-type': 'application/json' } },
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

/** `peer`: or why there is none. */
export function peer(name: string, figures: number[] | undefined, peer: unknown): Row['yardstick'] {
  return { name: typeof peer === 'string' ? peer : name, figures: figures ?? [] }
}

async function runs(command: string, args: string[]): Promise<boolean> {
  return promisify(execFile)(command, args, { env: ENVIRONMENT }).then(
    () => true,
    () => false,
  )
}

/** It takes no port of the kernel's choice that it would tell. */
async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  // Holds: a TCP server that listens.
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}
