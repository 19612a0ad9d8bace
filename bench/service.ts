import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Pool } from 'undici'
import { open } from './open.ts'
import { NodeProcess } from './process.ts'

/** Node options of `npm start`. */
const NODE_OPTIONS = ['--disable-sigusr1', '--max-semi-space-size=2']
const COMPILED = new URL('../node_modules/.cache/node', import.meta.url).pathname
const MAIN = new URL('../src/main.ts', import.meta.url).pathname
/** Number of clients that wait for an answer before they send the next request. */
const CLIENTS = 8
/** Enough connections that no request waits for another one. */
const CONNECTIONS_MAX = 128
/** Environment of tasks, on both sides of a comparison. */
export const ENVIRONMENT = { PATH: '/usr/local/bin:/usr/bin:/bin', LANG: 'C.UTF-8' }
export const PYTHON = '/usr/bin/python3'

export interface Accepted {
  taskId: string
  latencyMs: number
}

/** The real service, as `npm start` runs it, with its own folders; its tasks end with it. */
export class Service implements AsyncDisposable {
  readonly process: NodeProcess
  readonly folder: string
  readonly address: string
  readonly #pool: Pool
  readonly #callbackUrl: string | null
  readonly #idPrefix: string
  #submitted = 0
  #closed: Promise<void> | undefined

  private constructor(
    folder: string,
    options: {
      process: NodeProcess
      address: string
      callbackUrl: string | null
      idPrefix: string
    },
  ) {
    this.folder = folder
    this.process = options.process
    this.address = options.address
    this.#pool = new Pool(options.address, { connections: CONNECTIONS_MAX })
    this.#callbackUrl = options.callbackUrl
    this.#idPrefix = options.idPrefix
    open.add(this)
  }

  static async start(options: {
    /** Name -> text of each task file. */
    tasks: Record<string, string>
    callbackUrl: string | null
    env?: Record<string, string>
    nodeOptions?: readonly string[]
    /** Program to run instead of the service. */
    main?: string
    /** Interpreter of `main`; default: Node. */
    command?: string
    /** Folder of a killed service to continue with; removed with this one. */
    folder?: string
    /** Prefix of task ids, for several services with one database. */
    idPrefix?: string
  }): Promise<Service> {
    const folder = options.folder ?? (await mkdtemp(join(tmpdir(), 'task-runner-bench-')))
    const tasksDir = join(folder, 'tasks')
    await mkdir(tasksDir, { recursive: true })
    for (const [name, text] of Object.entries(options.tasks)) {
      await writeFile(join(tasksDir, name), text)
    }
    const ofNode = options.command === undefined ? NODE_OPTIONS : []
    const nodeOptions = [...ofNode, ...(options.nodeOptions ?? [])]
    const process = new NodeProcess([...nodeOptions, options.main ?? MAIN], {
      folder,
      command: options.command,
      env: {
        ...ENVIRONMENT,
        NODE_COMPILE_CACHE: COMPILED,
        UV_THREADPOOL_SIZE: '16',
        MALLOC_MMAP_THRESHOLD_: '131072',
        PORT: '0',
        DATA_DIR: join(folder, 'data'),
        TASKS_DIR: tasksDir,
        PYTHON_COMMAND: PYTHON,
        SHELL_COMMAND: '/usr/bin/bash',
        SHUTDOWN_GRACE_SECONDS: '1',
        ...options.env,
      },
    })
    const listening = await process
      .line((line) => line.includes('"msg":"listening"'))
      .catch(async (err: unknown) => {
        await process[Symbol.asyncDispose]()
        await rm(folder, { recursive: true })
        throw err
      })
    // main.ts logs the address with this message.
    const { address } = JSON.parse(listening) as { address: string }
    const { callbackUrl, idPrefix = 'bench' } = options
    return new Service(folder, { process, address, callbackUrl, idPrefix })
  }

  /** Submits a task. Throws unless the answer is 200: then the task is on disk. */
  async submit(taskFileName: string): Promise<Accepted> {
    this.#submitted += 1
    const taskId = `${this.#idPrefix}-${this.#submitted}`
    const startedAt = performance.now()
    const { statusCode, body } = await this.#pool.request({
      method: 'POST',
      path: '/task-runner',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({
        task_id: taskId,
        task_file_name: taskFileName,
        worker_config: {},
        callback_url: this.#callbackUrl,
      }),
    })
    const text = await body.text()
    if (statusCode !== 200) throw new Error(`not accepted: ${statusCode} ${text}`)
    return { taskId, latencyMs: performance.now() - startedAt }
  }

  /** Keeps all connections busy until `count` tasks are accepted. */
  async submitMany(taskFileName: string, count: number): Promise<void> {
    let left = count
    const client = async () => {
      while (left > 0) {
        left -= 1
        await this.submit(taskFileName)
      }
    }
    await Promise.all(Array.from({ length: CLIENTS }, client))
  }

  /** Sends the cheapest request, which uses neither the store nor workers. */
  async ping(): Promise<void> {
    const { body } = await this.#pool.request({ method: 'GET', path: '/health/live' })
    await body.dump()
  }

  /** Returns the number of tasks with a status, at most a page. */
  async count(status: string): Promise<number> {
    const { body } = await this.#pool.request({ method: 'GET', path: `/tasks?status=${status}` })
    // The API lists tasks in this form.
    return ((await body.json()) as { tasks: unknown[] }).tasks.length
  }

  task(taskId: string): Promise<Record<string, unknown>> {
    return this.get(`/tasks/${taskId}`)
  }

  async get(path: string): Promise<Record<string, unknown>> {
    const { statusCode, body } = await this.#pool.request({ method: 'GET', path })
    if (statusCode !== 200) throw new Error(`${path}: ${statusCode} ${await body.text()}`)
    // Every answer of the API is a JSON object.
    return (await body.json()) as Record<string, unknown>
  }

  /** Kills the service and its tasks with SIGKILL; keeps its folder. */
  async kill(): Promise<void> {
    await this.#leave(() => this.process.kill())
  }

  /** Stops the service with SIGTERM, and its tasks; keeps its folder. */
  async stop(): Promise<void> {
    await this.#leave(() => this.process[Symbol.asyncDispose]())
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #leave(end: () => Promise<void>): Promise<void> {
    this.#closed ??= Promise.resolve()
    open.delete(this)
    await this.#pool.destroy()
    await end()
    await this.#endTasks()
  }

  async #close(): Promise<void> {
    await this.#leave(() => this.process[Symbol.asyncDispose]())
    await rm(this.folder, { recursive: true, force: true, maxRetries: 5 })
  }

  /** Kills the local tasks, which outlive the service by design. */
  async #endTasks(): Promise<void> {
    const workersDir = join(this.folder, 'data', 'workers')
    for (const name of await readdir(workersDir).catch(() => [])) {
      const record = await readFile(join(workersDir, name, 'worker.json'), 'utf8').catch(() => '')
      const pid = Number(/"pid":(\d+)/.exec(record)?.[1])
      const command = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
      if (command === '/bin/sh\0-s\0') process.kill(-pid, 'SIGKILL')
    }
  }
}
