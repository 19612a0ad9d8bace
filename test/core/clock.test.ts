import { describe, expect, test } from 'vitest'
import { CallbackDispatcher } from '../../src/core/callbacks.ts'
import type { AttemptResult, CallbackSender } from '../../src/core/ports.ts'
import { openStores, QUIET, type Stores } from '../helpers/stores.ts'

const HOUR_MS = 3_600_000
const PATIENTLY = { timeout: 20_000, interval: 5 }
const IN_ALL_MAX = 192
const PER_ORIGIN_MAX = 16

const OK: AttemptResult = { statusCode: 200, error: null, retryAfterMs: null }
const BUSY: AttemptResult = { statusCode: 503, error: 'busy', retryAfterMs: null }

interface Sent {
  taskId: string
  webhookId: string
  origin: string
  /** Of the steady clock, which nobody sets. */
  at: number
  answer: (result: AttemptResult) => void
}

interface Scene extends AsyncDisposable {
  dispatcher: CallbackDispatcher
  sent: Sent[]
  underWay: { most: number; mostPerOrigin: number; mostPerTask: number; now: number }
  /** Sets the wall clock forth, or back. */
  setClock(byMs: number): void
  now(): number
  attemptsOf(taskId: string): Sent[]
}

/** A dispatcher over the real store. `reply` undefined: each attempt waits until the test answers it. */
function startScene(
  stores: Stores,
  options: {
    delaysMs: number[]
    /** How far the wall clock is off from the start. */
    setBy?: number
    reply?: (attempt: Sent, count: number) => AttemptResult | undefined
  },
): Scene {
  let { setBy = 0 } = options
  const now = () => Date.now() + setBy
  const sent: Sent[] = []
  const open = new Map<string, number>()
  const tally = (key: string, by: number) => {
    const count = (open.get(key) ?? 0) + by
    open.set(key, count)
    return count
  }
  const underWay = { most: 0, mostPerOrigin: 0, mostPerTask: 0, now: 0 }
  const sender: CallbackSender = {
    async send({ url, webhookId, payload }, signal) {
      const { origin } = new URL(url)
      const { promise, resolve } = Promise.withResolvers<AttemptResult>()
      const { taskId } = payload
      const attempt: Sent = { taskId, webhookId, origin, at: performance.now(), answer: resolve }
      sent.push(attempt)
      underWay.now += 1
      underWay.most = Math.max(underWay.most, underWay.now)
      underWay.mostPerOrigin = Math.max(underWay.mostPerOrigin, tally(origin, 1))
      underWay.mostPerTask = Math.max(underWay.mostPerTask, tally(`task ${taskId}`, 1))
      signal.addEventListener('abort', () => resolve({ ...BUSY, error: 'aborted' }))
      const reply = options.reply?.(attempt, sent.filter((one) => one.taskId === taskId).length)
      if (reply) setImmediate(resolve, reply)
      const result = await promise
      tally(origin, -1)
      tally(`task ${taskId}`, -1)
      underWay.now -= 1
      return result
    },
    async close() {},
  }
  const dispatcher = new CallbackDispatcher({
    store: stores.deliveries,
    sender,
    // 0.5: no jitter.
    schedule: { delaysMs: options.delaysMs, random: () => 0.5 },
    attemptTimeoutMs: 15_000,
    now,
    log: QUIET,
  })
  return {
    dispatcher,
    sent,
    underWay,
    setClock(byMs) {
      setBy += byMs
    },
    now,
    attemptsOf: (taskId) => sent.filter((attempt) => attempt.taskId === taskId),
    [Symbol.asyncDispose]: () => dispatcher.close(0),
  }
}

