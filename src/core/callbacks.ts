import type {
  AttemptResult,
  CallbackFacts,
  CallbackSender,
  DeliveryContent,
  DeliveryStore,
  DueDelivery,
  Logger,
  NewDelivery,
} from './ports.ts'
import { DamagedTaskError } from './ports.ts'
import { longestDelaysMs, type RetrySchedule, retryDelayMs } from './retry.ts'
import { type CallbackStatus, type Task, traceOf } from './task.ts'

/** Maximum delay taken from a receiver's `Retry-After`. */
const RETRY_AFTER_MAX_MS = 24 * 60 * 60 * 1000
/** Maximum concurrent attempts. */
const ATTEMPTS_MAX = 192
/** Maximum concurrent attempts to an origin whose last attempt did not time out; others get one. */
const ATTEMPTS_PER_ORIGIN_MAX = 16
/** Maximum concurrent attempts to all origins whose last attempt timed out, or that are new. */
const ATTEMPTS_TO_OTHERS_MAX = 128
/** Maximum concurrent attempts to all origins whose last attempt timed out. */
const ATTEMPTS_TO_TIMED_OUT_MAX = 64
/** Maximum origins whose last result is kept. */
const ORIGINS_KNOWN_MAX = 1_000
/** Duration from which an attempt without a response counts as timed out. */
const TIMED_OUT_MS = 1_000
/** Maximum sleep, in case of a clock jump or a missed wake-up. */
const POLL_MS = 30_000
/** Minimum step back of the clock that is handled; NTP corrects by less. */
const CLOCK_JUMP_MS = 2_000
/** Pause after a failure of the store. */
const STORE_RETRY_MS = 1_000

/** Returns the facts that a callback's headers carry. */
export function factsOf(
  ended: Pick<Task, 'status' | 'reason' | 'exitCode' | 'startedAt' | 'finishedAt'>,
): CallbackFacts {
  const { status, reason, exitCode, startedAt, finishedAt } = ended
  const hasRun = startedAt !== null && finishedAt !== null
  return { status, reason, exitCode, durationMs: hasRun ? finishedAt - startedAt : null }
}

/**
 * Returns the delivery's next state. 2xx: delivered. 410 or a blocked address: given up. 413:
 * retried at once with the end of the log. Else retried by schedule, later if `Retry-After` says so
 * (Standard Webhooks, "Delivery"). An attempt by hand does not change the schedule.
 */
export function afterAttempt(
  result: AttemptResult,
  options: {
    /** Number of the attempt in the schedule. */
    attempt: number
    manual: boolean
    /** When the schedule continues after an attempt by hand; null: it has ended. */
    resumeAt: number | null
    deliveredBefore: boolean
    /** The attempt sent only the end of the log. */
    isCut: boolean
    now: number
    schedule: RetrySchedule
  },
): { status: Exclude<CallbackStatus, 'none'>; nextAttemptAt: number | null } {
  const { statusCode } = result
  if (statusCode !== null && statusCode >= 200 && statusCode < 300) {
    return { status: 'delivered', nextAttemptAt: null }
  }
  // A failed repetition does not undo a delivery.
  if (options.deliveredBefore) return { status: 'delivered', nextAttemptAt: null }
  const givenUp = { status: 'given_up', nextAttemptAt: null } as const
  if (statusCode === 410 || result.blocked) return givenUp
  if (statusCode === 413 && !options.isCut) return { status: 'pending', nextAttemptAt: options.now }
  if (options.manual) {
    return options.resumeAt === null
      ? givenUp
      : { status: 'pending', nextAttemptAt: options.resumeAt }
  }
  const delayMs = retryDelayMs(options.attempt, options.schedule)
  if (delayMs === undefined) return givenUp
  const waitMs = Math.max(delayMs, Math.min(result.retryAfterMs ?? 0, RETRY_AFTER_MAX_MS))
  return { status: 'pending', nextAttemptAt: options.now + waitMs }
}

/**
 * Attempts due deliveries. All state that must survive a crash is in the store. A lease lasts
 * longer than an attempt may take, so that no two instances attempt a delivery at once.
 */
