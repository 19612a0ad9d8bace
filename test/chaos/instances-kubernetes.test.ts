import type { ServerResponse } from 'node:http'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { workerNameFor } from '../../src/core/task.ts'
import {
  attemptsFor,
  expectCounted,
  runnerOf,
  startKubernetesInstances,
  takenFrom,
  taskOf,
} from '../helpers/instances.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import { eventually, exitAfter, finalTask, get, logOf, post } from '../helpers/recovery.ts'
import type { Service } from '../helpers/service.ts'

const SLOW_MS = 180_000
const TAKEN_OVER_MS = 30_000
/** Sooner than whoever has just started may call anybody dead. */
const HANDED_OVER_MS = 10_000

let postgres: Postgres

beforeAll(async () => {
  postgres = await startPostgres()
}, 60_000)
afterAll(() => postgres[Symbol.asyncDispose]())

const bodyOf = (service: Service, path: string) => get(service, path).then(({ body }) => body)

describe.concurrent('an instance that was paused, and goes on when others have taken over', () => {
  test(
    'writes nothing, calls nobody, ends no worker, and is of use again',
    async () => {
      await using instances = await startKubernetesInstances(postgres)
      const { stage, fake } = instances
      const first = await instances.start('a')
      for (const taskId of ['ends', 'goes-on']) await stage.submit(first, taskId, 'r-count.sh')
      const owner = await runnerOf(first, 'ends')
      await runnerOf(first, 'goes-on')
      // It has room for none beyond what it takes over.
      const second = await instances.start('b', { MAX_CONCURRENT_TASKS: '1' })
      first.process.kill('SIGSTOP')
      for (const taskId of ['ends', 'goes-on']) await takenFrom(owner, second, taskId)
      await stage.open('ends', 'open')
      await expectCounted(second, stage, 'ends')
      const paths = ['/tasks/ends', '/tasks/ends/callback', '/tasks/goes-on']
      const read = () => Promise.all(paths.map((path) => bodyOf(second, path)))
      await eventually(async () => expect((await read())[1]?.status).toBe('delivered'))
      const before = await read()

      first.process.kill('SIGCONT')
      await instances.beats(owner)
      await stage.submit(first, 'new', 'r-count.sh')
      expect(await runnerOf(second, 'new')).toBe(owner)
      expect(await read()).toEqual(before)
      expect(attemptsFor(stage, 'ends')).toBe(1)
      const worker = workerNameFor('goes-on')
      const ended = fake.requests.filter(({ method, path }) => {
        return method === 'DELETE' && path.endsWith(worker)
      })
      expect(ended).toEqual([])
      expect(first.log.filter((line) => line.includes('"msg":"task finished"'))).toEqual([])
      for (const taskId of ['goes-on', 'new']) {
        await stage.open(taskId, 'open')
        await expectCounted(first, stage, taskId)
      }
      expect(instances.jobsMade()).toBe(3)
      await instances.expectNothingLeft()
    },
    SLOW_MS,
  )

  test(
    'amid the making of workers: each task runs once, and nothing is left',
    async () => {
      await using instances = await startKubernetesInstances(postgres)
      const { stage, fake } = instances
      const moments = {
        'before-job': { path: /\/configmaps$/, answerAfterMs: 2_000 },
        'after-job': {
          ...{ path: /\/jobs$/, answerAfterMs: 2_000 },
          query: (query: URLSearchParams) => !query.has('dryRun'),
        },
        'before-secret': { path: /\/secrets$/, blackhole: true },
        'after-secret': { path: /\/secrets$/, answerAfterMs: 2_000 },
      }
      const ids = Object.keys(moments)
      const paused = await Promise.all(ids.map((taskId) => instances.start(taskId)))
      for (const service of paused) service.process.kill('SIGSTOP')
      for (const [index, [taskId, fault]] of Object.entries(moments).entries()) {
        const injected = fake.faults.inject({ ...fault, method: 'POST', times: 1 })
        const service = paused[index] as Service
        service.process.kill('SIGCONT')
        await stage.submit(service, taskId, 'r-count.sh')
        await eventually(() => expect(injected.hits).toBe(1))
        service.process.kill('SIGSTOP')
      }
      const last = await instances.start('b')
      const owners = new Map<string, string>()
      for (const taskId of ids) {
        const { status, instance } = await taskOf(last, taskId)
        expect(status).toBe('provisioning')
        owners.set(taskId, String(instance))
      }
      expect(new Set(owners.values()).size).toBe(ids.length)
      for (const [taskId, owner] of owners) await takenFrom(owner, last, taskId)
      for (const taskId of ids) await stage.open(taskId, 'open')
      for (const taskId of ids) await expectCounted(last, stage, taskId)
      await instances.expectNothingLeft()
      const read = () => Promise.all(ids.map((taskId) => bodyOf(last, `/tasks/${taskId}`)))
      const before = await read()

      for (const service of paused) service.process.kill('SIGCONT')
      await Promise.all([...owners.values()].map((owner) => instances.beats(owner)))
      for (const service of paused) {
        await eventually(() =>
          expect(service.log.some((line) => line.includes('taken over by another'))).toBe(true),
        )
      }
      await instances.expectNothingLeft()
      for (const taskId of ids) {
        await expectCounted(last, stage, taskId)
        expect(attemptsFor(stage, taskId)).toBe(1)
      }
      expect(await read()).toEqual(before)
    },
    SLOW_MS,
  )
})

