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
/** After a container's end the kubelet may still refuse its log for a moment. */
const LAST_LOG_MS = 30_000
/** A Secret may come later than the pod that wants it. */
const CONFIG_GRACE_MS = 10_000
/** Maximum milliseconds until a log can be read. */
const READABLE_MS = 10_000
/** Milliseconds that a kubelet has to report in once the API is back: it renews its node's lease first. */
const NODE_REPORT_MS = 45_000
const NEVER_OVERDUE = 0

/** Is told what a worker waits for: what it fails with should it wait in vain. */
export type Hindered = (why: WorkerError | UnavailableError) => void

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
  /** Puts the ConfigMap of the task files again. */
  putFilesAgain: (configMapName: string, signal: AbortSignal) => Promise<void>
  /** The task's completion is known. */
  onEnded: () => void
  closing: AbortSignal
  log: Logger
}

type Waiting = Extract<Observation, { phase: 'waiting' }>
type Ended = Extract<Observation, { phase: 'ended' }>

/** A provisioning that waits for the task to start. */
interface Starting {
  signal: AbortSignal
  hindered: Hindered
  /** Ends the provisioning, which can come again; the watch goes on. */
  fail: (err: UnavailableError) => void
  /** When events are asked for next, and how long after that. */
  lookAt: number
  lookMs: number
  warning: ReturnType<typeof warningOf>
}

/**
 * One Job, from its creation to the end of its task:
 *
 *   waiting → running → ended
 *
 * with `queued` beside `waiting` while a queue such as Kueue suspends it. One loop observes the Job
 * and its pod whenever the watches report a change, and every few seconds. Whoever provisions waits
 * until it is not `waiting` any more, all others until it is `ended`. Troubles of the API decide
 * nothing: the loop goes on.
 */
export class JobWatch {
  readonly ring: LogRing
  readonly name: string
  readonly uid: string
  /** We end it: that it is deleted is no news. */
  isStopping = false
  #completion: Completion | undefined
  readonly #options: JobWatchOptions
  /** As it was given: stands for what the watches have not told yet, the first time. */
  #given: V1Job | undefined
  readonly #maxLogBytes: number
  /** Name of the ConfigMap that its pod waits for. */
  readonly #filesName: string
  /** Rejected when it waits in vain. */
  readonly #started = Promise.withResolvers<void>()
  /** The last one, until the task has started. */
  #starting: Starting | undefined
  #ended: Promise<Completion> | undefined
  /** Since when it waits while nobody provisions, and its container cannot be started; epoch ms. */
  #waitingSince: number | undefined
  #stuckSince: number | undefined
  #log: PodLog | undefined
  #following: Promise<void> | undefined
  /** Aborts with the backend, or when a stream does not end after its container. */
  readonly #reading: AbortSignal
  readonly #stopReading = new AbortController()
  readonly #readable = Promise.withResolvers<void>()
  #isOverLogLimit = false