export class CallbackDispatcher {
  readonly #store: DeliveryStore
  readonly #sender: CallbackSender
  readonly #schedule: RetrySchedule
  readonly #attemptTimeoutMs: number
  readonly #leaseMs: number
  readonly #now: () => number
  readonly #isClockOurs: boolean
  readonly #log: Logger
  readonly #underWay = new Map<string, number>()
  /** Whether each origin's last attempt timed out; least recently attempted first. */
  readonly #hasTimedOut = new Map<string, boolean>()
  readonly #attempts = new Set<Promise<void>>()
  /** Deliveries whose attempt is under way, by task. */
  readonly #dues = new Map<string, DueDelivery>()
  readonly #abort = new AbortController()
  #clock: { now: number; steady: number }
  #isBounded = false
  #timer: NodeJS.Timeout | undefined
  #pass: Promise<void> | undefined
  #timerAt = Number.POSITIVE_INFINITY
  #again = false
  /** A due delivery exceeded a limit: the end of an attempt wakes the dispatcher. */
  #backlog = false
  #closed = false

  constructor(options: {
    store: DeliveryStore
    sender: CallbackSender
    schedule: RetrySchedule
    /** Timeout of a whole attempt. */
    attemptTimeoutMs: number
    now: () => number
    /** False: `now` is the deployment's clock, whose jumps are handled elsewhere. Default true. */
    isClockOurs?: boolean
    log: Logger
  }) {
    this.#store = options.store
    this.#sender = options.sender
    this.#schedule = options.schedule
    this.#attemptTimeoutMs = options.attemptTimeoutMs
    this.#leaseMs = options.attemptTimeoutMs * 2 + 10_000
    this.#now = options.now
    this.#isClockOurs = options.isClockOurs ?? true
    this.#clock = { now: options.now(), steady: performance.now() }
    this.#log = options.log
  }

  start(): void {
    this.wake()
  }

  /**
   * Returns the delivery to commit with an outcome. Within the limits, it is leased to this
   * instance, which calls `attemptNow` after the commit; else it waits its turn.
   */
  prepare(callbackUrl: string): NewDelivery {
    const { origin } = new URL(callbackUrl)
    const room = !this.#closed && this.#hasRoom(origin)
    if (room) this.#count(origin, 1)
    else this.#backlog = true
    return {
      // Not the task id, which may have dots: they separate the parts of the signed content.
      webhookId: `msg_${crypto.randomUUID().replaceAll('-', '')}`,
      origin,
      leaseUntil: room ? this.#now() + this.#leaseMs : null,
    }
  }

  /** Undoes `prepare` after a commit that did not happen. */
  abandon(delivery: NewDelivery): void {
    if (delivery.leaseUntil !== null) this.#count(delivery.origin, -1)
  }

