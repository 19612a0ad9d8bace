import { setTimeout as pause } from 'node:timers/promises'
import type { V1Job, V1Pod } from '@kubernetes/client-node'
import { Deadline } from '../../core/deadline.ts'
import { type Completion, type LogCursors, type Logger, WorkerError } from '../../core/ports.ts'
import { overLogLimit } from '../completion.ts'
import { LogRing } from '../log-ring.ts'
import { ApiError, type KubernetesApi } from './api.ts'
import type { ClusterView } from './cluster-view.ts'
import { LogCursor, type LogPosition } from './log-cursor.ts'
import { ANNOTATIONS, TASK_CONTAINER } from './manifests.ts'
import { deletedOutside, type Observation, observe, warningOf } from './observation.ts'
import { PodLog } from './pod-log.ts'

const RETRY_MS = 250
/** After a container's end the kubelet may still refuse its log for a moment. */
const LAST_LOG_MS = 30_000
/** For what there is of a log that nobody has followed here. */
const FIRST_PIECE_MS = 1_000
/** A Secret may come later than the pod that wants it. */
const CONFIG_GRACE_MS = 10_000

/** What a worker waits for, told when it waited in vain. */
export type Hindered = (reason: WorkerError['reason'], message: string) => void

export interface JobWatchOptions {
  api: KubernetesApi
  view: ClusterView
  provisioningTimeoutMs: number
  logBytesKept: number
  configGraceMs?: number | undefined
  lastLogMs?: number | undefined
  logSilentMs?: number | undefined
  logCursors: LogCursors | undefined
  logCursorMs?: number | undefined
  /** Ends the task's pod. */
  end: () => Promise<void>
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
  readonly #annotations: Record<string, string>
  #ended: Promise<Completion> | undefined
  readonly #cursor: LogCursor
  readonly #counted = Promise.withResolvers<void>()
  #stuckSince: number | undefined
  #isOverLogLimit = false

