import { setTimeout as pause } from 'node:timers/promises'
import { UnavailableError } from './errors.ts'
import type { Logger } from './ports.ts'
import { until } from './until.ts'

export interface AvailabilityOptions {
  /** Throws while workers are unavailable: `WorkerBackend.check`. */
  check: () => Promise<void>
  /** Called with false before any task waits, and with true once `check` has passed. */
  onChange: (isAvailable: boolean) => void
  log: Logger
  retryMs: number
  retryMaxMs: number
}

/**
 * Circuit breaker of the worker backend. While it is open, all tasks wait; it closes once `check`
 * passes. Pauses grow until a task gets a worker, since `check` does not detect every cause.
 */
export class Availability {
  readonly #options: AvailabilityOptions
  readonly #closing = new AbortController()
  #waitMs: number
  #problem: string | undefined
  #available: PromiseWithResolvers<void> | undefined

  constructor(options: AvailabilityOptions) {
    this.#options = options
    this.#waitMs = options.retryMs
  }

  /** Why workers are unavailable, in a sentence; undefined while they are available. */
  get problem(): string | undefined {
    return this.#problem
  }

  /** Notes that a step failed since workers are unavailable. */
  failed(err: UnavailableError): void {
    this.#problem = err.message
    if (this.#available) return
    this.#available = Promise.withResolvers<void>()
    this.#options.log.warn({ err }, 'workers are unavailable: tasks wait')
    this.#options.onChange(false)
    void this.#recover(this.#available)
  }

  /** Notes that a task got its worker. */
  passed(): void {
    this.#waitMs = this.#options.retryMs
  }

  /** Waits until workers are available. Rejects when `signal` aborts. */
  async available(signal: AbortSignal): Promise<void> {
    if (this.#available) await until(this.#available.promise, signal)
  }

  close(): void {
    this.#closing.abort()
  }

  /** Never rejects. */
  async #recover(available: PromiseWithResolvers<void>): Promise<void> {
    const { check, onChange, log, retryMaxMs } = this.#options
    const { signal } = this.#closing
    while (!signal.aborted) {
      await pause(this.#waitMs, undefined, { signal }).catch(() => {})
      this.#waitMs = Math.min(this.#waitMs * 2, retryMaxMs)
      try {
        await check()
        break
      } catch (err) {
        if (err instanceof UnavailableError) this.#problem = err.message
        log.debug({ err }, 'workers are still unavailable')
      }
    }
    if (signal.aborted) return
    log.info({}, 'workers are available again')
    this.#problem = undefined
    this.#available = undefined
    onChange(true)
    available.resolve()
  }
}
