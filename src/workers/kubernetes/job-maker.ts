import { setTimeout as pause } from 'node:timers/promises'
import type { V1ConfigMap, V1Job } from '@kubernetes/client-node'
import { UnavailableError } from '../../core/errors.ts'
import { type Logger, WorkerError, type WorkerSpec } from '../../core/ports.ts'
import { assertTaskFile, type LeftOut, leftOutNotes } from '../../core/tasks-folder.ts'
import { type ImageNames, imageFor } from '../image.ts'
import type { KubernetesApi } from './api.ts'
import type { ClusterView, Persistence } from './cluster-view.ts'
import { ApiError, FAILURES } from './failures.ts'
import type { Hindered } from './job-watch.ts'
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
  /** Made once for the database: tells this service's workers from those of others. */
  deployment: string
  /** Id of the version before, which services that share a key share. */
  legacyInstance?: string | undefined
  tasksDir: string
  images: ImageNames
  serviceAccount: string
  /** Of Kueue. */
  queue: string | undefined
  provisioningTimeoutMs: number
  terminationGraceMs: number
  keptWorkerMs: number
  /** Home of workers; undefined: in their folder. */
  home?: string | undefined
  /** The clock by which the age of workers is judged. */
  now: () => number
  log: Logger
}

const CONFIG_MAPS_KEPT_MAX = 3
/** Somebody may remove a ConfigMap: after this it is put again, and others that nobody needs go. */
const FILES_THERE_MS = 60_000
/** Another instance with other task files may be about to make a Job that names its ConfigMap. */
const UNUSED_FILES_KEPT_MS = 3_600_000
/** Milliseconds until a Secret is tried again that goes with an earlier Job of the same name. */
const GARBAGE_MS = 500

export interface MadeJob {
  job: V1Job
  /** An earlier attempt has made it, and it was over before it was given its Secret: its task never began. */
  isNeverBegun: boolean
}

/** Makes the objects of a worker: its Job, and the Secrets and task files that its pod waits for. */
export class JobMaker {
  readonly #api: KubernetesApi
  readonly #view: ClusterView
  readonly #settings: JobSettings
  readonly #files: PackedTasks
  /** ConfigMaps that were put, the last ones, and until when they are taken to be there. */
  readonly #filesThere = new Map<string, { configMap: V1ConfigMap; until: number }>()
  #areFilesFine = true

  constructor(api: KubernetesApi, view: ClusterView, settings: JobSettings) {
    this.#api = api
    this.#view = view
    this.#settings = settings
    this.#files = new PackedTasks(settings.tasksDir, settings.deployment)
  }

  /**
   * The Job first, then what it needs, which from its first moment goes with it: so nothing is left behind, whenever we
   * are interrupted. Its pod waits for the Secret: who was held up before the Job was made learns in time whether its
   * task was seen through by others meanwhile, and who is held up later finds that the Job went with them.
   */
  async make(
    spec: WorkerSpec,
    options: { signal: AbortSignal; hindered: Hindered; mayStart: () => Promise<void> },
  ): Promise<MadeJob> {
    const { signal, mayStart } = options
    const { tasksDir } = this.#settings
    if (spec.taskFolder === 'tasks') await assertTaskFile(tasksDir, spec.taskFileName)
    const { name: filesName, leftOut } = await this.#putFiles(options)
    const jobOptions = this.#jobOptions(spec, filesName)
    const { object: job, isNew } = await this.#put<V1Job>(
      ...(['jobs', workerJob(spec, jobOptions), options] as const),
    )
    const uid = job.metadata?.uid ?? ''
    const wasOver = !isNew && (await this.#isOver(job, signal))
    const secrets = { ...options, isOwnerNew: isNew }
    // The one for the registry first: images are pulled once all volumes are there.
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
    const { job, pod } = await this.#view.look(which, signal, { rideMs })
    return observe(job, pod).phase === 'ended'
  }

