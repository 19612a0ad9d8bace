/** Limits the tasks that run on this instance. Tasks that retake a slot go before new ones. */
export class Slots {
  readonly #limit: number
  readonly #onFree: () => void
  readonly #returning: Array<() => void> = []
  #taken = 0

  /** `onFree` is called when a slot is free for a new task. */
  constructor(limit: number, onFree: () => void) {
    this.#limit = limit
    this.#onFree = onFree
  }

  /** Slots for new tasks. */
  get free(): number {
    return Math.max(0, this.#limit - this.#taken)
  }

  /** Takes free slots, at most `max`. */
  takeFree(max: number): Slot[] {
    return Array.from({ length: Math.min(this.free, max) }, () => this.take())
  }

  /** Takes a slot even when none is free: for a task that runs already. */
  take(): Slot {
    this.#taken += 1
    let isHeld = true
    const release = () => {
      if (!isHeld) return
      isHeld = false
      this.#taken -= 1
      this.#assignFree()
    }
    const retake = async (signal: AbortSignal) => {
      await this.#takeWhenFree(signal)
      isHeld = true
    }
    return { release, retake }
  }

  /** Takes a slot as soon as one is free. Rejects when `signal` aborts. */
  async #takeWhenFree(signal: AbortSignal): Promise<void> {
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

  #assignFree(): void {
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
  /** Frees the slot for other tasks. Idempotent. */
  release(): void
  /** Takes a slot again, before any new task. Rejects when `signal` aborts. */
  retake(signal: AbortSignal): Promise<void>
}
