import { setTimeout as pause } from 'node:timers/promises'
import { z } from 'zod'
import { UnavailableError } from '../../core/errors.ts'
import {
  type Logger,
  type Worker,
  type WorkerBackend,
  WorkerError,
  type WorkerSpec,
  type WorkerStatus,
} from '../../core/ports.ts'
import { assertTasksFolder } from '../../core/tasks-folder.ts'
import { until } from '../../core/until.ts'
import { lost } from '../completion.ts'
import { type ImageNames, imageFor } from '../image.ts'
import { workerTar } from '../worker-files.ts'
import {
  containerRequest,
  type Inspected,
  inspected,
  type Known,
  knownOf,
  LABELS,
  type Listed,
  labelsOf,
  listed,
  stateOf,
} from './container.ts'
import { ContainerWatch, hasEnded, REMOVED, untilAnswered } from './container-watch.ts'
import { discard, Engine, type EngineAddress, EngineError, isFailure, outputOf } from './engine.ts'
import { FAILURES } from './failures.ts'
import { pull } from './pull.ts'

export interface DockerSettings {
  engine: EngineAddress
  /** Id that distinguishes this service's containers from those of others. */
  deployment: string
  /**
   * Id that earlier versions used. Services that share a sealing key share it, so such a container
   * is ours only if our store has its task.
   */
  legacyInstance: string
  tasksDir: string
  images: ImageNames
  network: string
  mounts: readonly string[]
  /** Home of workers; undefined: in their folder. */
  home?: string | undefined
  terminationGraceMs: number
  /** Bytes of each log that are kept in memory. */
  logBytesKept: number
  /** Clock for the age of workers. */
  now: () => number
  log: Logger
  /** Time limit of one call; default 30 s. */
  callTimeoutMs?: number
}

/** Time limit for sending the files of a worker, in multiples of that of other calls. */
const FILL_LIMIT_FACTOR = 20
const CHECK_LIMIT_MS = 5_000
/** Interval of checking whether a container is gone. */
const REMOVAL_MS = 25
const REMOVAL_MAX_MS = 1_000
const REMOVAL_LIMIT_MS = 10_000

interface Making {
  worker: Promise<Worker>
  /** Failure of the last pull, with which the task ends if no pull succeeds in time. */
  pullFailure?: WorkerError
}

/** Runs workers as containers of a Docker or Podman engine, found by their name and labels. */
export class DockerBackend implements WorkerBackend {
  readonly name = 'docker'
  readonly #settings: DockerSettings
  readonly #engine: Engine
  /** Watches by container id, which a rename does not change. */
  readonly #watched = new Map<string, ContainerWatch>()
  /** Ids of kept containers whose task is known to be over. */
  readonly #over = new Set<string>()
  readonly #making = new Map<string, Making>()
  readonly #closing = new AbortController()
  #checking: Promise<void> | undefined
  #machine: Promise<{ cpus: number; isPodman: boolean }> | undefined

  constructor(settings: DockerSettings) {
    this.#settings = settings
    this.#engine = new Engine(settings.engine, settings.callTimeoutMs)
  }

  async provision(
    spec: WorkerSpec,
    signal: AbortSignal,
    mayStart = async () => {},
  ): Promise<Worker> {
    signal.throwIfAborted()
    const making = this.#making.get(spec.name) ?? this.#make(spec, signal, mayStart)
    try {
      return await until(making.worker, signal)
    } catch (err) {
      const isTimeOver = err instanceof DOMException && err.name === 'TimeoutError'
      if (!isTimeOver || !making.pullFailure) throw err
      // If the engine fails now, the pulls may have failed because of it.
      await this.check()
      throw making.pullFailure
    }
  }

