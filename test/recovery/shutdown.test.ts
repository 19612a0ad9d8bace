import { once } from 'node:events'
import { writeFile } from 'node:fs/promises'
import type { ServerResponse } from 'node:http'
import { connect } from 'node:net'
import { dirname, join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Ports } from '../../src/app.ts'
import type { AttemptResult } from '../../src/core/ports.ts'
import { kubeconfigOf } from '../fakes/kubernetes/credentials.ts'
import { startApp, taskRequest } from '../helpers/app.ts'
import { startRawServer } from '../helpers/hostile-servers.ts'
import {
  eventually,
  exitAfter,
  expectNoWorkers,
  finalTask,
  get,
  isAlive,
  killIfThere,
  post,
  type Stage,
  startStage,
} from '../helpers/recovery.ts'
import { npmStart, processesOf, type Service } from '../helpers/service.ts'

const TIMEOUT_MS = 90_000

interface HeldStage extends Stage {
  /** Answers of the receiver that wait to be given. */
  held: ServerResponse[]
}

/** A receiver that holds its first answer open until the test gives it; later ones are 200 at once. */
async function startHeldStage(env: Record<string, string>): Promise<HeldStage> {
  const held: ServerResponse[] = []
  const stage = await startStage({
    env,
    answer: (_, response, count) => {
      if (count === 1) held.push(response)
      else response.end('{}')
    },
  })
  return { ...stage, held }
}

/** A task that has ended, with its callback attempt held open. */
async function holdAttempt(stage: HeldStage, service: Service): Promise<void> {
  await stage.open('told', 'before', 'during', 'after')
  await stage.submit(service, 'told', 'r-story.sh')
  await eventually(() => expect(stage.held.length).toBe(1))
}

async function expectDraining(service: Service): Promise<void> {
  await eventually(async () => expect((await get(service, '/health/ready')).status).toBe(503))
}

/** Follows a log; settles with what was received when the service ends the stream. */
async function follow(service: Service, taskId: string): Promise<{ ended: Promise<string> }> {
  const answer = await fetch(`${service.url}/tasks/${taskId}/logs?follow=true`)
  expect(answer.status).toBe(200)
  return { ended: answer.text() }
}

