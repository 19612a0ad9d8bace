import { existsSync, readFileSync } from 'node:fs'
import { chmod, mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { expect, vi } from 'vitest'
import { type Received, type Receiver, startReceiver } from './receiver.ts'
import { processesOf, type Service, startService } from './service.ts'

export const FINAL = /^(succeeded|failed|cancelled)$/

export interface Answer {
  status: number
  headers: Headers
  body: Record<string, unknown>
}

/**
 * Waits until `check` throws no more. What `expect.poll` does, which concurrent tests can use only through
 * a context that helpers do not have.
 */
export function eventually<T>(check: () => T | Promise<T>, timeout = 25_000): Promise<T> {
  return vi.waitFor(check, { timeout, interval: 50 })
}

/** Further fields of a request; `env` goes into its `env_variables`. */
type More = { env?: Record<string, string> } & Record<string, unknown>

/** A data folder that outlives its services, folders that tasks watch, and a receiver. */
export interface Stage extends AsyncDisposable {
  dataDir: string
  /** The folder that a task is given as $GATE; it ends when that is removed. */
  gateOf(taskId: string): string
  receiver: Receiver
  start(env?: Record<string, string>): Promise<Service>
  /** A request for one of the `r-` task files, with a callback to the receiver. */
  request(taskId: string, file: string, more?: More): Record<string, unknown>
  /** Submits it, and expects that it is accepted. */
  submit(service: Service, taskId: string, file: string, more?: More): Promise<void>
  /** Makes files in the task's gate. */
  open(taskId: string, ...names: string[]): Promise<void>
  /** Waits for a file that the task makes in its gate. */
  made(taskId: string, name: string): Promise<void>
  /** Waits for the first callback of the task. */
  callbackOf(taskId: string): Promise<Received>
  /** Works on the database of a service that has ended. */
  database<T>(work: (db: DatabaseSync) => T): T
}

export async function startStage(
  options: {
    dataDir?: string
    env?: Record<string, string>
    /** The user that the service runs as. */
    uid?: number
    answer?: Parameters<typeof startReceiver>[0]
  } = {},
): Promise<Stage> {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-recovery-'))
  // Its tasks look at their gates.
  if (options.uid !== undefined) await chmod(folder, 0o755)
  const dataDir = options.dataDir ?? join(folder, 'data')
  const gates = join(folder, 'gates')
  const gateOf = (taskId: string) => join(gates, taskId)
  const receiver = await startReceiver(options.answer)
  const services: Service[] = []
  const request: Stage['request'] = (taskId, file, { env = {}, ...more } = {}) => ({
    task_id: taskId,
    task_file_name: file,
    callback_url: receiver.url,
    worker_config: { env_variables: { GATE: gateOf(taskId), ...env } },
    ...more,
  })
  return {
    dataDir,
    gateOf,
    receiver,
    request,
    async start(env = {}) {
      const service = await startService({ DATA_DIR: dataDir, ...options.env, ...env }, options.uid)
      services.push(service)
      return service
    },
    async submit(service, taskId, file, more) {
      await mkdir(gateOf(taskId), { recursive: true })
      const answer = await post(service, '/task-runner', request(taskId, file, more))
      expect(answer).toMatchObject({ status: 200, body: { success: true } })
    },
    async open(taskId, ...names) {
      await mkdir(gateOf(taskId), { recursive: true })
      for (const name of names) await writeFile(join(gateOf(taskId), name), '')
    },
    async made(taskId, name) {
      await eventually(() => expect(existsSync(join(gateOf(taskId), name)), name).toBe(true))
    },
    callbackOf: (taskId) =>
      eventually(() => {
        const callback = receiver.received.find(({ body }) => body.task_id === taskId)
        if (!callback) throw new Error(`no callback of ${taskId}`)
        return callback
      }),
    database(work) {
      const db = new DatabaseSync(join(dataDir, 'task-runner.db'))
      try {
        return work(db)
      } finally {
        db.close()
      }
    },
    async [Symbol.asyncDispose]() {
      for (const service of services) await service.kill()
      await receiver[Symbol.asyncDispose]()
      await rm(gates, { recursive: true, force: true })
      for (const pid of processesOf(dataDir)) killIfThere(pid)
      await expectNoProcesses(dataDir)
      await rm(folder, { recursive: true, force: true, maxRetries: 10 })
    },
  }
}

export async function get(service: { url: string }, path: string): Promise<Answer> {
  const answer = await fetch(service.url + path)
  return { status: answer.status, headers: answer.headers, body: Object(await answer.json()) }
}

export async function post(
  service: { url: string },
  path: string,
  body: object = {},
): Promise<Answer> {
  const answer = await fetch(service.url + path, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
  })
  return { status: answer.status, headers: answer.headers, body: Object(await answer.json()) }
}

export async function logOf(service: { url: string }, taskId: string): Promise<string> {
  return (await fetch(`${service.url}/tasks/${taskId}/logs`)).text()
}

/** The task once it is final. */
export function finalTask(
  service: { url: string },
  taskId: string,
): Promise<Record<string, unknown>> {
  return eventually(async () => {
    const { body } = await get(service, `/tasks/${taskId}`)
    expect(body, taskId).toMatchObject({ status: expect.stringMatching(FINAL) })
    return body
  })
}

/** Workers, their folders and their processes are all gone. */
export async function expectNoWorkers(service: { url: string }, dataDir: string): Promise<void> {
  await eventually(async () => {
    expect((await get(service, '/workers')).body).toEqual({ workers: [] })
    expect(await readdir(join(dataDir, 'workers'))).toEqual([])
  })
  await expectNoProcesses(dataDir)
}

export async function expectNoProcesses(dataDir: string): Promise<void> {
  await eventually(() => expect(processesOf(dataDir)).toEqual([]))
}

/** Sends the signal, and waits for the end. One that does not end in time is killed, and tells so. */
export async function exitAfter(
  service: Service,
  signal: NodeJS.Signals,
  withinMs = 15_000,
): Promise<unknown> {
  const timer = Promise.withResolvers<string>()
  const late = setTimeout(() => timer.resolve(`did not end in ${withinMs} ms`), withinMs)
  const exit = await Promise.race([service.kill(signal), timer.promise])
  clearTimeout(late)
  await service.kill()
  return exit
}

export function isAlive(pid: number): boolean {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1')
    return stat[stat.lastIndexOf(')') + 2] !== 'Z'
  } catch {
    return false
  }
}

export function killIfThere(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It ended by itself.
  }
}