describe.concurrent('an instance that is killed', () => {
  test(
    'leaves its tasks to others, which see each through once, with its whole log',
    async () => {
      await using instances = await startKubernetesInstances(postgres)
      const { stage } = instances
      const first = await instances.start('a')
      const codes = new Map([0, 1, 42, 0, 7, 255].map((code, index) => [`killed-${index}`, code]))
      for (const [taskId, code] of codes) {
        await stage.submit(first, taskId, 'r-count.sh', { env: { CODE: String(code) } })
      }
      const owner = await runnerOf(first, 'killed-0')
      for (const taskId of codes.keys()) await runnerOf(first, taskId)
      const others = await Promise.all([instances.start('b'), instances.start('c')])
      await exitAfter(first, 'SIGKILL')
      const killedAt = performance.now()
      for (const taskId of codes.keys()) await takenFrom(owner, others[0], taskId)
      expect(performance.now() - killedAt).toBeLessThan(TAKEN_OVER_MS)
      for (const taskId of codes.keys()) await stage.open(taskId, 'open')
      for (const [taskId, code] of codes) await expectCounted(others[1], stage, taskId, code)
      expect(instances.jobsMade()).toBe(codes.size)
      await instances.expectNothingLeft()
    },
    SLOW_MS,
  )

  test(
    'or paused amid a callback attempt: another makes one, once the lease is over, and it counts alone',
    async () => {
      const heldOf = new Map<string, ServerResponse>()
      await using instances = await startKubernetesInstances(postgres, {
        env: { CALLBACK_TIMEOUT_SECONDS: '3' },
        // The first attempt for each.
        answer: ({ body }, response) => {
          if (heldOf.has(body.task_id)) response.end()
          else heldOf.set(body.task_id, response)
        },
      })
      const { stage } = instances
      const begin = async (taskId: string) => {
        const service = await instances.start(taskId)
        await stage.open(taskId, 'before', 'during', 'after')
        await stage.submit(service, taskId, 'r-story.sh')
        await eventually(() => expect([...heldOf.keys()]).toContain(taskId))
        return service
      }
      const killed = await begin('killed')
      await exitAfter(killed, 'SIGKILL')
      const paused = await begin('paused')
      paused.process.kill('SIGSTOP')
      const last = await instances.start('b')
      for (const taskId of ['killed', 'paused']) {
        await eventually(async () => {
          const { body } = await get(last, `/tasks/${taskId}/callback`)
          expect(body).toMatchObject({ status: 'delivered', attempts: [{ status_code: 200 }] })
        })
        expect(attemptsFor(stage, taskId)).toBe(2)
      }
      const delivered = await bodyOf(last, '/tasks/paused/callback')
      const { instance } = await taskOf(last, 'paused')
      heldOf.get('paused')?.writeHead(500).end()
      paused.process.kill('SIGCONT')
      await instances.beats(String(instance))
      expect(await bodyOf(paused, '/tasks/paused/callback')).toEqual(delivered)
      expect(attemptsFor(stage, 'paused')).toBe(2)
    },
    SLOW_MS,
  )
})

