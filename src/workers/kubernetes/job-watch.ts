import { setTimeout as pause } from 'node:timers/promises'
import type { V1Job, V1Pod } from '@kubernetes/client-node'
import { Deadline } from '../../core/deadline.ts'
import { UnavailableError } from '../../core/errors.ts'
import { type Completion, type Logger, WorkerError } from '../../core/ports.ts'
import { until } from '../../core/until.ts'
import { overLogLimit } from '../completion.ts'
import { LogRing } from '../log-ring.ts'
import type { KubernetesApi } from './api.ts'
import type { ClusterView } from './cluster-view.ts'
import { ApiError } from './failures.ts'
import { filesNameOf, maxLogBytesOf, TASK_CONTAINER } from './manifests.ts'
import { deletedOutside, isOverdue, type Observation, observe, warningOf } from './observation.ts'
import { PodLog } from './pod-log.ts'

const RETRY_MS = 250
/** Time limit for the rest of the log: the kubelet may reject it for a moment after the end. */
const LAST_LOG_MS = 30_000
/** Time for a pod's configuration to become valid: its Secret may be created after it. */
const CONFIG_GRACE_MS = 10_000
/** Maximum milliseconds until a log can be read. */
const READABLE_MS = 10_000
/** Time that kubelets need to report after an outage of the API: they renew node leases first. */
const NODE_REPORT_MS = 45_000
const NEVER_OVERDUE = 0

/** Reports why a worker is not ready yet; the last report becomes the error. */
export type OnWaiting = (why: WorkerError | UnavailableError) => void

export interface JobWatchOptions {
  api: KubernetesApi
  view: ClusterView
  provisioningTimeoutMs: number
  logBytesKept: number
  configGraceMs?: number | undefined
  lastLogMs?: number | undefined
  nodeReportMs?: number | undefined
  logSilentMs?: number | undefined
  /** Ends the task's pod. */
  end: () => Promise<void>
  /** Creates the ConfigMap of the task files again. */
  putFilesAgain: (configMapName: string, signal: AbortSignal) => Promise<void>
  /** Called when the task's completion is known. */
  onEnded: () => void
  closing: AbortSignal
  log: Logger
}

type Waiting = Extract<Observation, { phase: 'waiting' }>
type Ended = Extract<Observation, { phase: 'ended' }>

/** A provisioning that waits for the task to start. */
interface Starting {
  signal: AbortSignal
  onWaiting: OnWaiting
  /** Ends the provisioning, which can be retried; the watch continues. */
  fail: (err: UnavailableError) => void
  /** When events are read next, and the interval after that. */
  eventsAt: number
  eventsMs: number
  warning: ReturnType<typeof warningOf>
}

/**
 * One Job, from its creation to the end of its task:
 *
 *   waiting → running → ended
 *
 * with `queued` in place of `waiting` while a queue such as Kueue suspends it. One loop observes
 * the Job and its pod after each change that the watches report, and every few seconds.
 * Provisioning lasts while the phase is `waiting`. Failures of the API do not end the loop.
 */
export class JobWatch {
  readonly ring: LogRing
  readonly name: string
  readonly uid: string
  /** Whether the service is stopping the task, and the deletion of its pod is expected. */
  isStopping = false
  #completion: Completion | undefined
  readonly #options: JobWatchOptions
  /** The Job as created, for the first observation: the watches may not have it yet. */
  #created: V1Job | undefined
  readonly #maxLogBytes: number
  /** Name of the ConfigMap that its pod mounts. */
  readonly #filesName: string
  /** Rejected if the task can never start. */
  readonly #started = Promise.withResolvers<void>()
  /** Latest provisioning, until the task has started. */
  #starting: Starting | undefined
  #ended: Promise<Completion> | undefined
  /** Start of the wait for a pod while no provisioning is under way, in epoch ms. */
  #waitingSince: number | undefined
  /** First time in a row that its container could not be started, in epoch ms. */
  #stuckSince: number | undefined
  #log: PodLog | undefined
  #following: Promise<void> | undefined
  /** Aborts when the backend closes, or when a stream does not end with its container. */
  readonly #reading: AbortSignal
  readonly #stopReading = new AbortController()
  readonly #readable = Promise.withResolvers<void>()
  #isOverLogLimit = false

  constructor(job: V1Job, options: JobWatchOptions) {
    this.#created = job
    this.#options = options
    this.#maxLogBytes = maxLogBytesOf(job)
    this.#filesName = filesNameOf(job)
    this.name = job.metadata?.name ?? ''
    this.uid = job.metadata?.uid ?? ''
    this.ring = new LogRing(options.logBytesKept)
    this.#reading = AbortSignal.any([options.closing, this.#stopReading.signal])
    this.#started.promise.catch(() => {})
  }

  get completion(): Completion | undefined {
    return this.#completion
  }