describe('when the clock is set back by an hour', () => {
  test('a pending delivery keeps its delay', async () => {
    await using stores = await openStores()
    await using scene = startScene(stores, {
      delaysMs: [1_000],
      reply: (_, count) => (count === 1 ? BUSY : OK),
    })
    await stores.finished('pending', { finishedAt: scene.now(), origin: 'http://a.test' })
    scene.dispatcher.start()
    await expect
      .poll(async () => (await stores.deliveries.state('pending'))?.attempts.length, PATIENTLY)
      .toBe(1)
    scene.setClock(-HOUR_MS)
    await expect.poll(() => scene.sent.length, PATIENTLY).toBe(2)
    const [first, second] = scene.sent
    const delayMs = Number(second?.at) - Number(first?.at)
    expect(delayMs).toBeGreaterThan(950)
    expect(delayMs).toBeLessThan(5_000)
  })

  test('one whose attempt was under way and then fails keeps its delay as well', async () => {
    await using stores = await openStores()
    await using scene = startScene(stores, {
      delaysMs: [HOUR_MS / 2],
      reply: ({ taskId }) => (taskId === 'other' ? OK : undefined),
    })
    await stores.finished('under-way', { finishedAt: scene.now(), origin: 'http://a.test' })
    scene.dispatcher.start()
    await expect.poll(() => scene.sent.length, PATIENTLY).toBe(1)
    scene.setClock(-HOUR_MS)
    scene.sent[0]?.answer(BUSY)
    const state = () => stores.deliveries.state('under-way')
    await expect.poll(async () => (await state())?.attempts.length, PATIENTLY).toBe(1)
    const setAt = scene.now()
    const durationMs = (await state())?.attempts[0]?.durationMs
    expect(durationMs, 'is measured by the steady clock').toBeGreaterThanOrEqual(0)

    // Another delivery makes the dispatcher look.
    await stores.finished('other', { finishedAt: scene.now() - 1, origin: 'http://b.test' })
    scene.dispatcher.wake()
    await expect.poll(() => scene.attemptsOf('other').length, PATIENTLY).toBe(1)
    expect(scene.attemptsOf('under-way').length).toBe(1)
    const nextAttemptAt = (await state())?.nextAttemptAt
    expect(Number(nextAttemptAt) - setAt).toBeGreaterThan(HOUR_MS / 2 - 60_000)
    expect(Number(nextAttemptAt) - setAt).toBeLessThan(HOUR_MS / 2 + 60_000)
  })

  test('a delivery that is asked for again is sent', async () => {
    await using stores = await openStores()
    await using scene = startScene(stores, { delaysMs: [], reply: () => OK })
    await stores.finished('again', { finishedAt: scene.now(), origin: 'http://a.test' })
    scene.dispatcher.start()
    const status = async () => (await stores.deliveries.state('again'))?.status
    await expect.poll(status, PATIENTLY).toBe('delivered')
    scene.setClock(-HOUR_MS)
    expect(await scene.dispatcher.redeliver('again')).toBe('queued')
    await expect.poll(() => scene.sent.length, PATIENTLY).toBe(2)
    expect(scene.sent.map(({ webhookId }) => webhookId)).toEqual(['msg_again', 'msg_again'])
  })
})

describe('when the clock was set back by an hour while the service was down', () => {
  test('a delivery keeps the delay that its last attempt was followed by', async () => {
    await using stores = await openStores()
    {
      await using before = startScene(stores, { delaysMs: [3_000, 10_000], reply: () => BUSY })
      await stores.finished('pending', { finishedAt: before.now(), origin: 'http://a.test' })
      before.dispatcher.start()
      const attempts = async () => (await stores.deliveries.state('pending'))?.attempts.length
      await expect.poll(attempts, PATIENTLY).toBe(1)
    }
    const startedAt = performance.now()
    await using after = startScene(stores, {
      ...{ delaysMs: [3_000, 10_000], setBy: -HOUR_MS },
      reply: () => OK,
    })
    after.dispatcher.start()
    await expect.poll(() => after.sent.length, PATIENTLY).toBe(1)
    const delayMs = Number(after.sent[0]?.at) - startedAt
    expect(delayMs).toBeGreaterThan(1_000)
    expect(delayMs).toBeLessThan(9_000)
  })

  test('a first attempt is made at once', async () => {
    await using stores = await openStores()
    await using scene = startScene(stores, {
      ...{ delaysMs: [HOUR_MS], setBy: -HOUR_MS },
      reply: () => OK,
    })
    await stores.finished('first', { finishedAt: Date.now(), origin: 'http://a.test' })
    scene.dispatcher.start()
    await expect.poll(() => scene.sent.length, PATIENTLY).toBe(1)
  })
})

test('a restart on a clock that is right changes nothing of what a receiver has asked for', async () => {
  await using stores = await openStores()
  const nextAttemptAt = async () => (await stores.deliveries.state('asked'))?.nextAttemptAt
  {
    await using before = startScene(stores, {
      delaysMs: [1_000],
      reply: () => ({ ...BUSY, retryAfterMs: HOUR_MS }),
    })
    await stores.finished('asked', { finishedAt: before.now(), origin: 'http://a.test' })
    before.dispatcher.start()
    await expect.poll(async () => Number(await nextAttemptAt()) > Date.now(), PATIENTLY).toBe(true)
  }
  const askedFor = await nextAttemptAt()
  await using after = startScene(stores, { delaysMs: [1_000], reply: () => OK })
  await stores.finished('other', { finishedAt: after.now(), origin: 'http://b.test' })
  after.dispatcher.start()
  await expect.poll(() => after.attemptsOf('other').length, PATIENTLY).toBe(1)
  expect(await nextAttemptAt()).toBe(askedFor)
})

