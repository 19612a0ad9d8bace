import { KubeConfig, type V1Job } from '@kubernetes/client-node'
import { Deadline } from '../../core/deadline.ts'
import { TaskRunnerError } from '../../core/errors.ts'
import {
  type LogCursors,
  type Logger,
  type Worker,
  type WorkerBackend,
  WorkerError,
  type WorkerSpec,
} from '../../core/ports.ts'
import { assertTasksFolder } from '../../core/tasks-folder.ts'
import { until } from '../../core/until.ts'
import { ApiError, ApiUnreachableError, KubernetesApi } from './api.ts'
import { ClusterView } from './cluster-view.ts'
import { JobMaker, type JobSettings } from './job-maker.ts'
import { JobWatch } from './job-watch.ts'
import { ANNOTATIONS, LABELS } from './manifests.ts'
import { statusOf } from './observation.ts'
import { missingRights, type Right } from './rights.ts'

export interface KubernetesSettings extends JobSettings {
  /** Undefined: `KUBECONFIG`, the user's own file, or the service account of the pod we run in. */
  kubeconfig?: string | undefined
  /** Undefined: that of the kubeconfig's context. */
  namespace: string | undefined
  logBytesKept: number
  /** How far logs were read, for after a restart. */
  logCursors?: LogCursors | undefined
  log: Logger
  /** Towards the API server. Default: 20 a second, 30 at once. */
  callsPerSecond?: number
  callsAtOnce?: number
  /** How long things are waited for; tests wait less. */
  waits?: {
    /** Before we look for ourselves. */
    lookMs?: number
    /** For what may still heal in a container's configuration. */
    configGraceMs?: number
    /** For the rest of an ended container's log. */
    lastLogMs?: number
    /** For a word of a watch, and of a log, until it is asked for anew. */
    watchIdleMs?: number
    logSilentMs?: number
    /** Until what was read of a log is kept. */
    logCursorMs?: number
    /** For a worker to be gone, beyond its grace period. */
    goneMs?: number
  }
}

/** What the service account must be allowed to do in its namespace; deploy/kubernetes grants the same. */
export const RIGHTS: readonly Right[] = [
  { group: 'batch', resource: 'jobs', verbs: ['create', 'get', 'list', 'watch', 'delete'] },
  { group: '', resource: 'pods', verbs: ['get', 'list', 'watch'] },
  { group: '', resource: 'pods/log', verbs: ['get'] },
  { group: '', resource: 'events', verbs: ['list'] },
  { group: '', resource: 'configmaps', verbs: ['create'] },
  { group: '', resource: 'secrets', verbs: ['create'] },
]
const RIGHTS_KNOWN_MS = 300_000
/** For a worker to go after its grace period. */
const GONE_MS = 10_000

/** Workers that are Jobs of a Kubernetes namespace. */
export class KubernetesBackend implements WorkerBackend {
  readonly name = 'kubernetes'
  readonly #settings: KubernetesSettings
  readonly #api: KubernetesApi
  readonly #namespace: string
  readonly #view: ClusterView
  readonly #maker: JobMaker
  /** By the uid of their Job. */
  readonly #watches = new Map<string, JobWatch>()
  readonly #making = new Map<string, Promise<Worker>>()
  readonly #closing = new AbortController()
  #missingRights: { known: Promise<string[]>; until: number } | undefined