  /**
   * Waits until the task runs, is queued, or has run. Throws `WorkerError` if it never will,
   * `UnavailableError` if the API is unavailable, or the reason of `signal`.
   */
  async started(signal: AbortSignal, onWaiting: OnWaiting): Promise<void> {
    const { view } = this.#options
    view.throwIfUnwatched()
    const unavailable = Promise.withResolvers<never>()
    this.#starting = {
      signal,
      onWaiting,
      fail: unavailable.reject,
      eventsAt: Date.now() + view.lookMs,
      eventsMs: view.lookMs,
      warning: undefined,
    }
    await until(Promise.race([this.#started.promise, unavailable.promise, this.ended()]), signal)
  }

  /** Returns how the task ended, once it has. Rejects when the backend is closed. */
  ended(): Promise<Completion> {
    if (!this.#ended) {
      const ended = this.#run()
      this.#ended = ended
      // A failure is not kept, so the next call retries. On close, no call may be waiting.
      ended.catch(() => {
        if (this.#ended === ended) this.#ended = undefined
      })
    }
    return this.#ended
  }

  /**
   * Waits until the log of a running task is being read, or the task has ended. Throws
   * `UnavailableError` after a time limit.
   */
  async readable(): Promise<void> {
    using deadline = new Deadline(READABLE_MS, [])
    const either = Promise.race([this.#readable.promise, this.ended()])
    await until(either, deadline.signal).catch((err: unknown) => {
      if (!deadline.signal.aborted) throw err
      throw new UnavailableError('The log of the worker cannot be read at the moment')
    })
  }

  /** Returns the phase that the watches show. */
  phase(): Observation['phase'] {
    if (this.#completion) return 'ended'
    const { view } = this.#options
    return observe(view.job(this.uid), view.pod(this.uid), NEVER_OVERDUE).phase
  }

  async #run(): Promise<Completion> {
    const { view, closing } = this.#options
    for (;;) {
      // Subscribes before observing, to miss no change.
      const changed = view.change(this.uid, closing)
      changed.catch(() => {})
      try {
        if (this.#starting) view.throwIfUnwatched()
        const { seen, pod } = await this.#observe()
        if (seen.phase === 'waiting') {
          if (await this.#shouldGiveUp(seen)) {
            this.#started.reject(new WorkerError(seen.reason, seen.message))
            return await this.#end(seen, pod)
          }
          if (this.#starting) await this.#report(seen, pod, this.#starting)
        } else {
          this.#started.resolve()
          this.#starting = undefined
          this.#waitingSince = undefined
          if (pod && seen.phase !== 'queued') this.#log ??= this.#logOf(pod.metadata?.name ?? '')
          if (seen.phase === 'running') this.#following ??= this.#log?.follow(this.#reading)
          if (seen.phase === 'ended') return await this.#end(seen, pod)
        }
      } catch (err) {
        if (!(err instanceof UnavailableError)) throw err
        this.#starting?.fail(err)
      }
      await changed
    }
  }

  /** Reports why the worker is not ready yet, with messages of events if the pod has none. */
  async #report(seen: Waiting, pod: V1Pod | undefined, starting: Starting): Promise<void> {
    const { view, closing, log } = this.#options
    const isUnclear = ['provisioning_timeout', 'unschedulable'].includes(seen.reason)
    if (isUnclear && Date.now() >= starting.eventsAt) {
      // With backoff, since many tasks may wait for the same reason.
      starting.eventsMs *= 2
      starting.eventsAt = Date.now() + starting.eventsMs
      const events = await view
        .events(pod?.metadata?.uid ?? this.uid, closing)
        .catch((err: unknown) => {
          log.warn({ err, worker: this.name }, 'events could not be read')
          return []
        })
      starting.warning = warningOf(events) ?? starting.warning
      const isMissing = `configmap "${this.#filesName}" not found`
      if (events.some(({ message }) => message?.includes(isMissing))) {
        await this.#options
          .putFilesAgain(this.#filesName, starting.signal)
          .catch((err: unknown) => {
            log.warn({ err, worker: this.name }, 'a ConfigMap of task files was not created again')
          })
      }
    }
    const also = isUnclear ? starting.warning : undefined
    const message = also ? `${seen.message}. ${also.message}` : seen.message
    starting.onWaiting(
      also?.reason === 'unavailable'
        ? new UnavailableError(also.message)
        : new WorkerError(also?.reason ?? seen.reason, message),
    )
  }

  /** Reads the rest of the log and sets the completion. */
  async #end(seen: Waiting | Ended, pod: V1Pod | undefined): Promise<Completion> {
    const { closing, lastLogMs = LAST_LOG_MS, onEnded } = this.#options
    this.#log?.over()
    // The stream should end with the container, but may have stalled.
    const late = pause(lastLogMs, undefined, { signal: this.#reading, ref: false })
    await Promise.race([this.#following, late])
    this.#stopReading.abort()
    await this.#following
    const note = this.#log && pod ? await this.#readRest(this.#log) : ''
    closing.throwIfAborted()
    this.ring.append(Buffer.from(note))
    this.ring.end()
    this.#completion = this.#completionOf(seen, pod)
    onEnded()
    return this.#completion
  }

  #completionOf(seen: Waiting | Ended, pod: V1Pod | undefined): Completion {
    if (this.#isOverLogLimit) return overLogLimit(this.#maxLogBytes)
    if (seen.phase === 'waiting') {
      // Safe: `observe` gives only reasons of workers.
      const reason = seen.reason as Completion['reason']
      return { reason, exitCode: null, signal: null, message: seen.message }
    }
    const wasDeleted = pod?.metadata?.deletionTimestamp && seen.completion.reason === 'signal'
    return wasDeleted && !this.isStopping ? deletedOutside() : seen.completion
  }

  /** Observes what the watches show, and reads the API before judging that something is gone. */
  async #observe(): Promise<{ seen: Observation; pod: V1Pod | undefined }> {
    const { view } = this.#options
    const job = view.job(this.uid) ?? this.#created
    this.#created = undefined
    const watched = this.#judge(job, view.pod(this.uid), NEVER_OVERDUE)
    const { seen, pod } = watched
    const isLost = pod && seen.phase !== 'ended' && isOverdue(pod, this.#overdueNow())
    if (!isLost && (pod || (seen.phase !== 'ended' && job))) return watched
    const read = await this.#read()
    return this.#judge(read.job, read.pod, this.#overdueNow())
  }

  #read(): Promise<{ job: V1Job | undefined; pod: V1Pod | undefined }> {
    const { view, closing } = this.#options
    const onFailure = (err: UnavailableError) => this.#starting?.onWaiting(err)
    return view.read(this, closing, { rideMs: view.rideMs, onFailure })
  }

  #judge(
    job: V1Job | undefined,
    pod: V1Pod | undefined,
    now: number,
  ): { seen: Observation; pod: V1Pod | undefined } {
    const last = this.#options.view.lastPod(this.uid)
    const lastSeen = !pod && last ? observe(job, last, now) : undefined
    if (lastSeen?.phase === 'ended') return { seen: lastSeen, pod: last }
    return { seen: observe(job, pod, now), pod }
  }

  /** Returns the time to judge overdue pods by: none are after an outage until kubelets report. */
  #overdueNow(): number {
    const { view, nodeReportMs = NODE_REPORT_MS } = this.#options
    return view.watchedMs >= nodeReportMs ? Date.now() : NEVER_OVERDUE
  }

  async #shouldGiveUp(seen: Waiting): Promise<boolean> {
    const { view, configGraceMs = CONFIG_GRACE_MS, provisioningTimeoutMs } = this.#options
    if (seen.isHopeless) return true
    // Times count only while the watches work: otherwise the state may have changed unseen.
    const isWatched = view.problem === undefined
    const since = (is: boolean, before: number | undefined) =>
      is && isWatched ? (before ?? Date.now()) : undefined
    this.#stuckSince = since(seen.reason === 'startup_failed', this.#stuckSince)
    // A queue has admitted the Job, and no provisioning is left to enforce its time limit.
    this.#waitingSince = since(this.#starting === undefined, this.#waitingSince)
    const isOver = (at: number | undefined, ms: number) => at !== undefined && Date.now() - at >= ms
    const isStuck = isOver(this.#stuckSince, configGraceMs)
    if (!isStuck && !isOver(this.#waitingSince, provisioningTimeoutMs)) return false
    // Confirmed by the API, since watches may be late or dead.
    const { job, pod } = await this.#read()
    const now = observe(job, pod, NEVER_OVERDUE)
    return now.phase === 'waiting' && (!isStuck || now.reason === 'startup_failed')
  }

  #logOf(podName: string): PodLog {
    const { api, view, logSilentMs, end } = this.#options
    return new PodLog(api, {
      path: `${view.path('pods')}/${podName}/log`,
      container: TASK_CONTAINER,
      ring: this.ring,
      silentMs: logSilentMs,
      onRead: () => {
        this.#readable.resolve()
        if (this.ring.totalBytes <= this.#maxLogBytes || this.#isOverLogLimit) return
        this.#isOverLogLimit = true
        end().catch((err: unknown) =>
          this.#options.log.error({ err, worker: this.name }, 'ending a task failed'),
        )
      },
    })
  }

  /** Reads the rest of the log. Returns a note for the log if that fails. */
  async #readRest(log: PodLog): Promise<string> {
    const { lastLogMs = LAST_LOG_MS, closing } = this.#options
    using deadline = new Deadline(lastLogMs, [closing])
    const { signal } = deadline
    for (let words = ''; ; ) {
      try {
        await log.rest(signal)
        return ''
      } catch (err) {
        // The pod is gone, or its container never started.
        if (err instanceof ApiError && ['invalid', 'not_found'].includes(err.kind)) return ''
        words ||= err instanceof Error ? err.message : String(err)
        if (signal.aborted || err instanceof ApiError)
          return `[task-runner] The end of the log could not be read: ${words}\n`
        await pause(RETRY_MS, undefined, { signal }).catch(() => {})
      }
    }
  }
}
