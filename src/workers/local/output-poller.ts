import { DRAIN_BYTES, type LocalRun } from './local-run.ts'

const INTERVAL_MS = 4
const INTERVAL_MAX_MS = 50

/** Moves the output of tasks into their logs, the more often the more there is. */
export class OutputPoller {
  readonly #runs: ReadonlyMap<string, LocalRun>
  #timer: NodeJS.Timeout | undefined
  #intervalMs = INTERVAL_MS
  #isClosed = false

  constructor(runs: ReadonlyMap<string, LocalRun>) {
    this.#runs = runs
  }

  /** Polls within `ms`, and goes on while there are runs. */
  soon(ms = INTERVAL_MS): void {
    if (this.#isClosed || (this.#timer && ms >= this.#intervalMs)) return
    clearTimeout(this.#timer)
    this.#intervalMs = ms
    this.#timer = setTimeout(() => {
      this.#timer = undefined
      let moved = 0
      for (const run of this.#runs.values()) moved = Math.max(moved, run.drain())
      if (this.#runs.size === 0) return
      const isMore = moved >= DRAIN_BYTES
      this.soon(isMore ? 0 : moved > 0 ? INTERVAL_MS : Math.min(2 * ms || 1, INTERVAL_MAX_MS))
    }, ms)
  }

  close(): void {
    this.#isClosed = true
    clearTimeout(this.#timer)
  }
}
