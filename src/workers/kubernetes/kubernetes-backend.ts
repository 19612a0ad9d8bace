import { once } from 'node:events'
import { setTimeout as pause } from 'node:timers/promises'
import { createGzip } from 'node:zlib'
import { type CoreV1Event, KubeConfig, type V1Job, type V1Pod } from '@kubernetes/client-node'
import { TaskRunnerError } from '../../core/errors.ts'
import {
  type Completion,
  type Logger,
  type Worker,
  type WorkerBackend,
  WorkerError,
  type WorkerSpec,
} from '../../core/ports.ts'
import { until } from '../../core/until.ts'
import { lost, overLogLimit } from '../completion.ts'
import { type ImageNames, imageFor } from '../image.ts'
import { LogRing } from '../log-ring.ts'
import { sharedTar } from '../worker-files.ts'
import { ApiError, ApiUnreachableError, KubernetesApi } from './api.ts'
import {
  ANNOTATIONS,
  filesConfigMap,
  type JobOptions,
  LABELS,
  OBJECT_BYTES_MAX,
  ownSecret,
  pullSecret,
  pullSecretName,
  TASK_CONTAINER,
  workerJob,
} from './manifests.ts'
import { type Observation, observe, statusOf, warningOf } from './observation.ts'
import { PodLog } from './pod-log.ts'
import { Reflector } from './reflector.ts'

export interface KubernetesSettings {
  /** Undefined: `KUBECONFIG`, the user's own file, or the service account of the pod we run in. */
  kubeconfig?: string | undefined
  /** Undefined: that of the kubeconfig's context. */
  namespace: string | undefined
  instance: string
  tasksDir: string
  images: ImageNames
  serviceAccount: string
  queue: string | undefined
  workersMax: number
  provisioningTimeoutMs: number
  terminationGraceMs: number
  keptWorkerMs: number
  logBytesKept: number
  log: Logger
}

/** What the service account must be allowed to do in its namespace; deploy/kubernetes grants the same. */
export const RIGHTS: ReadonlyArray<{ group: string; resource: string; verbs: readonly string[] }> =
  [
    { group: 'batch', resource: 'jobs', verbs: ['create', 'get', 'list', 'watch', 'delete'] },
    { group: '', resource: 'pods', verbs: ['get', 'list', 'watch'] },
    { group: '', resource: 'pods/log', verbs: ['get'] },
    { group: '', resource: 'events', verbs: ['list'] },
    { group: '', resource: 'configmaps', verbs: ['create'] },
    { group: '', resource: 'secrets', verbs: ['create', 'patch', 'delete'] },
  ]
const RIGHTS_KNOWN_MS = 300_000
const FILES_KNOWN_MS = 1_000
const RETRY_MS = 250
const RETRY_MAX_MS = 30_000
/** Watches may be late or dead: what waits looks for itself so often. */
const LOOK_MS = 5_000
/** After a container's end the kubelet may still refuse its log for a moment. */
const LAST_LOG_MS = 10_000
/** A Secret may come later than the pod that wants it. */
const CONFIG_GRACE_MS = 10_000

interface Watched {
  ring: LogRing
  ended: Promise<Completion>
  completion: Completion | undefined
  overLogLimit: boolean
  /** What was told last about a pod that is gone. */
  lastPod: V1Pod | undefined
}

/** Workers that are Jobs of a Kubernetes namespace. */
export class KubernetesBackend implements WorkerBackend {
  readonly name = 'kubernetes'
  readonly #settings: KubernetesSettings
  readonly #api: KubernetesApi
  readonly #namespace: string
  readonly #jobs: Reflector<V1Job>
  readonly #pods: Reflector<V1Pod>
  readonly #changes = new EventTarget()
  readonly #watched = new Map<string, Watched>()
  readonly #making = new Map<string, Promise<Worker>>()
  readonly #closing = new AbortController()
  /** Names of ConfigMaps that are there. */
  readonly #filesThere = new Set<string>()
  #filesKnown: { known: Promise<Buffer>; until: number } | undefined
  #missingRights: { known: Promise<string[]>; until: number } | undefined

