import { once, setMaxListeners } from 'node:events'
import { setTimeout as pause } from 'node:timers/promises'
import type { CoreV1Event, V1Job, V1Pod } from '@kubernetes/client-node'
import { Deadline } from '../../core/deadline.ts'
import { UnavailableError } from '../../core/errors.ts'
import type { Logger } from '../../core/ports.ts'
import { until } from '../../core/until.ts'
import type { KubernetesApi } from './api.ts'
import { ApiError, ApiUnavailableError } from './failures.ts'
import { LABELS } from './manifests.ts'
import { Reflector } from './reflector.ts'

const RETRY_MS = 250
const RETRY_MAX_MS = 30_000
/** Maximum wait for a change before asking the API: watches may be late or dead. */
const LOOK_MS = 5_000
/** Maximum time of retries while the API is unavailable, if the caller can retry itself. */
const RIDE_MS = 5_000
const LAST_PODS_MAX = 2_000
const CONTROLLER_UID = 'batch.kubernetes.io/controller-uid'

export interface ClusterViewOptions {
  namespace: string
  /** Id that distinguishes this service's workers from those of others. */
  deployment: string
  /** Id that earlier versions used; services that share a sealing key share it. */
  legacyInstance: string | undefined
  log: Logger
  lookMs?: number | undefined
  rideMs?: number | undefined
  watchIdleMs?: number | undefined
  onJobGone: (uid: string) => void
}

export interface Persistence {
  /** Called after each failure. */
  onFailure?: (err: UnavailableError) => void
  /** Maximum milliseconds of retries. Default: until the signal aborts. */
  rideMs?: number
}

/**
 * A watched copy of our Jobs and their pods. Jobs are known by uid, since a new Job may have the
 * name of an old one.
 */
export class ClusterView {
  readonly lookMs: number
  readonly rideMs: number
  /** Selects our workers and those with the legacy id, which may be ours. */
  readonly labelSelector: string
  readonly #api: KubernetesApi
  readonly #options: ClusterViewOptions
  readonly #jobs: Reflector<V1Job>
  readonly #pods: Reflector<V1Pod>
  /** Youngest pod of each Job, by the Job's uid. */
  readonly #podOf = new Map<string, V1Pod>()
  /** Last state of deleted pods, by the Job's uid; at most `LAST_PODS_MAX`. */
  readonly #lastPodOf = new Map<string, V1Pod>()
  /** Emits an event named after the Job's uid, and `any`, for each change. */
  readonly #changes = new EventTarget()

