import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { afterAttempt, CallbackDispatcher } from '../../src/core/callbacks.ts'
import type {
  AttemptResult,
  CallbackFacts,
  CallbackSender,
  DeliveryStore,
  Logger,
  NewDelivery,
} from '../../src/core/ports.ts'
import { Sealer } from '../../src/secrets/sealing.ts'
import type { Connection } from '../../src/store/connection.ts'
import { SqlDeliveryStore } from '../../src/store/delivery-store.ts'
import { openSqlite } from '../../src/store/sqlite.ts'
import { SqlTaskStore } from '../../src/store/task-store.ts'
import { storedLog } from '../helpers/stored-log.ts'

const SILENT: Logger = { debug() {}, info() {}, warn() {}, error() {} }
const OK: AttemptResult = { statusCode: 200, error: null, retryAfterMs: null }
const REFUSED: AttemptResult = { statusCode: 500, error: 'answered 500', retryAfterMs: null }
const UNREACHED: AttemptResult = { statusCode: null, error: 'no connection', retryAfterMs: null }
const DAY_MS = 86_400_000

describe('afterAttempt', () => {
  const schedule = { delaysMs: [5_000, 60_000], random: () => 0.5 }
  const first = {
    ...{ attempt: 1, manual: false, resumeAt: null as number | null, deliveredBefore: false },
    ...{ isCut: false, now: 1_000, schedule },
  }
  const delivered = { status: 'delivered', nextAttemptAt: null }
  const givenUp = { status: 'given_up', nextAttemptAt: null }
  const pendingAt = (nextAttemptAt: number) => ({ status: 'pending', nextAttemptAt })
  const status = (statusCode: number, more: Partial<AttemptResult> = {}): AttemptResult => ({
    ...{ statusCode, error: null, retryAfterMs: null },
    ...more,
  })

  test.each<[string, AttemptResult, Partial<typeof first>, object]>([
    ['200 delivers', status(200), {}, delivered],
    ['204 delivers', status(204), {}, delivered],
    ['299 delivers', status(299), {}, delivered],
    ['199 is tried again', status(199), {}, pendingAt(6_000)],
    ['a redirect is tried again', status(302), {}, pendingAt(6_000)],
    ['400 is tried again', status(400), {}, pendingAt(6_000)],
    ['404 is tried again', status(404), {}, pendingAt(6_000)],
    ['500 is tried again', status(500), {}, pendingAt(6_000)],
    ['no answer is tried again', UNREACHED, {}, pendingAt(6_000)],
    ['410 ends it', status(410), {}, givenUp],
    ['a blocked address ends it', { ...UNREACHED, blocked: true }, {}, givenUp],
    ['the second failure waits longer', status(500), { attempt: 2 }, pendingAt(61_000)],
    ['the failure after the last delay ends it', status(500), { attempt: 3 }, givenUp],
    ['a success after the last delay delivers', status(200), { attempt: 9 }, delivered],
    [
      'a receiver may ask for more time',
      status(429, { retryAfterMs: 9_000 }),
      {},
      pendingAt(10_000),
    ],
    ['but not for less', status(503, { retryAfterMs: 1 }), {}, pendingAt(6_000)],
    ['nor for ever', status(503, { retryAfterMs: 9e15 }), {}, pendingAt(1_000 + DAY_MS)],
    ['Retry-After does not reopen 410', status(410, { retryAfterMs: 1 }), {}, givenUp],
    [
      'a failure asked for by hand after the schedule ends it',
      status(500),
      { manual: true },
      givenUp,
    ],
    [
      'a failure asked for by hand leaves the schedule as it was',
      status(503, { retryAfterMs: 9e6 }),
      { manual: true, resumeAt: 77_000, attempt: 3 },
      pendingAt(77_000),
    ],
    ['410 ends it, also by hand', status(410), { manual: true, resumeAt: 77_000 }, givenUp],
    ['413 is followed at once', status(413, { retryAfterMs: 9 }), {}, pendingAt(1_000)],
    ['also at the end of the schedule', status(413), { attempt: 3 }, pendingAt(1_000)],
    ['413 of what was cut is tried again', status(413), { isCut: true }, pendingAt(6_000)],
    ['a success asked for by hand delivers', status(200), { manual: true }, delivered],
    [
      'what was delivered once stays so, whatever a repetition gave',
      status(410),
      { manual: true, deliveredBefore: true },
      delivered,
    ],
  ])('%s', (_, result, options, expected) => {
    expect(afterAttempt(result, { ...first, ...options })).toEqual(expected)
  })
})

