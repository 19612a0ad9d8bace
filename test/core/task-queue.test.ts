import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { ClaimedTask, Hints, TaskStore } from '../../src/core/ports.ts'
import type { Slot } from '../../src/core/slots.ts'
import { TaskQueue, type TaskQueueOptions } from '../../src/core/task-queue.ts'
import { newTask, openStores, QUIET, type Stores } from '../helpers/stores.ts'

const MINUTE_MS = 60_000
const WAIT = { timeout: 10_000, interval: 5 }

let stores: Stores
const open: TaskQueue[] = []

beforeEach(async () => {
  stores = await openStores()
})
afterEach(async () => {
  for (const queue of open.splice(0)) await queue.stop()
  await stores[Symbol.asyncDispose]()
})

/** A queue whose runs the test ends one by one. */
function scripted(options: Partial<TaskQueueOptions> = {}) {
  const queue = new TaskQueue({
    ...{
      store: stores.tasks,
      concurrency: 1,
      length: 0,
      queuedMax: 10_000,
      now: Date.now,
      log: QUIET,
    },
    ...options,
  })
  open.push(queue)
  const started: string[] = []
  const slots = new Map<string, Slot>()
  const run = ({ taskId }: ClaimedTask, slot: Slot) => {
    started.push(taskId)
    slots.set(taskId, slot)
  }
  const end = (taskId: string) => slots.get(taskId)?.release()
  return { queue, started, slots, end, start: () => queue.start(run) }
}

/** Counts the claims of a store, and settles when one more is answered. */
function counted(store: TaskStore) {
  let claims = 0
  const claimNext: TaskStore['claimNext'] = async (options) => {
    const tasks = await store.claimNext(options)
    claims += 1
    return tasks
  }
  return {
    store: {
      claimNext,
      putBack: (task: ClaimedTask) => store.putBack(task),
      countQueued: (max: number) => store.countQueued(max),
    },
    get claims() {
      return claims
    },
    async oneMore() {
      const before = claims
      await expect.poll(() => claims, WAIT).toBeGreaterThan(before)
    },
  }
}

const stored = async (taskId: string, more: { createdAt?: number; priority?: number } = {}) =>
  expect(await stores.tasks.insert(newTask(taskId, more))).toBe(true)

describe('claiming', () => {
  test('takes tasks in their order, as many at once as may run', async () => {
    for (const taskId of ['a', 'b', 'c', 'd']) await stored(taskId)
    const { queue, started, end, start } = scripted({ concurrency: 2, length: 4 })
    expect(queue.length).toBe(4)
    start()
    await expect.poll(() => started, WAIT).toEqual(['a', 'b'])
    expect(queue.length).toBe(2)
    end('b')
    await expect.poll(() => started, WAIT).toEqual(['a', 'b', 'c'])
    end('a')
    await expect.poll(() => started, WAIT).toEqual(['a', 'b', 'c', 'd'])
    expect(queue.length).toBe(0)
    expect(await stores.tasks.countQueued(10)).toBe(0)
  })

  test('takes a task that comes while there is room', async () => {
    const { queue, started, start } = scripted()
    start()
    for (const taskId of ['a', 'b']) {
      await stored(taskId)
      queue.added()
    }
    await expect.poll(() => started, WAIT).toEqual(['a'])
    expect(queue.length).toBe(1)
    expect(await stores.tasks.countQueued(10)).toBe(1)
  })

  test('takes a task that nothing was said about', async () => {
    const { started, start } = scripted()
    start()
    await stored('unheard')
    await expect.poll(() => started, WAIT).toEqual(['unheard'])
  })

  test('a step of priority is worth a minute of waiting, so that nobody waits for ever', async () => {
    await stored('old', { createdAt: 0 })
    await stored('newer', { createdAt: 5 * MINUTE_MS })
    await stored('urgent', { createdAt: 8 * MINUTE_MS, priority: 9 })
    await stored('a little', { createdAt: 6 * MINUTE_MS, priority: 2 })
    await stored('too late', { createdAt: 15 * MINUTE_MS, priority: 9 })
    const { started, end, start } = scripted()
    start()
    const order = ['urgent', 'old', 'a little', 'newer', 'too late']
    for (const [index, taskId] of order.entries()) {
      await expect.poll(() => started, WAIT).toEqual(order.slice(0, index + 1))
      end(taskId)
    }
  })

  test('2,000 tasks all run once, in order', async () => {
    const wanted = Array.from({ length: 2_000 }, (_, index) => String(index))
    await Promise.all(wanted.slice(0, 1_500).map((taskId) => stored(taskId)))
    const { queue, started, end, start } = scripted({ concurrency: 40, length: 1_500 })
    start()
    for (let ended = 0; ended < wanted.length; ) {
      await expect.poll(() => started.length, WAIT).toBeGreaterThan(ended)
      if (ended === 0) {
        for (const late of wanted.slice(1_500)) {
          await stored(late)
          queue.added()
        }
      }
      for (; ended < started.length; ended += 1) end(started[ended] ?? '')
    }
    expect(started).toEqual(wanted)
    expect(queue.length).toBe(0)
  }, 60_000)

  test('asks nothing more of the store while the queue is empty, whatever ends', async () => {
    const { store, ...asked } = counted(stores.tasks)
    const { queue, started, end, start } = scripted({ store, concurrency: 3 })
    for (const taskId of ['a', 'b']) await stored(taskId)
    start()
    await expect.poll(() => started, WAIT).toEqual(['a', 'b'])
    const { claims } = asked
    end('a')
    end('b')
    await stores.tasks.check()
    expect(asked.claims).toBe(claims)
    await stored('c')
    queue.added()
    await expect.poll(() => started, WAIT).toEqual(['a', 'b', 'c'])
  })

  test('goes on when the store failed', async () => {
    let failures = 2
    const claimNext: TaskStore['claimNext'] = async (options) => {
      failures -= 1
      if (failures >= 0) throw new Error('store down')
      return stores.tasks.claimNext(options)
    }
    const { store } = counted(stores.tasks)
    const { started, start } = scripted({ store: { ...store, claimNext } })
    await stored('a')
    start()
    await expect.poll(() => started, WAIT).toEqual(['a'])
    expect(failures).toBeLessThan(0)
  })
})

