import { once } from 'node:events'
import { setTimeout as pause } from 'node:timers/promises'
import type { Availability } from './availability.ts'
import { Deadline } from './deadline.ts'
import { TaskRunnerError, UnavailableError } from './errors.ts'
import { type Logger, WorkerError } from './ports.ts'
import type { Slot } from './slots.ts'

/** What a task may be hindered at. */
export type Step = 'getting a worker' | 'finding its worker' | 'watching its worker'

/** A task that may be hindered. */
export interface Hindered {
  taskId: string
  /** End the step for good. */
  ends: readonly AbortSignal[]
  /** Ends a pause, so that the step is repeated at once. */
  wake?: AbortSignal
  /** Given to others while the task waits; undefined: the task has its worker, and keeps it. */
  slot?: Slot
  /** Hears what hinders the task, in a sentence; null: nothing any more. */
  onWaiting: (waitingFor: string | null) => void
}

export interface PatienceOptions {
  availability: Availability
  retryMs: number
  retryMaxMs: number
  /** A task that fails at a step for so long, while others pass it, has a trouble of its own. */
  hopelessMs: number
  now: () => number
  log: Logger
}

/** Maximum of one wait that counts, so that a clock set forward makes no task hopeless. */
const WAIT_COUNTED_MAX_MS = 60_000
const WORDS_MAX = 500
/** The longest that a timer takes. */
const FOREVER_MS = 2 ** 31 - 1

/**
 * Repeats the steps of a task's life. A failure of ours (the machine, its disk, the engine, the store) is no outcome: the task
 * waits, and the step is repeated with growing pauses.
 */
export class Patience {
  readonly #options: PatienceOptions
  /** How often each step was passed, by any task. */
  readonly #passes = new Map<Step, number>()

  constructor(options: PatienceOptions) {
    this.#options = options
  }

  /**
   * Repeats `attempt` until it succeeds. Throws a `WorkerError`: that of the attempt, which is the task's own, or
   * `internal_error` when the step failed for too long while others passed it. Rejects when one of the task's `ends` aborts.
   */
  async repeat<T>(step: Step, task: Hindered, attempt: () => Promise<T>): Promise<T> {
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
        log.warn({ err, taskId: task.taskId, step }, 'a task is hindered and waits')
        task.onWaiting(words)
        const began = now()
        await this.#wait(err, waitMs, task)
        waitedMs += Math.min(Math.max(now() - began, 1), WAIT_COUNTED_MAX_MS)
      }
    }
  }

  /** Rejects when one of the task's `ends` aborts. */
  async #wait(err: unknown, waitMs: number, { ends, wake, slot }: Hindered): Promise<void> {
    const { availability } = this.#options
    const isShared = err instanceof UnavailableError
    if (isShared) availability.failed(err)
    slot?.release()
    using ended = new Deadline(FOREVER_MS, ends)
    const { signal } = ended
    // Others try for this task as well, where it waits for what all wait for.
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

/** What an error says to people: the words of one that nobody expected are cut to a line. */
export function wordsOf(err: unknown): string {
  if (err instanceof TaskRunnerError) return err.message
  const words = err instanceof Error ? err.message : String(err)
  const line = words.split('\n', 1)[0] ?? ''
  return `The service met an error and tries again: ${line.slice(0, WORDS_MAX)}`
}

/** Repeats an idempotent step, with growing pauses, until it succeeds. Undefined: `signal` has aborted. */
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
        log.error({ err: worse }, `what is done when ${what} fails failed as well`)
      })
      await pause(waitMs, undefined, { signal }).catch(() => {})
      if (signal.aborted) return undefined
    }
  }
}
