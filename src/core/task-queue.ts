import type { ClaimedTask, Hints, Logger, TaskStore } from './ports.ts'
import { type Slot, Slots } from './slots.ts'

/** Maximum tasks claimed at once, so that instances that hear of many tasks share them. */
const CLAIMED_AT_ONCE = 16
/** Pause between looks at the table: a hint of what happens in between may get lost. */
const LOOK_MS = 1_000
/** Pause between counts of what waits, where other instances take tasks in as well. */
const COUNT_MS = 2_000

export interface TaskQueueOptions {
  store: Pick<TaskStore, 'claimNext' | 'putBack' | 'countQueued'>
  /** Tells the other instances. Undefined: nobody else works on these tasks. */
  hints?: Hints | undefined
  /** Maximum tasks that run at a time on this instance. */
  concurrency: number
  /** Maximum tasks that run at a time on all instances. */
  runningMax?: number | undefined
  /** Tasks that wait at the start. */
  length: number
  /** Maximum tasks that wait; what is beyond is not counted. */
  queuedMax: number
  now: () => number
  log: Logger
}

/**
 * The queue as this instance sees it. The queue itself is the table of tasks: what waits is a row
 * with status `queued`. While there is room, this claims the next ones, woken by what is heard and
 * by a look each second, and it counts the slots of all tasks that run here.
 */
export class TaskQueue {
  readonly #options: TaskQueueOptions
  readonly #slots: Slots
  #length: number
  #isHeld = false
  /** The last claim got less than there was room for, and nothing has been heard since. */
  #isDrained = false
  /** Tasks were added here since others were last told. */
  #isUntold = false
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

  /** Tasks that wait, on all instances. */
  get length(): number {
    return this.#length
  }

  /** Notes that a task was stored here, and looks for what can be claimed. */
  added(): void {
    this.#length += 1
    this.#isUntold = true
    this.look()
  }

  /** Notes that a waiting task was ended here. */
  removed(): void {
    this.#length = Math.max(0, this.#length - 1)
  }

  /** Looks for waiting tasks, if there is room. */
  look(): void {
    this.#isDrained = false
    this.#wake.resolve()
  }

  /** Takes a slot, whatever the limit: for a task that runs already. */
  takeSlot(): Slot {
    return this.#slots.take()
  }

  /** Calls `run` with each task claimed, which holds its slot until it is released. */
  start(run: (task: ClaimedTask, slot: Slot) => void): void {
    this.#isWorking = true
    this.#claiming = this.#claimWhileThereIsRoom(run)
    this.#timers.push(setInterval(() => this.look(), LOOK_MS))
    if (!this.#options.hints) return
    this.#timers.push(setInterval(() => this.#count(), COUNT_MS))
  }

  /** Claims nothing until `goOn`: workers are unavailable. Idempotent, as that is. */
  hold(): void {
    this.#isHeld = true
  }

  goOn(): void {
    this.#isHeld = false
    this.look()
  }

  /** Claims no more. Idempotent. */
  async stop(): Promise<void> {
    this.#isWorking = false
    for (const timer of this.#timers.splice(0)) clearInterval(timer)
    this.#wake.resolve()
    await this.#claiming
  }

  /** Never rejects: what fails is tried again at the next count. */
  async #count(): Promise<void> {
    const { store, queuedMax, log } = this.#options
    try {
      this.#length = await store.countQueued(queuedMax)
    } catch (err) {
      log.warn({ err }, 'counting waiting tasks failed, trying again')
    }
  }

  async #claimWhileThereIsRoom(run: (task: ClaimedTask, slot: Slot) => void): Promise<void> {
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
      if (this.#isUntold && !this.#isDrained) this.#options.hints?.tasksWait()
      this.#isUntold = false
      // Where a limit holds for all instances, the end of any task makes room.
      if (this.#options.runningMax !== undefined) this.#isDrained = false
      await this.#wake.promise
    }
  }

  /** Never rejects: what fails is tried again at the next look. */
  async #claim(limit: number): Promise<ClaimedTask[]> {
    const { store, runningMax, now, log } = this.#options
    try {
      const tasks = await store.claimNext({ at: now(), limit, runningMax })
      if (this.#isWorking) {
        this.#length = Math.max(0, this.#length - tasks.length)
        return tasks
      }
      // Stopped meanwhile: others need not wait for this instance to come back.
      for (const task of tasks) await store.putBack(task)
    } catch (err) {
      log.warn({ err }, 'claiming waiting tasks failed, trying again')
    }
    return []
  }
}
