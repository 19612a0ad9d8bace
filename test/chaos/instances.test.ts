import { setTimeout as pause } from 'node:timers/promises'
import { Agent, request } from 'undici'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { workerNameFor } from '../../src/core/task.ts'
import { presets } from '../fakes/kubernetes/presets.ts'
import { expectCounted, startKubernetesInstances, taskOf } from '../helpers/instances.ts'
import { podOf } from '../helpers/kubernetes.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import { eventually, exitAfter, FINAL, get, logOf, post } from '../helpers/recovery.ts'
import type { Service } from '../helpers/service.ts'
import { FAILPOINTS, type Failpoint } from '../helpers/service-with-failpoint.ts'

const MINUTE_MS = 60_000
/**
 * What a dead instance leaves of an ended task is removed by a sweep: one a minute, for what is a minute old. The engine
 * looks twice a minute whether it is time for one, and one that a database under load fails is made up for by the next.
 */
const SWEPT_MS = 240_000

let postgres: Postgres

beforeAll(async () => {
  postgres = await startPostgres()
}, MINUTE_MS)
afterAll(() => postgres[Symbol.asyncDispose]())

describe.concurrent('instances', () => {
  test(
    'killed at every step of a task: others see it through, once, and leave nothing',
    async () => {
      await using instances = await startKubernetesInstances(postgres, {
        env: { CALLBACK_TIMEOUT_SECONDS: '5' },
      })
      const { stage } = instances
      // These would pass their point with what another has left: a callback, or a task that waits.
      const first: Failpoint[] = ['recorded', 'sent', 'sending']
      const last: Failpoint = 'inserted'
      const others = FAILPOINTS.filter((point) => point !== last && !first.includes(point))
      const points = [...first, ...others, last]
      const idOf = (point: string) => `killed-${point.replace(' ', '-')}`
      for (const point of points) {
        const victim = await instances.start(point.replace(' ', '-'), { KILL_AT: point })
        await stage.open(idOf(point), 'open')
        const answer = await post(
          victim,
          '/task-runner',
          stage.request(idOf(point), 'r-count.sh'),
        ).catch(() => undefined)
        expect(answer?.status, point).toBe(point === last ? undefined : 200)
        expect(await victim.ended, point).toBe('SIGKILL')
      }
      const [one, other] = await Promise.all([instances.start('b'), instances.start('c')])
      const again = await post(one, '/task-runner', stage.request(idOf('inserted'), 'r-count.sh'))
      expect(again.body.message).toMatch(/^Already accepted/)
      for (const point of points) {
        await eventually(async () => {
          const task = await taskOf(other, idOf(point))
          expect(task).toMatchObject({ status: 'succeeded', callback_status: 'delivered' })
        }, MINUTE_MS)
        await expectCounted(one, stage, idOf(point))
      }
      expect(instances.jobsMade()).toBe(points.length)
      await instances.expectNothingLeft(SWEPT_MS)
    },
    8 * MINUTE_MS,
  )

  test(
    'killed amid its sweep: another sweeps in its place',
    async () => {
      await using instances = await startKubernetesInstances(postgres)
      const { stage, fake } = instances
      const victim = await instances.start('a', { KILL_AT: 'committed' })
      await stage.open('left', 'open')
      await stage.submit(victim, 'left', 'r-count.sh')
      expect(await victim.ended).toBe('SIGKILL')
      expect(fake.objects('jobs')).toHaveLength(1)
      // Of all that list Jobs the sweep alone wants no pages.
      const hung = fake.faults.inject({
        ...{ method: 'GET', path: /\/jobs$/, blackhole: true, times: 1 },
        query: (query) => !query.has('limit') && !query.has('watch'),
      })
      const sweeping = await instances.start('b')
      await eventually(() => expect(hung.hits).toBe(1), 2 * MINUTE_MS)
      await exitAfter(sweeping, 'SIGKILL')
      await instances.start('c')
      await instances.expectNothingLeft(SWEPT_MS)
    },
    8 * MINUTE_MS,
  )

  test(
    'restarted one after the other under a steady load, with 200 tasks running: nothing fails, is lost or doubled',
    async () => {
      const isLong = (worker = '') => worker.startsWith('task-long-')
      await using instances = await startKubernetesInstances(postgres, {
        env: { MAX_CONCURRENT_TASKS: '100' },
        fake: {
          runProcesses: false,
          behave: ({ metadata }) =>
            isLong(metadata.labels?.['job-name'])
              ? presets.runs({ log: 'begun\n' })
              : presets.exits(0, { log: 'quick\n', message: 'task 0\n', afterMs: 300 }),
        },
      })
      const { stage, fake } = instances
      const hosts = ['a', 'b', 'c']
      const serving = new Map<string, Service>()
      for (const host of hosts) serving.set(host, await instances.start(host))
      const asked = () => [...serving.values()][0] as Service
      const long = Array.from({ length: 200 }, (_, index) => `long-${index}`)
      for (const taskId of long) await stage.submit(asked(), taskId, 'r-nap.sh')
      const running = async (service: Service) =>
        (await get(service, '/tasks?status=running&limit=500')).body.tasks as object[]
      await eventually(
        async () => expect((await running(asked())).length).toBeGreaterThanOrEqual(long.length),
        MINUTE_MS,
      )

      const load = startLoad((taskId) => stage.request(taskId, 'r-nap.sh'), serving)
      for (const host of hosts) {
        const before = load.accepted.length
        await eventually(() => expect(load.accepted.length).toBeGreaterThan(before + 20))
        expect(await exitAfter(serving.get(host) as Service, 'SIGTERM'), host).toBe(0)
        serving.delete(host)
        const service = await instances.start(host)
        expect((await get(service, '/health/ready')).status).toBe(200)
        serving.set(host, service)
      }
      await load.stop()
      expect(load.failures).toEqual([])
      console.log(`${load.accepted.length} tasks, ${load.retries()} requests made again`)

      for (const taskId of long) {
        const log = { log: 'over\n', message: 'task 0\n' }
        fake.kubelet.play(await podOf(fake, workerNameFor(taskId)), presets.exits(0, log))
      }
      const all = [...long, ...load.accepted]
      expect(new Set(all).size).toBe(all.length)
      for (const taskId of all) {
        const task = await eventually(async () => {
          const now = await taskOf(asked(), taskId)
          expect(now).toMatchObject({
            status: expect.stringMatching(FINAL),
            callback_status: 'delivered',
          })
          return now
        }, MINUTE_MS)
        expect(task).toMatchObject({ status: 'succeeded', exit_code: 0 })
        const log = taskId.startsWith('long-') ? 'begun\nover\n' : 'quick\n'
        expect(await logOf(asked(), taskId), taskId).toBe(log)
        expect(instances.jobsMade(workerNameFor(taskId)), taskId).toBe(1)
      }
      const { received } = stage.receiver
      const told = new Map(received.map(({ body }) => [body.task_id, body.logs]))
      expect(told.size).toBe(all.length)
      for (const taskId of long) expect(told.get(taskId)).toBe('begun\nover\n')
      // Who stops waits for its receivers: none is called twice.
      expect(received).toHaveLength(all.length)
      expect(new Set(received.map(({ headers }) => headers['webhook-id'])).size).toBe(all.length)
      await instances.expectNothingLeft(SWEPT_MS)
    },
    8 * MINUTE_MS,
  )
})

