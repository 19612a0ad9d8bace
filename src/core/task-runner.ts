import { Availability } from './availability.ts'
import { type CallbackDispatcher, factsOf } from './callbacks.ts'
import { Deadline } from './deadline.ts'
import { StoreFullError, TaskRunnerError } from './errors.ts'
import { type Masker, maskedTail } from './masking.ts'
import { Membership } from './membership.ts'
import {
  CANCELLED,
  failure,
  NO_LOG,
  type TakenLog,
  UNREADABLE_LOG,
  withLastLine,
} from './outcome.ts'
import { Patience, persistently, wordsOf } from './patience.ts'
import type {
  ClaimedTask,
  Cluster,
  Completion,
  DeliveryContent,
  Hints,
  Logger,
  NewDelivery,
  OrphanedTask,
  SeenTask,
  TaskStore,
  Worker,
  WorkerBackend,
} from './ports.ts'
import { DamagedTaskError, WorkerError } from './ports.ts'
import { Provisioning } from './provisioning.ts'
import type { Slot } from './slots.ts'
import { isFinal, type Outcome, type Task, traceOf } from './task.ts'
import type { TaskQueue } from './task-queue.ts'
import type { WorkerSetup } from './worker-setup.ts'

export const LOG_BYTES_KEPT = 5 * 1024 * 1024
/** Maximum size of a log kept in memory for the first attempt, which then reads no store. */
const HELD_LOG_BYTES = 64 * 1024
const PAUSES = { retryMs: 500, retryMaxMs: 15_000 }
const HOPELESS_MS = 600_000
/** Time limit for reading the log of an ended task, retries included. */
const LOG_TIMEOUT_MS = 5_000

export interface TaskRunnerOptions {
  store: TaskStore
  queue: TaskQueue
  backend: WorkerBackend
  callbacks: CallbackDispatcher
  /** Undefined: this is the only instance. */
  cluster?: Cluster | undefined
  /** Notifies the other instances. */
  hints?: Hints | undefined
  provisioningTimeoutMs: number
  setup: WorkerSetup
  /** Called after a task got no worker: the cause may block other tasks, too. Never rejects. */
  onProvisioningFailed: () => Promise<void>
  /** Returns the masker of the secrets that the task's log must not show. */
  maskerFor: (task: Task) => Masker
  /** Maximum time that a task may fail at a step which other tasks pass. Default: ten minutes. */
  hopelessMs?: number
  now: () => number
  log: Logger
}

/** A task that this instance runs. */
interface Run {
  /** Undefined until the task is claimed. */
  claim: number | undefined
  /** Aborted once the task's cancel is requested. */
  cancel: AbortController
  /** Aborted when another instance has the task, or at shutdown: its worker goes on without us. */
  release: AbortController
  done: Promise<void>
  /** What the task waits for, in a sentence. */
  waitingFor: string | null
}

interface Committed {
  delivery: NewDelivery | undefined
  /** Undefined: no callback, or a log so large that the attempt reads it from the store. */
  content: DeliveryContent | undefined
}

/**
 * Runs tasks: claims one, provisions its worker or attaches to it, awaits its exit, takes its log,
 * commits the outcome, delivers the callback and releases the slot and the worker. After a crash,
 * `start` of the next process resumes each task at the step that was interrupted.
 */
export class TaskRunner {
  readonly #store: TaskStore
  readonly #queue: TaskQueue
  readonly #backend: WorkerBackend
  readonly #callbacks: CallbackDispatcher
  readonly #options: TaskRunnerOptions
  readonly #log: Logger
  readonly #runs = new Map<string, Run>()
  /** Work that needs no slot: deliveries, terminations. */
  readonly #backgroundWork = new Set<Promise<void>>()
  readonly #closing = new AbortController()
  readonly #membership: Membership | undefined
  readonly #availability: Availability
  readonly #patience: Patience
  readonly #provisioning: Provisioning

