import type { ClaimedTask, Hints, Logger, TaskStore } from './ports.ts'
import { type Slot, Slots } from './slots.ts'

/** Maximum tasks per claim, so that instances share a burst of tasks. */
const CLAIMED_AT_ONCE = 16
/** Interval of polling the table, since a hint may get lost. */
const POLL_MS = 1_000
/** Interval of counting waiting tasks, if other instances accept tasks, too. */
const COUNT_MS = 2_000

export interface TaskQueueOptions {
  store: Pick<TaskStore, 'claimNext' | 'putBack' | 'countQueued'>
  /** Notifies the other instances. Undefined: this is the only one. */
  hints?: Hints | undefined
  /** Maximum running tasks on this instance. */
  concurrency: number
  /** Maximum running tasks on all instances. */
  runningMax?: number | undefined
  /** Number of waiting tasks at the start. */
  length: number
  /** Maximum waiting tasks; counting stops there. */
  queuedMax: number
  now: () => number
  log: Logger
}

/**
 * Claims waiting tasks while this instance has free slots. The queue itself is the table of tasks:
 * a waiting task is a row with status `queued`. Hints from other instances and a timer wake it.
 */
export class TaskQueue {
  readonly #options: TaskQueueOptions
  readonly #slots: Slots
  #length: number
  #isHeld = false
  /** The last claim got fewer tasks than there were free slots, and no hint has come since. */
  #isDrained = false
  /** Tasks were added here since the last hint to others. */
  #hasNews = false
  #wake = Promise.withResolvers<void>()
  #isWorking = false
  #claiming: Promise<void> = Promise.resolve()
  #timers: NodeJS.Timeout[] = []

  constructor(options: TaskQueueOptions) {
    this.#options = options
    this.#length = options.length
    this.#slots = new Slots(options.concurrency, () => {
      if (!this.#isDrained) this.#wake.resolve()
    })
  }

  /** Number of waiting tasks of the deployment. */
  get length(): number {
    return this.#length
  }

  /** Counts a task that was stored, and looks for tasks to claim. */
  added(): void {
    this.#length += 1
    this.#hasNews = true
    this.look()
  }

  /** Counts a waiting task that was cancelled. */
  removed(): void {
    this.#length = Math.max(0, this.#length - 1)
  }

  /** Claims waiting tasks as far as slots are free. */
  look(): void {
    this.#isDrained = false
    this.#wake.resolve()
  }

  /** Takes a slot even when none is free: for a task that runs already. */
  takeSlot(): Slot {
    return this.#slots.take()
  }

  /** Calls `run` with each claimed task, which holds its slot until released. */
  start(run: (task: ClaimedTask, slot: Slot) => void): void {
    this.#isWorking = true
    this.#claiming = this.#claimIntoFreeSlots(run)
    this.#timers.push(setInterval(() => this.look(), POLL_MS))
    if (!this.#options.hints) return
    this.#timers.push(setInterval(() => this.#count(), COUNT_MS))
  }

  /** Pauses claiming until `goOn`: workers are unavailable. Both are idempotent. */
  hold(): void {
    this.#isHeld = true
  }

  goOn(): void {
    this.#isHeld = false
    this.look()
  }

  /** Stops claiming. Idempotent. */
  async stop(): Promise<void> {
    this.#isWorking = false
    for (const timer of this.#timers.splice(0)) clearInterval(timer)
    this.#wake.resolve()
    await this.#claiming
  }

  /** Never rejects: a failed count is retried at the next one. */
  async #count(): Promise<void> {
    const { store, queuedMax, log } = this.#options
    try {
      this.#length = await store.countQueued(queuedMax)
    } catch (err) {
      log.warn({ err }, 'counting waiting tasks failed, trying again')
    }
  }

  async #claimIntoFreeSlots(run: (task: ClaimedTask, slot: Slot) => void): Promise<void> {
    while (this.#isWorking) {
      this.#wake = Promise.withResolvers()
      const slots = this.#isHeld ? [] : this.#slots.takeFree(CLAIMED_AT_ONCE)
      if (slots.length > 0) {
        this.#isDrained = true
        const tasks = await this.#claim(slots.length)
        const isFull = tasks.length === slots.length
        if (isFull) this.#isDrained = false
        for (const slot of slots) {
          const task = tasks.shift()
          if (task) run(task, slot)
          else slot.release()
        }
        if (isFull) continue
      }
      if (this.#hasNews && !this.#isDrained) this.#options.hints?.tasksWait()
      this.#hasNews = false
      // With a limit for the deployment, any task's end on any instance may allow a claim.
      if (this.#options.runningMax !== undefined) this.#isDrained = false
      await this.#wake.promise
    }
  }

  /** Never rejects: a failed claim is retried at the next poll. */
  async #claim(limit: number): Promise<ClaimedTask[]> {
    const { store, runningMax, now, log } = this.#options
    try {
      const tasks = await store.claimNext({ at: now(), limit, runningMax })
      if (this.#isWorking) {
        this.#length = Math.max(0, this.#length - tasks.length)
        return tasks
      }
      // Stopped meanwhile: other instances can run them at once.
      for (const task of tasks) await store.putBack(task)
    } catch (err) {
      log.warn({ err }, 'claiming waiting tasks failed, trying again')
    }
    return []
  }
}