describe.concurrent('a service that is told to stop (SIGTERM)', () => {
  test(
    'takes nothing more, waits for the answer to a callback, records it, lets tasks go on, and exits with 0',
    async () => {
      await using stage = await startHeldStage({ SHUTDOWN_GRACE_SECONDS: '60' })
      const first = await stage.start()
      await stage.open('goes-on', 'before')
      await stage.submit(first, 'goes-on', 'r-story.sh')
      await stage.made('goes-on', 'said-before')
      const follower = await follow(first, 'goes-on')
      await holdAttempt(stage, first)

      const ended = first.kill('SIGTERM')
      await expectDraining(first)
      expect((await get(first, '/health/live')).status).toBe(200)
      expect((await get(first, '/tasks/told')).body.status).toBe('succeeded')
      const refused = await post(first, '/task-runner', stage.request('late', 'r-story.sh'))
      expect(refused).toMatchObject({ status: 503, body: { success: false } })
      expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(0)
      // What was accepted before is still known: a client that asks again is not sent away.
      const again = await post(first, '/task-runner', stage.request('told', 'r-story.sh'))
      expect(again).toMatchObject({ status: 200, body: { success: true } })

      stage.held[0]?.end('{}')
      expect(await ended).toBe(0)
      expect(await follower.ended).toContain('data: before\n')
      expect(processesOf(stage.dataDir), 'the running task goes on').not.toEqual([])

      const second = await stage.start()
      const { body } = await get(second, '/tasks/told/callback')
      expect(body).toMatchObject({ status: 'delivered', attempts: [{ status_code: 200 }] })
      expect((await get(second, '/tasks/late')).status).toBe(404)
      await stage.open('goes-on', 'during', 'after')
      expect(await finalTask(second, 'goes-on')).toMatchObject({ status: 'succeeded' })
      expect((await stage.callbackOf('goes-on')).body.logs).toBe('before\nduring\nafter\n')
      expect(stage.receiver.received.length, 'each was delivered once').toBe(2)
      await expectNoWorkers(second, stage.dataDir)
    },
    TIMEOUT_MS,
  )

  test(
    'exits after the grace though a receiver does not answer, and delivers again after the restart under the same webhook-id',
    async () => {
      await using stage = await startHeldStage({ SHUTDOWN_GRACE_SECONDS: '2' })
      const first = await stage.start()
      await holdAttempt(stage, first)
      const startedAt = performance.now()
      expect(await first.kill('SIGTERM')).toBe(0)
      const tookMs = performance.now() - startedAt
      // Attempts get nine tenths of it.
      expect(tookMs).toBeGreaterThan(1_750)
      expect(tookMs).toBeLessThan(10_000)

      const second = await stage.start()
      await eventually(async () =>
        expect((await get(second, '/tasks/told')).body.callback_status).toBe('delivered'),
      )
      const { received } = stage.receiver
      expect(received.length).toBe(2)
      expect(received[0]?.headers['webhook-id']).toMatch(/^msg_/)
      expect(received[1]?.headers['webhook-id']).toBe(received[0]?.headers['webhook-id'])
      expect(received[1]?.body).toEqual(received[0]?.body)
    },
    TIMEOUT_MS,
  )

  test(
    'ends at once when told a second time, and loses nothing by it',
    async () => {
      await using stage = await startHeldStage({ SHUTDOWN_GRACE_SECONDS: '600' })
      const first = await stage.start()
      await holdAttempt(stage, first)
      void first.kill('SIGTERM')
      await expectDraining(first)
      const startedAt = performance.now()
      expect(await first.kill('SIGTERM')).toBe(1)
      expect(performance.now() - startedAt).toBeLessThan(5_000)

      const second = await stage.start()
      await eventually(async () =>
        expect((await get(second, '/tasks/told')).body.callback_status).toBe('delivered'),
      )
      const ids = stage.receiver.received.map(({ headers }) => headers['webhook-id'])
      expect(ids).toEqual([ids[0], ids[0]])
    },
    TIMEOUT_MS,
  )

  test(
    'is not held up by a follower that reads nothing',
    async () => {
      await using stage = await startStage({ env: { SHUTDOWN_GRACE_SECONDS: '1' } })
      const service = await stage.start()
      await stage.submit(service, 'noise', 'r-noise.sh')
      await stage.made('noise', 'started')
      const socket = connect(Number(new URL(service.url).port), '127.0.0.1')
      try {
        socket.write('GET /tasks/noise/logs?follow=true HTTP/1.1\r\nhost: localhost\r\n\r\n')
        await once(socket, 'readable')
        // Nobody reads on: 4 MB do not fit into the buffers between us.
        expect(await exitAfter(service, 'SIGTERM')).toBe(0)
      } finally {
        socket.destroy()
      }
    },
    TIMEOUT_MS,
  )

  test(
    'is not held up by a client that never finishes its request',
    async () => {
      await using stage = await startStage({ env: { SHUTDOWN_GRACE_SECONDS: '1' } })
      const service = await stage.start()
      const socket = connect(Number(new URL(service.url).port), '127.0.0.1')
      socket.on('error', () => {})
      try {
        socket.write(
          'POST /task-runner HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{',
        )
        // Its beginning has arrived once a later request is answered.
        expect((await get(service, '/health/live')).status).toBe(200)
        expect(await exitAfter(service, 'SIGTERM')).toBe(0)
      } finally {
        socket.destroy()
      }
    },
    TIMEOUT_MS,
  )
})

/** Environments with a platform that accepts connections and never answers. */
const PLATFORMS = {
  docker: async (folder: string) => {
    const path = join(folder, 'silent.sock')
    const server = await startRawServer(() => {}, { path })
    return { server, env: { WORKER_BACKEND: 'docker', DOCKER_HOST: `unix://${path}` } }
  },
  kubernetes: async (folder: string) => {
    const server = await startRawServer()
    const path = join(folder, 'kubeconfig')
    const access = { token: 'a-token', namespace: 'default', ca: undefined }
    await writeFile(path, kubeconfigOf(`https://127.0.0.1:${server.port}`, access))
    return { server, env: { WORKER_BACKEND: 'kubernetes', KUBECONFIG: path } }
  },
}