  constructor(options: TaskRunnerOptions) {
    this.#options = options
    this.#store = options.store
    this.#queue = options.queue
    this.#backend = options.backend
    this.#callbacks = options.callbacks
    this.#log = options.log
    this.#membership = options.cluster && this.#membershipOf(options.cluster)
    const { now, log, hopelessMs = HOPELESS_MS } = options
    this.#availability = new Availability({
      ...PAUSES,
      log,
      check: () => this.#backend.check(),
      onChange: (isAvailable) => (isAvailable ? this.#queue.goOn() : this.#queue.hold()),
    })
    this.#patience = new Patience({
      ...PAUSES,
      availability: this.#availability,
      hopelessMs,
      now,
      log,
    })
    this.#provisioning = new Provisioning({ ...options, membership: this.#membership })
  }

  /** Returns what a live task waits for, as far as this instance knows, in a sentence. */
  waitingFor({ taskId, status }: Pick<Task, 'taskId' | 'status'>): string | undefined {
    const own = this.#runs.get(taskId)?.waitingFor
    return own ?? (status === 'queued' ? this.#availability.problem : undefined)
  }

  /** Returns what tasks of this instance wait for, a sentence each. */
  hindrances(): string[] {
    const sentences = [...this.#runs.values()].flatMap(({ waitingFor }) => waitingFor ?? [])
    const { problem } = this.#availability
    return [...new Set(problem === undefined ? sentences : [problem, ...sentences])]
  }

  /** Resumes the tasks of an earlier process, then claims new ones. */
  async start(): Promise<void> {
    await this.#options.cluster?.beat()
    const [live, workersLeft] = await Promise.all([
      this.#store.live(),
      this.#store.workersToTerminate(),
    ])
    for (const task of live) {
      if (task.status === 'queued') this.#background(this.cancel(task.taskId))
      else this.#resume(task)
    }
    this.#queue.start((task, slot) =>
      this.#runInSlot(task.taskId, slot, (run) => this.#carryOut(task, run, slot)),
    )
    this.#membership?.start()
    for (const task of workersLeft) this.#background(this.#terminate(task))
    if (live.length > 0) this.#log.info({ tasks: live.length }, 'resumed unfinished tasks')
  }

  /** Stops claiming and releases running tasks: their workers go on, and `start` finds them. */
  async close(): Promise<void> {
    const stopped = this.#queue.stop()
    this.#closing.abort()
    this.#availability.close()
    this.#membership?.stop()
    for (const run of this.#runs.values()) run.release.abort()
    await Promise.all([...this.#runs.values()].map((run) => run.done))
    await stopped
    // First: other instances need not wait for our deliveries to end.
    await this.#membership?.leave()
    await Promise.all(this.#backgroundWork)
  }

  /** Ends a task, whatever its status. Idempotent; a final task stays as it is. */
  async cancel(taskId: string): Promise<Task> {
    const task = await this.#store.requestCancel(taskId, this.#options.now())
    if (task?.status === 'queued') {
      const full = await this.#get(taskId)
      const isEnded = full && (await this.#finish({ ...full, claim: task.claim }, CANCELLED))
      if (isEnded) this.#queue.removed()
    }
    // A run that has claimed the task meanwhile gets the request with its claim, or by these calls.
    this.cancelRun(taskId)
    if (task && task.status !== 'queued') this.#options.hints?.cancelRequested(taskId)
    const current = await this.#get(taskId)
    if (!current) throw new TaskRunnerError('task_not_found', `There is no task "${taskId}"`)
    return current
  }

  /** Returns the task, also one whose parameters are damaged. */
  async #get(taskId: string): Promise<Task | undefined> {
    try {
      return await this.#store.get(taskId)
    } catch (err) {
      if (err instanceof DamagedTaskError) return err.task
      throw err
    }
  }

  /** Cancels the task if this instance runs it. */
  cancelRun(taskId: string): void {
    this.#runs.get(taskId)?.cancel.abort()
  }

  /** Resumes a running task. It takes a slot even when none is free. */
  #resume(seen: SeenTask): void {
    if (this.#closing.signal.aborted || this.#runs.has(seen.taskId)) return
    const slot = this.#queue.takeSlot()
    this.#runInSlot(seen.taskId, slot, async (run) => {
      const onFailure = async (err: unknown) => {
        if (err instanceof StoreFullError) await this.#freeSpaceOf(seen.taskId)
      }
      const task = await this.#claim(seen, run, { onFailure })
      if (task) await this.#carryOut(task, run, slot)
    })
  }

  /** Runs the task, then releases its slot. `work` never rejects. */
  #runInSlot(taskId: string, slot: Slot, work: (run: Run) => Promise<void>): void {
    void this.#runExclusively(taskId, work).finally(() => slot.release())
  }

  /** Does nothing if this instance runs the task already. `work` never rejects. */
  async #runExclusively(taskId: string, work: (run: Run) => Promise<void>): Promise<void> {
    if (this.#runs.has(taskId)) return
    const done = Promise.withResolvers<void>()
    const run: Run = {
      claim: undefined,
      cancel: new AbortController(),
      release: new AbortController(),
      done: done.promise,
      waitingFor: null,
    }
    this.#runs.set(taskId, run)
    await work(run)
    this.#runs.delete(taskId)
    done.resolve()
  }

  /**
   * Claims a task that was claimed before. Retries until the store replies: if a reply were lost,
   * this instance would hold the claim and not run the task. Never rejects.
   */
  #claim(
    { taskId, claim }: SeenTask,
    run: Run,
    options: { onFailure?: (err: unknown) => Promise<void> } = {},
  ): Promise<ClaimedTask | undefined> {
    const claiming = () => this.#store.claim(taskId, this.#options.now(), claim)
    return this.#repeat('claiming a task', claiming, { ...options, signal: run.release.signal })
  }

  /** Frees the space of the worker that an earlier process left: it may have filled the disk. */
  async #freeSpaceOf(taskId: string): Promise<void> {
    const task = await this.#store.get(taskId)
    const worker = task && (await this.#provisioning.find(task))
    await worker?.freeSpace?.()
  }

  /** Carries out a claimed task, from its worker to its outcome. Never rejects. */
  async #carryOut(task: ClaimedTask, run: Run, slot: Slot): Promise<void> {
    run.claim = task.claim
    if (task.damage) {
      // Retrying cannot repair it, and the secrets that the worker got are unknown.
      await this.#finish(task, failure('internal_error', task.damage.message))
      return
    }
    if (task.cancelRequested) run.cancel.abort()
    const cancelled = run.cancel.signal
    let worker: Worker | undefined
    let outcome: Outcome | undefined
    try {
      worker = await this.#attachOrProvision(task, run, slot)
      if (!worker) {
        outcome = cancelled.aborted
          ? CANCELLED
          : failure('worker_lost', 'The worker vanished while the service was down')
      } else {
        const startedAt = task.startedAt ?? this.#options.now()
        task.startedAt = startedAt
        // At once: a short task ends before the store has committed its start.
        const exit = this.#awaitExit(worker, { ...task, startedAt }, run)
        const marked = this.#markRunning(task, startedAt, { run, worker })
        outcome = await exit.finally(() => marked)
      }
    } catch (err) {
      if (run.release.signal.aborted) return this.#release(task)
      outcome = cancelled.aborted ? CANCELLED : this.#failureOf(err, task)
      const gotNoWorker = !worker && !['cancelled', 'startup_failed'].includes(outcome.reason)
      if (gotNoWorker) this.#background(this.#options.onProvisioningFailed())
    }
    if (outcome === undefined) return this.#release(task)
    await this.#finish(task, outcome, { worker, run })
  }

  /** Undefined: the task has no worker any more. Throws the `WorkerError` that ends the task. */
  async #attachOrProvision(task: ClaimedTask, run: Run, slot: Slot): Promise<Worker | undefined> {
    const { taskId } = task
    const [released, cancelled] = [run.release.signal, run.cancel.signal]
    const onWaiting = (waitingFor: string | null) => this.#noteWaiting(task, run, waitingFor)
    if (task.status === 'running' || cancelled.aborted) {
      const options = { taskId, ends: [released], wake: cancelled, onWaiting }
      return this.#patience.repeat('finding its worker', options, async () => {
        try {
          return await this.#provisioning.find(task)
        } catch (err) {
          // The cancel takes effect at once; the worker is terminated later.
          if (cancelled.aborted) return undefined
          throw err
        }
      })
    }
    const options = { taskId, ends: [released, cancelled], slot, onWaiting }
    // An earlier attempt may have made the worker before it crashed or failed.
    let mayExist = task.claim > 1
    const worker = await this.#patience.repeat('getting a worker', options, () => {
      const attempt = this.#provisioning.attempt(task, [released, cancelled], mayExist)
      mayExist = true
      return attempt
    })
    this.#availability.passed()
    return worker
  }

  /** Stores what the task waits for, so that every instance can report it. */
  #noteWaiting(task: ClaimedTask, run: Run, waitingFor: string | null): void {
    if (run.waitingFor === waitingFor) return
    const masked = waitingFor === null ? null : this.#masked(waitingFor, task)
    run.waitingFor = masked
    this.#background(
      this.#store.noteWaiting(task, masked).catch((err: unknown) => {
        this.#log.debug({ err, taskId: task.taskId }, 'storing what a task waits for failed')
      }),
    )
  }

  /** Releases the run if another instance has claimed the task. Never rejects. */
  async #markRunning(
    task: ClaimedTask,
    startedAt: number,
    { run, worker }: { run: Run; worker: Worker },
  ): Promise<void> {
    const marking = () => this.#store.markRunning(task, startedAt)
    const isOurs = await this.#repeat('marking a task running', marking, {
      signal: run.release.signal,
      // The task may have ended already, after it filled the disk.
      onFailure: async (err) => {
        if (err instanceof StoreFullError) await worker.freeSpace?.()
      },
    })
    if (isOurs === false) run.release.abort()
    const { taskId, workerName } = task
    if (isOurs) this.#log.info({ taskId, ...traceOf(task), worker: workerName }, 'task running')
  }

  /** Waits for the task's exit, its cancel or its time limit. Undefined: the run is released. */
  async #awaitExit(
    worker: Worker,
    task: ClaimedTask & { startedAt: number },
    run: Run,
  ): Promise<Outcome | undefined> {
    const options = {
      taskId: task.taskId,
      ends: [run.release.signal],
      wake: run.cancel.signal,
      onWaiting: (waitingFor: string | null) => this.#noteWaiting(task, run, waitingFor),
    }
    const limitMs = task.timeoutSeconds * 1000
    return this.#patience.repeat('watching its worker', options, async () => {
      // Never more than the limit, even if the clock was set back.
      const leftMs = Math.min(task.startedAt + limitMs - this.#options.now(), limitMs)
      return this.#awaitExitOnce(worker, task, { run, leftMs: Math.max(0, leftMs) })
    })
  }

  async #awaitExitOnce(
    worker: Worker,
    task: ClaimedTask,
    { run, leftMs }: { run: Run; leftMs: number },
  ): Promise<Outcome | undefined> {
    const [released, cancelled] = [run.release.signal, run.cancel.signal]
    using deadline = new Deadline(leftMs, [released, cancelled])
    try {
      return this.#outcomeOf(await worker.completion(deadline.signal), task)
    } catch (err) {
      if (!deadline.signal.aborted) throw err
      if (released.aborted) return undefined
      await this.#membership?.confirmed(released)
      if (cancelled.aborted) {
        // The cancel takes effect at once; the worker is terminated later.
        await worker.stop().catch((stopErr: unknown) => {
          this.#log.error({ err: stopErr, taskId: task.taskId }, 'stopping a task failed')
        })
        return CANCELLED
      }
      // The task may have ended in time, while this instance was down.
      if ((await worker.hasEnded?.()) || (await worker.status()) === 'Completed') {
        return this.#outcomeOf(await worker.completion(released), task)
      }
      await worker.stop()
      return failure('timed_out', `Ran longer than its limit of ${task.timeoutSeconds} seconds`)
    }
  }

  /** Returns success for an observed exit code 0, and for nothing else. */
  #outcomeOf(completion: Completion, task: Task): Outcome {
    const succeeded = completion.reason === 'completed' && completion.exitCode === 0
    // The message may quote other programs.
    const message = this.#masked(completion.message ?? '', task) || null
    return { ...completion, message, status: succeeded ? 'succeeded' : 'failed' }
  }

  /** Returns the outcome of a task that ends without a completion. */
  #failureOf(err: unknown, task: Task): Outcome {
    if (err instanceof WorkerError) {
      return failure(err.reason, this.#masked(err.message, task))
    }
    // A bug: no step throws anything else.
    this.#log.error({ err, taskId: task.taskId }, 'running a task failed')
    return failure('internal_error', 'The service could not run the task; its own log says why')
  }

  /** Fails a task whose worker is lost together with the host of a dead instance. */
  async #failOrphan(orphan: OrphanedTask, run: Run): Promise<void> {
    const task = await this.#claim(orphan, run)
    if (!task) return
    run.claim = task.claim
    const message = `The host of instance ${orphan.instance} has not come back, and the worker ran there`
    await this.#finish(task, failure('worker_lost', message))
  }

  /**
   * Takes the log and commits it with outcome and delivery. After that the slot is free: the first
   * attempt, then the worker's termination go on in the background. False: the task was final.
   */
  async #finish(
    task: Task,
    outcome: Outcome,
    { worker, run }: { worker?: Worker | undefined; run?: Run | undefined } = {},
  ): Promise<boolean> {
    const { taskId } = task
    const keepWorker =
      !task.terminateOnCompletion && worker !== undefined && outcome.status !== 'cancelled'
    const committed = await this.#commit(task, outcome, { worker, run, keepWorker })
    if (!committed) {
      if (worker) this.#release(task)
      return false
    }
    const { status, reason, exitCode } = outcome
    this.#log.info({ taskId, ...traceOf(task), status, reason, exitCode }, 'task finished')
    const { delivery, content } = committed
    const firstAttempt = delivery && this.#callbacks.attemptNow(taskId, delivery, content)
    this.#background(
      Promise.resolve(firstAttempt).then(async () => {
        if (!keepWorker && task.claim > 0) await this.#terminate(task, worker)
      }),
    )
    return true
  }

  /** Undefined: the task is not ours, or final. Apart, so that no delivery holds a large log. */
  async #commit(
    task: Task,
    outcome: Outcome,
    {
      worker,
      run,
      keepWorker,
    }: { worker?: Worker | undefined; run?: Run | undefined; keepWorker: boolean },
  ): Promise<Committed | undefined> {
    const { callbackUrl } = task
    const { log, rawBytes } = await this.#takeLog(task, outcome, worker)
    const delivery = callbackUrl === null ? undefined : this.#callbacks.prepare(callbackUrl)
    const finishedAt = this.#options.now()
    const end = { outcome, log, logBytes: rawBytes, delivery, finishedAt, keepWorker }
    const committing = () => this.#store.finish(task, end)
    const isCommitted = await this.#repeat('committing an outcome', committing, {
      onFailure: async (err) => {
        if (run) run.waitingFor = wordsOf(err)
        // The worker's own files may have filled the disk.
        if (err instanceof StoreFullError) await worker?.freeSpace?.()
      },
    })
    if (!isCommitted) {
      if (delivery) this.#callbacks.abandon(delivery)
      return undefined
    }
    const isLarge = log.content.length > HELD_LOG_BYTES
    if (callbackUrl === null || isLarge) return { delivery, content: undefined }
    const { callbackUrlToken: token, traceparent, taskFileName: taskName, taskId } = task
    const logs = { bytes: log.content.length, read: async () => log }
    const payload = { taskName, taskId, success: outcome.status === 'succeeded', logs }
    const facts = factsOf({ ...task, ...outcome, finishedAt })
    return {
      delivery,
      content: { url: callbackUrl, token, traceparent, payload, facts, isCut: false },
    }
  }

  /** Returns the log as it is stored and sent. */
  async #takeLog(task: Task, outcome: Outcome, worker: Worker | undefined): Promise<TakenLog> {
    const taken = worker ? await this.#readLog(worker, task, outcome.exitCode !== null) : NO_LOG
    const mask = (text: string) => this.#masked(text, task)
    return withLastLine(taken, outcome, { mask, maxBytes: LOG_BYTES_KEPT })
  }

  async #readLog(worker: Worker, task: Task, hasEnded: boolean): Promise<TakenLog> {
    const reading = () =>
      maskedTail(worker, this.#options.maskerFor(task), LOG_BYTES_KEPT, hasEnded)
    using deadline = new Deadline(LOG_TIMEOUT_MS, [this.#closing.signal])
    // An unreadable log must not hold up the outcome.
    return (await this.#repeat('reading a log', reading, deadline)) ?? UNREADABLE_LOG
  }

  #masked(text: string, task: Task): string {
    return this.#options.maskerFor(task).mask(Buffer.from(text)).toString()
  }

  /**
   * Stops work on a task that another instance has claimed, or at shutdown. If that instance has
   * ended the task, it may not know or reach our worker, which is terminated here.
   */
  #release(task: Pick<Task, 'taskId' | 'workerName'>): void {
    const { taskId } = task
    if (this.#closing.signal.aborted) return
    this.#log.warn({ taskId }, 'the task was taken over by another instance')
    this.#background(
      this.#repeat('releasing a task', async () => {
        const owner = await this.#store.workerOwner(taskId)
        if (owner && (!isFinal(owner.status) || owner.kept)) return
        const worker = await this.#provisioning.find(task)
        await worker?.terminate()
      }),
    )
  }

  /** Terminates a worker. Retries until it is gone or the service shuts down. */
  async #terminate(task: Pick<Task, 'taskId' | 'workerName'>, known?: Worker): Promise<void> {
    await this.#repeat('terminating a worker', async () => {
      const worker = known ?? (await this.#provisioning.find(task))
      await worker?.terminate()
      await this.#store.workerTerminated(task.taskId)
    })
  }

  /** Returns a membership that can resume, release, fail and cancel this runner's tasks. */
  #membershipOf(cluster: Cluster): Membership {
    const runs = this.#runs
    return new Membership(
      cluster,
      {
        held: () =>
          new Map(
            [...runs].flatMap(([id, { claim }]) => (claim === undefined ? [] : [[id, claim]])),
          ),
        release: (taskId, claim) => {
          const run = runs.get(taskId)
          if (run?.claim === claim) run.release.abort()
        },
        resume: (task) => this.#resume(task),
        fail: (orphan) => {
          const work = (run: Run) => this.#failOrphan(orphan, run)
          this.#background(this.#runExclusively(orphan.taskId, work))
        },
        cancel: (taskId) => this.cancelRun(taskId),
      },
      this.#log,
    )
  }

  /** Repeats an idempotent step until it succeeds. Undefined: `signal` or the shutdown ended it. */
  #repeat<T>(
    what: string,
    step: () => Promise<T>,
    options: { signal?: AbortSignal; onFailure?: (err: unknown) => Promise<void> } = {},
  ): Promise<T | undefined> {
    const signal = options.signal ?? this.#closing.signal
    return persistently(what, step, { ...options, ...PAUSES, signal, log: this.#log })
  }

  #background(work: Promise<unknown>): void {
    const tracked = work.then(
      () => {},
      (err: unknown) => this.#log.error({ err }, 'background work of a task failed'),
    )
    this.#backgroundWork.add(tracked)
    void tracked.then(() => this.#backgroundWork.delete(tracked))
  }
}