  constructor(job: V1Job, options: JobWatchOptions) {
    this.#given = job
    this.#options = options
    this.#annotations = job.metadata?.annotations ?? {}
    this.name = job.metadata?.name ?? ''
    this.uid = job.metadata?.uid ?? ''
    this.ring = new LogRing(options.logBytesKept)
    this.#cursor = new LogCursor({
      ...{ cursors: options.logCursors, writeMs: options.logCursorMs, log: options.log },
      taskId: this.#annotations[ANNOTATIONS.taskId] ?? '',
    })
  }

  get completion(): Completion | undefined {
    return this.#completion
  }

  /** Until the task runs, or has run. Throws a `WorkerError` when it never will. */
  async started(signal: AbortSignal, hindered: Hindered): Promise<void> {
    const { view } = this.#options
    let lookMs = view.lookMs
    let lookAt = Date.now() + lookMs
    let warning: ReturnType<typeof warningOf>
    for (;;) {
      const { seen, pod } = await this.#observe(signal)
      if (seen.phase !== 'waiting') return
      if (this.#isVain(seen)) throw new WorkerError(seen.reason, seen.message)
      const isUnclear = ['provisioning_timeout', 'unschedulable'].includes(seen.reason)
      const tell = () => {
        if (!warning || !isUnclear) hindered(seen.reason, seen.message)
        else hindered(warning.reason ?? seen.reason, `${seen.message}. ${warning.message}`)
      }
      tell()
      const changed = view.change(this.uid, signal)
      changed.catch(() => {})
      if (isUnclear && Date.now() >= lookAt) {
        // Ever less often: many may wait for the same.
        lookMs *= 2
        lookAt = Date.now() + lookMs
        const uid = pod?.metadata?.uid ?? this.uid
        warning = warningOf(await view.events(uid, signal).catch(() => [])) ?? warning
        tell()
      }
      await changed
    }
  }

  /** How the task ended, once it has. Rejects when the backend is closed. */
  ended(): Promise<Completion> {
    this.#ended ??= this.#end()
    // While we shut down nobody waits for it.
    this.#ended.catch(() => {})
    return this.#ended
  }

  /** Settles once the ring's bytes are counted from where they were before a restart, or the task has ended. */
  async counted(): Promise<void> {
    await Promise.race([this.#counted.promise, this.ended()])
  }

  /** Nobody reads on: settles once it is kept how far the log was read. */
  letGo(): Promise<void> {
    return this.#cursor.flush()
  }

  /** What is known now. */
  phase(): Observation['phase'] {
    if (this.#completion) return 'ended'
    const { view } = this.#options
    return observe(view.job(this.uid), view.pod(this.uid)).phase
  }

  async #end(): Promise<Completion> {
    const { view, closing, provisioningTimeoutMs } = this.#options
    const reading = new AbortController()
    const signal = AbortSignal.any([closing, reading.signal])
    let log: PodLog | undefined
    let following: Promise<void> | undefined
    let waitingSince: number | undefined
    const after = await this.#cursor.read()
    // One that says nothing has no first piece to wait for.
    if (!after) setTimeout(this.#counted.resolve, FIRST_PIECE_MS).unref()
    for (;;) {
      const { seen, pod } = await this.#observe(closing)
      const podName = pod?.metadata?.name
      if (podName && (seen.phase === 'running' || seen.phase === 'ended')) {
        log ??= this.#logOf(podName, after)
        if (seen.phase === 'running') following ??= log.follow(signal)
      }
      waitingSince = seen.phase === 'waiting' ? (waitingSince ?? Date.now()) : undefined
      // A queue has let it go, and it does not come up: nobody else looks at the time any more.
      const isTooLong =
        waitingSince !== undefined && Date.now() - waitingSince >= provisioningTimeoutMs
      if (
        seen.phase === 'ended' ||
        (seen.phase === 'waiting' && (isTooLong || this.#isVain(seen)))
      ) {
        log?.over()
        // The stream ends with the container; one that has stalled is not waited for.
        const lastLogMs = this.#options.lastLogMs ?? LAST_LOG_MS
        const late = pause(lastLogMs, undefined, { signal, ref: false })
        await Promise.race([following, late])
        reading.abort()
        await following
        const note = log && pod ? await this.#restOf(log) : ''
        closing.throwIfAborted()
        this.#cursor.drop()
        if (after && this.ring.totalBytes === 0) this.ring.seed(Buffer.alloc(0), after.totalBytes)
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
    if (this.#isOverLogLimit)
      return overLogLimit(Number(this.#annotations[ANNOTATIONS.maxLogBytes]))
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

  /** What is not there may not have been told yet: that it has gone is asked for. */
  async #observe(signal: AbortSignal): Promise<{ seen: Observation; pod: V1Pod | undefined }> {
    const { view } = this.#options
    const last = view.lastPod(this.uid)
    const judge = (job: V1Job | undefined, pod: V1Pod | undefined) => {
      const seen = observe(job, pod)
      const lastSeen = !pod && last ? observe(job, last) : undefined
      return lastSeen?.phase === 'ended' ? { seen: lastSeen, pod: last } : { seen, pod }
    }
    const job = view.job(this.uid) ?? this.#given
    this.#given = undefined
    const told = judge(job, view.pod(this.uid))
    if (told.pod || (told.seen.phase !== 'ended' && job)) return told
    const asked = await view.look(this.name, this.uid, signal)
    return judge(asked.job, asked.pod)
  }

  #isVain(seen: Extract<Observation, { phase: 'waiting' }>): boolean {
    const isConfig = seen.reason === 'startup_failed'
    this.#stuckSince = isConfig ? (this.#stuckSince ?? Date.now()) : undefined
    const graceMs = this.#options.configGraceMs ?? CONFIG_GRACE_MS
    const isTooLong = this.#stuckSince !== undefined && Date.now() - this.#stuckSince >= graceMs
    return seen.isHopeless || isTooLong
  }

  #logOf(podName: string, after: LogPosition | undefined): PodLog {
    const { api, view, logSilentMs, end } = this.#options
    const maxLogBytes = Number(this.#annotations[ANNOTATIONS.maxLogBytes])
    return new PodLog(api, {
      path: `${view.path('pods')}/${podName}/log`,
      container: TASK_CONTAINER,
      ring: this.ring,
      silentMs: logSilentMs,
      after,
      onRead: (position) => {
        this.#counted.resolve()
        this.#cursor.moved(position)
        if (this.ring.totalBytes <= maxLogBytes || this.#isOverLogLimit) return
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
        if (err instanceof ApiError && [400, 404].includes(err.status)) return ''
        words ||= err instanceof Error ? err.message : String(err)
        const isFinal = signal.aborted || (err instanceof ApiError && err.status < 500)
        if (isFinal) return `[task-runner] The end of the log could not be read: ${words}\n`
        await pause(RETRY_MS, undefined, { signal }).catch(() => {})
      }
    }
  }
}