  constructor(settings: KubernetesSettings) {
    this.#settings = settings
    const config = new KubeConfig()
    if (settings.kubeconfig === undefined) config.loadFromDefault()
    else config.loadFromFile(settings.kubeconfig)
    const context = config.getContextObject(config.getCurrentContext())
    this.#namespace = settings.namespace ?? context?.namespace ?? 'default'
    this.#api = new KubernetesApi(config)
    const labelSelector = `${LABELS.instance}=${settings.instance}`
    const onChange = () => this.#changes.dispatchEvent(new Event('change'))
    const { log } = settings
    const common = { labelSelector, onChange, log }
    this.#jobs = new Reflector(this.#api, {
      ...common,
      path: this.#path('jobs'),
      onDeleted: () => {},
    })
    this.#pods = new Reflector(this.#api, {
      ...common,
      path: this.#path('pods'),
      // How its task ended may be told in the same breath.
      onDeleted: (pod) => {
        const watched = this.#watched.get(jobNameOf(pod))
        if (watched) watched.lastPod = pod
      },
    })
  }

  async provision(spec: WorkerSpec, signal: AbortSignal): Promise<Worker> {
    signal.throwIfAborted()
    const making =
      this.#making.get(spec.name) ??
      this.#provision(spec, signal).finally(() => this.#making.delete(spec.name))
    this.#making.set(spec.name, making)
    // Not raced with the signal: what hindered the worker is told by the step that was interrupted.
    return making
  }

  async find(name: string): Promise<Worker | undefined> {
    const job = await this.#job(name)
    return job && this.#worker(job)
  }

  async list(): Promise<Worker[]> {
    await this.#synced()
    const query = { labelSelector: `${LABELS.instance}=${this.#settings.instance}` }
    const { items } = await this.#api.json<{ items: V1Job[] }>('GET', this.#path('jobs'), { query })
    return items.map((job) => this.#worker(job))
  }

  async check(): Promise<void> {
    const missing = await this.#rights().catch((err: unknown) => {
      throw new TaskRunnerError('workers_unavailable', messageOf(err), { cause: err })
    })
    if (missing.length === 0) return
    const message = `The service account may not ${missing.join(', ')} in namespace ${this.#namespace}`
    throw new TaskRunnerError('workers_unavailable', message)
  }

  async taskFilesProblem(): Promise<string | undefined> {
    const { length } = await this.#files()
    if (length <= OBJECT_BYTES_MAX) return undefined
    return `the tasks folder has ${length} bytes when compressed, and a ConfigMap takes ${OBJECT_BYTES_MAX}: bake task files into the image, or clone them with git_configs`
  }

  async close(): Promise<void> {
    this.#closing.abort()
    await Promise.all([this.#jobs.stop(), this.#pods.stop()])
    await this.#api.close()
  }

  /** Rejects when `signal` aborts, with what it was that the worker waited for. */
  async #provision(spec: WorkerSpec, signal: AbortSignal): Promise<Worker> {
    let hindrance: { reason: WorkerError['reason']; message: string } = {
      reason: 'provisioning_timeout',
      message: 'The Kubernetes API did not answer in time',
    }
    const hindered = (reason: WorkerError['reason'], message: string) => {
      hindrance = { reason, message }
    }
    try {
      await until(this.#synced(), signal)
      const existing = await this.#persistently(() => this.#job(spec.name), signal)
      const job = existing ?? (await this.#create(spec, signal, hindered))
      await this.#started(job, signal, hindered)
      const worker = this.#worker(job)
      this.#watch(spec.name, job)
      return worker
    } catch (err) {
      const isTimeout = signal.aborted && signal.reason instanceof DOMException
      if (isTimeout && signal.reason.name === 'TimeoutError') {
        const seconds = this.#settings.provisioningTimeoutMs / 1000
        const message = `The worker was not ready within ${seconds} seconds. ${hindrance.message}`
        throw new WorkerError(hindrance.reason, message, { cause: err })
      }
      throw err
    }
  }

  async #create(
    spec: WorkerSpec,
    signal: AbortSignal,
    hindered: (reason: WorkerError['reason'], message: string) => void,
  ): Promise<V1Job> {
    await this.#withinCap(signal, hindered)
    const options = await this.#jobOptions(spec, signal)
    const secrets = [ownSecret(spec, this.#settings.instance), pullSecret(spec, options)]
    const job = workerJob(spec, options)
    for (const secret of secrets) if (secret) await this.#put('secrets', secret, signal, hindered)
    const created = await this.#put<V1Job>('jobs', job, signal, hindered)
    // With the Job goes what it needs, also when we do not come to it.
    const owner = {
      ...{ apiVersion: 'batch/v1', kind: 'Job', name: spec.name },
      uid: created.metadata?.uid ?? '',
    }
    for (const secret of secrets) {
      if (!secret) continue
      const path = `${this.#path('secrets')}/${secret.metadata?.name}`
      await this.#persistently(
        () =>
          this.#api.json('PATCH', path, {
            body: { metadata: { ownerReferences: [owner] } },
            contentType: 'application/merge-patch+json',
            signal,
          }),
        signal,
      )
    }
    return created
  }

  async #jobOptions(spec: WorkerSpec, signal: AbortSignal): Promise<JobOptions> {
    const { settings } = { settings: this.#settings }
    const files = await this.#files()
    const problem = files.length > OBJECT_BYTES_MAX ? await this.taskFilesProblem() : undefined
    if (problem) throw new WorkerError('startup_failed', `The worker cannot be given ${problem}`)
    const configMap = filesConfigMap(files, settings.instance)
    const filesName = configMap.metadata?.name ?? ''
    if (!this.#filesThere.has(filesName)) {
      await this.#put('configmaps', configMap, signal, () => {})
      this.#filesThere.add(filesName)
    }
    return {
      ...{ instance: settings.instance, queue: settings.queue, filesName },
      image: imageFor(spec.image, settings.images),
      serviceAccount: settings.serviceAccount,
      provisioningTimeoutSeconds: Math.ceil(settings.provisioningTimeoutMs / 1000),
      terminationGraceSeconds: Math.ceil(settings.terminationGraceMs / 1000),
      keptWorkerSeconds: Math.ceil(settings.keptWorkerMs / 1000),
      createdAt: Date.now(),
    }
  }

  /** Creates, or adopts what an earlier attempt has created whose answer got lost. Waits for quota. */
  async #put<T extends { metadata?: { name?: string } }>(
    resource: 'jobs' | 'secrets' | 'configmaps',
    object: T,
    signal: AbortSignal,
    hindered: (reason: WorkerError['reason'], message: string) => void,
  ): Promise<T> {
    const path = this.#path(resource)
    for (;;) {
      try {
        return await this.#persistently(
          () => this.#api.json<T>('POST', path, { body: object, signal }),
          signal,
        )
      } catch (err) {
        if (!(err instanceof ApiError)) throw err
        const name = object.metadata?.name ?? ''
        if (err.reason === 'AlreadyExists') {
          // What is immutable and named by its content or its task is as we would make it.
          if (resource !== 'jobs') return object
          const job = await this.#job(name)
          // Holds: it is a Job, as `object` is.
          if (job && !job.metadata?.deletionTimestamp) return job as T
          hindered('startup_failed', `Another Job has the name ${name}`)
        } else if (err.status === 403 && /exceeded quota/.test(err.message)) {
          hindered('unschedulable', `The namespace has no quota left: ${err.message}`)
        } else {
          const message = `Kubernetes refuses to make the worker: ${err.message}`
          throw new WorkerError('startup_failed', message, { cause: err })
        }
        await this.#change(signal)
      }
    }
  }

  async #withinCap(
    signal: AbortSignal,
    hindered: (reason: WorkerError['reason'], message: string) => void,
  ): Promise<void> {
    const { workersMax } = this.#settings
    const live = () =>
      [...this.#jobs.objects.values()].filter(({ status }) => !status?.completionTime).length
    while (live() >= workersMax) {
      hindered('unschedulable', `There are ${workersMax} workers already, as many as may be`)
      await this.#change(signal)
    }
  }

  /** Until the task runs, or has run. Throws a `WorkerError` when it never will. */
  async #started(
    job: V1Job,
    signal: AbortSignal,
    hindered: (reason: WorkerError['reason'], message: string) => void,
  ): Promise<void> {
    const name = job.metadata?.name ?? ''
    let stuckSince: number | undefined
    let lookedAt = Date.now()
    let isSeen = false
    for (;;) {
      isSeen ||= this.#jobs.objects.has(name)
      // What was created just now may not have been told yet.
      const known = isSeen ? this.#jobs.objects.get(name) : job
      const pod = this.#podOf(name)
      const seen = observe(known, pod)
      if (seen.phase !== 'waiting') return
      const isConfig = seen.reason === 'startup_failed'
      stuckSince = isConfig ? (stuckSince ?? Date.now()) : undefined
      const isTooLong = stuckSince !== undefined && Date.now() - stuckSince >= CONFIG_GRACE_MS
      hindered(seen.reason, seen.message)
      if (seen.isHopeless || isTooLong) throw new WorkerError(seen.reason, seen.message)
      if (seen.reason === 'provisioning_timeout' && Date.now() - lookedAt >= LOOK_MS) {
        lookedAt = Date.now()
        const warning = await this.#warning(pod?.metadata?.uid ?? known?.metadata?.uid).catch(
          () => undefined,
        )
        if (warning) hindered('provisioning_timeout', `${seen.message}. ${warning}`)
      }
      await this.#change(signal)
    }
  }

  async #warning(uid: string | undefined): Promise<string | undefined> {
    if (uid === undefined) return undefined
    const query = { fieldSelector: `involvedObject.uid=${uid}` }
    const events = await this.#api.json<{ items: CoreV1Event[] }>('GET', this.#path('events'), {
      query,
    })
    return warningOf(events.items)
  }

  #worker(job: V1Job): Worker {
    const name = job.metadata?.name ?? ''
    const annotations = job.metadata?.annotations ?? {}
    const watched = async () => {
      const known = this.#watched.get(name)
      if (known) return known
      await this.#synced()
      return this.#watch(name, job)
    }
    return {
      name,
      taskId: annotations[ANNOTATIONS.taskId] ?? '',
      backend: this.name,
      image: annotations[ANNOTATIONS.image] ?? null,
      size: annotations[ANNOTATIONS.size] || null,
      createdAt: Number(annotations[ANNOTATIONS.createdAt]),
      status: async () => {
        if (this.#watched.get(name)?.completion) return 'Completed'
        await this.#synced()
        const now = await this.#job(name)
        return statusOf(now, this.#podOf(name))
      },
      completion: async (signal) => until((await until(watched(), signal)).ended, signal),
      stop: async () => this.#stop(name, await watched()),
      logs: async ({ maxBytes }) => {
        const found = await watched()
        if (!this.#isRunning(name)) await found.ended
        return found.ring.tail(maxBytes)
      },
      follow: async function* ({ from, signal }) {
        yield* (await watched()).ring.follow(from, signal)
      },
      terminate: () => this.#terminate(name),
    }
  }

  #isRunning(name: string): boolean {
    return observe(this.#jobs.objects.get(name), this.#podOf(name)).phase === 'running'
  }

  #watch(name: string, job: V1Job): Watched {
    const known = this.#watched.get(name)
    if (known) return known
    const watched: Watched = {
      ring: new LogRing(this.#settings.logBytesKept),
      ended: Promise.resolve(lost('')),
      completion: undefined,
      overLogLimit: false,
      lastPod: undefined,
    }
    this.#watched.set(name, watched)
    watched.ended = this.#end(name, job, watched)
    // While we shut down nobody waits for it.
    watched.ended.catch(() => {})
    return watched
  }

  /** How the task ended, once it has. The API's troubles decide nothing. */
  async #end(name: string, job: V1Job, watched: Watched): Promise<Completion> {
    const { signal } = this.#closing
    const maxLogBytes = Number(job.metadata?.annotations?.[ANNOTATIONS.maxLogBytes])
    const readers = new AbortController()
    signal.addEventListener('abort', () => readers.abort(), { once: true })
    let log: PodLog | undefined
    let following: Promise<void> | undefined
    const isOver = () => watched.completion !== undefined || !this.#isRunning(name)
    let isSeen = false
    for (;;) {
      isSeen ||= this.#jobs.objects.has(name)
      const pod = this.#podOf(name)
      const known = isSeen ? this.#jobs.objects.get(name) : job
      const last: Observation | undefined = watched.lastPod && observe(known, watched.lastPod)
      const seen = !pod && last?.phase === 'ended' ? last : observe(known, pod)
      const podName = pod?.metadata?.name
      if (podName && (seen.phase === 'running' || seen.phase === 'ended')) {
        const path = `${this.#path('pods')}/${podName}/log`
        log ??= new PodLog(this.#api, path, TASK_CONTAINER, watched.ring)
        if (seen.phase === 'running') following ??= log.follow(isOver, readers.signal)
      }
      if (watched.ring.totalBytes > maxLogBytes && !watched.overLogLimit) {
        watched.overLogLimit = true
        void this.#delete(name).catch((err: unknown) =>
          this.#settings.log.error({ err, worker: name }, 'ending a task failed'),
        )
      }
      if (seen.phase === 'ended' || (seen.phase === 'waiting' && seen.isHopeless)) {
        // The stream ends with the container; one that has stalled is not waited for.
        const late = pause(LAST_LOG_MS, undefined, { signal, ref: false })
        await Promise.race([following, late])
        readers.abort()
        await following
        if (log) await this.#restOf(log, pod)
        watched.ring.end()
        watched.completion =
          seen.phase === 'ended'
            ? watched.overLogLimit
              ? overLogLimit(maxLogBytes)
              : seen.completion
            : lost(seen.message)
        return watched.completion
      }
      await Promise.race([
        this.#change(signal),
        ...(following ? [pause(RETRY_MS, undefined, { signal })] : []),
      ])
    }
  }

  async #restOf(log: PodLog, pod: V1Pod | undefined): Promise<void> {
    const signal = AbortSignal.any([this.#closing.signal, AbortSignal.timeout(LAST_LOG_MS)])
    while (pod && !signal.aborted) {
      try {
        return await log.rest(signal)
      } catch {
        await pause(RETRY_MS, undefined, { signal }).catch(() => {})
      }
    }
  }

  /** Ends the task with its pod; its log was read by then, and what the pod ended with is told before it goes. */
  async #stop(name: string, watched: Watched): Promise<void> {
    if (watched.completion) return
    await this.#delete(name)
    await watched.ended
  }

  async #terminate(name: string): Promise<void> {
    await this.#making.get(name)?.catch(() => {})
    await this.#delete(name)
    for (const secret of [name, pullSecretName(name)]) await this.#remove('secrets', secret)
    await this.#synced()
    const { signal } = this.#closing
    while (this.#jobs.objects.has(name) || this.#podOf(name)) {
      // Watches may be late: whether it is gone is asked.
      if (!(await this.#job(name))) this.#jobs.objects.delete(name)
      const pod = this.#podOf(name)?.metadata?.name
      if (pod && !(await this.#exists('pods', pod))) this.#pods.objects.delete(pod)
      if (this.#jobs.objects.has(name) || this.#podOf(name)) await this.#change(signal)
    }
    this.#watched.delete(name)
  }

  async #delete(name: string): Promise<void> {
    const job = await this.#job(name)
    if (job) await this.#remove('jobs', name, job.metadata?.uid)
  }

  async #remove(resource: 'jobs' | 'secrets', name: string, uid?: string): Promise<void> {
    try {
      await this.#api.json('DELETE', `${this.#path(resource)}/${name}`, {
        body: {
          ...{ apiVersion: 'v1', kind: 'DeleteOptions' },
          // The default of Jobs leaves their pods behind.
          propagationPolicy: 'Background',
          ...(uid === undefined ? {} : { preconditions: { uid } }),
        },
      })
    } catch (err) {
      // Gone, or another by now.
      if (!(err instanceof ApiError && [404, 409].includes(err.status))) throw err
    }
  }

  /** One of ours. */
  async #job(name: string): Promise<V1Job | undefined> {
    try {
      const job = await this.#api.json<V1Job>('GET', `${this.#path('jobs')}/${name}`)
      const isOurs = job.metadata?.labels?.[LABELS.instance] === this.#settings.instance
      return isOurs ? job : undefined
    } catch (err) {
      if (err instanceof ApiError && err.status === 404) return undefined
      throw err
    }
  }

  async #exists(resource: 'pods', name: string): Promise<boolean> {
    try {
      await this.#api.json('GET', `${this.#path(resource)}/${name}`)
      return true
    } catch (err) {
      if (err instanceof ApiError && err.status === 404) return false
      throw err
    }
  }

  #podOf(name: string): V1Pod | undefined {
    for (const pod of this.#pods.objects.values()) {
      if (jobNameOf(pod) === name) return pod
    }
    return undefined
  }

  #rights(): Promise<string[]> {
    if (!this.#missingRights || this.#missingRights.until < Date.now()) {
      const known = this.#askRights()
      this.#missingRights = { known, until: Date.now() + RIGHTS_KNOWN_MS }
      known.catch(() => {
        this.#missingRights = undefined
      })
    }
    return this.#missingRights.known
  }

  async #askRights(): Promise<string[]> {
    const asked = RIGHTS.flatMap(({ group, resource, verbs }) =>
      verbs.map(async (verb) => {
        const [name, subresource] = resource.split('/')
        const resourceAttributes = {
          ...{ namespace: this.#namespace, group, verb, resource: name },
          ...(subresource === undefined ? {} : { subresource }),
        }
        const path = '/apis/authorization.k8s.io/v1/selfsubjectaccessreviews'
        const body = {
          ...{ apiVersion: 'authorization.k8s.io/v1', kind: 'SelfSubjectAccessReview' },
          spec: { resourceAttributes },
        }
        const { status } = await this.#api.json<{ status: { allowed: boolean } }>('POST', path, {
          body,
        })
        return status.allowed ? [] : [`${verb} ${resource}`]
      }),
    )
    return (await Promise.all(asked)).flat()
  }

  /** Looked at again after a moment: many tasks may come at once. */
  #files(): Promise<Buffer> {
    if (!this.#filesKnown || this.#filesKnown.until < Date.now()) {
      this.#filesKnown = { known: this.#pack(), until: Date.now() + FILES_KNOWN_MS }
      this.#filesKnown.known.catch(() => {
        this.#filesKnown = undefined
      })
    }
    return this.#filesKnown.known
  }

  async #pack(): Promise<Buffer> {
    const zipped = createGzip()
    const chunks: Buffer[] = []
    zipped.on('data', (chunk: Buffer) => chunks.push(chunk))
    const tar = await sharedTar(this.#settings.tasksDir)
    const ended = once(zipped, 'end')
    for await (const chunk of tar) zipped.write(chunk)
    zipped.end()
    await ended
    return Buffer.concat(chunks)
  }

  async #synced(): Promise<void> {
    await Promise.all([this.#jobs.synced(), this.#pods.synced()])
  }

  /** Until something has changed, or a moment has passed. Rejects when `signal` aborts. */
  async #change(signal: AbortSignal): Promise<void> {
    const late = AbortSignal.timeout(LOOK_MS)
    const either = AbortSignal.any([signal, late])
    await once(this.#changes, 'change', { signal: either }).catch(() => {})
    signal.throwIfAborted()
  }

  /** Repeats a step while the API does not answer. Rejects when `signal` aborts. */
  async #persistently<T>(step: () => Promise<T>, signal: AbortSignal): Promise<T> {
    for (let waitMs = RETRY_MS; ; waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)) {
      try {
        return await step()
      } catch (err) {
        signal.throwIfAborted()
        if (!(err instanceof ApiUnreachableError)) throw err
        this.#settings.log.warn({ err }, 'waiting for the Kubernetes API')
        await pause(waitMs * (0.5 + Math.random()), undefined, { signal })
      }
    }
  }

  #path(resource: 'jobs' | 'pods' | 'secrets' | 'configmaps' | 'events'): string {
    const group = resource === 'jobs' ? '/apis/batch/v1' : '/api/v1'
    return `${group}/namespaces/${this.#namespace}/${resource}`
  }
}

function jobNameOf(pod: V1Pod): string {
  return pod.metadata?.labels?.['batch.kubernetes.io/job-name'] ?? ''
}

function messageOf(err: unknown): string {
  return err instanceof Error ? err.message : String(err)
}
