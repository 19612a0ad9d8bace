import { randomBytes } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import pg from 'pg'
import { expect } from 'vitest'
import {
  type FakeKubernetes,
  type FakeKubernetesOptions,
  startFakeKubernetes,
} from '../fakes/kubernetes/server.ts'
import type { Postgres } from './postgres.ts'
import {
  eventually,
  expectNoProcesses,
  finalTask,
  get,
  killIfThere,
  logOf,
  type Stage,
  startStage,
} from './recovery.ts'
import { processesOf, type Service } from './service.ts'

type Row = Record<string, unknown>
type StageOptions = NonNullable<Parameters<typeof startStage>[0]>

/** Several services over one database, with what a stage has: gates, requests and a receiver. */
export interface Instances extends AsyncDisposable {
  stage: Stage
  /** Starts one more. Each `host` has a data folder of its own. */
  start(host: string, env?: Record<string, string>): Promise<Service>
  dataDirOf(host: string): string
  databaseUrl: string
  sql(text: string, values?: unknown[]): Promise<Row[]>
  /** Waits until the instance has told anew that it lives, and then once more: it knows by then what is its own. */
  beats(instance: string): Promise<void>
}

export async function startInstances(
  postgres: Postgres,
  options: Omit<StageOptions, 'dataDir'> = {},
): Promise<Instances> {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-instances-'))
  const dataDirOf = (host: string) => join(folder, host)
  const url = await postgres.database()
  const stage = await startStage({
    ...options,
    env: { DATABASE_URL: url, SEALING_KEY: randomBytes(32).toString('base64'), ...options.env },
  })
  const pool = new pg.Pool({ connectionString: url, max: 2 })
  const sql = async (text: string, values: unknown[] = []) =>
    (await pool.query<Row>(text, values)).rows
  const hosts = new Set<string>()
  return {
    stage,
    dataDirOf,
    databaseUrl: url,
    sql,
    start(host, env) {
      hosts.add(host)
      return stage.start({ DATA_DIR: dataDirOf(host), ...env })
    },
    async beats(instance) {
      const seenAt = async () =>
        (await sql('select beat_at from instances where name = $1', [instance]))[0]?.beat_at
      for (const _ of ['once', 'twice']) {
        const before = await seenAt()
        await eventually(async () => expect(await seenAt()).not.toBe(before))
      }
    },
    async [Symbol.asyncDispose]() {
      await pool.end()
      await stage[Symbol.asyncDispose]()
      for (const host of hosts) {
        for (const pid of processesOf(dataDirOf(host))) killIfThere(pid)
        await expectNoProcesses(dataDirOf(host))
      }
      await rm(folder, { recursive: true, force: true, maxRetries: 10 })
    },
  }
}

/** The same with workers in a cluster that runs pods as processes. */
export interface KubernetesInstances extends Instances {
  fake: FakeKubernetes
  /** How often a Job of this name was asked for and made. */
  jobsMade(workerName?: string): number
  expectNothingLeft(withinMs?: number): Promise<void>
}

export async function startKubernetesInstances(
  postgres: Postgres,
  {
    fake: fakeOptions,
    env,
    ...options
  }: Omit<StageOptions, 'dataDir'> & { fake?: FakeKubernetesOptions } = {},
): Promise<KubernetesInstances> {
  const fake = await startFakeKubernetes({
    ...{ tls: true, runProcesses: true, namespace: 'workers' },
    ...fakeOptions,
  })
  const instances = await startInstances(postgres, {
    ...options,
    env: { WORKER_BACKEND: 'kubernetes', KUBECONFIG: fake.kubeconfig.path, ...env },
  })
  return {
    ...instances,
    fake,
    jobsMade: (workerName) =>
      fake.requests.filter(({ method, path, query, status, body }) => {
        if (method !== 'POST' || !path.endsWith('/jobs') || status !== 201) return false
        if (query.dryRun) return false
        const { metadata } = body as { metadata: { name: string } }
        return workerName === undefined || metadata.name === workerName
      }).length,
    expectNothingLeft: (withinMs) =>
      eventually(() => {
        for (const kind of ['jobs', 'pods', 'secrets'] as const) {
          expect(
            fake.objects(kind).map(({ metadata }) => metadata.name),
            kind,
          ).toEqual([])
        }
      }, withinMs),
    async [Symbol.asyncDispose]() {
      await instances[Symbol.asyncDispose]()
      await fake[Symbol.asyncDispose]()
    },
  }
}

export async function taskOf(service: Service, taskId: string): Promise<Record<string, unknown>> {
  return (await get(service, `/tasks/${taskId}`)).body
}

/** The name of the instance that runs the task, once one does. */
export function runnerOf(service: Service, taskId: string): Promise<string> {
  return eventually(async () => {
    const task = await taskOf(service, taskId)
    expect(task.status).toBe('running')
    return String(task.instance)
  })
}

/** Every attempt to call back for the task carried one id. Returns how many there were. */
export function attemptsFor({ receiver }: Stage, taskId: string): number {
  const ids = receiver.received
    .filter(({ body }) => body.task_id === taskId)
    .map(({ headers }) => headers['webhook-id'])
  expect(new Set(ids).size, `webhook-ids of ${taskId}`).toBe(1)
  return ids.length
}

/** A task of r-count.sh ran once and ended so, with every line that it numbered in its log, and in its callback. */
export async function expectCounted(
  service: Service,
  stage: Stage,
  taskId: string,
  exitCode = 0,
): Promise<void> {
  const status = exitCode === 0 ? 'succeeded' : 'failed'
  expect(await finalTask(service, taskId)).toMatchObject({ status, exit_code: exitCode })
  const gate = stage.gateOf(taskId)
  expect(await readFile(join(gate, 'runs'), 'utf8'), `runs of ${taskId}`).toBe('once\n')
  const log = await logOf(service, taskId)
  expect(log).toBe(countedTo(Number(await readFile(join(gate, 'lines'), 'utf8'))))
  const { body } = await stage.callbackOf(taskId)
  expect(body).toMatchObject({ success: exitCode === 0, logs: log })
  attemptsFor(stage, taskId)
}

export function countedTo(lines: number): string {
  return Array.from({ length: lines }, (_, index) => `line ${index + 1}\n`).join('')
}

/** Waits until another instance than `owner` runs the task. Returns its name. */
export function takenFrom(
  owner: string,
  service: Service,
  taskId: string,
  withinMs = 60_000,
): Promise<string> {
  return eventually(async () => {
    const task = await taskOf(service, taskId)
    expect(task).toMatchObject({ status: 'running', instance: expect.not.stringMatching(owner) })
    return String(task.instance)
  }, withinMs)
}
