import { describe, expect, test } from 'vitest'
import type { SeenTask, WaitingTask } from '../../src/core/ports.ts'
import type { Slot } from '../../src/core/slots.ts'
import { EmbeddedQueue } from '../../src/queue/embedded.ts'

function waiting(taskId: string, more: Partial<WaitingTask> = {}): WaitingTask {
  return { taskId, createdAt: 0, priority: 0, ...more }
}

/** A handler whose runs the test ends one by one. */
function scripted() {
  const started: string[] = []
  const ends = new Map<string, () => void>()
  const handler = ({ taskId }: SeenTask) =>
    new Promise<boolean>((resolve) => {
      started.push(taskId)
      ends.set(taskId, () => resolve(true))
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
    for (const taskId of ['a', 'b', 'c', 'd']) queue.enqueue(waiting(taskId))
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
    queue.enqueue(waiting('a'))
    queue.enqueue(waiting('b'))
    expect(started).toEqual(['a'])
    expect(queue.length).toBe(1)
  })

  test('nothing new is handed out while workers are unavailable', () => {
    const queue = new EmbeddedQueue()
    const { started, handler } = scripted()
    queue.work(2, handler)
    queue.hold()
    queue.enqueue(waiting('a'))
    queue.resume({ taskId: 'r', claim: 1 })
    expect(started).toEqual(['r'])
    expect(queue.length).toBe(1)
    queue.goOn()
    expect(started).toEqual(['r', 'a'])
  })

  test('a task that waits gives its slot to others, and comes back before new ones', async () => {
    const queue = new EmbeddedQueue()
    const { started, handler, end } = scripted()
    const slots: Slot[] = []
    queue.work(1, (task, slot) => {
      slots.push(slot)
      return handler(task)
    })
    for (const taskId of ['a', 'b', 'c']) queue.enqueue(waiting(taskId))
    slots[0]?.release()
    expect(started).toEqual(['a', 'b'])
    const back = slots[0]?.retake(new AbortController().signal)
    await end('b')
    await back
    expect(started).toEqual(['a', 'b'])
    await end('a')
    expect(started).toEqual(['a', 'b', 'c'])
  })

  test('a task that runs already is resumed beyond the limit, and counts against it', async () => {
    const queue = new EmbeddedQueue()
    const { started, handler, end } = scripted()
    queue.work(1, handler)
    for (const taskId of ['r1', 'r2']) queue.resume({ taskId: taskId, claim: 1 })
    queue.enqueue(waiting('a'))
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
    queue.enqueue(waiting('a'))
    queue.enqueue(waiting('b'))
    queue.stop()
    await end('a')
    queue.enqueue(waiting('c'))
    queue.resume({ taskId: 'd', claim: 1 })
    expect(started).toEqual(['a'])
    expect(queue.length).toBe(2)
  })

  test('5,000 tasks all run once, in order, however the queue tidies up', async () => {
    const queue = new EmbeddedQueue()
    const wanted = Array.from({ length: 5_000 }, (_, index) => String(index))
    const seen: string[] = []
    const all = Promise.withResolvers<void>()
    for (const taskId of wanted.slice(0, 3_000)) queue.enqueue(waiting(taskId))
    queue.work(3, async ({ taskId }) => {
      seen.push(taskId)
      if (seen.length === 1_500)
        for (const late of wanted.slice(3_000)) queue.enqueue(waiting(late))
      if (seen.length === wanted.length) all.resolve()
      return true
    })
    await all.promise
    expect(seen).toEqual(wanted)
    expect(queue.length).toBe(0)
  })

  test('a step of priority is worth a minute of waiting, so that nobody waits for ever', async () => {
    const queue = new EmbeddedQueue()
    const { started, handler, end } = scripted()
    const minute = 60_000
    queue.enqueue(waiting('old', { createdAt: 0 }))
    queue.enqueue(waiting('newer', { createdAt: 5 * minute }))
    queue.enqueue(waiting('urgent', { createdAt: 8 * minute, priority: 9 }))
    queue.enqueue(waiting('a little', { createdAt: 6 * minute, priority: 2 }))
    queue.enqueue(waiting('too late', { createdAt: 15 * minute, priority: 9 }))
    queue.work(1, handler)
    for (const taskId of ['urgent', 'old', 'a little', 'newer', 'too late']) await end(taskId)
    expect(started).toEqual(['urgent', 'old', 'a little', 'newer', 'too late'])
  })

  test('one that is taken out and comes again waits once', async () => {
    const queue = new EmbeddedQueue()
    const { started, handler } = scripted()
    for (const taskId of ['a', 'b', 'b']) queue.enqueue(waiting(taskId))
    expect(queue.length).toBe(2)
    queue.remove('a')
    queue.remove('a')
    queue.enqueue(waiting('a'))
    expect(queue.length).toBe(2)
    queue.work(5, handler)
    expect(started).toEqual(['b', 'a'])
  })
})