describe('slots', () => {
  test('nothing new is claimed while workers are unavailable', async () => {
    const { queue, started, start } = scripted({ concurrency: 2 })
    queue.hold()
    start()
    await stored('a')
    queue.added()
    await stores.tasks.check()
    expect(started).toEqual([])
    expect(queue.length).toBe(1)
    expect(await stores.tasks.countQueued(10)).toBe(1)
    queue.goOn()
    await expect.poll(() => started, WAIT).toEqual(['a'])
  })

  test('a task that waits gives its slot to others, and comes back before new ones', async () => {
    for (const taskId of ['a', 'b', 'c']) await stored(taskId)
    const { started, slots, end, start } = scripted()
    start()
    await expect.poll(() => started, WAIT).toEqual(['a'])
    end('a')
    await expect.poll(() => started, WAIT).toEqual(['a', 'b'])
    const back = slots.get('a')?.retake(new AbortController().signal)
    end('b')
    await back
    await stores.tasks.check()
    expect(started).toEqual(['a', 'b'])
    end('a')
    await expect.poll(() => started, WAIT).toEqual(['a', 'b', 'c'])
  })

  test('one that comes back amid a claim gets a slot only when one is free', async () => {
    const gate = Promise.withResolvers<void>()
    const asked = Promise.withResolvers<void>()
    const { store } = counted(stores.tasks)
    const claimNext: TaskStore['claimNext'] = async (options) => {
      asked.resolve()
      await gate.promise
      return stores.tasks.claimNext(options)
    }
    const { queue, started, start, end } = scripted({ store: { ...store, claimNext } })
    const waiting = queue.takeSlot()
    waiting.release()
    await stored('a')
    start()
    await asked.promise
    let isBack = false
    const back = waiting.retake(new AbortController().signal).then(() => {
      isBack = true
    })
    gate.resolve()
    await expect.poll(() => started, WAIT).toEqual(['a'])
    expect(isBack).toBe(false)
    end('a')
    await back
  })

  test('a task that runs already takes one beyond the limit, and counts against it', async () => {
    const { queue, started, start } = scripted()
    const running = [queue.takeSlot(), queue.takeSlot()]
    await stored('a')
    start()
    running[0]?.release()
    await stores.tasks.check()
    expect(started).toEqual([])
    running[1]?.release()
    await expect.poll(() => started, WAIT).toEqual(['a'])
  })
})

describe('stopping', () => {
  test('claims nothing more, and what waits is still counted', async () => {
    const { queue, started, end, start } = scripted()
    start()
    await stored('a')
    queue.added()
    await expect.poll(() => started, WAIT).toEqual(['a'])
    await queue.stop()
    await queue.stop()
    end('a')
    await stored('b')
    queue.added()
    await stores.tasks.check()
    expect(started).toEqual(['a'])
    expect(queue.length).toBe(1)
  })

  test('puts back what is claimed at that moment', async () => {
    const gate = Promise.withResolvers<void>()
    const claimed = Promise.withResolvers<void>()
    const { store } = counted(stores.tasks)
    const claimNext: TaskStore['claimNext'] = async (options) => {
      const tasks = await stores.tasks.claimNext(options)
      claimed.resolve()
      await gate.promise
      return tasks
    }
    const { queue, started, start } = scripted({ store: { ...store, claimNext }, length: 1 })
    await stored('a')
    start()
    await claimed.promise
    const stopped = queue.stop()
    gate.resolve()
    await stopped
    expect(started).toEqual([])
    expect(queue.length).toBe(1)
    expect(await stores.tasks.get('a')).toMatchObject({ status: 'queued', instance: null })
  })
})

describe('telling the others', () => {
  const listening = () => {
    let told = 0
    const hints: Hints = {
      tasksWait: () => {
        told += 1
      },
      cancelRequested: () => {},
    }
    return {
      hints,
      get told() {
        return told
      },
    }
  }

  test('of tasks that there is no room for here, and of no others', async () => {
    const { hints, ...others } = listening()
    const heard = listening()
    const { queue, started, start } = scripted({ hints: heard.hints })
    start()
    await stored('a')
    queue.added()
    await expect.poll(() => started, WAIT).toEqual(['a'])
    const before = heard.told
    await stored('b')
    queue.added()
    await expect.poll(() => heard.told, WAIT).toBeGreaterThan(before)
    const roomy = scripted({ hints, concurrency: 5 })
    roomy.start()
    await stored('c')
    roomy.queue.added()
    await expect.poll(() => roomy.started, WAIT).toEqual(['b', 'c'])
    expect(others.told).toBe(0)
  })

  test('what others take in and take out is counted now and then', async () => {
    const { queue, start } = scripted({ hints: listening().hints, concurrency: 0 })
    start()
    await stored('a')
    await stored('b')
    await expect.poll(() => queue.length, WAIT).toBe(2)
    await stores.tasks.claim('a', 0)
    await expect.poll(() => queue.length, WAIT).toBe(1)
  })
})

test('the length follows what is added and removed here, and never falls below none', async () => {
  const { queue } = scripted()
  queue.removed()
  expect(queue.length).toBe(0)
  queue.added()
  queue.added()
  queue.removed()
  expect(queue.length).toBe(1)
})
