import type { TaskQueue } from '../core/ports.ts'

/** A first-in first-out queue inside the process. It may be lost at any time: the store is the truth. */
export class EmbeddedQueue implements TaskQueue {
  readonly #waiting = new Set<string>()
  /** Where the oldest is: looking for it anew each time would step over all that went before. */
  #oldest: Iterator<string> | undefined
  readonly #active = new Set<Promise<void>>()
  #concurrency = 0
  #handler: ((taskId: string) => Promise<void>) | undefined

  get length(): number {
    return this.#waiting.size
  }

  enqueue(taskId: string): void {
    this.#waiting.add(taskId)
    this.#fill()
  }

  remove(taskId: string): void {
    this.#waiting.delete(taskId)
  }

  resume(taskId: string): void {
    this.#hand(taskId)
  }

  work(concurrency: number, handler: (taskId: string) => Promise<void>): void {
    this.#concurrency = concurrency
    this.#handler = handler
    this.#fill()
  }

  stop(): void {
    this.#handler = undefined
  }

  #fill(): void {
    while (this.#handler && this.#waiting.size > 0 && this.#active.size < this.#concurrency) {
      this.#oldest ??= this.#waiting.values()
      const next = this.#oldest.next()
      if (next.done) {
        this.#oldest = undefined
        continue
      }
      this.#waiting.delete(next.value)
      this.#hand(next.value)
    }
  }

  #hand(taskId: string): void {
    if (!this.#handler) return
    const done = this.#handler(taskId).finally(() => {
      this.#active.delete(done)
      this.#fill()
    })
    this.#active.add(done)
  }
}
