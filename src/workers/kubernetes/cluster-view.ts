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
/** Watches may be late or dead: what waits wakes up so often. */
const LOOK_MS = 5_000
/** How long an API that does not answer is waited for where the caller can come again. */
const RIDE_MS = 5_000
const LAST_PODS_MAX = 2_000
const CONTROLLER_UID = 'batch.kubernetes.io/controller-uid'

export interface ClusterViewOptions {
  namespace: string
  /** Tells this service's workers from those of others. */
  deployment: string
  /** Id of the version before, which services that share a key share. */
  legacyInstance: string | undefined
  log: Logger
  lookMs?: number | undefined
  rideMs?: number | undefined
  watchIdleMs?: number | undefined
  onJobGone: (uid: string) => void
}

export interface Persistence {
  /** Is told of each failure. */
  hindered?: (err: UnavailableError) => void
  /** How long to go on. Default: until the signal aborts. */
  rideMs?: number
}

/**
 * Our Jobs and their pods as the API server tells of them, and who waits for their changes. Jobs are known by uid:
 * one that somebody makes under the same name is another.
 */
export class ClusterView {
  readonly lookMs: number
  readonly rideMs: number
  /** Selects workers that are ours, and those that may be. */
  readonly labelSelector: string
  readonly #api: KubernetesApi
  readonly #options: ClusterViewOptions
  readonly #jobs: Reflector<V1Job>
  readonly #pods: Reflector<V1Pod>
  /** By the uid of their Job. Of several the youngest. */
  readonly #podOf = new Map<string, V1Pod>()
  /** What was told last about pods that are gone, by the uid of their Job; of so many, or until that is forgotten. */
  readonly #lastPodOf = new Map<string, V1Pod>()
  /** One type of event for each Job, its uid, and `any`. */
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
    // All who wait for room wait for any change.
    setMaxListeners(0, this.#changes)
    this.#jobs = new Reflector(api, {
      ...common,
      ...{ path: this.path('jobs'), answer: 'JobList' },
      onChange: (job) => this.#changed(job.metadata?.uid ?? ''),
      onDeleted: (job) => {
        this.#changed(job.metadata?.uid ?? '')
        options.onJobGone(job.metadata?.uid ?? '')
      },
    })
    this.#pods = new Reflector(api, {
      ...common,
      ...{ path: this.path('pods'), answer: 'PodList' },
      onChange: (pod) => {
        const known = this.#podOf.get(jobUidOf(pod))
        if (!known || known.metadata?.uid === pod.metadata?.uid || isYounger(pod, known)) {
          this.#podOf.set(jobUidOf(pod), pod)
        }
        this.#changed(jobUidOf(pod))
      },
      // How its task ended may be told in the same breath.
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

  /** Settles when all is known that there is. Throws `UnavailableError` when that takes long. */
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

  /** Why nothing is heard of the cluster; undefined: it is. */
  get problem(): string | undefined {
    return (this.#jobs.problem ?? this.#pods.problem)?.message
  }

  /** Throws `UnavailableError` when nothing was heard of the cluster for a while. */
  throwIfBlind(): void {
    for (const { problem } of [this.#jobs, this.#pods]) {
      if (problem && performance.now() - problem.since >= this.rideMs) {
        throw new UnavailableError(`The cluster cannot be watched: ${problem.message}`)
      }
    }
  }

  /** How long it is heard of without a break: kubelets that were cut off as we were have had that to report. */
  get heardMs(): number {
    const now = performance.now()
    const heard = [this.#jobs, this.#pods].map(({ problem, watchedSince }) =>
      problem ? 0 : now - (watchedSince ?? now),
    )
    return Math.min(...heard)
  }

  /** Those that are ours, and those that may be. */
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

  /** A pod that is gone. */
  lastPod(jobUid: string): V1Pod | undefined {
    return this.#lastPodOf.get(jobUid)
  }

  forget(jobUid: string): void {
    this.#lastPodOf.delete(jobUid)
  }

  /** Asks, where the watches tell nothing: they may be late, and one later than the other. */
  async look(
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

  /** One of ours, or one that may be, as the API server has it now. */
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
   * Waits until something about the Job, or `any`, has changed, or a moment has passed: false then. Rejects when `signal` aborts.
   */
  async change(jobUid: string, signal: AbortSignal): Promise<boolean> {
    using deadline = new Deadline(this.lookMs, [signal])
    const changed = once(this.#changes, jobUid, { signal: deadline.signal })
    const isNews = await changed.then(
      () => true,
      () => false,
    )
    signal.throwIfAborted()
    return isNews
  }

  /** Repeats a step while the API is unavailable. Rejects when `signal` aborts, or with that after `rideMs`. */
  async persistently<T>(
    step: () => Promise<T>,
    signal: AbortSignal,
    { hindered, rideMs = Number.POSITIVE_INFINITY }: Persistence = {},
  ): Promise<T> {
    const began = performance.now()
    for (let waitMs = RETRY_MS; ; waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)) {
      try {
        return await step()
      } catch (err) {
        signal.throwIfAborted()
        if (!(err instanceof UnavailableError)) throw err
        hindered?.(err)
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