  /** Makes the first attempt after the commit. Without `content`, reads it from the store. */
  async attemptNow(
    taskId: string,
    delivery: NewDelivery,
    content?: DeliveryContent,
  ): Promise<void> {
    if (delivery.leaseUntil === null) {
      this.wake()
      return
    }
    if (this.#closed) {
      this.abandon(delivery)
      await this.#store.release(taskId, delivery.leaseUntil)
      return
    }
    await this.#track(
      this.#attempt(
        {
          taskId,
          webhookId: delivery.webhookId,
          origin: delivery.origin,
          attempts: 0,
          manualAttempts: 0,
          manual: false,
          resumeAt: null,
          deliveredBefore: false,
          leaseUntil: delivery.leaseUntil,
        },
        content,
      ),
    )
  }

  /** Queues an attempt by hand, whatever the delivery's status. Safe to repeat. */
  async redeliver(taskId: string): Promise<'queued' | 'in_flight' | undefined> {
    const answer = await this.#store.redeliver(taskId, this.#now())
    if (answer === 'queued') this.wake()
    return answer
  }

  /** Starts due attempts, now or after the pass under way. */
  wake(): void {
    if (this.#closed) return
    if (this.#pass) {
      this.#again = true
      return
    }
    clearTimeout(this.#timer)
    this.#timerAt = Number.POSITIVE_INFINITY
    this.#pass = this.#startDue()
      .catch((err: unknown) => {
        this.#log.error({ err }, 'reading due deliveries failed, trying again')
        return STORE_RETRY_MS
      })
      .then((sleepMs) => {
        this.#pass = undefined
        if (this.#again) {
          this.#again = false
          this.wake()
        } else {
          this.#wakeIn(sleepMs)
        }
      })
  }

  /** Waits at most `graceMs` for attempts under way, then aborts them; they are retried later. */
  async close(graceMs: number): Promise<void> {
    this.#closed = true
    clearTimeout(this.#timer)
    const timer = setTimeout(() => this.#abort.abort(), graceMs)
    await this.#pass
    await Promise.all(this.#attempts)
    clearTimeout(timer)
  }

  #wakeIn(sleepMs: number): void {
    // By the steady clock: the other one may be set back.
    const at = performance.now() + sleepMs
    if (this.#closed || at >= this.#timerAt) return
    clearTimeout(this.#timer)
    this.#timerAt = at
    this.#timer = setTimeout(() => this.wake(), sleepMs)
  }

  /** Starts due attempts up to the limits. Returns how long to sleep, in ms. */
  async #startDue(): Promise<number> {
    this.#backlog = false
    await this.#handleClockJump()
    await this.#boundOnce()
    while (!this.#closed) {
      if (this.#attemptsUnderWay().all >= ATTEMPTS_MAX) {
        this.#backlog = true
        break
      }
      const due = await this.#store.takeDue({
        now: this.#now(),
        leaseUntil: this.#now() + this.#leaseMs,
        ...this.#originsWithRoom(),
      })
      if (!due) break
      // A clock set forward ended the lease, while our attempt goes on.
      const ours = this.#dues.get(due.taskId)
      if (ours) {
        ours.leaseUntil = due.leaseUntil
        continue
      }
      this.#count(due.origin, 1)
      void this.#track(this.#attempt(due))
    }
    const nextDueAt = await this.#store.nextDueAt()
    if (nextDueAt === undefined) return POLL_MS
    // Due and not started: it exceeded a limit, and the end of an attempt wakes us earlier.
    return Math.min(Math.max(nextDueAt - this.#nowWithoutJumps(), 0) || STORE_RETRY_MS, POLL_MS)
  }

  /** Returns the time without jumps since `#handleClockJump`, which moves the due times. */
  #nowWithoutJumps(): number {
    if (!this.#isClockOurs) return this.#now()
    return this.#clock.now + (performance.now() - this.#clock.steady)
  }

  /** Moves due times along with a clock that was set back, which would delay every delivery. */
  async #handleClockJump(): Promise<void> {
    if (!this.#isClockOurs) return
    const now = this.#now()
    const steady = performance.now()
    const jumpMs = now - this.#clock.now - (steady - this.#clock.steady)
    this.#clock = { now, steady }
    if (jumpMs > -CLOCK_JUMP_MS) return
    this.#log.warn({ jumpMs }, 'the clock was set back')
    await this.#store.shiftDue(jumpMs)
  }

  /** Corrects due times once, after a clock that was set back while the service was down. */
  async #boundOnce(): Promise<void> {
    if (this.#isBounded) return
    await this.#store.boundDue({
      now: this.#now(),
      toleranceMs: CLOCK_JUMP_MS,
      longestDelaysMs: longestDelaysMs(this.#schedule),
    })
    this.#isBounded = true
  }

  /** Undefined: nothing to send. If the stored content is damaged, the delivery is given up. */
  async #contentOf(due: DueDelivery): Promise<DeliveryContent | undefined> {
    try {
      return await this.#store.content(due.taskId)
    } catch (err) {
      if (!(err instanceof DamagedTaskError)) throw err
      const attempt = { number: due.attempts + 1, startedAt: this.#now(), durationMs: 0 }
      await this.#store.recordAttempt(
        due.taskId,
        { ...attempt, statusCode: null, error: err.message, manual: due.manual },
        { status: 'given_up', nextAttemptAt: null },
        due.leaseUntil,
      )
      return undefined
    }
  }

  async #attempt(due: DueDelivery, known?: DeliveryContent): Promise<void> {
    const { taskId } = due
    this.#dues.set(taskId, due)
    try {
      const content = known ?? (await this.#contentOf(due))
      if (!content) return
      const startedAt = this.#now()
      // Too little of the lease is left: once it ends, the delivery is due again, to any instance.
      if (startedAt + this.#attemptTimeoutMs > due.leaseUntil) {
        return this.#wakeIn(Math.max(due.leaseUntil - startedAt, 0))
      }
      const steadyStart = performance.now()
      const result = await this.#sender.send(
        { ...content, webhookId: due.webhookId, timestamp: Math.floor(startedAt / 1000) },
        this.#abort.signal,
      )
      if (this.#abort.signal.aborted) {
        await this.#store.release(taskId, due.leaseUntil)
        return
      }
      const durationMs = Math.round(performance.now() - steadyStart)
      this.#noteResult(due.origin, result.statusCode === null && durationMs > TIMED_OUT_MS)
      // Before the due time is stored: a past jump must not move it.
      await this.#handleClockJump()
      const number = due.attempts + 1
      const next = afterAttempt(result, {
        attempt: number - due.manualAttempts,
        manual: due.manual,
        resumeAt: due.resumeAt,
        deliveredBefore: due.deliveredBefore,
        isCut: content.isCut,
        now: this.#now(),
        schedule: this.#schedule,
      })
      const { statusCode, error } = result
      await this.#store.recordAttempt(
        taskId,
        { number, startedAt, durationMs, statusCode, error, manual: due.manual },
        next,
        due.leaseUntil,
      )
      const trace = traceOf(content)
      const fields = { taskId, ...trace, attempt: number, statusCode, error, durationMs }
      if (next.status === 'delivered') this.#log.info(fields, 'callback delivered')
      else if (next.status === 'given_up') this.#log.error(fields, 'callback given up')
      else
        this.#log.warn({ ...fields, nextAttemptAt: next.nextAttemptAt }, 'callback attempt failed')
      const { nextAttemptAt } = next
      if (nextAttemptAt !== null) this.#wakeIn(Math.max(nextAttemptAt - this.#nowWithoutJumps(), 0))
    } catch (err) {
      // The attempt is repeated once the lease ends: at least once, never lost.
      this.#log.error({ err, taskId }, 'callback attempt could not be made or recorded')
      this.#wakeIn(Math.max(due.leaseUntil - this.#now(), STORE_RETRY_MS))
    } finally {
      this.#dues.delete(taskId)
      this.#count(due.origin, -1)
      if (this.#backlog) this.wake()
    }
  }

  async #track(attempt: Promise<void>): Promise<void> {
    this.#attempts.add(attempt)
    await attempt
    this.#attempts.delete(attempt)
  }

  #hasRoom(origin: string, { all, others, timedOut } = this.#attemptsUnderWay()): boolean {
    if (all >= ATTEMPTS_MAX) return false
    const count = this.#underWay.get(origin) ?? 0
    const hasTimedOut = this.#hasTimedOut.get(origin)
    if (hasTimedOut === false) return count < ATTEMPTS_PER_ORIGIN_MAX
    if (count > 0 || others >= ATTEMPTS_TO_OTHERS_MAX) return false
    return !hasTimedOut || timedOut < ATTEMPTS_TO_TIMED_OUT_MAX
  }

  /** Returns the origins that the next attempt may go to: `onlyOrigins`, or all but some. */
  #originsWithRoom(): { exceptOrigins: string[]; onlyOrigins?: string[] } {
    const known = [...new Set([...this.#underWay.keys(), ...this.#hasTimedOut.keys()])]
    const underWay = this.#attemptsUnderWay()
    const exceptOrigins = known.filter((origin) => !this.#hasRoom(origin, underWay))
    if (exceptOrigins.length > 0) this.#backlog = true
    if (underWay.others < ATTEMPTS_TO_OTHERS_MAX) return { exceptOrigins }
    const onlyOrigins = known.filter((origin) => this.#hasRoom(origin, underWay))
    return { exceptOrigins: [], onlyOrigins }
  }

  /** Counts all attempts, those to origins that timed out or are new, and those that timed out. */
  #attemptsUnderWay(): { all: number; others: number; timedOut: number } {
    let [all, others, timedOut] = [0, 0, 0]
    for (const [origin, count] of this.#underWay) {
      const hasTimedOut = this.#hasTimedOut.get(origin)
      all += count
      if (hasTimedOut !== false) others += count
      if (hasTimedOut) timedOut += count
    }
    return { all, others, timedOut }
  }

  #noteResult(origin: string, hasTimedOut: boolean): void {
    this.#hasTimedOut.delete(origin)
    this.#hasTimedOut.set(origin, hasTimedOut)
    const [oldest] = this.#hasTimedOut.keys()
    if (this.#hasTimedOut.size > ORIGINS_KNOWN_MAX && oldest !== undefined) {
      this.#hasTimedOut.delete(oldest)
    }
  }

  #count(origin: string, by: 1 | -1): void {
    const count = (this.#underWay.get(origin) ?? 0) + by
    if (count === 0) this.#underWay.delete(origin)
    else this.#underWay.set(origin, count)
  }
}
