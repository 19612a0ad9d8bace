import type { V1Job } from '@kubernetes/client-node'
import { Deadline } from '../../core/deadline.ts'
import { UnavailableError } from '../../core/errors.ts'
import { type Worker, type WorkerBackend, WorkerError, type WorkerSpec } from '../../core/ports.ts'
import { SharedLook } from '../../core/shared-look.ts'
import { assertTasksFolder } from '../../core/tasks-folder.ts'
import { until } from '../../core/until.ts'
import { BOOTSTRAP_END_MS } from '../worker-files.ts'
import { KubernetesApi } from './api.ts'
import { ClusterView, type Persistence } from './cluster-view.ts'
import { ApiError, FAILURES } from './failures.ts'
import { JobMaker, type JobSettings } from './job-maker.ts'
import { JobWatch } from './job-watch.ts'
import { loadKubeconfig } from './kubeconfig.ts'
import { ANNOTATIONS, createdAtOf } from './manifests.ts'
import { statusOf } from './observation.ts'
import { missingRights, type Right } from './rights.ts'

export interface KubernetesSettings extends JobSettings {
  /** Default: `KUBECONFIG`, the user's file, or the pod's service account. */
  kubeconfig?: string | undefined
  /** Undefined: the namespace of the kubeconfig's context. */
  namespace: string | undefined
  logBytesKept: number
  /** Rate limit of calls to the API server; default 20. */
  callsPerSecond?: number
  /** Burst of calls; default 30. */
  callsAtOnce?: number
  /** Time limits, which tests shorten. */
  waits?: {
    /** Wait for a change in the watches before the API is read. */
    lookMs?: number
    /** Wait for the answer to a call. */
    callMs?: number
    /** Retries while the API is unavailable, if the caller can retry itself. */
    rideMs?: number
    /** Duration of a check. */
    checkMs?: number
    /** Wait for an invalid container configuration to become valid. */
    configGraceMs?: number
    /** Wait for the rest of an ended container's log. */
    lastLogMs?: number
    /** Wait for kubelets to report after an outage of the API. */
    nodeReportMs?: number
    /** Silence after which a watch is opened again. */
    watchIdleMs?: number
    /** Silence after which a log stream is opened again. */
    logSilentMs?: number
    /** Wait for a worker to be gone, beyond its grace period. */
    goneMs?: number
  }
}

/** Rights that the service account needs in its namespace; deploy/kubernetes grants them. */
export const RIGHTS: readonly Right[] = [
  { group: 'batch', resource: 'jobs', verbs: ['create', 'get', 'list', 'watch', 'delete'] },
  { group: '', resource: 'pods', verbs: ['get', 'list', 'watch'] },
  { group: '', resource: 'pods/log', verbs: ['get'] },
  { group: '', resource: 'events', verbs: ['list'] },
  { group: '', resource: 'configmaps', verbs: ['create'] },
  { group: '', resource: 'secrets', verbs: ['create'] },
]
/** Optional rights to remove unused task files; without them, the service logs a warning. */
export const CLEAN_UP_RIGHTS: readonly Right[] = [
  { group: '', resource: 'configmaps', verbs: ['list', 'delete'] },
]
const RIGHTS_KNOWN_MS = 300_000
/** A missing right may be granted at any moment. */
const MISSING_RIGHTS_KNOWN_MS = 5_000
const CHECK_MS = 5_000
/** Wait for a worker to be gone after its grace period. */
const GONE_MS = 10_000
/** Wait for the end of a stopped task after its grace period, including its log or a lost node. */
const STOPPED_MS = 90_000

/** Minimal worker that a check creates with a dry run. */
const CHECKED: WorkerSpec = {
  name: 'task-runner-check',
  taskId: 'check',
  taskFileName: 'check.sh',
  taskFolder: 'tasks',
  repositories: [],
  environment: {},
  notes: [],
  keepAfterwards: false,
  maxLogBytes: 1,
  timeoutSeconds: 1,
}

