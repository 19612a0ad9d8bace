import type { Handler, SeenTask, TaskQueue, WaitingTask } from '../core/ports.ts'
import { Slots } from '../core/slots.ts'
import { queuePosition } from '../core/task.ts'

/** A queue inside the process. It may be lost at any time: the store is the truth. */
export class EmbeddedQueue implements TaskQueue {
  /** By priority: within one, tasks go in the order they came. */
  readonly #lanes = new Map<number, Lane>()
  readonly #slots = new Slots(() => this.#fill())
  #length = 0
  #isHeld = false
  #handler: Handler | undefined

  get length(): number {
    return this.#length
  }

  enqueue(task: WaitingTask): void {
    const lane = this.#lanes.get(task.priority) ?? new Lane()
    this.#lanes.set(task.priority, lane)
    if (lane.add(task)) this.#length += 1
    this.#fill()
  }

  remove(taskId: string): void {
    for (const lane of this.#lanes.values()) if (lane.delete(taskId)) this.#length -= 1
  }

  resume(task: SeenTask): void {
    this.#hand(task)
  }

  work(concurrency: number, handler: Handler): void {
    this.#slots.limit = concurrency
    this.#handler = handler
    this.#fill()
  }

  hold(): void {
    this.#isHeld = true
  }

  goOn(): void {
    this.#isHeld = false
    this.#fill()
  }

  async stop(): Promise<void> {
    this.#handler = undefined
  }

  #fill(): void {
    while (this.#handler && !this.#isHeld && this.#slots.free > 0) {
      const next = this.#next()
      if (!next) return
      this.remove(next.taskId)
      this.#hand({ taskId: next.taskId, claim: 0 })
    }
  }

  #next(): WaitingTask | undefined {
    let next: WaitingTask | undefined
    for (const lane of this.#lanes.values()) {
      const head = lane.head()
      if (head && (!next || queuePosition(head) < queuePosition(next))) next = head
    }
    return next
  }

  #hand(task: SeenTask): void {
    if (!this.#handler) return
    const slot = this.#slots.take()
    void this.#handler(task, slot).finally(() => slot.release())
  }
}

/** Tasks of one priority, first in, first out. */
class Lane {
  readonly #waiting = new Map<string, WaitingTask>()
  /** Where the oldest is: looking for it anew each time would step over all that went before. */
  #from: Iterator<WaitingTask> | undefined
  #head: WaitingTask | undefined

  /** False: it waits already. */
  add(task: WaitingTask): boolean {
    if (this.#waiting.has(task.taskId)) return false
    this.#waiting.set(task.taskId, task)
    return true
  }

  delete(taskId: string): boolean {
    return this.#waiting.delete(taskId)
  }

  head(): WaitingTask | undefined {
    while (this.#waiting.size > 0) {
      const head = this.#head
      if (head && this.#waiting.get(head.taskId) === head) return head
      this.#from ??= this.#waiting.values()
      const next = this.#from.next()
      if (next.done) this.#from = undefined
      else this.#head = next.value
    }
    return undefined
  }
}