const LOAD_CLIENTS = 4
const LOAD_EVERY_MS = 500
/** A connection that is refused or reset, in the words of the system and of the client. */
const NOT_SERVED = /ECONNREFUSED|ECONNRESET|EPIPE|UND_ERR_SOCKET/

/** Clients that submit to one service after the other, and make a request again only where it was not served. */
function startLoad(requestFor: (taskId: string) => object, serving: Map<string, Service>) {
  const accepted: string[] = []
  const failures: unknown[] = []
  const dispatcher = new Agent({ connections: LOAD_CLIENTS })
  let isOver = false
  let retries = 0
  let turn = 0
  const submit = async (taskId: string) => {
    for (;;) {
      turn += 1
      const services = [...serving.values()]
      const { url } = services[turn % services.length] as Service
      try {
        const answer = await request(`${url}/task-runner`, {
          ...{ method: 'POST', dispatcher, body: JSON.stringify(requestFor(taskId)) },
          headers: { 'content-type': 'application/json' },
        })
        const body = await answer.body.text()
        if (answer.statusCode === 200) accepted.push(taskId)
        else failures.push({ taskId, status: answer.statusCode, body })
        return
      } catch (err) {
        // Holds: what is thrown is looked at for its code alone.
        const { code } = err as { code?: string }
        if (!NOT_SERVED.test(String(code))) return void failures.push(err)
        retries += 1
      }
    }
  }
  const clients = Array.from({ length: LOAD_CLIENTS }, async (_, client) => {
    for (let number = 0; !isOver; number += 1) {
      await submit(`quick-${client}-${number}`)
      // The pace of the load, not a wait for anything.
      await pause(LOAD_EVERY_MS)
    }
  })
  return {
    accepted,
    failures,
    retries: () => retries,
    async stop() {
      isOver = true
      await Promise.all(clients)
      await dispatcher.close()
    },
  }
}