/** Runs workers as Jobs of a Kubernetes namespace. */
export class KubernetesBackend implements WorkerBackend {
  readonly name = 'kubernetes'
  readonly #settings: KubernetesSettings
  readonly #api: KubernetesApi
  readonly #namespace: string
  readonly #view: ClusterView
  readonly #maker: JobMaker
  /** Watches by the uid of their Job. */
  readonly #watches = new Map<string, JobWatch>()
  readonly #making = new Map<string, Promise<Worker>>()
  readonly #closing = new AbortController()
  readonly #checks = new SharedLook(() => this.#check())
  #missingRights: { known: Promise<string[]>; until: number } | undefined

  constructor(settings: KubernetesSettings) {
    this.#settings = settings
    const { waits = {}, callsPerSecond, callsAtOnce } = settings
    this.#api = new KubernetesApi(() => loadKubeconfig(settings.kubeconfig), {
      ...(callsPerSecond === undefined ? {} : { callsPerSecond }),
      ...(callsAtOnce === undefined ? {} : { callsAtOnce }),
      ...(waits.callMs === undefined ? {} : { callMs: waits.callMs }),
    })
    const { config } = this.#api
    const context = config.getContextObject(config.getCurrentContext())
    this.#namespace = settings.namespace ?? context?.namespace ?? 'default'
    this.#view = new ClusterView(this.#api, {
      namespace: this.#namespace,
      deployment: settings.deployment,
      legacyInstance: settings.legacyInstance,
      log: settings.log,
      lookMs: waits.lookMs,
      rideMs: waits.rideMs,
      watchIdleMs: waits.watchIdleMs,
      onJobGone: (uid) => this.#forgetIfGone(uid),
    })
    this.#maker = new JobMaker(this.#api, this.#view, settings)
  }

  async provision(
    spec: WorkerSpec,
    signal: AbortSignal,
    mayStart = async () => {},
  ): Promise<Worker> {
    signal.throwIfAborted()
    const making =
      this.#making.get(spec.name) ??
      this.#provision(spec, signal, mayStart).finally(() => this.#making.delete(spec.name))
    this.#making.set(spec.name, making)
    // Not raced with the signal, since the interrupted step reports why the worker was not ready.
    return making
  }

  async find(name: string): Promise<Worker | undefined> {
    const job = await this.#view.namedJob(name, this.#closing.signal)
    return job && this.#worker(job)
  }

  async list(): Promise<Worker[]> {
    await this.#view.synced()
    const { items } = await this.#api.json<{ items: V1Job[] }>('GET', this.#view.path('jobs'), {
      query: { labelSelector: this.#view.labelSelector },
      answer: 'JobList',
    })
    return items.map((job) => this.#worker(job))
  }

  /** Costs one API call, and one per right every few minutes; concurrent callers share a check. */
  check(): Promise<void> {
    return this.#checks.at('provisioning')
  }

  taskFilesProblem(): Promise<string | undefined> {
    return this.#maker.taskFilesProblem()
  }

  async close(): Promise<void> {
    this.#closing.abort()
    await this.#view.close()
    await this.#api.close()
  }

  /** Rejects when `signal` aborts, with the last reported reason for the wait. */
  async #provision(
    spec: WorkerSpec,
    signal: AbortSignal,
    mayStart: () => Promise<void>,
  ): Promise<Worker> {
    const noAnswer = new UnavailableError('The Kubernetes API did not answer in time')
    const last: { reason: WorkerError | UnavailableError } = { reason: noAnswer }
    const onWaiting = (why: WorkerError | UnavailableError) => {
      last.reason = why
    }
    try {
      await until(this.#view.synced(), signal)
      const options = { signal, onWaiting, mayStart }
      let made = await this.#maker.make(spec, options)
      while (made.isNeverBegun) {
        await this.#removed(this.#watch(made.job), signal)
        made = await this.#maker.make(spec, options)
      }
      await this.#watch(made.job).started(signal, onWaiting)
      return this.#worker(made.job)
    } catch (err) {
      const isTimeout = signal.aborted && signal.reason instanceof DOMException
      if (!isTimeout || signal.reason.name !== 'TimeoutError') throw err
      const { problem } = this.#view
      if (problem !== undefined) {
        throw new UnavailableError(`The cluster cannot be watched: ${problem}`, { cause: err })
      }
      const { reason } = last
      if (reason instanceof UnavailableError) throw reason
      const seconds = this.#settings.provisioningTimeoutMs / 1000
      const message = `The worker was not ready within ${seconds} seconds. ${reason.message}`
      throw new WorkerError(reason.reason, message, { cause: err })
    }
  }

  #worker(job: V1Job): Worker {
    const name = job.metadata?.name ?? ''
    const annotations = job.metadata?.annotations ?? {}
    const uid = job.metadata?.uid ?? ''
    let held = this.#watches.get(uid)
    const watched = async () => {
      await this.#view.synced()
      held ??= this.#watch(job)
      return held
    }
    return {
      name,
      taskId: annotations[ANNOTATIONS.taskId] ?? '',
      backend: this.name,
      image: annotations[ANNOTATIONS.image] ?? null,
      size: annotations[ANNOTATIONS.size] || null,
      createdAt: createdAtOf(job),
      mayBeForeign: !this.#view.isOurs(job),
      status: async () => {
        await this.#view.synced()
        if ((held ?? this.#watches.get(uid))?.completion) return 'Completed'
        // A Job that the watch does not have is gone, or too new.
        const job = this.#view.job(uid) ?? (await this.#view.namedJob(name, this.#closing.signal))
        return statusOf(job?.metadata?.uid === uid ? job : undefined, this.#view.pod(uid))
      },
      completion: async (signal) => {
        const watch = await until(this.#view.persistently(watched, signal), signal)
        return until(watch.ended(), signal)
      },
      stop: async () => this.#stop(await watched()),
      logs: async ({ maxBytes }) => {
        const watch = await watched()
        const ended = watch.ended()
        const phase = watch.phase()
        if (phase === 'ended') await ended
        // Waits rather than return an empty log, because followers continue from its length.
        else if (phase === 'running') await watch.readable()
        return watch.ring.tail(maxBytes)
      },
      follow: async function* ({ from, signal }) {
        const watch = await watched()
        void watch.ended()
        yield* watch.ring.follow(from, signal)
      },
      terminate: async () => {
        await this.#terminate(await watched())
        held = undefined
      },
    }
  }

  #watch(job: V1Job): JobWatch {
    const uid = job.metadata?.uid ?? ''
    const known = this.#watches.get(uid)
    if (known) return known
    const { provisioningTimeoutMs, logBytesKept, log, waits = {} } = this.#settings
    const watch: JobWatch = new JobWatch(job, {
      api: this.#api,
      view: this.#view,
      closing: this.#closing.signal,
      provisioningTimeoutMs,
      logBytesKept,
      log,
      configGraceMs: waits.configGraceMs,
      lastLogMs: waits.lastLogMs,
      nodeReportMs: waits.nodeReportMs,
      logSilentMs: waits.logSilentMs,
      end: () => this.#delete(watch),
      putFilesAgain: (name, signal) =>
        this.#maker.putFilesAgain(name, { signal, onWaiting: () => {} }),
      onEnded: () => this.#forgetIfGone(uid),
    })
    this.#watches.set(uid, watch)
    return watch
  }

  /** Forgets a completed worker whose Job is gone. Readers of its log keep a reference. */
  #forgetIfGone(uid: string): void {
    if (!this.#watches.get(uid)?.completion || this.#view.job(uid)) return
    this.#watches.delete(uid)
    this.#view.forget(uid)
  }

  /** Deletes the Job and waits until the task has ended. Throws after a time limit. */
  async #stop(watch: JobWatch): Promise<void> {
    if (watch.completion) return
    watch.isStopping = true
    const ended = watch.ended()
    await this.#delete(watch, { rideMs: this.#view.rideMs })
    using deadline = new Deadline(this.#settings.terminationGraceMs + STOPPED_MS, [])
    await until(ended, deadline.signal)
  }

  /** Removes a worker. Rejects if it stays, for example on a lost node. */
  async #terminate(watch: JobWatch): Promise<void> {
    watch.isStopping = true
    await this.#making.get(watch.name)?.catch(() => {})
    await this.#removed(watch, this.#closing.signal)
  }

  /** Removes a Job and waits until it and its pod are gone. */
  async #removed(watch: JobWatch, signal: AbortSignal): Promise<void> {
    const { name, uid } = watch
    await this.#api.remove(`${this.#view.path('jobs')}/${name}`, uid)
    const { waits = {}, terminationGraceMs } = this.#settings
    const patienceMs = terminationGraceMs + BOOTSTRAP_END_MS + (waits.goneMs ?? GONE_MS)
    using deadline = new Deadline(patienceMs, [this.#closing.signal, signal])
    const isThere = () => this.#view.job(uid) !== undefined || this.#view.pod(uid) !== undefined
    try {
      while (isThere()) {
        // The watches often report the Job and its pod one after the other.
        if ((await this.#view.change(uid, deadline.signal)) || !isThere()) continue
        // Watches may be late.
        const found = await this.#view.read(watch, deadline.signal)
        if (!found.job && !found.pod) break
      }
    } catch (err) {
      this.#closing.signal.throwIfAborted()
      signal.throwIfAborted()
      this.#view.throwIfUnwatched()
      throw new Error(`Worker ${name} is not removed in time: is its node lost?`, { cause: err })
    }
    this.#watches.delete(uid)
    this.#view.forget(uid)
  }

  /** Deletes the Job with the watch's uid, and retries while the API is unavailable. */
  async #delete({ name, uid }: JobWatch, persistence: Persistence = {}): Promise<void> {
    const { signal } = this.#closing
    const remove = () => this.#api.remove(`${this.#view.path('jobs')}/${name}`, uid)
    await this.#view.persistently(remove, signal, persistence)
  }

  async #check(): Promise<void> {
    using deadline = new Deadline(this.#settings.waits?.checkMs ?? CHECK_MS, [this.#closing.signal])
    const { signal } = deadline
    try {
      await assertTasksFolder(this.#settings.tasksDir)
      await until(this.#tryProvisioning(signal), signal)
    } catch (err) {
      if (err instanceof UnavailableError) throw err
      const words = deadline.signal.aborted ? 'it does not answer in time' : messageOf(err)
      throw new UnavailableError(`The Kubernetes API cannot be used: ${words}`, { cause: err })
    }
  }

  async #tryProvisioning(signal: AbortSignal): Promise<void> {
    const missing = await this.#rights()
    if (missing.length > 0) {
      const what = missing.join(', ')
      throw new UnavailableError(
        `The service account may not ${what} in namespace ${this.#namespace}`,
      )
    }
    await this.#view.synced()
    this.#view.throwIfUnwatched()
    await this.#maker.check()
    await this.#maker.tryJob(CHECKED, signal).catch((err: unknown) => {
      // A failure of this worker need not affect others.
      if (!(err instanceof ApiError && FAILURES[err.kind] === 'task')) throw err
    })
  }

  /** Returns the missing rights, from a cache that is shorter if there are some. */
  #rights(): Promise<string[]> {
    if (!this.#missingRights || this.#missingRights.until < Date.now()) {
      const known = missingRights(this.#api, this.#namespace, RIGHTS)
      const cached = { known, until: Date.now() + RIGHTS_KNOWN_MS }
      this.#missingRights = cached
      known.then(
        ({ length }) => {
          if (length > 0) cached.until = Date.now() + MISSING_RIGHTS_KNOWN_MS
        },
        () => {
          this.#missingRights = undefined
        },
      )
    }
    return this.#missingRights.known
  }
}

function messageOf(err: unknown): string {
  return err instanceof Error ? err.message : String(err)
}
