import { once } from 'node:events'
import { createGzip } from 'node:zlib'
import type { V1Job } from '@kubernetes/client-node'
import { WorkerError, type WorkerSpec } from '../../core/ports.ts'
import { assertTaskFile, type LeftOut, leftOutNotes } from '../../core/tasks-folder.ts'
import { type ImageNames, imageFor } from '../image.ts'
import { sharedTar } from '../worker-files.ts'
import { ApiError, type KubernetesApi } from './api.ts'
import type { ClusterView } from './cluster-view.ts'
import type { Hindered } from './job-watch.ts'
import {
  filesConfigMap,
  type JobOptions,
  OBJECT_BYTES_MAX,
  ownSecret,
  pullSecret,
  workerJob,
} from './manifests.ts'

export interface JobSettings {
  instance: string
  tasksDir: string
  images: ImageNames
  serviceAccount: string
  /** Of Kueue. */
  queue: string | undefined
  workersMax: number
  provisioningTimeoutMs: number
  terminationGraceMs: number
  keptWorkerMs: number
  /** The clock by which the age of workers is judged. */
  now: () => number
}

const FILES_KNOWN_MS = 1_000

/** The tasks folder as workers get it. */
interface PackedFiles {
  zipped: Buffer
  leftOut: readonly LeftOut[]
}

/** Makes the objects of a worker: its Job, and the Secrets and task files that its pod waits for. */
export class JobMaker {
  readonly #api: KubernetesApi
  readonly #view: ClusterView
  readonly #settings: JobSettings
  /** Names of workers that may be made, and may not be seen yet. */
  readonly #admitted = new Set<string>()
  /** Names of ConfigMaps that are there. */
  readonly #filesThere = new Set<string>()
  #filesKnown: { known: Promise<PackedFiles>; until: number } | undefined

  constructor(api: KubernetesApi, view: ClusterView, settings: JobSettings) {
    this.#api = api
    this.#view = view
    this.#settings = settings
  }

  /**
   * The Job first, then what it needs, which from its first moment goes with it: so nothing is left behind, whenever we
   * are interrupted. Its pod waits for the Secret: who was held up before the Job was made learns in time whether its
   * task was seen through by others meanwhile, and who is held up later finds that the Job went with them.
   */
  async make(
    spec: WorkerSpec,
    options: { signal: AbortSignal; hindered: Hindered; mayStart: () => Promise<void> },
  ): Promise<V1Job> {
    const { signal, hindered, mayStart } = options
    const { tasksDir, instance } = this.#settings
    if (spec.taskFolder === 'tasks') await assertTaskFile(tasksDir, spec.taskFileName)
    const files = await this.#files()
    const jobOptions = await this.#jobOptions(spec, files.zipped, signal)
    await this.#withinCap(spec.name, signal, hindered)
    const job = await this.#put<V1Job>('jobs', workerJob(spec, jobOptions), signal, hindered)
    const uid = job.metadata?.uid ?? ''
    // The one for the registry first: images are pulled once all volumes are there.
    const pull = pullSecret(spec, jobOptions, uid)
    if (pull) await this.#put('secrets', pull, signal, hindered)
    await mayStart()
    const notes = [...spec.notes, ...leftOutNotes(files.leftOut)]
    await this.#put('secrets', ownSecret({ ...spec, notes }, instance, uid), signal, hindered)
    return job
  }

  async #jobOptions(spec: WorkerSpec, files: Buffer, signal: AbortSignal): Promise<JobOptions> {
    const settings = this.#settings
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
      createdAt: settings.now(),
    }
  }

  /** Creates, or adopts what an earlier attempt has created whose answer got lost. Waits for quota. */
  async #put<T extends { metadata?: { name?: string } }>(
    resource: 'jobs' | 'secrets' | 'configmaps',
    object: T,
    signal: AbortSignal,
    hindered: Hindered,
  ): Promise<T> {
    const path = this.#view.path(resource)
    for (;;) {
      try {
        return await this.#view.persistently(
          () =>
            this.#api.json<T>('POST', path, {
              body: object,
              signal,
              isUrgent: resource === 'secrets',
            }),
          signal,
          (message) => hindered('provisioning_timeout', message),
        )
      } catch (err) {
        if (!(err instanceof ApiError)) throw err
        const name = object.metadata?.name ?? ''
        if (err.reason === 'AlreadyExists') {
          // What is named by its content, or made for the very Job, is as we would make it.
          if (resource !== 'jobs') return object
          const job = await this.#view.persistently(() => this.#view.namedJob(name, signal), signal)
          // Holds: it is a Job, as `object` is.
          if (job && !job.metadata?.deletionTimestamp) return job as T
          hindered('startup_failed', `Another Job has the name ${name}`)
        } else if (err.status === 403 && /exceeded quota/.test(err.message)) {
          hindered('unschedulable', `The namespace has no quota left: ${err.message}`)
        } else {
          const message = `Kubernetes refuses to make the worker: ${err.message}`
          throw new WorkerError('startup_failed', message, { cause: err })
        }
        await this.#view.change('any', signal)
      }
    }
  }

  async #withinCap(name: string, signal: AbortSignal, hindered: Hindered): Promise<void> {
    const { workersMax } = this.#settings
    const live = () => {
      const isEnded = ({ type, status }: { type: string; status: string }) =>
        ['Complete', 'Failed'].includes(type) && status === 'True'
      const names = [...this.#view.jobs]
        .filter(({ status }) => !status?.conditions?.some(isEnded))
        .map(({ metadata }) => metadata?.name ?? '')
      return new Set([...names, ...this.#admitted]).size
    }
    const isThere = () => [...this.#view.jobs].some(({ metadata }) => metadata?.name === name)
    while (live() >= workersMax && !isThere()) {
      hindered('unschedulable', `There are ${workersMax} workers already, as many as may be`)
      await this.#view.change('any', signal)
    }
    this.#admitted.add(name)
  }

  async taskFilesProblem(): Promise<string | undefined> {
    const { length } = (await this.#files()).zipped
    if (length <= OBJECT_BYTES_MAX) return undefined
    return `the tasks folder has ${length} bytes when compressed, and a ConfigMap takes ${OBJECT_BYTES_MAX}: bake task files into the image, or clone them with git_configs`
  }

  /** The making has ended: from now on a worker counts where it is seen. */
  forget(name: string): void {
    this.#admitted.delete(name)
  }

  /** Looked at again after a moment: many tasks may come at once. */
  #files(): Promise<PackedFiles> {
    if (!this.#filesKnown || this.#filesKnown.until < Date.now()) {
      this.#filesKnown = { known: this.#pack(), until: Date.now() + FILES_KNOWN_MS }
      this.#filesKnown.known.catch(() => {
        this.#filesKnown = undefined
      })
    }
    return this.#filesKnown.known
  }

  async #pack(): Promise<PackedFiles> {
    const zipped = createGzip()
    const chunks: Buffer[] = []
    zipped.on('data', (chunk: Buffer) => chunks.push(chunk))
    const { tar, leftOut } = await sharedTar(this.#settings.tasksDir)
    const ended = once(zipped, 'end')
    for await (const chunk of tar) zipped.write(chunk)
    zipped.end()
    await ended
    return { zipped: Buffer.concat(chunks), leftOut }
  }
}
