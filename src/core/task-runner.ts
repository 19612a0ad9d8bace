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
/** A log up to this size is held for the first attempt: most need no second look into the store. */
const HELD_LOG_BYTES = 64 * 1024
const PAUSES = { retryMs: 500, retryMaxMs: 15_000 }
const HOPELESS_MS = 600_000
/** How long the log of a task that has ended is asked for, should its worker not give it. */
const LOG_PATIENCE_MS = 5_000

export interface TaskRunnerOptions {
  store: TaskStore
  queue: TaskQueue
  backend: WorkerBackend
  callbacks: CallbackDispatcher
  /** Undefined: nobody else works on these tasks. */
  cluster?: Cluster | undefined
  /** Tells the other instances of a cluster. */
  hints?: Hints | undefined
  provisioningTimeoutMs: number
  setup: WorkerSetup
  /** A worker could not be had: what hinders it may hold up others that wait, too. Never rejects. */
  onProvisioningFailed: () => Promise<void>
  /** Knows what must not show in the task's log. */
  maskerFor: (task: Task) => Masker
  /** How long a task may fail at a step that others pass. Default: ten minutes. */
  hopelessMs?: number
  now: () => number
  log: Logger
}

/** A run under way on this instance. */
interface Run {
  /** Undefined until it is ours. */
  claim: number | undefined
  /** Someone wants the task ended. */
  cancel: AbortController
  /** It is not ours any more, or we shut down: nothing is decided, and the worker goes on without us. */
  letGo: AbortController
  done: Promise<void>
  /** What hinders the task at the moment, in a sentence. */
  waitingFor: string | null
}

interface Ending {
  worker: Worker | undefined
  run: Run | undefined
  keepWorker: boolean
}

interface Committed {
  delivery: NewDelivery | undefined
  /** Undefined: there is nothing to send, or it is large, and is read again when its turn comes. */
  content: DeliveryContent | undefined
}

/**
 * One task's life: take it, get it a worker, see it through, keep its log, commit the outcome, tell the
 * caller, end the worker. Whatever a crash interrupts, `start` of the next process takes up again.
 */
