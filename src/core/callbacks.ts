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

/** A receiver may ask us to wait, but not for ever. */
const RETRY_AFTER_MAX_MS = 24 * 60 * 60 * 1000
/** Attempts under way at a time, in all. */
const ATTEMPTS_MAX = 192
/** Attempts to an origin that answered last. Any other gets one at a time, so that a dead receiver delays only itself. */
const ATTEMPTS_PER_ORIGIN_MAX = 16
/** Attempts to all origins that did not answer last, or were not called yet. */
const ATTEMPTS_TO_OTHERS_MAX = 128
/** Attempts to all origins that did not answer last. */
const ATTEMPTS_TO_SILENT_MAX = 64
/** Origins whose last answer is remembered. */
const ORIGINS_KNOWN_MAX = 1_000
/** Who has not answered by then hangs, or its name server does; refused connections are told sooner. */
const SILENT_MS = 1_000
/** The longest the dispatcher sleeps: bounds what a clock jump or a missed wake-up can cost. */
const POLL_MS = 30_000
/** Smaller steps are the clock being kept right. */
const CLOCK_JUMP_MS = 2_000
/** After the store failed. */
const STORE_RETRY_MS = 1_000

/** What the headers of a callback say of its task. */
export function factsOf(
  ended: Pick<Task, 'status' | 'reason' | 'exitCode' | 'startedAt' | 'finishedAt'>,
): CallbackFacts {
  const { status, reason, exitCode, startedAt, finishedAt } = ended
  const hasRun = startedAt !== null && finishedAt !== null
  return { status, reason, exitCode, durationMs: hasRun ? finishedAt - startedAt : null }
}

/**
 * What follows an attempt. 2xx delivers. 410 and a blocked address end it. After 413 the end of the log is sent at once.
 * Everything else is retried by schedule, later when the receiver says so (Standard Webhooks, "Delivery"). An attempt
 * that a person asked for leaves the schedule as it was.
 */