  async find(name: string): Promise<Worker | undefined> {
    const container = (await this.#inspect(name)) ?? (await this.#renamed(name))
    return container && this.#worker(container)
  }

  async list(): Promise<Worker[]> {
    const containers = await this.#list()
    const ids = new Set(containers.map(({ Id }) => Id))
    for (const id of this.#over.difference(ids)) this.#over.delete(id)
    return containers.map((container) => this.#worker(container))
  }

  check(): Promise<void> {
    this.#checking ??= this.#check().finally(() => {
      this.#checking = undefined
    })
    return this.#checking
  }

  async close(): Promise<void> {
    this.#closing.abort()
    await this.#engine.close()
  }

  async #check(): Promise<void> {
    const limit = AbortSignal.timeout(CHECK_LIMIT_MS)
    await assertTasksFolder(this.#settings.tasksDir)
    try {
      await this.#list(LABELS.deployment, limit)
    } catch (err) {
      if (!limit.aborted) throw err
      throw new EngineError('timeout', `no answer within ${CHECK_LIMIT_MS / 1000} s`, {
        cause: err,
      })
    }
  }

  #make(spec: WorkerSpec, signal: AbortSignal, mayStart: () => Promise<void>): Making {
    const onPullFailed = (err: WorkerError) => {
      making.pullFailure = err
    }
    const making: Making = {
      worker: this.#provision(spec, { signal, mayStart, onPullFailed }).finally(() =>
        this.#making.delete(spec.name),
      ),
    }
    this.#making.set(spec.name, making)
    return making
  }

  /** Cleans up after itself even if `signal` has aborted. */
  async #provision(
    spec: WorkerSpec,
    options: {
      signal: AbortSignal
      mayStart: () => Promise<void>
      onPullFailed: (err: WorkerError) => void
    },
  ): Promise<Worker> {
    const { signal, mayStart, onPullFailed: onFailed } = options
    const { log, images } = this.#settings
    const existing = await this.#existing(spec)
    if (existing && existing.State.Status !== 'created') return this.#worker(existing)
    // The service was killed before it started this container.
    if (existing) {
      await mayStart()
      await this.#remove(existing.Id)
    }
    const image = imageFor(spec.image, images)
    const notes = [...spec.notes]
    let madeId: string | undefined
    try {
      const config = spec.imageConfig
      const pulledMs = await pull(this.#engine, image, { config, signal, onFailed, log })
      if (pulledMs !== undefined) notes.push(`pulled ${image} in ${Math.ceil(pulledMs / 1000)} s`)
      madeId = await this.#create({ ...spec, notes }, image, signal)
      const container = await this.#inspect(madeId)
      if (!container) throw new UnavailableError('The container was removed before its start')
      await this.#fill(madeId, { ...spec, notes }, signal)
      signal.throwIfAborted()
      // If this instance is paused here, the one that takes over removes the unstarted container.
      await mayStart()
      await this.#start(container, signal)
      return this.#worker(container)
    } catch (err) {
      if (madeId) await this.#removeUnstarted(madeId, err)
      throw provisioningError(err)
    }
  }

  /** Finds the worker's container by its name. Throws `WorkerError` if it runs another task. */
  async #existing({ name, taskId }: WorkerSpec): Promise<Inspected | undefined> {
    const container = await this.#inspect(name)
    if (!container || knownOf(container).taskId === taskId) return container
    const message = `The container ${name} is the worker of another task`
    throw new WorkerError('startup_failed', message)
  }

  async #create(spec: WorkerSpec, image: string, signal: AbortSignal): Promise<string> {
    const { cpus, isPodman } = await this.#machineOnce()
    const createdAt = this.#settings.now()
    const { deployment, network, mounts, terminationGraceMs } = this.#settings
    const body = containerRequest(spec, {
      deployment,
      image,
      network,
      mounts,
      terminationGraceMs,
      createdAt,
      cpusMax: cpus,
      logDriver: isPodman ? 'json-file' : 'local',
    })
    const made = z.object({ Id: z.string().min(1) })
    // Without `signal`, so that the id of the container is known and it can be removed.
    const call = { query: { name: spec.name }, body, step: 'make', expect: [201] } as const
    signal.throwIfAborted()
    try {
      return (await this.#engine.json('POST', '/containers/create', made, call)).Id
    } catch (err) {
      if (!isFailure(err, 'conflict')) throw err
      // Another instance may have created it for the same task: the next attempt finds it.
      if (await this.#existing(spec)) throw err
      const message = `A container of another service has the name ${spec.name}`
      throw new WorkerError('startup_failed', message)
    }
  }

  async #fill(id: string, spec: WorkerSpec, signal: AbortSignal): Promise<void> {
    const body = await workerTar(spec, this.#settings)
    const query = { path: '/' }
    // Large folders may take long; `signal` enforces the provisioning timeout.
    const limitMs = FILL_LIMIT_FACTOR * this.#engine.callLimitMs
    const call = { query, body, signal, step: 'make', limitMs } as const
    const answer = await this.#engine.text('PUT', `/containers/${id}/archive`, call)
    if (answer !== '') throw new EngineError('garbage', 'an answer to the files of a worker')
  }

  /** Starts the container, attached first so that no byte of its log is missed. */
  async #start(container: Inspected, signal: AbortSignal): Promise<void> {
    const { Id } = container
    const output = await this.#engine.stream('POST', `/containers/${Id}/attach`, {
      query: { stream: 'true', stdout: 'true', stderr: 'true' },
      signal: this.#closing.signal,
      step: 'make',
    })
    try {
      const call = { signal, step: 'make', expect: [204, 304] } as const
      await this.#engine.text('POST', `/containers/${Id}/start`, call)
    } catch (err) {
      await discard(output)
      throw err
    }
    this.#watch(container, outputOf(output))
  }

  /**
   * Removes a container unless it was started: the next attempt finds a started one. Does nothing
   * if the engine is unavailable. Never rejects.
   */
  async #removeUnstarted(id: string, why: unknown): Promise<void> {
    if (isFailure(why, 'unreachable', 'timeout')) return
    try {
      // By id, since another instance may have reused the name.
      const container = await this.#inspect(id)
      if (container?.State.Status === 'created') await this.#remove(id)
    } catch (err) {
      // The next attempt, or the end of the task, removes it.
      this.#settings.log.warn({ err, id }, 'a container that was not started could not be removed')
    }
  }

  #worker(container: Inspected | Listed): Worker {
    const known = knownOf(container)
    const { id, name, taskId, image, size, createdAt } = known
    let held = this.#watched.get(id)
    const watched = async () => {
      held ??= this.#watched.get(id)
      if (held) return held
      const found = await this.#inspect(id)
      // A concurrent call may have created the watch.
      held = this.#watched.get(id) ?? (found && this.#watch(found, undefined))
      return held
    }
    const status = async () => {
      if (held?.completion) return 'Completed'
      const found = await this.#inspect(id)
      return found ? this.#statusOf(found) : 'Terminating'
    }
    return {
      name,
      taskId,
      backend: this.name,
      image,
      size,
      createdAt,
      ...(this.#isOurs(container) ? {} : { mayBeForeign: true }),
      // A listed container needs no further call.
      status: 'Config' in container ? status : () => this.#statusOf(container),
      completion: async (signal) => {
        const { log } = this.#settings
        const found = await until(untilAnswered(watched, { signal, log }), signal)
        return found ? until(found.ended, signal) : lost(REMOVED)
      },
      stop: async () => {
        const found = await watched()
        await found?.stop()
      },
      logs: async ({ maxBytes }) => {
        const found = await watched()
        if (!found) throw new Error('the container is gone')
        // Output of an ended task may still be arriving, all of it after a restart of the service.
        if ((await status()) !== 'Running') await found.ended
        else await found.log.begun()
        return found.log.tail(maxBytes)
      },
      follow: async function* ({ from, signal }) {
        const found = await watched()
        if (found) yield* found.log.follow(from, signal)
      },
      terminate: async () => {
        await this.#terminate(known, held)
        held = undefined
      },
    }
  }

  /** Calls the engine only for a kept container whose task is not known to be over. */
  async #statusOf(container: Inspected | Listed): Promise<WorkerStatus> {
    const id = container.Id
    const state = stateOf(container)
    if (state === 'removing') return 'Terminating'
    if (state === 'created') return 'Provisioning'
    const isKnown = this.#over.has(id) || this.#watched.get(id)?.completion
    if (isKnown || ['exited', 'dead'].includes(state)) return 'Completed'
    if (!labelsOf(container)[LABELS.keeps]) return 'Running'
    if (!(await hasEnded(this.#engine, container))) return 'Running'
    this.#over.add(id)
    return 'Completed'
  }

  /**
   * Watches a container and forgets it when its task has ended; callers keep a reference. Without
   * `output`, as after a restart, the log is read from its beginning.
   */
  #watch(container: Inspected, output: AsyncIterable<Buffer> | undefined): ContainerWatch {
    const { terminationGraceMs, logBytesKept, log } = this.#settings
    const watched = new ContainerWatch(container, output, {
      engine: this.#engine,
      inspect: (id) => this.#inspect(id),
      terminationGraceMs,
      logBytesKept,
      log,
      closing: this.#closing.signal,
    })
    const { id } = watched
    this.#watched.set(id, watched)
    const forget = () => {
      if (this.#watched.get(id) === watched) this.#watched.delete(id)
    }
    watched.ended.then(forget, forget)
    return watched
  }

  async #terminate({ id, name, taskId }: Known, held?: ContainerWatch): Promise<void> {
    // A container that is being created would appear after the inspection.
    await this.#making.get(name)?.worker.catch(() => {})
    const container = (await this.#inspect(id)) ?? (await this.#inspect(name))
    if (container && knownOf(container).taskId === taskId) {
      if (container.State.Status === 'running') {
        await (held ?? this.#watched.get(container.Id) ?? this.#watch(container, undefined)).stop()
      }
      await this.#remove(container.Id)
    }
  }

  async #remove(id: string): Promise<void> {
    const { signal } = this.#closing
    const givesUpAt = performance.now() + REMOVAL_LIMIT_MS
    for (let waitMs = REMOVAL_MS; ; waitMs = Math.min(waitMs * 2, REMOVAL_MAX_MS)) {
      try {
        const call = { query: { force: 'true', v: 'true' }, expect: [200, 204] }
        await this.#engine.text('DELETE', `/containers/${id}`, call)
      } catch (err) {
        if (isFailure(err, 'not_found')) return
        // Already being removed.
        if (!isFailure(err, 'conflict')) throw err
      }
      if (performance.now() > givesUpAt) {
        const words = `container ${id} is still there after ${REMOVAL_LIMIT_MS / 1000} s`
        throw new EngineError('conflict', words)
      }
      await pause(waitMs, undefined, { signal })
    }
  }

  /** Inspects a container by name or id; undefined unless ours, or of an earlier version. */
  async #inspect(name: string): Promise<Inspected | undefined> {
    try {
      const path = `/containers/${name}/json`
      const container = await this.#engine.json('GET', path, inspected)
      return this.#isOurs(container) || this.#isLegacy(container) ? container : undefined
    } catch (err) {
      if (isFailure(err, 'not_found')) return undefined
      throw err
    }
  }

  /** Finds the container of a worker that was renamed by hand. */
  async #renamed(worker: string): Promise<Inspected | undefined> {
    const [container] = await this.#list(`${LABELS.worker}=${worker}`)
    return container && this.#inspect(container.Id)
  }

  /** Lists our containers, and those of earlier versions, that have the label. */
  async #list(label: string = LABELS.deployment, signal?: AbortSignal): Promise<Listed[]> {
    const filters = JSON.stringify({ label: [label] })
    const call = { query: { all: 'true', filters }, signal }
    const found = await this.#engine.json('GET', '/containers/json', listed, call)
    return found.filter((container) => this.#isOurs(container) || this.#isLegacy(container))
  }

  #isOurs(container: Inspected | Listed): boolean {
    return labelsOf(container)[LABELS.deployment] === this.#settings.deployment
  }

  #isLegacy(container: Inspected | Listed): boolean {
    return labelsOf(container)[LABELS.deployment] === this.#settings.legacyInstance
  }

  #machineOnce(): Promise<{ cpus: number; isPodman: boolean }> {
    this.#machine ??= this.#askMachine().catch((err: unknown) => {
      this.#machine = undefined
      throw err
    })
    return this.#machine
  }

  async #askMachine(): Promise<{ cpus: number; isPodman: boolean }> {
    const components = z.array(z.object({ Name: z.string() })).nullish()
    const [info, version] = await Promise.all([
      this.#engine.json('GET', '/info', z.object({ NCPU: z.number().positive() })),
      this.#engine.json('GET', '/version', z.object({ Components: components })),
    ])
    const isPodman = (version.Components ?? []).some(({ Name }) => Name.includes('Podman'))
    return { cpus: info.NCPU, isPodman }
  }
}

/** Converts a failure that is the task's own to a `WorkerError`; the core retries all others. */
function provisioningError(err: unknown): unknown {
  if (!(err instanceof EngineError) || FAILURES[err.kind].verdict !== 'task') return err
  const message = `The container could not be started: ${err.words}`
  return new WorkerError('startup_failed', message, { cause: err })
}
