import type { TaskQueue } from '../core/ports.ts'

/** A first-in first-out queue inside the process. It may be lost at any time: the store is the truth. */
export class EmbeddedQueue implements TaskQueue {
  #waiting: string[] = []
  /** Index of the oldest in `#waiting`: shifting an array of 100,000 for each task would be slow. */
  #head = 0
  readonly #active = new Set<Promise<void>>()
  #concurrency = 0
  #handler: ((taskId: string) => Promise<void>) | undefined

  get length(): number {
    return this.#waiting.length - this.#head
  }

  enqueue(taskId: string): void {
    this.#waiting.push(taskId)
    this.#fill()
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
    while (this.#handler && this.length > 0 && this.#active.size < this.#concurrency) {
      const taskId = this.#waiting[this.#head]
      this.#head += 1
      if (this.#head > 1_000 && this.#head * 2 > this.#waiting.length) {
        this.#waiting = this.#waiting.slice(this.#head)
        this.#head = 0
      }
      if (taskId !== undefined) this.#hand(taskId)
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
