/** Counts the tasks that run on this instance at a time. Those that come back go before new ones. */
export class Slots {
  readonly #limit: number
  readonly #onFree: () => void
  readonly #returning: Array<() => void> = []
  #taken = 0

  /** `onFree` is called when a new task may have a slot. */
  constructor(limit: number, onFree: () => void) {
    this.#limit = limit
    this.#onFree = onFree
  }

  /** Slots for new tasks. */
  get free(): number {
    return Math.max(0, this.#limit - this.#taken)
  }

  /** Takes the slots that are free, `max` at most. */
  takeFree(max: number): Slot[] {
    return Array.from({ length: Math.min(this.free, max) }, () => this.take())
  }

  /** Takes a slot, whatever the limit: for a task that runs already. */
  take(): Slot {
    this.#taken += 1
    let isHeld = true
    const release = () => {
      if (!isHeld) return
      isHeld = false
      this.#taken -= 1
      this.#handOn()
    }
    const retake = async (signal: AbortSignal) => {
      await this.#turn(signal)
      isHeld = true
    }
    return { release, retake }
  }

  /** Takes a slot as soon as one is free. Rejects when `signal` aborts. */
  async #turn(signal: AbortSignal): Promise<void> {
    signal.throwIfAborted()
    if (this.free > 0 && this.#returning.length === 0) {
      this.#taken += 1
      return
    }
    const turn = Promise.withResolvers<void>()
    const onAbort = () => {
      this.#returning.splice(this.#returning.indexOf(turn.resolve), 1)
      turn.reject(signal.reason)
    }
    this.#returning.push(turn.resolve)
    signal.addEventListener('abort', onAbort, { once: true })
    await turn.promise.finally(() => signal.removeEventListener('abort', onAbort))
  }

  #handOn(): void {
    while (this.free > 0) {
      const next = this.#returning.shift()
      if (!next) break
      this.#taken += 1
      next()
    }
    if (this.free > 0) this.#onFree()
  }
}

/** A place among the tasks that run at a time. */
export interface Slot {
  /** Gives the place to others. Idempotent. */
  release(): void
  /** Takes a place again after `release`, before any task that has had none. Rejects when `signal` aborts. */
  retake(signal: AbortSignal): Promise<void>
}