test.concurrent(
  'an instance that is told to stop hands over its tasks at once, though it still waits for a receiver; what it takes in is run',
  async () => {
    const held: ServerResponse[] = []
    await using instances = await startKubernetesInstances(postgres, {
      env: { CALLBACK_TIMEOUT_SECONDS: '60', SHUTDOWN_GRACE_SECONDS: '60' },
      answer: (_, response, count) => void (count === 1 ? held.push(response) : response.end()),
    })
    const { stage } = instances
    const first = await instances.start('a')
    await stage.open('told', 'before', 'during', 'after')
    await stage.submit(first, 'told', 'r-story.sh')
    await eventually(() => expect(held).toHaveLength(1))
    const ids = ['left-1', 'left-2']
    for (const taskId of ids) await stage.submit(first, taskId, 'r-count.sh')
    const owner = await runnerOf(first, 'left-1')
    await runnerOf(first, 'left-2')
    const second = await instances.start('b')
    const stopped = exitAfter(first, 'SIGTERM')
    for (const taskId of ids) await takenFrom(owner, second, taskId, HANDED_OVER_MS)
    await stage.submit(first, 'late', 'r-count.sh')
    expect(await runnerOf(second, 'late')).not.toBe(owner)
    held[0]?.end()
    expect(await stopped).toBe(0)
    for (const taskId of [...ids, 'late']) {
      await stage.open(taskId, 'open')
      await expectCounted(second, stage, taskId)
    }
    expect(attemptsFor(stage, 'told')).toBe(1)
    expect(instances.jobsMade()).toBe(4)
    await instances.expectNothingLeft()
  },
  SLOW_MS,
)

test.concurrent(
  'whatever instance is asked, a task is seen, read, followed, cancelled and called back for again; its id is known to all',
  async () => {
    await using instances = await startKubernetesInstances(postgres)
    const { stage } = instances
    const first = await instances.start('a')
    for (const taskId of ['counts', 'ended']) {
      await stage.submit(first, taskId, 'r-count.sh')
      await runnerOf(first, taskId)
    }
    const second = await instances.start('b')
    const both = [first, second]

    expect(await bodyOf(second, '/tasks/counts')).toEqual(await bodyOf(first, '/tasks/counts'))
    await eventually(async () => expect(await logOf(second, 'counts')).toMatch(/^line 1\nline 2\n/))
    expect((await bodyOf(second, '/workers')).workers).toHaveLength(2)
    for (const each of both) {
      const again = await post(each, '/task-runner', stage.request('counts', 'r-count.sh'))
      expect(again).toMatchObject({ status: 200, body: { message: 'Already accepted: running' } })
      const different = stage.request('counts', 'r-count.sh', { timeout_seconds: 7 })
      expect(await post(each, '/task-runner', different)).toMatchObject({ status: 409 })
    }

    expect((await post(second, '/tasks/ended/cancel')).status).toBe(200)
    for (const each of both) {
      expect(await finalTask(each, 'ended')).toMatchObject({ status: 'cancelled' })
    }

    const follower = newFollower('counts')
    for (let turn = 0; turn < 5; turn += 1) {
      await follower.read(turn % 2 === 0 ? first : second, (events) => events > 3)
    }
    await stage.open('counts', 'open')
    await follower.read(second, (_, isOver) => isOver)
    await expectCounted(second, stage, 'counts')
    expect(follower.text).toBe(await logOf(first, 'counts'))

    for (const [index, each] of both.entries()) {
      await eventually(async () => {
        expect((await bodyOf(each, '/tasks/counts/callback')).status).toBe('delivered')
      })
      expect((await post(each, '/tasks/counts/callback/redeliver')).status).toBe(200)
      await eventually(() => expect(attemptsFor(stage, 'counts')).toBe(index + 2))
    }
    await instances.expectNothingLeft()
  },
  SLOW_MS,
)

/** Follows a task's log, and goes on where it was: at another instance, too. */
function newFollower(taskId: string) {
  let lastId: string | undefined
  const follower = {
    text: '',
    /** Reads until there are enough events, or the one that says it is over. */
    async read(service: Service, enough: (events: number, isOver: boolean) => boolean) {
      const gone = new AbortController()
      const answer = await fetch(`${service.url}/tasks/${taskId}/logs?follow=true`, {
        headers: lastId === undefined ? {} : { 'last-event-id': lastId },
        signal: gone.signal,
      })
      expect(answer.status).toBe(200)
      let read = ''
      const stream = answer.body?.pipeThrough(new TextDecoderStream()) ?? new ReadableStream()
      for await (const piece of stream) {
        read += piece
        if (enough(read.split('\n\n').length - 1, read.includes('event: end\n'))) break
      }
      gone.abort()
      // The last one may have been cut in its middle.
      for (const event of read.split('\n\n').slice(0, -1)) {
        const [head = '', ...data] = event.split('\n')
        if (!head.startsWith('id: ')) continue
        lastId = head.slice('id: '.length)
        follower.text += data.map((line) => line.slice('data: '.length)).join('\n')
      }
    },
  }
  return follower
}