export class TaskRunner {
  readonly #store: TaskStore
  readonly #queue: TaskQueue
  readonly #backend: WorkerBackend
  readonly #callbacks: CallbackDispatcher
  readonly #options: TaskRunnerOptions
  readonly #log: Logger
  readonly #runs = new Map<string, Run>()
  /** What goes on after a run's slot was given back: deliveries, terminations. */
  readonly #afterwards = new Set<Promise<void>>()
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
    this.#membership = options.cluster && this.#memberOf(options.cluster)
    const { now, log, hopelessMs = HOPELESS_MS } = options
    this.#availability = new Availability({
      ...{ ...PAUSES, log },
      check: () => this.#backend.check(),
      onChange: (isAvailable) => (isAvailable ? this.#queue.goOn() : this.#queue.hold()),
    })
    this.#patience = new Patience({
      ...{ ...PAUSES, hopelessMs, now, log },
      availability: this.#availability,
    })
    this.#provisioning = new Provisioning({ ...options, membership: this.#membership })
  }

  /** What hinders a task that has not ended, as far as this instance knows, in a sentence. */
  waitingFor({ taskId, status }: Pick<Task, 'taskId' | 'status'>): string | undefined {
    const own = this.#runs.get(taskId)?.waitingFor
    return own ?? (status === 'queued' ? this.#availability.problem : undefined)
  }

  /** What hinders tasks of this instance, a sentence each. */
  hindrances(): string[] {
    const sentences = [...this.#runs.values()].flatMap(({ waitingFor }) => waitingFor ?? [])
    const { problem } = this.#availability
    return [...new Set(problem === undefined ? sentences : [problem, ...sentences])]
  }

  /** Takes up what an earlier process left, then new work. */
  async start(): Promise<void> {
    await this.#options.cluster?.beat()
    const [live, leftWorkers] = await Promise.all([
      this.#store.live(),
      this.#store.workersToTerminate(),
    ])
    for (const task of live) {
      if (task.status === 'queued') this.#background(this.cancel(task.taskId))
      else this.#resume(task)
    }
    this.#queue.start((task, slot) =>
      this.#inSlot(task.taskId, slot, (run) => this.#seeTaskThrough(task, run, slot)),
    )
    this.#membership?.start()
    for (const left of leftWorkers) this.#background(this.#terminate(left))
    if (live.length > 0) this.#log.info({ tasks: live.length }, 'took up unfinished tasks')
  }

  /** Stops taking work and lets go of running tasks: their workers go on, and are found again at the next start. */
  async close(): Promise<void> {
    const stopped = this.#queue.stop()
    this.#closing.abort()
    this.#availability.close()
    this.#membership?.stop()
    for (const run of this.#runs.values()) run.letGo.abort()
    await Promise.all([...this.#runs.values()].map((run) => run.done))
    await stopped
    // Before the rest: others need not wait for receivers that we wait for.
    await this.#membership?.leave()
    await Promise.all(this.#afterwards)
  }

  /** Ends a task in whatever state it is. Idempotent; final tasks stay as they are. */
  async cancel(taskId: string): Promise<Task> {
    const task = await this.#store.requestCancel(taskId, this.#options.now())
    if (task?.status === 'queued') {
      const full = await this.#known(taskId)
      const isEnded = full && (await this.#settle({ ...full, claim: task.claim }, CANCELLED))
      if (isEnded) this.#queue.removed()
    }
    // A run that claimed the task meanwhile reads the request with its claim, or hears it here or elsewhere.
    this.hearCancel(taskId)
    if (task && task.status !== 'queued') this.#options.hints?.cancelRequested(taskId)
    const now = await this.#known(taskId)
    if (!now) throw new TaskRunnerError('task_not_found', `There is no task "${taskId}"`)
    return now
  }

  /** The task, also where its parameters are damaged. */
  async #known(taskId: string): Promise<Task | undefined> {
    try {
      return await this.#store.get(taskId)
    } catch (err) {
      if (err instanceof DamagedTaskError) return err.task
      throw err
    }
  }

  /** Someone wants the task ended. Nothing happens unless it runs here. */
  hearCancel(taskId: string): void {
    this.#runs.get(taskId)?.cancel.abort()
  }

  /** Takes on a task that runs already, whatever the limit; it counts against it. */
  #resume(seen: SeenTask): void {
    if (this.#closing.signal.aborted || this.#runs.has(seen.taskId)) return
    const slot = this.#queue.takeSlot()
    this.#inSlot(seen.taskId, slot, (run) => this.#takeOn(seen, run, slot))
  }

  /** Runs the task, and gives its slot back. `work` never rejects. */
  #inSlot(taskId: string, slot: Slot, work: (run: Run) => Promise<void>): void {
    void this.#once(taskId, work).finally(() => slot.release())
  }

  /** Does nothing when the task is in hand already. `work` never rejects. */
  async #once(taskId: string, work: (run: Run) => Promise<void>): Promise<void> {
    if (this.#runs.has(taskId)) return
    const done = Promise.withResolvers<void>()
    const run: Run = {
      claim: undefined,
      cancel: new AbortController(),
      letGo: new AbortController(),
      done: done.promise,
      waitingFor: null,
    }
    this.#runs.set(taskId, run)
    await work(run)
    this.#runs.delete(taskId)
    done.resolve()
  }

  /** Claims a task that runs already, and sees it through. Never rejects. */
  async #takeOn({ taskId, claim }: SeenTask, run: Run, slot: Slot): Promise<void> {
    const claiming = () => this.#store.claim(taskId, this.#options.now(), claim)
    const task = await this.#repeat('claiming a task', claiming, {
      signal: run.letGo.signal,
      onFailure: async (err) => {
        if (err instanceof StoreFullError) await this.#freeSpaceOf(taskId)
      },
    })
    if (task) await this.#seeTaskThrough(task, run, slot)
  }

  /** Sees a claimed task through, from its worker to its outcome. Never rejects. */
  async #seeTaskThrough(task: ClaimedTask, run: Run, slot: Slot): Promise<void> {
    const letGo = run.letGo.signal
    run.claim = task.claim
    if (task.damage) {
      // No waiting mends that, and nobody can know what the worker was given.
      await this.#settle(task, failure('internal_error', task.damage.message))
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
          : failure('worker_lost', 'The worker vanished while the service was away')
      } else {
        const startedAt = task.startedAt ?? this.#options.now()
        task.startedAt = startedAt
        // Together: a short task ends before the disk has taken down that it began.
        const seeing = this.#seeThrough(worker, { ...task, startedAt }, run)
        const marking = this.#markRunning(task, startedAt, { run, worker })
        outcome = await seeing.finally(() => marking)
      }
    } catch (err) {
      if (letGo.aborted) return this.#leave(task)
      outcome = cancelled.aborted ? CANCELLED : this.#failureOf(err, task)
      const isForWantOfWorker = !worker && !['cancelled', 'startup_failed'].includes(outcome.reason)
      if (isForWantOfWorker) this.#background(this.#options.onProvisioningFailed())
    }
    // Let go: nothing is decided, and the worker goes on without us.
    if (outcome === undefined) return this.#leave(task)
    await this.#settle(task, outcome, { worker, run })
  }

  /** Never rejects. Lets go of the run when the task is not ours any more. */
  async #markRunning(
    task: ClaimedTask,
    startedAt: number,
    { run, worker }: { run: Run; worker: Worker },
  ): Promise<void> {
    const marking = () => this.#store.markRunning(task, startedAt)
    const isOurs = await this.#repeat('marking a task running', marking, {
      signal: run.letGo.signal,
      // It may have ended meanwhile, and have filled the disk.
      onFailure: async (err) => {
        if (err instanceof StoreFullError) await worker.freeSpace?.()
      },
    })
    if (isOurs === false) run.letGo.abort()
    const { taskId, workerName } = task
    if (isOurs) this.#log.info({ taskId, ...traceOf(task), worker: workerName }, 'task running')
  }

  /** The worker of an earlier process may have filled the disk, and ended. */
  async #freeSpaceOf(taskId: string): Promise<void> {
    const task = await this.#store.get(taskId)
    const worker = task && (await this.#provisioning.find(task))
    await worker?.freeSpace?.()
  }

  /**
   * Somebody else has the task, unless we shut down. Where that one has ended it, a worker that we made too late, or that
   * only we can reach, is nobody's.
   */
  #leave(task: Pick<Task, 'taskId' | 'workerName'>): void {
    const { taskId } = task
    if (this.#closing.signal.aborted) return
    this.#log.warn({ taskId }, 'the task was taken over by another instance')
    this.#background(
      this.#repeat('leaving a task', async () => {
        const owner = await this.#store.workerOwner(taskId)
        if (owner && (!isFinal(owner.status) || owner.kept)) return
        const worker = await this.#provisioning.find(task)
        await worker?.terminate()
      }),
    )
  }

  /** Undefined: there is no worker of the task any more. Throws the `WorkerError` that ends the task. */
  async #attachOrProvision(task: ClaimedTask, run: Run, slot: Slot): Promise<Worker | undefined> {
    const { taskId } = task
    const [letGo, cancelled] = [run.letGo.signal, run.cancel.signal]
    const onWaiting = (waitingFor: string | null) => this.#noteWaiting(task, run, waitingFor)
    if (task.status === 'running' || cancelled.aborted) {
      const hindered = { taskId, ends: [letGo], wake: cancelled, onWaiting }
      return this.#patience.repeat('finding its worker', hindered, async () => {
        try {
          return await this.#provisioning.find(task)
        } catch (err) {
          // The caller's word counts, whatever hinders us; the worker is terminated in any case.
          if (cancelled.aborted) return undefined
          throw err
        }
      })
    }
    const hindered = { taskId, ends: [letGo, cancelled], slot, onWaiting }
    // An earlier attempt may have begun one, before a crash or a trouble cut it short.
    let mayBeBegun = task.claim > 1
    const worker = await this.#patience.repeat('getting a worker', hindered, () => {
      const attempt = this.#provisioning.attempt(task, [letGo, cancelled], mayBeBegun)
      mayBeBegun = true
      return attempt
    })
    this.#availability.passed()
    return worker
  }

  /** Tells on every instance what hinders the task. */
  #noteWaiting(task: ClaimedTask, run: Run, waitingFor: string | null): void {
    if (run.waitingFor === waitingFor) return
    const words = waitingFor === null ? null : this.#masked(waitingFor, task)
    run.waitingFor = words
    this.#background(
      this.#store.noteWaiting(task, words).catch((err: unknown) => {
        this.#log.debug({ err, taskId: task.taskId }, 'what a task waits for could not be stored')
      }),
    )
  }

  /** Waits for the task's exit, a cancel, or its time limit. Undefined: we are shutting down. */
  async #seeThrough(
    worker: Worker,
    task: ClaimedTask & { startedAt: number },
    run: Run,
  ): Promise<Outcome | undefined> {
    const hindered = {
      taskId: task.taskId,
      ends: [run.letGo.signal],
      wake: run.cancel.signal,
      onWaiting: (waitingFor: string | null) => this.#noteWaiting(task, run, waitingFor),
    }
    const limitMs = task.timeoutSeconds * 1000
    return this.#patience.repeat('watching its worker', hindered, async () => {
      // Never more than the limit, should the clock have been set back meanwhile.
      const leftMs = Math.min(task.startedAt + limitMs - this.#options.now(), limitMs)
      return this.#watch(worker, task, { run, leftMs: Math.max(0, leftMs) })
    })
  }

  async #watch(
    worker: Worker,
    task: ClaimedTask,
    { run, leftMs }: { run: Run; leftMs: number },
  ): Promise<Outcome | undefined> {
    const [letGo, cancelled] = [run.letGo.signal, run.cancel.signal]
    using deadline = new Deadline(leftMs, [letGo, cancelled])
    try {
      return this.#outcomeOf(await worker.completion(deadline.signal), task)
    } catch (err) {
      if (!deadline.signal.aborted) throw err
      if (letGo.aborted) return undefined
      await this.#membership?.sure(letGo)
      if (cancelled.aborted) {
        // The caller's word counts, whatever hinders us; the worker is terminated in any case.
        await worker.stop().catch((stopping: unknown) => {
          this.#log.error({ err: stopping, taskId: task.taskId }, 'stopping a task failed')
        })
        return CANCELLED
      }
      // It may have ended in time, with nobody here to see it.
      if ((await worker.hasEnded?.()) || (await worker.status()) === 'Completed') {
        return this.#outcomeOf(await worker.completion(letGo), task)
      }
      await worker.stop()
      return failure('timed_out', `Ran longer than its limit of ${task.timeoutSeconds} seconds`)
    }
  }

  /**
   * The end of a run: take the log, commit outcome + log + delivery, and the slot is free. Then make the
   * first attempt and end the worker whatever it gave. False: someone else was first.
   */
  async #settle(
    task: Task,
    outcome: Outcome,
    { worker, run }: { worker?: Worker | undefined; run?: Run | undefined } = {},
  ): Promise<boolean> {
    const { taskId } = task
    const keepWorker =
      !task.terminateOnCompletion && worker !== undefined && outcome.status !== 'cancelled'
    const committed = await this.#commit(task, outcome, { worker, run, keepWorker })
    if (!committed) {
      if (worker) this.#leave(task)
      return false
    }
    const { status, reason, exitCode } = outcome
    this.#log.info({ taskId, ...traceOf(task), status, reason, exitCode }, 'task finished')
    const { delivery, content } = committed
    const telling = delivery && this.#callbacks.attemptNow(taskId, delivery, content)
    this.#background(
      Promise.resolve(telling).then(async () => {
        if (!keepWorker && task.claim > 0) await this.#terminate(task, worker)
      }),
    )
    return true
  }

  /** Undefined: it is somebody else's task. On its own, so that nothing that comes later holds a large log. */
  async #commit(
    task: Task,
    outcome: Outcome,
    { worker, run, keepWorker }: Ending,
  ): Promise<Committed | undefined> {
    const { callbackUrl } = task
    const { log, rawBytes } = await this.#logOf(task, outcome, worker)
    const delivery = callbackUrl === null ? undefined : this.#callbacks.prepare(callbackUrl)
    const finishedAt = this.#options.now()
    const committing = () =>
      this.#store.finish(task, {
        outcome,
        log,
        logBytes: rawBytes,
        delivery,
        finishedAt,
        keepWorker,
      })
    const committed = await this.#repeat('committing an outcome', committing, {
      onFailure: async (err) => {
        if (run) run.waitingFor = wordsOf(err)
        // Its own files may be what fills the disk.
        if (err instanceof StoreFullError) await worker?.freeSpace?.()
      },
    })
    if (!committed && delivery) this.#callbacks.abandon(delivery)
    if (!committed) return undefined
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

  /** The log as it is kept and sent. */
  async #logOf(task: Task, outcome: Outcome, worker: Worker | undefined): Promise<TakenLog> {
    const taken = worker ? await this.#takeLog(worker, task, outcome.exitCode !== null) : NO_LOG
    const mask = (text: string) => this.#masked(text, task)
    return withLastLine(taken, outcome, { mask, maxBytes: LOG_BYTES_KEPT })
  }

  async #takeLog(worker: Worker, task: Task, hasEnded: boolean): Promise<TakenLog> {
    const reading = () =>
      maskedTail(worker, this.#options.maskerFor(task), LOG_BYTES_KEPT, hasEnded)
    using deadline = new Deadline(LOG_PATIENCE_MS, [this.#closing.signal])
    const taken = await this.#repeat('reading a log', reading, deadline)
    // The outcome is worth more than the log.
    return taken ?? UNREADABLE_LOG
  }

  /** Success is an observed exit code 0, and nothing else. */
  #outcomeOf(completion: Completion, task: Task): Outcome {
    const succeeded = completion.reason === 'completed' && completion.exitCode === 0
    // It may hold words of other programs.
    const message = this.#masked(completion.message ?? '', task) || null
    return { ...completion, message, status: succeeded ? 'succeeded' : 'failed' }
  }

  /** Terminates a worker, again and again until it is gone or we are shutting down. */
  async #terminate(task: Pick<Task, 'taskId' | 'workerName'>, known?: Worker): Promise<void> {
    await this.#repeat('terminating a worker', async () => {
      const worker = known ?? (await this.#provisioning.find(task))
      await worker?.terminate()
      await this.#store.workerTerminated(task.taskId)
    })
  }

  #masked(words: string, task: Task): string {
    return this.#options.maskerFor(task).mask(Buffer.from(words)).toString()
  }

  /** What ends a task that has no completion. */
  #failureOf(err: unknown, task: Task): Outcome {
    if (err instanceof WorkerError) {
      return failure(err.reason, this.#masked(err.message, task))
    }
    // No step throws anything else: a contradiction of ours.
    this.#log.error({ err, taskId: task.taskId }, 'running a task failed')
    return failure('internal_error', 'The service could not run the task; its own log says why')
  }

  /**
   * Ends a task whose worker is out of reach with the host of the instance that has died. Claimed until it is answered:
   * a claim that got through unheard would leave the task ours, with nobody to look after it.
   */
  async #giveUp(orphan: OrphanedTask, run: Run): Promise<void> {
    const claiming = () => this.#store.claim(orphan.taskId, this.#options.now(), orphan.claim)
    const task = await this.#repeat('claiming a task', claiming, { signal: run.letGo.signal })
    if (!task) return
    run.claim = task.claim
    const message = `The host of instance ${orphan.instance} has not come back, and the worker ran there`
    await this.#settle(task, failure('worker_lost', message))
  }

  /** What is done here on behalf of all instances. */
  #memberOf(cluster: Cluster): Membership {
    const runs = this.#runs
    return new Membership(
      cluster,
      {
        held: () =>
          new Map(
            [...runs].flatMap(([id, { claim }]) => (claim === undefined ? [] : [[id, claim]])),
          ),
        letGo: (taskId, claim) => {
          const run = runs.get(taskId)
          if (run?.claim === claim) run.letGo.abort()
        },
        resume: (task) => this.#resume(task),
        giveUp: (orphan) => {
          this.#background(this.#once(orphan.taskId, (run) => this.#giveUp(orphan, run)))
        },
        cancel: (taskId) => this.hearCancel(taskId),
      },
      this.#log,
    )
  }

  /** Repeats an idempotent step until it succeeds. Undefined: `signal`, or the service's end, has cut that short. */
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
      (err: unknown) => this.#log.error({ err }, 'work after a run failed'),
    )
    this.#afterwards.add(tracked)
    void tracked.then(() => this.#afterwards.delete(tracked))
  }
}
