import { setTimeout as pause } from 'node:timers/promises'
import type { V1ConfigMap, V1Job } from '@kubernetes/client-node'
import { UnavailableError } from '../../core/errors.ts'
import { type Logger, WorkerError, type WorkerSpec } from '../../core/ports.ts'
import { assertTaskFile, type LeftOut, leftOutNotes } from '../../core/tasks-folder.ts'
import { type ImageNames, imageFor } from '../image.ts'
import type { KubernetesApi } from './api.ts'
import type { ClusterView, Persistence } from './cluster-view.ts'
import { ApiError, FAILURES } from './failures.ts'
import type { OnWaiting } from './job-watch.ts'
import {
  ANNOTATIONS,
  filesNameOf,
  type JobOptions,
  OBJECT_BYTES_MAX,
  ownSecret,
  pullSecret,
  workerJob,
} from './manifests.ts'
import { observe } from './observation.ts'
import { type Packed, PackedTasks } from './packed-tasks.ts'

export interface JobSettings {
  /** Id that distinguishes this service's workers from those of others. */
  deployment: string
  /** Id that earlier versions used; services that share a sealing key share it. */
  legacyInstance?: string | undefined
  tasksDir: string
  images: ImageNames
  serviceAccount: string
  /** Name of a Kueue queue. */
  queue: string | undefined
  provisioningTimeoutMs: number
  terminationGraceMs: number
  keptWorkerMs: number
  /** Home of workers; undefined: in their folder. */
  home?: string | undefined
  /** Clock for the age of workers. */
  now: () => number
  log: Logger
}

const CONFIG_MAPS_KEPT_MAX = 3
/** Interval for creating the ConfigMap again in case it was deleted, and removing unused ones. */
const CONFIG_MAP_CHECK_MS = 60_000
/** Minimum age of removed ConfigMaps: another instance may be about to create a Job with one. */
const UNUSED_FILES_KEPT_MS = 3_600_000
/** Retry interval for a Secret while the one of an earlier Job with that name is removed. */
const GARBAGE_MS = 500

export interface MadeJob {
  job: V1Job
  /** Whether an existing Job ended before it got its Secret, so that its task never started. */
  isNeverBegun: boolean
}

/** Creates the objects of a worker: its Job, and the Secrets and task files that its pod needs. */
export class JobMaker {
  readonly #api: KubernetesApi
  readonly #view: ClusterView
  readonly #settings: JobSettings
  readonly #files: PackedTasks
  /** Latest ConfigMaps created, and until when they are assumed to exist. */
  readonly #configMaps = new Map<string, { configMap: V1ConfigMap; until: number }>()
  #areFilesFine = true

  constructor(api: KubernetesApi, view: ClusterView, settings: JobSettings) {
    this.#api = api
    this.#view = view
    this.#settings = settings
    this.#files = new PackedTasks(settings.tasksDir, settings.deployment)
  }

  /**
   * Creates the Job, then its Secrets, which it owns, so that an interruption leaves nothing
   * behind. The pod cannot start without them. If this instance is paused and another takes over
   * the task, `mayStart` throws; after that call, the Secret is removed with the Job.
   */
  async make(
    spec: WorkerSpec,
    options: { signal: AbortSignal; onWaiting: OnWaiting; mayStart: () => Promise<void> },
  ): Promise<MadeJob> {
    const { signal, mayStart } = options
    const { tasksDir } = this.#settings
    if (spec.taskFolder === 'tasks') await assertTaskFile(tasksDir, spec.taskFileName)
    const { name: filesName, leftOut } = await this.#putFiles(options)
    const jobOptions = this.#jobOptions(spec, filesName)
    const { object: job, isNew } = await this.#put<V1Job>(
      'jobs',
      workerJob(spec, jobOptions),
      options,
    )
    const uid = job.metadata?.uid ?? ''
    const wasOver = !isNew && (await this.#isOver(job, signal))
    const secrets = { ...options, isOwnerNew: isNew }
    // The registry's Secret comes first: images are pulled once all volumes exist.
    const pull = pullSecret(spec, jobOptions, uid)
    if (pull) await this.#put('secrets', pull, secrets)
    await mayStart()
    const notes = [...spec.notes, ...leftOutNotes(leftOut)]
    const own = ownSecret({ ...spec, notes }, jobOptions, uid)
    const { isNew: isSecretNew } = await this.#put('secrets', own, secrets)
    return { job, isNeverBegun: wasOver && isSecretNew }
  }