test.each(['docker', 'kubernetes'] as const)(
  'SIGTERM ends the service in time though its %s never answers',
  async (platform) => {
    await using stage = await startStage({ env: { SHUTDOWN_GRACE_SECONDS: '1' } })
    const { server, env } = await PLATFORMS[platform](dirname(stage.dataDir))
    await using silent = server
    const service = await stage.start(env)
    await stage.submit(service, 'waits', 'r-story.sh')
    // A sweep, a request and a task are in the middle of their calls.
    const listing = fetch(`${service.url}/workers`).catch(() => undefined)
    await eventually(() => expect(silent.connections.length).toBeGreaterThan(0))
    expect(await exitAfter(service, 'SIGTERM', 8_000)).toBe(0)
    await listing

    const again = await stage.start({ WORKER_BACKEND: 'local' })
    expect((await get(again, '/tasks/waits')).body).toMatchObject({ finished_at: null })
  },
  TIMEOUT_MS,
)

test(
  'SIGTERM to `npm start` ends the service, and its port is free; SIGUSR1 opens no debugger',
  async () => {
    await using stage = await startStage()
    const service = await npmStart({ DATA_DIR: stage.dataDir })
    const npm = Number(service.process.pid)
    try {
      const line = service.log.find((each) => each.includes('"msg":"listening"'))
      const { pid } = JSON.parse(line ?? '{}')
      // Node would open its debugger to every user of the machine.
      process.kill(pid, 'SIGUSR1')
      expect((await get(service, '/health/live')).status).toBe(200)
      expect(service.log.join('\n')).not.toContain('Debugger')
      expect(await exitAfter(service, 'SIGTERM')).toBe(0)
      expect(isAlive(pid)).toBe(false)
      const socket = connect(Number(new URL(service.url).port), '127.0.0.1')
      const [err] = await once(socket, 'error')
      expect(err).toMatchObject({ code: 'ECONNREFUSED' })
    } finally {
      killIfThere(-npm)
    }
  },
  TIMEOUT_MS,
)

test('a service whose port is taken ends before it takes up any task', async () => {
  await using taken = await startRawServer()
  const calls: string[] = []
  const wrapPorts = (ports: Ports): Ports => ({
    ...ports,
    tasks: new Proxy(ports.tasks, {
      get(tasks, name) {
        const method = Reflect.get(tasks, name, tasks)
        if (typeof method !== 'function') return method
        return (...args: unknown[]) => {
          calls.push(String(name))
          return method.apply(tasks, args)
        }
      },
    }),
  })
  const listen = { host: '127.0.0.1', port: taken.port }
  await expect(startApp({}, { wrapPorts, listen })).rejects.toThrow('EADDRINUSE')
  expect(calls).toEqual([])

  await using app = await startApp({}, { wrapPorts, listen: { ...listen, port: 0 } })
  expect(calls).not.toEqual([])
  expect((await fetch(`${app.app.address}/health/live`)).status).toBe(200)
})

test('the grace bounds an attempt as well whose outcome was being committed when the stop came', async () => {
  const committing = Promise.withResolvers<void>()
  const mayCommit = Promise.withResolvers<void>()
  await using app = await startApp(
    { SHUTDOWN_GRACE_SECONDS: '0.5' },
    {
      wrapPorts: (ports) => ({
        ...ports,
        tasks: new Proxy(ports.tasks, {
          get(tasks, name) {
            const method = Reflect.get(tasks, name, tasks)
            if (name !== 'finish') return method.bind(tasks)
            return async (...args: unknown[]) => {
              committing.resolve()
              await mayCommit.promise
              return method.apply(tasks, args)
            }
          },
        }),
        sender: {
          // A receiver that never answers, given up only when the service says so.
          send: (_, signal) =>
            new Promise<AttemptResult>((resolve) => {
              const end = () => resolve({ statusCode: null, error: 'ended', retryAfterMs: null })
              if (signal.aborted) end()
              signal.addEventListener('abort', end)
            }),
          close: async () => {},
        },
      }),
    },
  )
  await app.submit(taskRequest({ callback_url: 'http://127.0.0.1:9/callback' }))
  await committing.promise
  const stopped = app.app.stop().then(() => 'stopped')
  mayCommit.resolve()
  const late = new Promise((resolve) => setTimeout(resolve, 8_000, 'still waiting').unref())
  expect(await Promise.race([stopped, late])).toBe('stopped')
})