  constructor(api: KubernetesApi, options: ClusterViewOptions) {
    this.#api = api
    this.#options = options
    this.lookMs = options.lookMs ?? LOOK_MS
    this.rideMs = options.rideMs ?? RIDE_MS
    const owners = [...new Set([options.deployment, options.legacyInstance])].filter(Boolean)
    this.labelSelector = `${LABELS.instance} in (${owners})`
    const common = {
      labelSelector: this.labelSelector,
      log: options.log,
      idleMs: options.watchIdleMs,
    }
    // All tasks that wait for quota listen to `any`.
    setMaxListeners(0, this.#changes)
    this.#jobs = new Reflector(api, {
      ...common,
      path: this.path('jobs'),
      answer: 'JobList',
      onChange: (job) => this.#changed(job.metadata?.uid ?? ''),
      onDeleted: (job) => {
        this.#changed(job.metadata?.uid ?? '')
        options.onJobGone(job.metadata?.uid ?? '')
      },
    })
    this.#pods = new Reflector(api, {
      ...common,
      path: this.path('pods'),
      answer: 'PodList',
      onChange: (pod) => {
        const known = this.#podOf.get(jobUidOf(pod))
        if (!known || known.metadata?.uid === pod.metadata?.uid || isYounger(pod, known)) {
          this.#podOf.set(jobUidOf(pod), pod)
        }
        this.#changed(jobUidOf(pod))
      },
      // The last state of the pod may say how its task ended.
      onDeleted: (pod) => {
        const uid = jobUidOf(pod)
        if (this.#podOf.get(uid)?.metadata?.uid === pod.metadata?.uid) this.#podOf.delete(uid)
        this.#lastPodOf.set(uid, pod)
        const [oldest = ''] = this.#lastPodOf.keys()
        if (this.#lastPodOf.size > LAST_PODS_MAX) this.#lastPodOf.delete(oldest)
        this.#changed(uid)
      },
    })
  }

  path(resource: 'jobs' | 'pods' | 'secrets' | 'configmaps' | 'events'): string {
    const group = resource === 'jobs' ? '/apis/batch/v1' : '/api/v1'
    return `${group}/namespaces/${this.#options.namespace}/${resource}`
  }

  /** Waits for the first list. Throws `UnavailableError` if that takes longer than `rideMs`. */
  async synced(): Promise<void> {
    using deadline = new Deadline(this.rideMs, [])
    const both = Promise.all([this.#jobs.synced(), this.#pods.synced()])
    try {
      await until(both, deadline.signal)
    } catch (err) {
      if (!deadline.signal.aborted) throw err
      const why =
        this.problem ?? `it has not listed the workers in namespace ${this.#options.namespace} yet`
      throw new UnavailableError(`The cluster cannot be watched: ${why}`, { cause: err })
    }
  }

  async close(): Promise<void> {
    await Promise.all([this.#jobs.stop(), this.#pods.stop()])
  }

  /** Message of the failure to watch the cluster; undefined while it is watched. */
  get problem(): string | undefined {
    return (this.#jobs.problem ?? this.#pods.problem)?.message
  }

  /** Throws `UnavailableError` if the cluster could not be watched for `rideMs`. */
  throwIfUnwatched(): void {
    for (const { problem } of [this.#jobs, this.#pods]) {
      if (problem && performance.now() - problem.since >= this.rideMs) {
        throw new UnavailableError(`The cluster cannot be watched: ${problem.message}`)
      }
    }
  }

  /** Milliseconds since the last break of a watch: the time kubelets have had to report since. */
  get watchedMs(): number {
    const now = performance.now()
    const durations = [this.#jobs, this.#pods].map(({ problem, watchedSince }) =>
      problem ? 0 : now - (watchedSince ?? now),
    )
    return Math.min(...durations)
  }

  /** Our Jobs, and those with the legacy id. */
  get jobs(): V1Job[] {
    return [...this.#jobs.objects.values()]
  }

  isOurs({ metadata }: Pick<V1Job, 'metadata'>): boolean {
    return metadata?.labels?.[LABELS.instance] === this.#options.deployment
  }

  job(uid: string): V1Job | undefined {
    return this.#jobs.objects.get(uid)
  }

  pod(jobUid: string): V1Pod | undefined {
    return this.#podOf.get(jobUid)
  }

  /** Returns the last state of the Job's deleted pod. */
  lastPod(jobUid: string): V1Pod | undefined {
    return this.#lastPodOf.get(jobUid)
  }

  forget(jobUid: string): void {
    this.#lastPodOf.delete(jobUid)
  }

  /** Reads a Job and its pod from the API, since watches may be late. */
  async read(
    { name, uid }: { name: string; uid: string },
    signal: AbortSignal,
    options: Persistence = {},
  ): Promise<{ job: V1Job | undefined; pod: V1Pod | undefined }> {
    const query = { labelSelector: `${CONTROLLER_UID}=${uid}` }
    const [job, pods] = await Promise.all([
      this.persistently(() => this.#jobNamed(name, signal), signal, options),
      this.persistently(
        () => {
          const call = { query, signal, answer: 'PodList' }
          return this.#api.json<{ items: V1Pod[] }>('GET', this.path('pods'), call)
        },
        signal,
        options,
      ),
    ])
    const [pod] = pods.items.toSorted((a, b) => (isYounger(a, b) ? -1 : 1))
    return { job: job?.metadata?.uid === uid ? job : undefined, pod }
  }

  /** Reads a Job from the API, if it is ours or has the legacy id. */
  async namedJob(name: string, signal: AbortSignal): Promise<V1Job | undefined> {
    const job = await this.#jobNamed(name, signal)
    const owner = job?.metadata?.labels?.[LABELS.instance]
    const { deployment, legacyInstance } = this.#options
    const mayBeOurs = owner === deployment || (owner !== undefined && owner === legacyInstance)
    return mayBeOurs ? job : undefined
  }

  async #jobNamed(name: string, signal: AbortSignal): Promise<V1Job | undefined> {
    try {
      const path = `${this.path('jobs')}/${name}`
      return await this.#api.json<V1Job>('GET', path, { signal, answer: 'Job' })
    } catch (err) {
      if (err instanceof ApiError && err.kind === 'not_found') return undefined
      throw err
    }
  }

  async events(uid: string, signal: AbortSignal): Promise<CoreV1Event[]> {
    const query = { fieldSelector: `involvedObject.uid=${uid}` }
    const path = this.path('events')
    const call = { query, signal, answer: 'EventList' }
    return (await this.#api.json<{ items: CoreV1Event[] }>('GET', path, call)).items
  }

  /**
   * Waits for a change of the Job, or of `any` Job, and returns true; returns false after `lookMs`.
   * Rejects when `signal` aborts.
   */
  async change(jobUid: string, signal: AbortSignal): Promise<boolean> {
    using deadline = new Deadline(this.lookMs, [signal])
    const changed = once(this.#changes, jobUid, { signal: deadline.signal })
    const hasChanged = await changed.then(
      () => true,
      () => false,
    )
    signal.throwIfAborted()
    return hasChanged
  }

  /** Repeats a step while the API is unavailable, until `signal` aborts or `rideMs` is over. */
  async persistently<T>(
    step: () => Promise<T>,
    signal: AbortSignal,
    { onFailure, rideMs = Number.POSITIVE_INFINITY }: Persistence = {},
  ): Promise<T> {
    const began = performance.now()
    for (let waitMs = RETRY_MS; ; waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)) {
      try {
        return await step()
      } catch (err) {
        signal.throwIfAborted()
        if (!(err instanceof UnavailableError)) throw err
        onFailure?.(err)
        const retryAfterMs = err instanceof ApiUnavailableError ? err.retryAfterMs : 0
        const pauseMs = Math.max(waitMs * (0.5 + Math.random()), retryAfterMs)
        if (performance.now() + pauseMs - began >= rideMs) throw err
        this.#options.log.warn({ err }, 'waiting for the Kubernetes API')
        await pause(pauseMs, undefined, { signal })
      }
    }
  }

  #changed(jobUid: string): void {
    this.#changes.dispatchEvent(new Event(jobUid))
    this.#changes.dispatchEvent(new Event('any'))
  }
}

function jobUidOf(pod: V1Pod): string {
  return pod.metadata?.labels?.[CONTROLLER_UID] ?? ''
}

function isYounger(one: V1Pod, other: V1Pod): boolean {
  const timeOf = ({ metadata }: V1Pod) => String(metadata?.creationTimestamp ?? '')
  return timeOf(one) > timeOf(other)
}