  async #isOver({ metadata }: V1Job, signal: AbortSignal): Promise<boolean> {
    const { rideMs } = this.#view
    const which = { name: metadata?.name ?? '', uid: metadata?.uid ?? '' }
    const { job, pod } = await this.#view.read(which, signal, { rideMs })
    return observe(job, pod).phase === 'ended'
  }

  /** Tries to create a Job with a dry run. Throws what creating it would. */
  async tryJob(spec: WorkerSpec, signal: AbortSignal): Promise<void> {
    const body = workerJob(spec, this.#jobOptions(spec, 'task-runner-files'))
    const call = { body, signal, answer: 'Job', query: { dryRun: 'All' }, isUrgent: true }
    await this.#api.json('POST', this.#view.path('jobs'), call)
  }

  /** Creates a deleted ConfigMap again, if this instance created it before. */
  async putFilesAgain(
    name: string,
    options: { signal: AbortSignal; onWaiting: OnWaiting },
  ): Promise<void> {
    const { configMap } = this.#configMaps.get(name) ?? {}
    if (configMap) await this.#put('configmaps', configMap, options)
  }

  /** Creates the ConfigMap with the task files and returns its name. */
  async #putFiles(options: {
    signal: AbortSignal
    onWaiting: OnWaiting
  }): Promise<{ name: string; leftOut: readonly LeftOut[] }> {
    const { configMap, leftOut } = await this.#packed()
    const problem = await this.taskFilesProblem()
    if (problem) throw new UnavailableError(`Workers cannot get their files: ${problem}`)
    const name = configMap.metadata?.name ?? ''
    const known = this.#configMaps.get(name)
    if (!known || known.until < Date.now()) {
      // Other tasks need not check as well.
      if (known) known.until = Date.now() + CONFIG_MAP_CHECK_MS
      await this.#put('configmaps', configMap, options)
      this.#configMaps.delete(name)
      this.#configMaps.set(name, { configMap, until: Date.now() + CONFIG_MAP_CHECK_MS })
      this.#removeUnusedFiles(name).catch((err: unknown) => {
        this.#settings.log.warn({ err }, 'unused ConfigMaps of task files could not be removed')
      })
      const [oldest = ''] = this.#configMaps.keys()
      if (this.#configMaps.size > CONFIG_MAPS_KEPT_MAX) this.#configMaps.delete(oldest)
    }
    return { name, leftOut }
  }

  async #packed(): Promise<Packed> {
    try {
      return await this.#files.current()
    } catch (err) {
      this.#areFilesFine = false
      throw err
    }
  }

  /** Removes old ConfigMaps of task files that no Job uses. */
  async #removeUnusedFiles(current: string): Promise<void> {
    const path = this.#view.path('configmaps')
    const { items } = await this.#api.json<{ items: V1ConfigMap[] }>('GET', path, {
      query: { labelSelector: this.#view.labelSelector },
      isMetadataOnly: true,
      answer: 'PartialObjectMetadataList',
    })
    const needed = new Set([current, ...this.#view.jobs.map(filesNameOf)])
    const keptFrom = this.#settings.now() - UNUSED_FILES_KEPT_MS
    for (const item of items) {
      const { name = '', uid = '', creationTimestamp } = item.metadata ?? {}
      const isOld = Date.parse(String(creationTimestamp)) < keptFrom
      if (!isOld || needed.has(name) || !this.#view.isOurs(item)) continue
      await this.#api.remove(`${path}/${name}`, uid)
      this.#configMaps.delete(name)
    }
  }

  #jobOptions(spec: WorkerSpec, filesName: string): JobOptions {
    const settings = this.#settings
    return {
      deployment: settings.deployment,
      queue: settings.queue,
      filesName,
      image: imageFor(spec.image, settings.images),
      serviceAccount: settings.serviceAccount,
      provisioningTimeoutSeconds: Math.ceil(settings.provisioningTimeoutMs / 1000),
      terminationGraceMs: settings.terminationGraceMs,
      keptWorkerSeconds: Math.ceil(settings.keptWorkerMs / 1000),
      createdAt: settings.now(),
      home: settings.home,
    }
  }

  /** Creates an object, or adopts it if an earlier attempt created it. Waits for quota. */
  async #put<T extends { kind?: string; metadata?: { name?: string } }>(
    resource: 'jobs' | 'secrets' | 'configmaps',
    object: T,
    options: { signal: AbortSignal; onWaiting: OnWaiting; isOwnerNew?: boolean },
  ): Promise<{ object: T; isNew: boolean }> {
    const { signal, onWaiting, isOwnerNew = false } = options
    const call = { body: object, signal, answer: object.kind ?? '' }
    const isUrgent = resource === 'secrets'
    let mayExist = false
    const persistence = {
      rideMs: this.#view.rideMs,
      onFailure: (err: UnavailableError) => {
        mayExist = true
        onWaiting(err)
      },
    }
    for (;;) {
      try {
        const path = this.#view.path(resource)
        const made = await this.#view.persistently(
          () => this.#api.json<T>('POST', path, { ...call, isUrgent }),
          signal,
          persistence,
        )
        return { object: made, isNew: true }
      } catch (err) {
        if (!(err instanceof ApiError) || FAILURES[err.kind] !== 'task') throw err
        if (err.kind === 'already_exists') {
          const adopted =
            resource === 'jobs'
              ? await this.#adopted(object, { signal, persistence })
              : !isOwnerNew || mayExist
          // Safe: it is a boolean, or a Job like `object`.
          if (adopted) return { object: adopted === true ? object : (adopted as T), isNew: false }
          const name = object.metadata?.name ?? ''
          const message = `Another ${object.kind} has the name ${name}`
          onWaiting(new WorkerError('startup_failed', message))
        } else if (err.kind === 'quota') {
          const message = `The namespace has no quota left: ${err.message}`
          onWaiting(new WorkerError('unschedulable', message))
        } else {
          const message = `Kubernetes rejected the worker: ${err.message}`
          throw new WorkerError('startup_failed', message, { cause: err })
        }
        if (isUrgent) await pause(GARBAGE_MS, undefined, { signal })
        else await this.#view.change('any', signal)
      }
    }
  }

  /** Returns the existing Job of the same name and task, unless it is being removed or not ours. */
  async #adopted(
    wanted: V1Job,
    { signal, persistence }: { signal: AbortSignal; persistence: Persistence },
  ): Promise<V1Job | undefined> {
    const name = wanted.metadata?.name ?? ''
    const find = () => this.#view.namedJob(name, signal)
    const job = await this.#view.persistently(find, signal, persistence)
    if (!job) return undefined
    const taskOf = ({ metadata }: V1Job) => metadata?.annotations?.[ANNOTATIONS.taskId]
    if (taskOf(job) !== taskOf(wanted)) {
      throw new WorkerError('startup_failed', `The worker of another task has the name ${name}`)
    }
    return job.metadata?.deletionTimestamp ? undefined : job
  }

  /** Throws `UnavailableError` while workers cannot get the task files, checked after a failure. */
  async check(): Promise<void> {
    if (this.#areFilesFine) return
    const problem = await this.taskFilesProblem()
    if (problem) throw new UnavailableError(`Workers cannot get their files: ${problem}`)
  }

  async taskFilesProblem(): Promise<string | undefined> {
    const { zippedBytes } = await this.#packed()
    this.#areFilesFine = zippedBytes <= OBJECT_BYTES_MAX
    if (this.#areFilesFine) return undefined
    return `the tasks folder has ${zippedBytes} bytes when compressed, but a ConfigMap has at most ${OBJECT_BYTES_MAX}: bake task files into the image, or clone them with git_configs`
  }
}
