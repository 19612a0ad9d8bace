import { setTimeout as pause } from 'node:timers/promises'
import type { V1Job, V1Pod } from '@kubernetes/client-node'
import { Deadline } from '../../core/deadline.ts'
import { UnavailableError } from '../../core/errors.ts'
import { type Completion, type Logger, WorkerError } from '../../core/ports.ts'
import { until } from '../../core/until.ts'
import { overLogLimit } from '../completion.ts'
import { LogRing } from '../log-ring.ts'
import type { KubernetesApi } from './api.ts'
import type { ClusterView, Persistence } from './cluster-view.ts'
import { ApiError } from './failures.ts'
import { maxLogBytesOf, TASK_CONTAINER } from './manifests.ts'
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

/** One Job, from its creation to the end of its task. The API's troubles decide nothing. */
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
  #ended: Promise<Completion> | undefined
  readonly #readable = Promise.withResolvers<void>()
  #stuckSince: number | undefined
  #isOverLogLimit = false

  constructor(job: V1Job, options: JobWatchOptions) {
    this.#given = job
    this.#options = options
    this.#maxLogBytes = maxLogBytesOf(job)
    const volumes = job.spec?.template.spec?.volumes ?? []
    this.#filesName = volumes.find(({ configMap }) => configMap)?.configMap?.name ?? ''
    this.name = job.metadata?.name ?? ''
    this.uid = job.metadata?.uid ?? ''
    this.ring = new LogRing(options.logBytesKept)
  }

  get completion(): Completion | undefined {
    return this.#completion
  }

  /**
   * Waits until the task runs, or has run. Throws a `WorkerError` when it never will, and an `UnavailableError` when nothing
   * is heard of it.
   */
  async started(signal: AbortSignal, hindered: Hindered): Promise<Observation['phase']> {
    const { view } = this.#options
    const persistence = { rideMs: view.rideMs, hindered }
    let lookMs = view.lookMs
    let lookAt = Date.now() + lookMs
    let warning: ReturnType<typeof warningOf>
    for (;;) {
      view.throwIfBlind()
      const { seen, pod } = await this.#observe(signal, persistence)
      if (seen.phase !== 'waiting') return seen.phase
      if (await this.#isVain(seen, signal, persistence)) {
        throw new WorkerError(seen.reason, seen.message)
      }
      const isUnclear = ['provisioning_timeout', 'unschedulable'].includes(seen.reason)
      const tell = () => {
        const also = isUnclear ? warning : undefined
        const message = also ? `${seen.message}. ${also.message}` : seen.message
        hindered(
          also?.reason === 'unavailable'
            ? new UnavailableError(also.message)
            : new WorkerError(also?.reason ?? seen.reason, message),
        )
      }
      tell()
      const changed = view.change(this.uid, signal)
      changed.catch(() => {})
      if (isUnclear && Date.now() >= lookAt) {
        // Ever less often: many may wait for the same.
        lookMs *= 2
        lookAt = Date.now() + lookMs
        const uid = pod?.metadata?.uid ?? this.uid
        const events = await view.events(uid, signal).catch(() => [])
        warning = warningOf(events) ?? warning
        tell()
        const isMissing = `configmap "${this.#filesName}" not found`
        if (events.some(({ message }) => message?.includes(isMissing))) {
          await this.#options.putFilesAgain(this.#filesName, signal)
        }
      }
      await changed
    }
  }

  /** How the task ended, once it has. Rejects when the backend is closed. */
  ended(): Promise<Completion> {
    if (!this.#ended) {
      const ended = this.#end()
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

  async #end(): Promise<Completion> {
    const { view, closing, provisioningTimeoutMs } = this.#options
    const reading = new AbortController()
    const signal = AbortSignal.any([closing, reading.signal])
    let log: PodLog | undefined
    let following: Promise<void> | undefined
    let waitingSince: number | undefined
    for (;;) {
      const { seen, pod } = await this.#observe(closing)
      const podName = pod?.metadata?.name
      if (podName && (seen.phase === 'running' || seen.phase === 'ended')) {
        log ??= this.#logOf(podName)
        if (seen.phase === 'running') following ??= log.follow(signal)
      }
      // Only while something is heard of it: what we are not told may have happened.
      const isWaiting = seen.phase === 'waiting' && view.problem === undefined
      waitingSince = isWaiting ? (waitingSince ?? Date.now()) : undefined
      // A queue has let it go, and it does not come up: nobody else looks at the time any more.
      const isTooLong =
        waitingSince !== undefined && Date.now() - waitingSince >= provisioningTimeoutMs
      const isVain =
        seen.phase === 'waiting' &&
        ((isTooLong && (await this.#isStill('waiting', closing))) ||
          (await this.#isVain(seen, closing)))
      if (seen.phase === 'ended' || isVain) {
        log?.over()
        // The stream ends with the container; one that has stalled is not waited for.
        const lastLogMs = this.#options.lastLogMs ?? LAST_LOG_MS
        const late = pause(lastLogMs, undefined, { signal, ref: false })
        await Promise.race([following, late])
        reading.abort()
        await following
        const note = log && pod ? await this.#restOf(log) : ''
        closing.throwIfAborted()
        this.ring.append(Buffer.from(note))
        this.ring.end()
        this.#completion = this.#completionOf(seen, pod)
        this.#options.onEnded()
        return this.#completion
      }
      await view.change(this.uid, closing)
    }
  }

  #completionOf(seen: Observation, pod: V1Pod | undefined): Completion {
    if (this.#isOverLogLimit) return overLogLimit(this.#maxLogBytes)
    if (seen.phase !== 'ended') {
      // Holds: nothing else ends without a completion. These reasons are no one's but a worker's.
      const { reason, message } = seen as Extract<Observation, { phase: 'waiting' }>
      return {
        ...{ exitCode: null, signal: null, message },
        reason: reason as Completion['reason'],
      }
    }
    const wasDeleted = pod?.metadata?.deletionTimestamp && seen.completion.reason === 'signal'
    return wasDeleted && !this.isStopping ? deletedOutside() : seen.completion
  }

  /** What is not there may not have been told yet: that it has gone, or its node, is asked for. */
  async #observe(
    signal: AbortSignal,
    persistence: Persistence = {},
  ): Promise<{ seen: Observation; pod: V1Pod | undefined }> {
    const { view } = this.#options
    const job = view.job(this.uid) ?? this.#given
    this.#given = undefined
    const told = this.#judge(job, view.pod(this.uid), NEVER_OVERDUE)
    const isLost = told.pod && told.seen.phase !== 'ended' && isOverdue(told.pod, this.#heardNow())
    if (!isLost && (told.pod || (told.seen.phase !== 'ended' && job))) return told
    const asked = await view.look(this, signal, persistence)
    return this.#judge(asked.job, asked.pod, this.#heardNow())
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

  async #isVain(
    seen: Extract<Observation, { phase: 'waiting' }>,
    signal: AbortSignal,
    persistence: Persistence = {},
  ): Promise<boolean> {
    const { view, configGraceMs = CONFIG_GRACE_MS } = this.#options
    const isStuck = seen.reason === 'startup_failed' && view.problem === undefined
    this.#stuckSince = isStuck ? (this.#stuckSince ?? Date.now()) : undefined
    if (seen.isHopeless) return true
    if (this.#stuckSince === undefined || Date.now() - this.#stuckSince < configGraceMs)
      return false
    return this.#isStill('startup_failed', signal, persistence)
  }

  /** Asks before the time is said to be up: watches may be late, or dead. */
  async #isStill(
    what: 'waiting' | 'startup_failed',
    signal: AbortSignal,
    persistence: Persistence = {},
  ): Promise<boolean> {
    const { job, pod } = await this.#options.view.look(this, signal, persistence)
    const seen = observe(job, pod, NEVER_OVERDUE)
    return seen.phase === 'waiting' && (what === 'waiting' || seen.reason === what)
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