type SendRequest = Parameters<CallbackSender['send']>[0]

/** Attempts wait until the test ends them, unless `answer` is set. */
class FakeSender implements CallbackSender {
  readonly sent: Array<SendRequest & { end: (result: AttemptResult) => void }> = []
  answer: ((request: SendRequest) => AttemptResult) | undefined

  send(request: SendRequest, signal: AbortSignal): Promise<AttemptResult> {
    const { promise, resolve } = Promise.withResolvers<AttemptResult>()
    this.sent.push({ ...request, end: resolve })
    if (this.answer) resolve(this.answer(request))
    signal.addEventListener('abort', () => resolve(UNREACHED))
    return promise
  }

  async close(): Promise<void> {}

  to(url: string) {
    return this.sent.filter((request) => request.url === url)
  }
}

describe('CallbackDispatcher', () => {
  const A = 'https://a.example/hook'
  const B = 'https://b.example/hook'
  const ATTEMPT_MS = 1_000
  const LEASE_MS = 2 * ATTEMPT_MS + 10_000

  let folder: string
  let connection: Connection
  let tasks: SqlTaskStore
  let store: SqlDeliveryStore
  let sender: FakeSender
  let movedMs: number
  const opened: CallbackDispatcher[] = []

  /** Goes on by itself, as a clock does, and can be moved by hand. */
  const now = () => 1_700_000_000_000 + Math.floor(performance.now()) + movedMs

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'callbacks-'))
    connection = await openSqlite(join(folder, 'test.db'))
    tasks = new SqlTaskStore(connection, new Sealer(Buffer.alloc(32)), { instance: 'here' })
    store = new SqlDeliveryStore(connection, tasks)
  })
  beforeEach(async () => {
    movedMs = 0
    sender = new FakeSender()
    for (const table of ['delivery_attempts', 'deliveries', 'task_logs', 'tasks'] as const) {
      await connection.db.deleteFrom(table).execute()
    }
  })
  afterEach(async () => {
    for (const dispatcher of opened.splice(0)) await dispatcher.close(0)
  })
  afterAll(async () => {
    await connection.close()
    await rm(folder, { recursive: true, force: true })
  })

  function open(overrides: Partial<DeliveryStore> = {}, delaysMs = [60_000]): CallbackDispatcher {
    const real = store
    const dispatcher = new CallbackDispatcher({
      // Methods of the store, each replaceable by the test.
      store: new Proxy<DeliveryStore>(real, {
        get(target, name) {
          const method =
            overrides[name as keyof DeliveryStore] ?? target[name as keyof DeliveryStore]
          return method.bind(target)
        },
      }),
      sender,
      schedule: { delaysMs, random: () => 0.5 },
      attemptTimeoutMs: ATTEMPT_MS,
      now,
      log: SILENT,
    })
    opened.push(dispatcher)
    return dispatcher
  }

  let ids = 0

  /** A task committed with its delivery, due now unless it is leased. */
  async function commit(
    url: string,
    delivery?: NewDelivery,
    content = Buffer.from('a log'),
  ): Promise<string> {
    ids += 1
    const taskId = `task ${ids}`
    await tasks.insert({
      ...{ taskId, taskFileName: 'a.sh', workerConfig: {}, callbackUrl: url },
      ...{ callbackUrlToken: 'a token', terminateOnCompletion: true, timeoutSeconds: 1 },
      ...{ digest: '', workerName: `worker-${ids}`, createdAt: 1, priority: 0, traceparent: null },
    })
    const task = await tasks.claim(taskId, 0)
    if (!task) throw new Error('not claimed')
    const { origin } = new URL(url)
    await tasks.finish(task, {
      outcome: {
        ...{ status: 'succeeded', reason: 'completed', message: null, exitCode: 0, signal: null },
      },
      log: { content, totalBytes: content.length },
      logBytes: content.length,
      delivery: delivery ?? { webhookId: `msg_${ids}`, origin, leaseUntil: null },
      finishedAt: now(),
      keepWorker: false,
    })
    return taskId
  }

  const contentOf = (taskId: string, url: string) => ({
    url,
    token: 'a token',
    traceparent: null,
    facts: {
      status: 'succeeded',
      reason: 'completed',
      exitCode: 0,
      durationMs: null,
    } as CallbackFacts,
    isCut: false,
    payload: {
      ...{ taskName: 'a.sh', taskId, success: true },
      logs: storedLog(Buffer.from('a log')),
    },
  })

  const sentCount = (count: number) =>
    expect.poll(() => sender.sent.length, { timeout: 10_000, interval: 5 }).toBe(count)
  const statusOf = (taskId: string, status: string) =>
    expect
      .poll(async () => (await store.state(taskId))?.status, { timeout: 10_000, interval: 5 })
      .toBe(status)
  const attemptsOf = async (taskId: string) => (await store.state(taskId))?.attempts.length ?? 0
  const recorded = (taskId: string, count: number) =>
    expect.poll(() => attemptsOf(taskId), { timeout: 10_000, interval: 5 }).toBe(count)

  test('what is due when it starts is sent as it is stored', async () => {
    sender.answer = () => OK
    const taskId = await commit(A)
    open().start()
    await statusOf(taskId, 'delivered')
    const { payload, isCut: _, ...rest } = contentOf(taskId, A)
    const { logs, ...facts } = payload
    expect(sender.sent).toMatchObject([
      { ...rest, payload: facts, webhookId: `msg_${ids}`, timestamp: expect.any(Number) },
    ])
    expect(await sender.sent[0]?.payload.logs.read()).toEqual(await logs.read())
    expect(Math.abs((sender.sent[0]?.timestamp ?? 0) - now() / 1000)).toBeLessThan(60)
  })

  test('a delivery whose address nobody can read any more is given up, and says so', async () => {
    const [damaged, sound] = [await commit(A), await commit(B)]
    await connection.db
      .updateTable('tasks')
      .set({ sealed: Buffer.from('damaged') })
      .where('task_id', '=', damaged)
      .execute()
    sender.answer = () => OK
    open().start()
    await statusOf(sound, 'delivered')
    await statusOf(damaged, 'given_up')
    expect((await store.state(damaged))?.attempts).toMatchObject([
      { number: 1, statusCode: null, error: expect.stringContaining('are damaged') },
    ])
  })

  test('the first attempt of a delivery just committed is made at once, and only once', async () => {
    const dispatcher = open()
    dispatcher.start()
    const delivery = dispatcher.prepare(A)
    expect(delivery).toEqual({
      webhookId: expect.stringMatching(/^msg_[0-9a-f]{32}$/),
      origin: 'https://a.example',
      leaseUntil: expect.any(Number),
    })
    const taskId = await commit(A, delivery)
    const attempt = dispatcher.attemptNow(taskId, delivery, contentOf(taskId, A))
    dispatcher.wake()
    await sentCount(1)
    sender.sent[0]?.end(OK)
    await attempt
    expect(await store.state(taskId)).toMatchObject({
      status: 'delivered',
      attempts: [{ number: 1 }],
    })
    expect(sender.sent).toHaveLength(1)
  })

  test('a delivery whose commit took longer than its lease is sent all the same, at once', async () => {
    sender.answer = () => OK
    const dispatcher = open()
    dispatcher.start()
    const delivery = dispatcher.prepare(A)
    movedMs += LEASE_MS
    const taskId = await commit(A, delivery)
    await dispatcher.attemptNow(taskId, delivery, contentOf(taskId, A))
    await statusOf(taskId, 'delivered')
    expect(sender.sent).toHaveLength(1)
  })

  test('a failed attempt is made again when its time has come, under the same id, and not before', async () => {
    sender.answer = () => REFUSED
    const dispatcher = open()
    const taskId = await commit(A)
    dispatcher.start()
    await recorded(taskId, 1)
    movedMs += 50_000
    dispatcher.wake()
    // Taken later than the look that `wake` began: shows that this look has found nothing.
    const marker = await commit(B)
    dispatcher.wake()
    await recorded(marker, 1)
    expect(await attemptsOf(taskId)).toBe(1)
    sender.answer = () => OK
    movedMs += 20_000
    dispatcher.wake()
    await statusOf(taskId, 'delivered')
    const [first, second] = sender.to(A)
    expect(second?.webhookId).toBe(first?.webhookId)
    expect(second?.timestamp).toBeGreaterThan(first?.timestamp ?? Number.POSITIVE_INFINITY)
  })

  test('short delays need no waking: all attempts are made, then it is given up', async () => {
    sender.answer = () => REFUSED
    const taskId = await commit(A)
    open({}, [20, 20, 20]).start()
    await statusOf(taskId, 'given_up')
    expect(await attemptsOf(taskId)).toBe(4)
    expect(sender.sent).toHaveLength(4)
  })

  /** Lets the receiver answer once. */
  async function haveAnswered(dispatcher: CallbackDispatcher, url: string): Promise<void> {
    sender.answer = () => OK
    const taskId = await commit(url)
    dispatcher.wake()
    await statusOf(taskId, 'delivered')
    sender.answer = undefined
    sender.sent.length = 0
  }

  test('one origin has at most 16 attempts under way, and delays no other', async () => {
    const dispatcher = open()
    await haveAnswered(dispatcher, A)
    const toA = await Promise.all(Array.from({ length: 20 }, () => commit(A)))
    const toB = await commit(B)
    dispatcher.wake()
    await expect.poll(() => sender.to(B).length, { timeout: 10_000 }).toBe(1)
    expect(sender.to(A)).toHaveLength(16)
    sender.to(B)[0]?.end(OK)
    await statusOf(toB, 'delivered')
    expect(sender.to(A)).toHaveLength(16)
    sender.answer = () => OK
    for (const request of sender.to(A)) request.end(OK)
    for (const taskId of toA) await statusOf(taskId, 'delivered')
    expect(sender.to(A)).toHaveLength(20)
  })

  test('one origin has one attempt under way until it has answered', async () => {
    const toA = await Promise.all(Array.from({ length: 5 }, () => commit(A)))
    const toB = await commit(B)
    const dispatcher = open()
    dispatcher.start()
    await expect.poll(() => sender.to(B).length, { timeout: 10_000 }).toBe(1)
    expect(sender.to(A)).toHaveLength(1)
    expect(dispatcher.prepare(A).leaseUntil).toBeNull()
    sender.to(B)[0]?.end(OK)
    await statusOf(toB, 'delivered')
    expect(sender.to(A)).toHaveLength(1)
    // Any answer counts.
    sender.to(A)[0]?.end(REFUSED)
    await expect.poll(() => sender.to(A).length, { timeout: 10_000 }).toBe(5)
    for (const request of sender.to(A)) request.end(OK)
    for (const taskId of toA.slice(1)) await statusOf(taskId, 'delivered')
  })

  test('a hundred origins that hang, with 16 deliveries each, do not delay one that was never called', async () => {
    const hung = Array.from({ length: 100 }, (_, index) => `https://hung-${index}.example/hook`)
    await Promise.all(hung.flatMap((url) => Array.from({ length: 16 }, () => commit(url))))
    const dispatcher = open()
    dispatcher.start()
    await sentCount(100)
    const first = dispatcher.prepare(A)
    const startedAt = performance.now()
    const taskId = await commit(A, first)
    void dispatcher.attemptNow(taskId, first, contentOf(taskId, A))
    await commit(B)
    dispatcher.wake()
    await expect.poll(() => sender.to(A).length + sender.to(B).length).toBe(2)
    expect(performance.now() - startedAt).toBeLessThan(5 * 1_000)
    expect(sender.sent).toHaveLength(102)
  })

  test('however many origins hang, there are places for those that answered last', async () => {
    const dispatcher = open()
    await haveAnswered(dispatcher, A)
    const hung = Array.from({ length: 150 }, (_, index) => `https://hung-${index}.example/hook`)
    await Promise.all(hung.map((url) => commit(url)))
    dispatcher.wake()
    await sentCount(128)
    expect(dispatcher.prepare(B).leaseUntil).toBeNull()
    const toA = await Promise.all(Array.from({ length: 3 }, () => commit(A)))
    dispatcher.wake()
    await expect.poll(() => sender.to(A).length, { timeout: 10_000 }).toBe(3)
    for (const request of sender.to(A)) request.end(OK)
    for (const taskId of toA) await statusOf(taskId, 'delivered')
    // An attempt that ends makes room for one that waits.
    for (const request of sender.sent.slice(0, 10)) request.end(REFUSED)
    await sentCount(128 + 3 + 10)
  })

  test('origins that kept us waiting for nothing get fewer places than those that were never called', async () => {
    const dispatcher = open({}, [1])
    const hung = Array.from({ length: 100 }, (_, index) => `https://hung-${index}.example/hook`)
    await Promise.all(hung.map((url) => commit(url)))
    dispatcher.start()
    await sentCount(100)
    const startedAt = performance.now()
    await expect
      .poll(() => performance.now() - startedAt, { timeout: 5_000 })
      .toBeGreaterThan(1_100)
    for (const request of sender.sent.splice(0)) request.end(UNREACHED)
    movedMs += 1_000
    dispatcher.wake()
    await sentCount(64)
    for (let count = 0; count < 64; count += 1) {
      expect(dispatcher.prepare(`https://new-${count}.example/hook`).leaseUntil).not.toBeNull()
    }
    expect(dispatcher.prepare(hung[99] ?? '').leaseUntil).toBeNull()
    expect(sender.sent).toHaveLength(64)
  })

  test('a dead origin full of first attempts leaves room for another', async () => {
    const dispatcher = open()
    await haveAnswered(dispatcher, A)
    const toA = Array.from({ length: 17 }, () => dispatcher.prepare(A))
    expect(toA.filter(({ leaseUntil }) => leaseUntil !== null)).toHaveLength(16)
    expect(toA.at(-1)?.leaseUntil).toBeNull()
    expect(dispatcher.prepare(B).leaseUntil).not.toBeNull()
  })

  test('room that was taken for a commit that did not happen is given back', () => {
    const dispatcher = open()
    for (let count = 0; count < 100; count += 1) {
      const delivery = dispatcher.prepare(A)
      expect(delivery.leaseUntil).not.toBeNull()
      dispatcher.abandon(delivery)
    }
  })

  test('a delivery that found no room is sent soon, also when room comes before its commit', async () => {
    const dispatcher = open()
    await haveAnswered(dispatcher, A)
    const first = Array.from({ length: 16 }, () => dispatcher.prepare(A))
    const late = dispatcher.prepare(A)
    expect(late.leaseUntil).toBeNull()
    sender.answer = () => OK
    await Promise.all(
      first.map(async (delivery) => {
        const taskId = await commit(A, delivery)
        await dispatcher.attemptNow(taskId, delivery, contentOf(taskId, A))
      }),
    )
    // The look that the end of these attempts began is over: a later delivery has been through it.
    const marker = dispatcher.prepare(B)
    const markerId = await commit(B, marker)
    await dispatcher.attemptNow(markerId, marker, contentOf(markerId, B))
    await store.nextDueAt()
    const taskId = await commit(A, late)
    await dispatcher.attemptNow(taskId, late, contentOf(taskId, A))
    await expect
      .poll(async () => (await store.state(taskId))?.status, { timeout: 10_000, interval: 20 })
      .toBe('delivered')
  })

  test('a store that cannot be read is asked again', async () => {
    sender.answer = () => OK
    const taskId = await commit(A)
    let failures = 0
    open({
      takeDue: (options) => {
        failures += 1
        return failures === 1 ? Promise.reject(new Error('store down')) : store.takeDue(options)
      },
    }).start()
    await statusOf(taskId, 'delivered')
    expect(failures).toBeGreaterThan(1)
  })

  test('an attempt that could not be recorded is made again when its lease ends', async () => {
    sender.answer = () => OK
    const taskId = await commit(A)
    let failures = 0
    const dispatcher = open({
      recordAttempt: (...args) => {
        failures += 1
        return failures === 1
          ? Promise.reject(new Error('store down'))
          : store.recordAttempt(...args)
      },
    })
    dispatcher.start()
    await expect.poll(() => failures, { timeout: 10_000 }).toBe(1)
    movedMs += LEASE_MS
    dispatcher.wake()
    await statusOf(taskId, 'delivered')
    expect(sender.sent).toHaveLength(2)
    expect(await attemptsOf(taskId)).toBe(1)
  })

  test('a sender that throws costs its attempt alone', async () => {
    const [one, two] = [await commit(A), await commit(B)]
    sender.answer = ({ url }) => {
      if (url === A) throw new Error('a fault of ours')
      return OK
    }
    const dispatcher = open()
    dispatcher.start()
    await statusOf(two, 'delivered')
    await statusOf(one, 'pending')
    sender.answer = () => OK
    movedMs += LEASE_MS
    dispatcher.wake()
    await statusOf(one, 'delivered')
  })

  test('a clock that is set back holds nothing up', async () => {
    sender.answer = () => OK
    const dispatcher = open()
    dispatcher.start()
    const taskId = await commit(A)
    movedMs -= DAY_MS
    dispatcher.wake()
    await statusOf(taskId, 'delivered')
  })

  test('redelivering one that was given up makes one attempt, and no more', async () => {
    sender.answer = () => ({ ...REFUSED, statusCode: 410 })
    const dispatcher = open({}, [10])
    const taskId = await commit(A)
    dispatcher.start()
    await statusOf(taskId, 'given_up')
    sender.answer = () => REFUSED
    expect(await dispatcher.redeliver(taskId)).toBe('queued')
    await recorded(taskId, 2)
    await statusOf(taskId, 'given_up')
    sender.answer = () => OK
    expect(await dispatcher.redeliver(taskId)).toBe('queued')
    await statusOf(taskId, 'delivered')
    expect(await attemptsOf(taskId)).toBe(3)
    expect(await dispatcher.redeliver('unknown')).toBeUndefined()
  })

  test('redelivering one that is tried again changes neither its schedule nor its count', async () => {
    sender.answer = () => REFUSED
    const dispatcher = open({}, [60_000, 60_000])
    const taskId = await commit(A)
    dispatcher.start()
    await recorded(taskId, 1)
    const { nextAttemptAt } = (await store.state(taskId)) ?? {}
    for (let count = 2; count < 8; count += 1) {
      expect(await dispatcher.redeliver(taskId)).toBe('queued')
      await recorded(taskId, count)
      expect(await store.state(taskId)).toMatchObject({ status: 'pending', nextAttemptAt })
    }
    movedMs += 90_000
    dispatcher.wake()
    await recorded(taskId, 8)
    expect(await store.state(taskId)).toMatchObject({ status: 'pending' })
    movedMs += 90_000
    dispatcher.wake()
    await statusOf(taskId, 'given_up')
    const { attempts = [] } = (await store.state(taskId)) ?? {}
    expect(attempts.map(({ manual }) => manual)).toEqual([
      ...[false, true, true, true, true, true, true],
      ...[false, false],
    ])
  })

  test('a receiver that finds it too large gets the end of the log at once, and ever after', async () => {
    const answers = [413, 500, 200]
    sender.answer = () => ({ ...REFUSED, statusCode: answers.shift() ?? 0 })
    const log = Buffer.from(`first ${'x'.repeat(100_000)} last`)
    const dispatcher = open({}, [10, 60_000])
    const taskId = await commit(A, undefined, log)
    dispatcher.start()
    await recorded(taskId, 2)
    movedMs += 90_000
    dispatcher.wake()
    await statusOf(taskId, 'delivered')
    const sent = await Promise.all(sender.sent.map(({ payload }) => payload.logs.read()))
    expect(sent.map(({ content }) => content.length)).toEqual([log.length, 65_536, 65_536])
    expect(sent[1]?.content.equals(log.subarray(-65_536))).toBe(true)
    expect(sent.map(({ totalBytes }) => totalBytes)).toEqual(Array(3).fill(log.length))
    expect(new Set(sender.sent.map(({ webhookId }) => webhookId)).size).toBe(1)
  })

  test('redelivering while an attempt is under way says so', async () => {
    const dispatcher = open()
    const taskId = await commit(A)
    dispatcher.start()
    await sentCount(1)
    expect(await dispatcher.redeliver(taskId)).toBe('in_flight')
    sender.sent[0]?.end(OK)
    await statusOf(taskId, 'delivered')
    expect(sender.sent).toHaveLength(1)
  })

  test('close waits for the attempt under way, and records it', async () => {
    const dispatcher = open()
    const taskId = await commit(A)
    dispatcher.start()
    await sentCount(1)
    let isClosed = false
    const closing = dispatcher.close(60_000).then(() => {
      isClosed = true
    })
    await store.nextDueAt()
    expect(isClosed).toBe(false)
    sender.sent[0]?.end(OK)
    await closing
    expect(await store.state(taskId)).toMatchObject({
      status: 'delivered',
      attempts: [{ number: 1 }],
    })
  })

  test('close aborts what takes longer than its grace, and gives it back without an attempt', async () => {
    const dispatcher = open()
    const taskId = await commit(A)
    dispatcher.start()
    await sentCount(1)
    await dispatcher.close(20)
    expect(await store.state(taskId)).toMatchObject({ status: 'pending', attempts: [] })
    sender.answer = () => OK
    open().start()
    await statusOf(taskId, 'delivered')
    expect(sender.sent[1]?.webhookId).toBe(sender.sent[0]?.webhookId)
  })

  test('after close nothing is begun: a delivery then waits for the next start', async () => {
    sender.answer = () => OK
    const dispatcher = open()
    dispatcher.start()
    await dispatcher.close(0)
    const delivery = dispatcher.prepare(A)
    expect(delivery.leaseUntil).toBeNull()
    const taskId = await commit(A, delivery)
    await dispatcher.attemptNow(taskId, delivery, contentOf(taskId, A))
    dispatcher.wake()
    await dispatcher.close(0)
    expect(sender.sent).toEqual([])
    open().start()
    await statusOf(taskId, 'delivered')
  })
})
