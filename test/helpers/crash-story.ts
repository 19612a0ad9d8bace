import { chmod, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect } from 'vitest'
import { dockerEnv, removeContainers } from './docker.ts'
import { type Postgres, startPostgres } from './postgres.ts'
import { type Receiver, startReceiver } from './receiver.ts'
import { processesOf, type Service, startService } from './service.ts'

/** A data folder that outlives its services, a receiver, and what was promised to its clients. */
export interface CrashStory extends AsyncDisposable {
  env: Record<string, string>
  receiver: Receiver
  start(env?: Record<string, string>): Promise<Service>
  /** Posts as a careful client does: again, until it is answered. Gives up when the service is gone. */
  submit(service: Service, taskId: string): Promise<boolean>
  /** Everything that must hold once the dust has settled. */
  expectAllKept(service: Service, taskIds: string[]): Promise<void>
}

/** `cluster`: instances over one Postgres, with Docker workers. Each start is an instance. */
export type Cast = 'local' | 'docker' | 'cluster'

export async function startCrashStory(cast: Cast = 'local'): Promise<CrashStory> {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-crash-'))
  const tasksDir = join(folder, 'tasks')
  const runs = join(folder, 'runs')
  const dataDir = join(folder, 'data')
  await writeFile(runs, '')
  await mkdir(tasksDir)
  // Workers in containers are a user of their own.
  await chmod(folder, 0o755)
  await chmod(runs, 0o666)
  await writeFile(
    join(tasksDir, 'note.sh'),
    `echo "$TASK_ID" >>${runs}\nsleep 0.1\necho "ran $TASK_ID"\n`,
  )
  const receiver = await startReceiver()
  const services: Service[] = []
  const postgres = cast === 'cluster' ? await startPostgres() : undefined
  const env = {
    ...{ DATA_DIR: dataDir, TASKS_DIR: tasksDir, MAX_CONCURRENT_TASKS: '3' },
    ...(cast === 'local' ? {} : dockerEnv([`${runs}:${runs}`])),
    ...(postgres ? await clusterEnv(postgres) : {}),
  }
  // A dead instance's tasks, deliveries and workers wait until it is known to be dead, and for the next sweep.
  const options = { timeout: postgres ? 150_000 : 25_000, interval: 50 }
  const get = async (service: Service, path: string) =>
    (await (await fetch(service.url + path)).json()) as Record<string, unknown>
  return {
    env,
    receiver,
    async start(more = {}) {
      const service = await startService({ ...env, ...more })
      services.push(service)
      return service
    },
    async submit(service, taskId) {
      const body = JSON.stringify({
        task_id: taskId,
        task_file_name: 'note.sh',
        worker_config: {},
        callback_url: receiver.url,
      })
      try {
        const headers = { 'content-type': 'application/json' }
        const answer = await fetch(`${service.url}/task-runner`, { method: 'POST', headers, body })
        return answer.status === 200
      } catch {
        return false
      }
    },
    async expectAllKept(service, taskIds) {
      for (const taskId of taskIds) {
        await expect
          .poll(() => get(service, `/tasks/${taskId}`), options)
          .toMatchObject({ status: 'succeeded', exit_code: 0, callback_status: 'delivered' })
        const ids = receiver.received
          .filter(({ body }) => body.task_id === taskId)
          .map(({ headers }) => headers['webhook-id'])
        expect(new Set(ids).size, `webhook-ids of ${taskId}`).toBe(1)
        expect(await (await fetch(`${service.url}/tasks/${taskId}/logs`)).text()).toBe(
          `ran ${taskId}\n`,
        )
      }
      for (const { body } of receiver.received) {
        expect(body).toEqual({
          task_name: 'note.sh',
          task_id: body.task_id,
          success: true,
          logs: `ran ${body.task_id}\n`,
        })
      }
      const ran = (await readFile(runs, 'utf8')).trim().split('\n')
      expect(ran.sort(), 'every script ran exactly once').toEqual([...taskIds].sort())
      await expect.poll(() => get(service, '/workers'), options).toEqual({ workers: [] })
      if (cast === 'local') expect(await readdir(join(dataDir, 'workers'))).toEqual([])
      expect(processesOf(dataDir)).toEqual([])
      const waiting = await get(service, '/tasks?status=queued')
      expect(waiting.tasks).toEqual([])
    },
    async [Symbol.asyncDispose]() {
      for (const service of services) await service.kill()
      if (cast !== 'local') await removeContainers(`task-chaos-${cast}`)
      await postgres?.[Symbol.asyncDispose]()
      await receiver[Symbol.asyncDispose]()
      await rm(folder, { recursive: true, force: true, maxRetries: 10 })
    },
  }
}

async function clusterEnv(postgres: Postgres): Promise<Record<string, string>> {
  return {
    DATABASE_URL: await postgres.database(),
    SEALING_KEY: Buffer.alloc(32, 7).toString('base64'),
    // As long as a lease lasts nobody else may deliver.
    CALLBACK_TIMEOUT_SECONDS: '2',
  }
}