  constructor(job: V1Job, options: JobWatchOptions) {
    this.#given = job
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
   * Waits until the task runs, is queued, or has run. Throws a `WorkerError` when it never will, an
   * `UnavailableError` when nothing is heard of it, and the reason of `signal`.
   */
  async started(signal: AbortSignal, hindered: Hindered): Promise<void> {
    const { view } = this.#options
    view.throwIfBlind()
    const { lookMs } = view
    const lookAt = Date.now() + lookMs
    const unheard = Promise.withResolvers<never>()
    const { reject: fail } = unheard
    this.#starting = { signal, hindered, fail, lookAt, lookMs, warning: undefined }
    await until(Promise.race([this.#started.promise, unheard.promise, this.ended()]), signal)
  }

  /** How the task ended, once it has. Rejects when the backend is closed. */
  ended(): Promise<Completion> {
    if (!this.#ended) {
      const ended = this.#run()
      this.#ended = ended
      // While we shut down nobody waits for it. Whatever else went wrong is tried again by who asks next.
      ended.catch(() => {
        if (this.#ended === ended) this.#ended = undefined
      })
    }
    return this.#ended
  }

  /**
   * Waits until the log of a running task is being read, or the task has ended. Throws
   * `UnavailableError` when that takes long.
   */
  async readable(): Promise<void> {
    using deadline = new Deadline(READABLE_MS, [])
    const either = Promise.race([this.#readable.promise, this.ended()])
    await until(either, deadline.signal).catch((err: unknown) => {
      if (!deadline.signal.aborted) throw err
      throw new UnavailableError('The log of the worker cannot be read at the moment')
    })
  }

  /** What is known now. */
  phase(): Observation['phase'] {
    if (this.#completion) return 'ended'
    const { view } = this.#options
    return observe(view.job(this.uid), view.pod(this.uid), NEVER_OVERDUE).phase
  }

  async #run(): Promise<Completion> {
    const { view, closing } = this.#options
    for (;;) {
      // Before it is looked at: what changes meanwhile is looked at next.
      const changed = view.change(this.uid, closing)
      changed.catch(() => {})
      try {
        if (this.#starting) view.throwIfBlind()
        const { seen, pod } = await this.#observe()
        if (seen.phase === 'waiting') {
          if (await this.#isVain(seen)) {
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

  /** Reports why the worker is not ready yet, with the words of events where the pod has none. */
  async #report(seen: Waiting, pod: V1Pod | undefined, starting: Starting): Promise<void> {
    const { view, closing, log } = this.#options
    const isUnclear = ['provisioning_timeout', 'unschedulable'].includes(seen.reason)
    if (isUnclear && Date.now() >= starting.lookAt) {
      // Ever less often: many may wait for the same.
      starting.lookMs *= 2
      starting.lookAt = Date.now() + starting.lookMs
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
            log.warn({ err, worker: this.name }, 'task files could not be put again')
          })
      }
    }
    const also = isUnclear ? starting.warning : undefined
    const message = also ? `${seen.message}. ${also.message}` : seen.message
    starting.hindered(
      also?.reason === 'unavailable'
        ? new UnavailableError(also.message)
        : new WorkerError(also?.reason ?? seen.reason, message),
    )
  }

  /** Reads what is left of the log. */
  async #end(seen: Waiting | Ended, pod: V1Pod | undefined): Promise<Completion> {
    const { closing, lastLogMs = LAST_LOG_MS, onEnded } = this.#options
    this.#log?.over()
    // The stream ends with the container; one that has stalled is not waited for.
    const late = pause(lastLogMs, undefined, { signal: this.#reading, ref: false })
    await Promise.race([this.#following, late])
    this.#stopReading.abort()
    await this.#following
    const note = this.#log && pod ? await this.#restOf(this.#log) : ''
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
      // Holds: these reasons are no one's but a worker's.
      const reason = seen.reason as Completion['reason']
      return { reason, exitCode: null, signal: null, message: seen.message }
    }
    const wasDeleted = pod?.metadata?.deletionTimestamp && seen.completion.reason === 'signal'
    return wasDeleted && !this.isStopping ? deletedOutside() : seen.completion
  }

  /** What is not there may not have been told yet: that it has gone, or its node, is asked for. */
  async #observe(): Promise<{ seen: Observation; pod: V1Pod | undefined }> {
    const { view } = this.#options
    const job = view.job(this.uid) ?? this.#given
    this.#given = undefined
    const told = this.#judge(job, view.pod(this.uid), NEVER_OVERDUE)
    const isLost = told.pod && told.seen.phase !== 'ended' && isOverdue(told.pod, this.#heardNow())
    if (!isLost && (told.pod || (told.seen.phase !== 'ended' && job))) return told
    const asked = await this.#look()
    return this.#judge(asked.job, asked.pod, this.#heardNow())
  }

  #look(): Promise<{ job: V1Job | undefined; pod: V1Pod | undefined }> {
    const { view, closing } = this.#options
    const hindered = (err: UnavailableError) => this.#starting?.hindered(err)
    return view.look(this, closing, { rideMs: view.rideMs, hindered })
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

  /** The time by which pods are overdue. After an outage of the API kubelets come late, as we do. */
  #heardNow(): number {
    const { view, nodeReportMs = NODE_REPORT_MS } = this.#options
    return view.heardMs >= nodeReportMs ? Date.now() : NEVER_OVERDUE
  }

  async #isVain(seen: Waiting): Promise<boolean> {
    const { view, configGraceMs = CONFIG_GRACE_MS, provisioningTimeoutMs } = this.#options
    if (seen.isHopeless) return true
    // Only while something is heard of it: what we are not told may have happened.
    const isHeard = view.problem === undefined
    const since = (is: boolean, before: number | undefined) =>
      is && isHeard ? (before ?? Date.now()) : undefined
    this.#stuckSince = since(seen.reason === 'startup_failed', this.#stuckSince)
    // A queue has let it go, and it does not come up: nobody else looks at the time any more.
    this.#waitingSince = since(this.#starting === undefined, this.#waitingSince)
    const isUp = (at: number | undefined, ms: number) => at !== undefined && Date.now() - at >= ms
    const isStuck = isUp(this.#stuckSince, configGraceMs)
    if (!isStuck && !isUp(this.#waitingSince, provisioningTimeoutMs)) return false
    // Asked before the time is said to be up: watches may be late, or dead.
    const { job, pod } = await this.#look()
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

  /** What to say when it cannot be had. */
  async #restOf(log: PodLog): Promise<string> {
    const { lastLogMs = LAST_LOG_MS, closing } = this.#options
    using deadline = new Deadline(lastLogMs, [closing])
    const { signal } = deadline
    for (let words = ''; ; ) {
      try {
        await log.rest(signal)
        return ''
      } catch (err) {
        // Gone with its pod, or never begun.
        if (err instanceof ApiError && ['invalid', 'not_found'].includes(err.kind)) return ''
        words ||= err instanceof Error ? err.message : String(err)
        if (signal.aborted || err instanceof ApiError)
          return `[task-runner] The end of the log could not be read: ${words}\n`
        await pause(RETRY_MS, undefined, { signal }).catch(() => {})
      }
    }
  }
}