describe('when the clock is set forth by an hour', () => {
  test('what became due is sent, and no more at once than the caps allow', async () => {
    await using stores = await openStores()
    await using scene = startScene(stores, { delaysMs: [] })
    const names = () => scene.sent.map(({ taskId }) => taskId)
    await stores.finished('first', { finishedAt: scene.now(), origin: 'http://first.test' })
    scene.dispatcher.start()
    await expect.poll(names, PATIENTLY).toEqual(['first'])
    const dueAt = scene.now() + HOUR_MS / 2
    const taskIds = Array.from({ length: 300 }, (_, index) => `due-${index}`)
    await Promise.all(
      taskIds.map((taskId, index) =>
        stores.finished(taskId, { finishedAt: dueAt, origin: `http://r${index % 12}.test` }),
      ),
    )
    await stores.finished('second', { finishedAt: scene.now(), origin: 'http://second.test' })
    scene.dispatcher.wake()
    await expect.poll(names, PATIENTLY).toEqual(['first', 'second'])
    for (const attempt of scene.sent) attempt.answer(OK)

    scene.setClock(HOUR_MS)
    scene.dispatcher.wake()
    // One for each origin, until it has answered.
    await expect.poll(() => scene.underWay.now, PATIENTLY).toBe(12)
    for (const attempt of scene.sent.slice(2)) attempt.answer(OK)
    await expect.poll(() => scene.underWay.now, PATIENTLY).toBe(IN_ALL_MAX)
    let answered = 2 + 12
    while (answered < taskIds.length + 2) {
      await expect.poll(() => scene.sent.length, PATIENTLY).toBeGreaterThan(answered)
      scene.sent[answered]?.answer(OK)
      answered += 1
    }
    await expect.poll(() => scene.underWay.now, PATIENTLY).toBe(0)
    expect(scene.underWay.most).toBe(IN_ALL_MAX)
    expect(scene.underWay.mostPerOrigin).toBeLessThanOrEqual(PER_ORIGIN_MAX)
    expect(names().sort()).toEqual(['first', 'second', ...taskIds].sort())
  })

  test('an attempt under way is not made a second time beside the first', async () => {
    await using stores = await openStores()
    await using scene = startScene(stores, {
      delaysMs: [],
      reply: ({ taskId }) => (taskId === 'other' ? OK : undefined),
    })
    await stores.finished('under-way', { finishedAt: scene.now(), origin: 'http://a.test' })
    scene.dispatcher.start()
    await expect.poll(() => scene.sent.length, PATIENTLY).toBe(1)
    scene.setClock(HOUR_MS)
    await stores.finished('other', { finishedAt: scene.now(), origin: 'http://b.test' })
    scene.dispatcher.wake()
    await expect.poll(() => scene.attemptsOf('other').length, PATIENTLY).toBe(1)
    expect(scene.underWay.mostPerTask).toBe(1)
    scene.sent[0]?.answer(OK)
    await expect
      .poll(async () => (await stores.deliveries.state('under-way'))?.status, PATIENTLY)
      .toBe('delivered')
  })
})

test('10,000 overdue deliveries, one of them asked for again, are sent once each, oldest first, within the caps', async () => {
  const count = 10_000
  const origins = 20
  await using stores = await openStores()
  await using scene = startScene(stores, { delaysMs: [HOUR_MS], reply: () => OK })
  const start = scene.now() - count
  await stores.overdue(
    Array.from({ length: count }, (_, index) => ({
      taskId: `t-${index}`,
      finishedAt: start + index,
      // A quarter is for one receiver, which must not hold up the others.
      origin: index % 4 === 0 ? 'http://busy.test' : `http://r${index % origins}.test`,
    })),
  )
  // The oldest is asked for again before anything was sent: it is due now, and so the youngest.
  expect(await scene.dispatcher.redeliver('t-0')).toBe('queued')
  await expect.poll(() => scene.sent.length, { timeout: 240_000, interval: 20 }).toBe(count)
  await expect.poll(() => scene.underWay.now, PATIENTLY).toBe(0)

  expect(new Set(scene.sent.map(({ taskId }) => taskId)).size).toBe(count)
  expect(scene.underWay.most).toBeLessThanOrEqual(IN_ALL_MAX)
  expect(scene.underWay.mostPerOrigin).toBeLessThanOrEqual(PER_ORIGIN_MAX)
  expect(scene.underWay.mostPerTask).toBe(1)
  const ages = new Map<string, number[]>()
  for (const { taskId, origin } of scene.sent) {
    const index = Number(taskId.slice(2))
    ages.set(origin, [...(ages.get(origin) ?? []), index === 0 ? count : index])
  }
  for (const [origin, order] of ages) {
    // Attempts begin in order, and read their logs at the same time: neighbours may overtake each other.
    const outOfOrder = order.filter((age, position) => {
      const rank = order.filter((other) => other < age).length
      return Math.abs(rank - position) > PER_ORIGIN_MAX
    })
    expect(outOfOrder, `of ${origin}`).toEqual([])
  }
  const redelivered = await stores.deliveries.state('t-0')
  expect(redelivered).toMatchObject({ status: 'delivered', webhookId: 'msg_t-0' })
}, 300_000)