  /** Makes no object. Throws what making a Job without anything of a task's own would. */
  async tryJob(spec: WorkerSpec, signal: AbortSignal): Promise<void> {
    const body = workerJob(spec, this.#jobOptions(spec, 'task-runner-files'))
    const call = { body, signal, answer: 'Job', query: { dryRun: 'All' }, isUrgent: true }
    await this.#api.json('POST', this.#view.path('jobs'), call)
  }

  /** Puts a ConfigMap again that somebody has removed. Nothing happens when it is none that was put here. */
  async putFilesAgain(
    name: string,
    options: { signal: AbortSignal; hindered: Hindered },
  ): Promise<void> {
    const { configMap } = this.#filesThere.get(name) ?? {}
    if (configMap) await this.#put('configmaps', configMap, options)
  }

  /** Puts the ConfigMap with the task files, and returns its name. */
  async #putFiles(options: {
    signal: AbortSignal
    hindered: Hindered
  }): Promise<{ name: string; leftOut: readonly LeftOut[] }> {
    const { configMap, leftOut } = await this.#packed()
    const problem = await this.taskFilesProblem()
    if (problem) throw new UnavailableError(`Workers cannot be given their files: ${problem}`)
    const name = configMap.metadata?.name ?? ''
    const known = this.#filesThere.get(name)
    if (!known || known.until < Date.now()) {
      // One task is enough to see to that it is still there.
      if (known) known.until = Date.now() + FILES_THERE_MS
      await this.#put('configmaps', configMap, options)
      this.#filesThere.delete(name)
      this.#filesThere.set(name, { configMap, until: Date.now() + FILES_THERE_MS })
      this.#removeUnusedFiles(name).catch((err: unknown) => {
        this.#settings.log.warn({ err }, 'task files that no worker needs could not be removed')
      })
      const [oldest = ''] = this.#filesThere.keys()
      if (this.#filesThere.size > CONFIG_MAPS_KEPT_MAX) this.#filesThere.delete(oldest)
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

  /** Removes the ConfigMaps of earlier task files that no Job names. */
  async #removeUnusedFiles(current: string): Promise<void> {
    const path = this.#view.path('configmaps')
    const { items } = await this.#api.json<{ items: V1ConfigMap[] }>('GET', path, {
      query: { labelSelector: this.#view.labelSelector },
      ...{ isMetadataOnly: true, answer: 'PartialObjectMetadataList' },
    })
    const needed = new Set([current, ...this.#view.jobs.map(filesNameOf)])
    const keptFrom = this.#settings.now() - UNUSED_FILES_KEPT_MS
    for (const item of items) {
      const { name = '', uid = '', creationTimestamp } = item.metadata ?? {}
      const isOld = Date.parse(String(creationTimestamp)) < keptFrom
      if (!isOld || needed.has(name) || !this.#view.isOurs(item)) continue
      await this.#api.remove(`${path}/${name}`, uid)
      this.#filesThere.delete(name)
    }
  }

  #jobOptions(spec: WorkerSpec, filesName: string): JobOptions {
    const settings = this.#settings
    return {
      ...{ deployment: settings.deployment, queue: settings.queue, filesName },
      image: imageFor(spec.image, settings.images),
      serviceAccount: settings.serviceAccount,
      provisioningTimeoutSeconds: Math.ceil(settings.provisioningTimeoutMs / 1000),
      terminationGraceMs: settings.terminationGraceMs,
      keptWorkerSeconds: Math.ceil(settings.keptWorkerMs / 1000),
      createdAt: settings.now(),
      home: settings.home,
    }
  }

  /** Creates, or adopts what an earlier attempt has created whose answer got lost. Waits for quota. */
  async #put<T extends { kind?: string; metadata?: { name?: string } }>(
    resource: 'jobs' | 'secrets' | 'configmaps',
    object: T,
    options: { signal: AbortSignal; hindered: Hindered; isOwnerNew?: boolean },
  ): Promise<{ object: T; isNew: boolean }> {
    const { signal, hindered, isOwnerNew = false } = options
    const call = { body: object, signal, answer: object.kind ?? '' }
    const isUrgent = resource === 'secrets'
    let wasUnheard = false
    const persistence = {
      rideMs: this.#view.rideMs,
      hindered: (err: UnavailableError) => {
        wasUnheard = true
        hindered(err)
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
              : !isOwnerNew || wasUnheard
          // Holds: where it is no boolean it is a Job, as `object` is.
          if (adopted) return { object: adopted === true ? object : (adopted as T), isNew: false }
          const name = object.metadata?.name ?? ''
          const message = `Another ${object.kind} has the name ${name}`
          hindered(new WorkerError('startup_failed', message))
        } else if (err.kind === 'quota') {
          const message = `The namespace has no quota left: ${err.message}`
          hindered(new WorkerError('unschedulable', message))
        } else {
          const message = `Kubernetes refuses to make the worker: ${err.message}`
          throw new WorkerError('startup_failed', message, { cause: err })
        }
        if (isUrgent) await pause(GARBAGE_MS, undefined, { signal })
        else await this.#view.change('any', signal)
      }
    }
  }

  /** Returns the Job that has the name of `wanted` and is for its task. Undefined: it is being removed, or another service's. */
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
      throw new WorkerError('startup_failed', `Another task's worker has the name ${name}`)
    }
    return job.metadata?.deletionTimestamp ? undefined : job
  }

  /** Throws `UnavailableError` while no worker could be given the task files. Packs them only after it has failed. */
  async check(): Promise<void> {
    if (this.#areFilesFine) return
    const problem = await this.taskFilesProblem()
    if (problem) throw new UnavailableError(`Workers cannot be given their files: ${problem}`)
  }

  async taskFilesProblem(): Promise<string | undefined> {
    const { zippedBytes } = await this.#packed()
    this.#areFilesFine = zippedBytes <= OBJECT_BYTES_MAX
    if (this.#areFilesFine) return undefined
    return `the tasks folder has ${zippedBytes} bytes when compressed, and a ConfigMap takes ${OBJECT_BYTES_MAX}: bake task files into the image, or clone them with git_configs`
  }
}