  constructor(settings: KubernetesSettings) {
    this.#settings = settings
    const { waits = {}, callsPerSecond, callsAtOnce } = settings
    this.#api = new KubernetesApi(() => configOf(settings.kubeconfig), {
      ...(callsPerSecond === undefined ? {} : { callsPerSecond }),
      ...(callsAtOnce === undefined ? {} : { callsAtOnce }),
    })
    const { config } = this.#api
    const context = config.getContextObject(config.getCurrentContext())
    this.#namespace = settings.namespace ?? context?.namespace ?? 'default'
    this.#view = new ClusterView(this.#api, {
      namespace: this.#namespace,
      instance: settings.instance,
      log: settings.log,
      lookMs: waits.lookMs,
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
      this.#provision(spec, signal, mayStart).finally(() => {
        this.#making.delete(spec.name)
        this.#maker.forget(spec.name)
      })
    this.#making.set(spec.name, making)
    // Not raced with the signal: what hindered the worker is told by the step that was interrupted.
    return making
  }

  async find(name: string): Promise<Worker | undefined> {
    const job = await this.#view.namedJob(name, this.#closing.signal)
    return job && this.#worker(job)
  }

  async list(): Promise<Worker[]> {
    await this.#view.synced()
    const query = { labelSelector: `${LABELS.instance}=${this.#settings.instance}` }
    const { items } = await this.#api.json<{ items: V1Job[] }>('GET', this.#view.path('jobs'), {
      query,
    })
    return items.map((job) => this.#worker(job))
  }

  async check(): Promise<void> {
    await assertTasksFolder(this.#settings.tasksDir)
    const missing = await this.#rights().catch((err: unknown) => {
      throw new TaskRunnerError('workers_unavailable', messageOf(err), { cause: err })
    })
    if (missing.length === 0) return
    const message = `The service account may not ${missing.join(', ')} in namespace ${this.#namespace}`
    throw new TaskRunnerError('workers_unavailable', message)
  }

  taskFilesProblem(): Promise<string | undefined> {
    return this.#maker.taskFilesProblem()
  }

  async close(): Promise<void> {
    this.#closing.abort()
    await this.#view.close()
    await this.#api.close()
    await Promise.all([...this.#watches.values()].map((watch) => watch.letGo()))
  }

  /** Rejects when `signal` aborts, with what it was that the worker waited for. */
  async #provision(
    spec: WorkerSpec,
    signal: AbortSignal,
    mayStart: () => Promise<void>,
  ): Promise<Worker> {
    let hindrance: { reason: WorkerError['reason']; message: string } = {
      reason: 'provisioning_timeout',
      message: 'The Kubernetes API did not answer in time',
    }
    const hindered = (reason: WorkerError['reason'], message: string) => {
      hindrance = { reason, message }
    }
    try {
      await until(this.#view.synced(), signal)
      const job = await this.#maker.make(spec, { signal, hindered, mayStart })
      const watch = this.#watch(job)
      await watch.started(signal, hindered).catch((err: unknown) => {
        // Whoever ends it finds it by its name.
        this.#watches.delete(watch.uid)
        throw err
      })
      // From now on, whether anybody asks or not: a log that nobody reads may be lost.
      void watch.ended()
      return this.#worker(job)
    } catch (err) {
      const isTimeout = signal.aborted && signal.reason instanceof DOMException
      if (isTimeout && signal.reason.name === 'TimeoutError') {
        const seconds = this.#settings.provisioningTimeoutMs / 1000
        const { problem } = this.#view
        const also = problem === undefined ? '' : `. The cluster cannot be watched: ${problem}`
        const message = `The worker was not ready within ${seconds} seconds. ${hindrance.message}${also}`
        throw new WorkerError(hindrance.reason, message, { cause: err })
      }
      throw err
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
      createdAt: Number(annotations[ANNOTATIONS.createdAt]),
      status: async () => {
        await this.#view.synced()
        if ((held ?? this.#watches.get(uid))?.completion) return 'Completed'
        const now = await this.#view.namedJob(name, this.#closing.signal).catch((err: unknown) => {
          // The watches' word is the last that was heard.
          if (err instanceof ApiUnreachableError) return this.#view.job(uid)
          throw err
        })
        return statusOf(now?.metadata?.uid === uid ? now : undefined, this.#view.pod(uid))
      },
      completion: async (signal) => until((await until(watched(), signal)).ended(), signal),
      stop: async () => this.#stop(await watched()),
      logs: async ({ maxBytes }) => {
        const watch = await watched()
        const ended = watch.ended()
        const phase = watch.phase()
        if (phase === 'ended') await ended
        // Rather late than as if there were nothing: followers go on from what they are told.
        else if (phase === 'running') await watch.counted()
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
    const { provisioningTimeoutMs, logBytesKept, logCursors, log, waits = {} } = this.#settings
    const watch: JobWatch = new JobWatch(job, {
      ...{ api: this.#api, view: this.#view, closing: this.#closing.signal },
      ...{ provisioningTimeoutMs, logBytesKept, logCursors, log },
      configGraceMs: waits.configGraceMs,
      lastLogMs: waits.lastLogMs,
      logSilentMs: waits.logSilentMs,
      logCursorMs: waits.logCursorMs,
      end: () => this.#delete(watch),
      onEnded: () => this.#forgetIfGone(uid),
    })
    this.#watches.set(uid, watch)
    return watch
  }

  /**
   * Kept ones go by themselves, and others are ended by other instances; who still reads the log of one has hold of its
   * watch. A task may be seen to have ended before its Job is seen to have gone, or after.
   */
  #forgetIfGone(uid: string): void {
    if (!this.#watches.get(uid)?.completion || this.#view.job(uid)) return
    this.#watches.delete(uid)
    this.#view.forget(uid)
  }

  /** Ends the task with its pod; its log was read by then, and what the pod ended with is told before it goes. */
  async #stop(watch: JobWatch): Promise<void> {
    if (watch.completion) return
    watch.isStopping = true
    const ended = watch.ended()
    await this.#delete(watch)
    await ended
  }

  /** Rejects when the worker does not go, as when its node is lost. */
  async #terminate(watch: JobWatch): Promise<void> {
    const { name, uid } = watch
    watch.isStopping = true
    await this.#making.get(name)?.catch(() => {})
    await this.#remove(name, uid)
    const { waits = {}, terminationGraceMs } = this.#settings
    const patienceMs = terminationGraceMs + (waits.goneMs ?? GONE_MS)
    using deadline = new Deadline(patienceMs, [this.#closing.signal])
    const { signal } = deadline
    const isThere = () => this.#view.job(uid) !== undefined || this.#view.pod(uid) !== undefined
    try {
      while (isThere()) {
        // Job and pod are often seen to go one after the other.
        if ((await this.#view.change(uid, signal)) || !isThere()) continue
        // Watches may be late: whether it is gone is asked.
        const asked = await this.#view.look(name, uid, signal)
        if (!asked.job && !asked.pod) break
      }
    } catch (err) {
      this.#closing.signal.throwIfAborted()
      throw new Error(`Worker ${name} does not go: is its node lost?`, { cause: err })
    }
    this.#watches.delete(uid)
    this.#view.forget(uid)
  }

  /** Of the very Job, and no other of its name. */
  async #delete({ name, uid }: JobWatch): Promise<void> {
    const { signal } = this.#closing
    await this.#view.persistently(() => this.#remove(name, uid), signal)
  }

  async #remove(name: string, uid: string): Promise<void> {
    try {
      await this.#api.json('DELETE', `${this.#view.path('jobs')}/${name}`, {
        body: {
          ...{ apiVersion: 'v1', kind: 'DeleteOptions' },
          // The default of Jobs leaves their pods behind.
          propagationPolicy: 'Background',
          preconditions: { uid },
        },
      })
    } catch (err) {
      // Gone, or another by now.
      if (!(err instanceof ApiError && [404, 409].includes(err.status))) throw err
    }
  }

  #rights(): Promise<string[]> {
    if (!this.#missingRights || this.#missingRights.until < Date.now()) {
      const known = missingRights(this.#api, this.#namespace, RIGHTS)
      this.#missingRights = { known, until: Date.now() + RIGHTS_KNOWN_MS }
      known.catch(() => {
        this.#missingRights = undefined
      })
    }
    return this.#missingRights.known
  }
}

function configOf(path: string | undefined): KubeConfig {
  const config = new KubeConfig()
  if (path === undefined) config.loadFromDefault()
  else config.loadFromFile(path)
  return config
}

function messageOf(err: unknown): string {
  return err instanceof Error ? err.message : String(err)
}
