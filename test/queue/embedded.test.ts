import { describe, expect, test } from 'vitest'
import { EmbeddedQueue } from '../../src/queue/embedded.ts'

/** A handler whose runs the test ends one by one. */
function scripted() {
  const started: string[] = []
  const ends = new Map<string, () => void>()
  const handler = (taskId: string) =>
    new Promise<void>((resolve) => {
      started.push(taskId)
      ends.set(taskId, resolve)
    })
  const end = async (taskId: string) => {
    ends.get(taskId)?.()
    // The queue hears of it some microtasks later.
    await new Promise(setImmediate)
  }
  return { started, handler, end }
}

describe('EmbeddedQueue', () => {
  test('tasks are handed out in their order, as many at once as may run', async () => {
    const queue = new EmbeddedQueue()
    const { started, handler, end } = scripted()
    for (const taskId of ['a', 'b', 'c', 'd']) queue.enqueue(taskId)
    expect(queue.length).toBe(4)
    queue.work(2, handler)
    expect(started).toEqual(['a', 'b'])
    expect(queue.length).toBe(2)
    await end('b')
    expect(started).toEqual(['a', 'b', 'c'])
    await end('a')
    expect(started).toEqual(['a', 'b', 'c', 'd'])
    expect(queue.length).toBe(0)
  })

  test('a task that comes while there is room is handed out at once', () => {
    const queue = new EmbeddedQueue()
    const { started, handler } = scripted()
    queue.work(1, handler)
    queue.enqueue('a')
    queue.enqueue('b')
    expect(started).toEqual(['a'])
    expect(queue.length).toBe(1)
  })

  test('a task that runs already is resumed beyond the limit, and counts against it', async () => {
    const queue = new EmbeddedQueue()
    const { started, handler, end } = scripted()
    queue.work(1, handler)
    for (const taskId of ['r1', 'r2']) queue.resume(taskId)
    queue.enqueue('a')
    expect(started).toEqual(['r1', 'r2'])
    await end('r1')
    expect(started).toEqual(['r1', 'r2'])
    await end('r2')
    expect(started).toEqual(['r1', 'r2', 'a'])
  })

  test('after stop nothing is handed out, and what waits is still counted', async () => {
    const queue = new EmbeddedQueue()
    const { started, handler, end } = scripted()
    queue.work(1, handler)
    queue.enqueue('a')
    queue.enqueue('b')
    queue.stop()
    await end('a')
    queue.enqueue('c')
    queue.resume('d')
    expect(started).toEqual(['a'])
    expect(queue.length).toBe(2)
  })

  test('5,000 tasks all run once, in order, however the queue tidies up', async () => {
    const queue = new EmbeddedQueue()
    const wanted = Array.from({ length: 5_000 }, (_, index) => String(index))
    const seen: string[] = []
    const all = Promise.withResolvers<void>()
    for (const taskId of wanted.slice(0, 3_000)) queue.enqueue(taskId)
    queue.work(3, async (taskId) => {
      seen.push(taskId)
      if (seen.length === 1_500) for (const late of wanted.slice(3_000)) queue.enqueue(late)
      if (seen.length === wanted.length) all.resolve()
    })
    await all.promise
    expect(seen).toEqual(wanted)
    expect(queue.length).toBe(0)
  })
})