export function afterAttempt(
  result: AttemptResult,
  options: {
    /** Number of the attempt in the schedule. */
    attempt: number
    manual: boolean
    /** When the schedule goes on after an attempt by hand; null where it has ended. */
    resumeAt: number | null
    deliveredBefore: boolean
    /** It had only the end of the log. */
    isCut: boolean
    now: number
    schedule: RetrySchedule
  },
): { status: Exclude<CallbackStatus, 'none'>; nextAttemptAt: number | null } {
  const { statusCode } = result
  if (statusCode !== null && statusCode >= 200 && statusCode < 300) {
    return { status: 'delivered', nextAttemptAt: null }
  }
  // Whoever has received it once has received it, whatever a repetition gave.
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
 * Sends outcomes. The store says what is due; this holds nothing that a crash could lose. An attempt
 * holds a lease longer than the attempt may take, so that no two instances attempt one delivery at once.
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
  /** Whether an origin kept us waiting for nothing the last time; those called last come last. */
  readonly #isSilent = new Map<string, boolean>()
  readonly #attempts = new Set<Promise<void>>()
  /** Of the attempts under way, by task. */
  readonly #dues = new Map<string, DueDelivery>()
  readonly #abort = new AbortController()
  #clock: { now: number; steady: number }
  #isBounded = false
  #timer: NodeJS.Timeout | undefined
  #draining: Promise<void> | undefined
  #timerAt = Number.POSITIVE_INFINITY
  #again = false
  /** Something due found no room: the next attempt that ends makes some. */
  #backlog = false
  #closed = false

  constructor(options: {
    store: DeliveryStore
    sender: CallbackSender
    schedule: RetrySchedule
    /** The longest a whole attempt takes. */
    attemptTimeoutMs: number
    now: () => number
    /** False: others go by it as well, and it is looked after elsewhere. Default true. */
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
   * A delivery for a task about to be committed. When there is room, its lease lets us make the first
   * attempt right after the commit with `attemptNow`; otherwise it waits its turn.
   */
  prepare(callbackUrl: string): NewDelivery {
    const { origin } = new URL(callbackUrl)
    const room = !this.#closed && this.#hasRoom(origin)
    if (room) this.#count(origin, 1)
    else this.#backlog = true
    return {
      // Names nothing of the task: a caller's id may hold dots, which the signed content forbids.
      webhookId: `msg_${crypto.randomUUID().replaceAll('-', '')}`,
      origin,
      leaseUntil: room ? this.#now() + this.#leaseMs : null,
    }
  }

  /** Gives back the room that `prepare` took, when the commit did not happen. */
  abandon(delivery: NewDelivery): void {
    if (delivery.leaseUntil !== null) this.#count(delivery.origin, -1)
  }

  /**
   * The first attempt of a delivery just committed, whose `content` is read from the store unless it is given. Settles when
   * it has ended; never rejects.
   */
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
          ...{ attempts: 0, manualAttempts: 0 },
          ...{ manual: false, resumeAt: null, deliveredBefore: false },
          leaseUntil: delivery.leaseUntil,
        },
        content,
      ),
    )
  }

  /**
   * Queues an attempt by hand, also after the delivery was given up or made. Schedule and count stay as they are. Safe to
   * repeat.
   */
  async redeliver(taskId: string): Promise<'queued' | 'in_flight' | undefined> {
    const answer = await this.#store.redeliver(taskId, this.#now())
    if (answer === 'queued') this.wake()
    return answer
  }

  /** Looks for due deliveries, now or after the look that is under way. */
  wake(): void {
    if (this.#closed) return
    if (this.#draining) {
      this.#again = true
      return
    }
    clearTimeout(this.#timer)
    this.#timerAt = Number.POSITIVE_INFINITY
    this.#draining = this.#drain()
      .catch((err: unknown) => {
        this.#log.error({ err }, 'reading due deliveries failed, trying again')
        return STORE_RETRY_MS
      })
      .then((sleepMs) => {
        this.#draining = undefined
        if (this.#again) {
          this.#again = false
          this.wake()
        } else {
          this.#wakeIn(sleepMs)
        }
      })
  }

  /** Waits for attempts under way, at most `graceMs`, then aborts them; they are made again later. */
  async close(graceMs: number): Promise<void> {
    this.#closed = true
    clearTimeout(this.#timer)
    const timer = setTimeout(() => this.#abort.abort(), graceMs)
    await this.#draining
    await Promise.all(this.#attempts)
    clearTimeout(timer)
  }

  #wakeIn(sleepMs: number): void {
    // The clock may be set: of two times by it, the later may look like the earlier.
    const at = performance.now() + sleepMs
    if (this.#closed || at >= this.#timerAt) return
    clearTimeout(this.#timer)
    this.#timerAt = at
    this.#timer = setTimeout(() => this.wake(), sleepMs)
  }

  /** Starts attempts while there is room and something due. Returns for how long to sleep, in ms. */
  async #drain(): Promise<number> {
    this.#backlog = false
    await this.#heedClock()
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
      // Its lease ran out by a clock set forth, yet its attempt is ours and goes on.
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
    // Due, yet not taken: there was no room, and the end of an attempt wakes us before this does.
    return Math.min(Math.max(nextDueAt - this.#heededNow(), 0) || STORE_RETRY_MS, POLL_MS)
  }

  /** The time by the clock as it was heeded last: what the store holds was not moved yet along with a jump since then. */
  #heededNow(): number {
    if (!this.#isClockOurs) return this.#now()
    return this.#clock.now + (performance.now() - this.#clock.steady)
  }

  /** A clock that is set back would put off every delivery by as much: they are moved along with it. */
  async #heedClock(): Promise<void> {
    if (!this.#isClockOurs) return
    const now = this.#now()
    const steady = performance.now()
    const jumpMs = now - this.#clock.now - (steady - this.#clock.steady)
    this.#clock = { now, steady }
    if (jumpMs > -CLOCK_JUMP_MS) return
    this.#log.warn({ jumpMs }, 'the clock was set back')
    await this.#store.shiftDue(jumpMs)
  }

  /**
   * A clock that was set back while the service was down would put off what was pending by as much.
   */
  async #boundOnce(): Promise<void> {
    if (this.#isBounded) return
    await this.#store.boundDue({
      now: this.#now(),
      toleranceMs: CLOCK_JUMP_MS,
      longestDelaysMs: longestDelaysMs(this.#schedule),
    })
    this.#isBounded = true
  }

  /** Undefined: there is nothing to send. Where nobody can know any more what that is, the delivery is given up. */
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
      // We were held up, and it may be another instance's by now: whoever looks when the lease is over has it.
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
      this.#remember(due.origin, result.statusCode === null && durationMs > SILENT_MS)
      // What is written now must not be moved by a jump that has happened already.
      await this.#heedClock()
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
      if (nextAttemptAt !== null) this.#wakeIn(Math.max(nextAttemptAt - this.#heededNow(), 0))
    } catch (err) {
      // The lease runs out and the attempt is made again: at least once, never lost.
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

  #hasRoom(origin: string, { all, others, silent } = this.#attemptsUnderWay()): boolean {
    if (all >= ATTEMPTS_MAX) return false
    const count = this.#underWay.get(origin) ?? 0
    const isSilent = this.#isSilent.get(origin)
    if (isSilent === false) return count < ATTEMPTS_PER_ORIGIN_MAX
    if (count > 0 || others >= ATTEMPTS_TO_OTHERS_MAX) return false
    return !isSilent || silent < ATTEMPTS_TO_SILENT_MAX
  }

  /** Which origins an attempt may go to next: some alone, or all but some. */
  #originsWithRoom(): { exceptOrigins: string[]; onlyOrigins?: string[] } {
    const known = [...new Set([...this.#underWay.keys(), ...this.#isSilent.keys()])]
    const underWay = this.#attemptsUnderWay()
    const exceptOrigins = known.filter((origin) => !this.#hasRoom(origin, underWay))
    if (exceptOrigins.length > 0) this.#backlog = true
    if (underWay.others < ATTEMPTS_TO_OTHERS_MAX) return { exceptOrigins }
    const onlyOrigins = known.filter((origin) => this.#hasRoom(origin, underWay))
    return { exceptOrigins: [], onlyOrigins }
  }

  /** All of them, those to origins that did not answer last, and those of them to origins that kept us waiting. */
  #attemptsUnderWay(): { all: number; others: number; silent: number } {
    let [all, others, silent] = [0, 0, 0]
    for (const [origin, count] of this.#underWay) {
      const isSilent = this.#isSilent.get(origin)
      all += count
      if (isSilent !== false) others += count
      if (isSilent) silent += count
    }
    return { all, others, silent }
  }

  #remember(origin: string, isSilent: boolean): void {
    this.#isSilent.delete(origin)
    this.#isSilent.set(origin, isSilent)
    const [oldest] = this.#isSilent.keys()
    if (this.#isSilent.size > ORIGINS_KNOWN_MAX && oldest !== undefined) {
      this.#isSilent.delete(oldest)
    }
  }

  #count(origin: string, by: 1 | -1): void {
    const count = (this.#underWay.get(origin) ?? 0) + by
    if (count === 0) this.#underWay.delete(origin)
    else this.#underWay.set(origin, count)
  }
}
