import { once } from 'node:events'
import { setTimeout as pause } from 'node:timers/promises'
import type { Availability } from './availability.ts'
import { Deadline } from './deadline.ts'
import { TaskRunnerError, UnavailableError } from './errors.ts'
import { type Logger, WorkerError } from './ports.ts'
import type { Slot } from './slots.ts'

/** Steps that are repeated while the service cannot do them. */
export type Step = 'getting a worker' | 'finding its worker' | 'watching its worker'

export interface StepOptions {
  taskId: string
  /** Signals that end the step. */
  ends: readonly AbortSignal[]
  /** Ends a pause: the step is repeated at once. */
  wake?: AbortSignal
  /** Released while the task waits; undefined: the task has a worker and keeps its slot. */
  slot?: Slot
  /** Called with what the task waits for, in a sentence; null: it waits no longer. */
  onWaiting: (waitingFor: string | null) => void
}

export interface PatienceOptions {
  availability: Availability
  retryMs: number
  retryMaxMs: number
  /** A task that fails at a step for this long while others pass it is failed. */
  hopelessMs: number
  now: () => number
  log: Logger
}

/** Maximum counted of one wait: a clock set forward must not fail a task. */
const WAIT_COUNTED_MAX_MS = 60_000
const WORDS_MAX = 500
/** Maximum delay of a Node timer. */
const FOREVER_MS = 2 ** 31 - 1

/**
 * Repeats a task's steps. A failure of the machine, its disk, the engine or the store is no
 * outcome: the task waits, and the step is repeated with growing pauses.
 */
export class Patience {
  readonly #options: PatienceOptions
  /** Number of times that any task has passed each step. */
  readonly #passes = new Map<Step, number>()

  constructor(options: PatienceOptions) {
    this.#options = options
  }

  /**
   * Repeats `attempt` until it succeeds. Throws its `WorkerError`, which is the task's own failure,
   * or one with `internal_error` if the step fails for `hopelessMs` while other tasks pass it.
   * Rejects when a signal of `ends` aborts.
   */
  async repeat<T>(step: Step, task: StepOptions, attempt: () => Promise<T>): Promise<T> {
    const { retryMs, retryMaxMs, hopelessMs, now, log } = this.#options
    const passesBefore = this.#passesOf(step)
    let waitedMs = 0
    for (let waitMs = retryMs; ; waitMs = Math.min(waitMs * 2, retryMaxMs)) {
      try {
        const result = await attempt()
        this.#passes.set(step, this.#passesOf(step) + 1)
        if (waitedMs > 0) task.onWaiting(null)
        return result
      } catch (err) {
        for (const end of task.ends) end.throwIfAborted()
        if (err instanceof WorkerError) throw err
        const words = wordsOf(err)
        if (waitedMs >= hopelessMs && this.#passesOf(step) > passesBefore) {
          throw new WorkerError('internal_error', words, { cause: err })
        }
        log.warn({ err, taskId: task.taskId, step }, 'a step failed, the task waits')
        task.onWaiting(words)
        const began = now()
        await this.#wait(err, waitMs, task)
        waitedMs += Math.min(Math.max(now() - began, 1), WAIT_COUNTED_MAX_MS)
      }
    }
  }

  /** Rejects when a signal of `ends` aborts. */
  async #wait(err: unknown, waitMs: number, { ends, wake, slot }: StepOptions): Promise<void> {
    const { availability } = this.#options
    const isShared = err instanceof UnavailableError
    if (isShared) availability.failed(err)
    slot?.release()
    using ended = new Deadline(FOREVER_MS, ends)
    const { signal } = ended
    // While workers are unavailable, `availability` polls for all tasks: no pause of its own.
    if (!(isShared && slot)) {
      using pausing = new Deadline(waitMs, wake && !wake.aborted ? [signal, wake] : [signal])
      if (!pausing.signal.aborted) await once(pausing.signal, 'abort')
      signal.throwIfAborted()
    }
    if (!slot) return
    await availability.available(signal)
    await slot.retake(signal)
  }

  #passesOf(step: Step): number {
    return this.#passes.get(step) ?? 0
  }
}

/** Returns an error's message for people: of an unexpected one, the first line. */
export function wordsOf(err: unknown): string {
  if (err instanceof TaskRunnerError) return err.message
  const words = err instanceof Error ? err.message : String(err)
  const line = words.split('\n', 1)[0] ?? ''
  return `The service retries after an error: ${line.slice(0, WORDS_MAX)}`
}

/** Repeats an idempotent step with growing pauses. Undefined: `signal` has aborted. */
export async function persistently<T>(
  what: string,
  step: () => Promise<T>,
  options: {
    signal: AbortSignal
    retryMs: number
    retryMaxMs: number
    onFailure?: (err: unknown) => Promise<void>
    log: Logger
  },
): Promise<T | undefined> {
  const { signal, retryMs, retryMaxMs, onFailure, log } = options
  for (let waitMs = retryMs; ; waitMs = Math.min(waitMs * 2, retryMaxMs)) {
    try {
      return await step()
    } catch (err) {
      log.error({ err }, `${what} failed, trying again`)
      await onFailure?.(err).catch((worse: unknown) => {
        log.error({ err: worse }, `recovering after ${what} failed`)
      })
      await pause(waitMs, undefined, { signal }).catch(() => {})
      if (signal.aborted) return undefined
    }
  }
}
