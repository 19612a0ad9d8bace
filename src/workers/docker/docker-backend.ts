import { setTimeout as pause } from 'node:timers/promises'
import { TaskRunnerError } from '../../core/errors.ts'
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
import { containerRequest, type Inspected, LABELS } from './container.ts'
import { ContainerWatch, exitOf, REMOVED } from './container-watch.ts'
import {
  discard,
  Engine,
  type EngineAddress,
  EngineError,
  outputOf,
  untilAnswered,
} from './engine.ts'
import { pull } from './pull.ts'

export interface DockerSettings {
  engine: EngineAddress
  /** Tells this service's containers from those of another on the same engine. */
  instance: string
  tasksDir: string
  images: ImageNames
  network: string
  mounts: readonly string[]
  terminationGraceMs: number
  /** Bytes of each log that are kept here, to be read at once. */
  logBytesKept: number
  /** The clock by which the age of workers is judged. */
  now: () => number
  log: Logger
}

/** Between two looks at whether a container is gone. */
const REMOVAL_MS = 25

/** Workers that are containers of a Docker or Podman engine, found again by their name and labels. */
export class DockerBackend implements WorkerBackend {
  readonly name = 'docker'
  readonly #settings: DockerSettings
  readonly #engine: Engine
  readonly #watched = new Map<string, ContainerWatch>()
  readonly #making = new Map<string, Promise<Worker>>()
  readonly #closing = new AbortController()
  #machine: Promise<{ cpus: number; isPodman: boolean }> | undefined

  constructor(settings: DockerSettings) {
    this.#settings = settings
    this.#engine = new Engine(settings.engine)
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
    return until(making, signal)
  }

  async find(name: string): Promise<Worker | undefined> {
    const container = await this.#inspect(name)
    return container && this.#worker(container)
  }

  async list(): Promise<Worker[]> {
    const filters = JSON.stringify({ label: [`${LABELS.instance}=${this.#settings.instance}`] })
    const found = await this.#engine.json<
      Array<{ Id: string; Names: string[]; Labels: Record<string, string>; Image: string }>
    >('GET', '/containers/json', { query: { all: 'true', filters } })
    return found.map(({ Id, Names, Labels, Image }) =>
      this.#worker({ Id, Name: Names[0] ?? '', Config: { Labels, Image } }),
    )
  }

  async check(): Promise<void> {
    await assertTasksFolder(this.#settings.tasksDir)
    try {
      await this.#engine.text('GET', '/_ping')
    } catch (err) {
      const message = err instanceof Error ? err.message : String(err)
      throw new TaskRunnerError('workers_unavailable', message, { cause: err })
    }
  }

  async close(): Promise<void> {
    this.#closing.abort()
    await this.#engine.close()
  }

  /** Goes on after `signal` has aborted as far as it takes to leave nothing behind. */
  async #provision(
    spec: WorkerSpec,
    signal: AbortSignal,
    mayStart: () => Promise<void>,
  ): Promise<Worker> {
    const existing = await this.#answered(() => this.#inspect(spec.name), signal)
    if (existing && existing.State.Status !== 'created') return this.#worker(existing)
    // One that was never started was being made when the service was killed: nothing has run in it.
    if (existing) {
      await mayStart()
      await this.#remove(existing.Id)
    }
    const image = imageFor(spec.image, this.#settings.images)
    const notes = [...spec.notes]
    const pulledMs = await this.#answered(
      () => pull(this.#engine, image, spec.imageConfig, signal),
      signal,
    )
    if (pulledMs !== undefined) notes.push(`pulled ${image} in ${Math.ceil(pulledMs / 1000)} s`)
    let madeId: string | undefined
    const onMade = (id: string) => {
      madeId = id
    }
    try {
      const container = await this.#answered(
        () => this.#create({ ...spec, notes }, image, { signal, onMade }),
        signal,
      )
      signal.throwIfAborted()
      // Should we be held up from here on, whoever takes over removes what never ran.
      await mayStart()
      await this.#started(container, signal)
      return this.#worker(container)
    } catch (err) {
      // By its id: of that name there may be one by now that another instance has made.
      const begun = madeId && (await this.#inspect(madeId).catch(() => undefined))
      // Started is started: it is found again. What never ran goes.
      if (begun && begun.State.Status === 'created') await this.#remove(begun.Id)
      throw err
    }
  }

  async #create(
    spec: WorkerSpec,
    image: string,
    { signal, onMade }: { signal: AbortSignal; onMade: (id: string) => void },
  ): Promise<Inspected> {
    const { cpus, isPodman } = await this.#machineOnce()
    const createdAt = this.#settings.now()
    const { instance, network, mounts, tasksDir } = this.#settings
    const options = { instance, image, network, mounts, cpusMax: cpus, createdAt }
    const body = containerRequest(spec, {
      ...options,
      logDriver: isPodman ? 'json-file' : 'local',
    })
    try {
      const call = { query: { name: spec.name }, body }
      onMade((await this.#engine.json<{ Id: string }>('POST', '/containers/create', call)).Id)
    } catch (err) {
      // Its answer to an earlier attempt may have got lost.
      if (!(err instanceof EngineError && err.status === 409)) throw workerErrorOf(err)
    }
    const container = await this.#inspect(spec.name)
    if (!container) {
      const message = `A container of another service has the name ${spec.name}`
      throw new WorkerError('startup_failed', message)
    }
    const files = await workerTar(spec, tasksDir)
    const call = { query: { path: '/' }, body: files, signal }
    await this.#engine
      .text('PUT', `/containers/${container.Id}/archive`, call)
      .catch((err: unknown) => Promise.reject(workerErrorOf(err)))
    return container
  }

  async #started(container: Inspected, signal: AbortSignal): Promise<void> {
    let isAgain = false
    await this.#answered(async () => {
      // An earlier attempt may have got through, with its answer lost.
      const begun = isAgain ? await this.#inspect(container.Id) : undefined
      isAgain = true
      if (begun && begun.State.Status !== 'created') return this.#watch(begun, undefined)
      return this.#start(container, signal)
    }, signal)
  }

  /** Attached before it starts, so that no byte of its log is missed. */
  async #start(container: Inspected, signal: AbortSignal): Promise<ContainerWatch> {
    const { Id } = container
    const output = await this.#engine
      .stream('POST', `/containers/${Id}/attach`, {
        query: { stream: 'true', stdout: 'true', stderr: 'true' },
        signal: this.#closing.signal,
      })
      .catch((err: unknown) => Promise.reject(workerErrorOf(err)))
    try {
      await this.#engine.text('POST', `/containers/${Id}/start`, { signal })
    } catch (err) {
      await discard(output)
      throw workerErrorOf(err)
    }
    return this.#watch(container, outputOf(output))
  }

  #worker(container: Pick<Inspected, 'Id' | 'Name'> & { Config: Inspected['Config'] }): Worker {
    const name = container.Name.replace(/^\//, '')
    const labels = container.Config.Labels
    let held = this.#watched.get(name)
    const watched = async () => {
      held ??= this.#watched.get(name)
      if (held) return held
      const found = await this.#inspect(name)
      // Another look may have been faster.
      held = this.#watched.get(name) ?? (found && this.#watch(found, undefined))
      return held
    }
    const status = async () => (held?.completion ? 'Completed' : this.#status(name))
    return {
      name,
      taskId: labels[LABELS.taskId] ?? '',
      backend: this.name,
      image: container.Config.Image,
      size: labels[LABELS.size] || null,
      createdAt: Number(labels[LABELS.createdAt]),
      status,
      completion: async (signal) => {
        const found = await until(this.#answered(watched, signal), signal)
        return found ? until(found.ended, signal) : lost(REMOVED)
      },
      stop: async () => {
        const found = await watched()
        await found?.stop()
      },
      logs: async ({ maxBytes }) => {
        const found = await watched()
        if (!found) throw new Error('the container is gone')
        // A task that has ended may still have output on its way, or all of it when we have just come back.
        if ((await status()) !== 'Running') await found.ended
        else await found.begun()
        return found.ring.tail(maxBytes)
      },
      follow: async function* ({ from, signal }) {
        const found = await watched()
        if (found) yield* found.ring.follow(from, signal)
      },
      terminate: async () => {
        await this.#terminate(name, held)
        held = undefined
      },
    }
  }

  async #status(name: string): Promise<WorkerStatus> {
    if (this.#watched.get(name)?.completion) return 'Completed'
    const container = await this.#inspect(name)
    if (!container || container.State.Status === 'removing') return 'Terminating'
    if (container.State.Status === 'created') return 'Provisioning'
    if (['exited', 'dead'].includes(container.State.Status)) return 'Completed'
    const isOver =
      container.Config.Labels[LABELS.keeps] && (await exitOf(this.#engine, container.Id))
    return isOver ? 'Completed' : 'Running'
  }

  /**
   * Until its task has ended; whoever needs it for longer has hold of it. Without `output`, as for a worker of before, its
   * log is read again from its beginning, as far as the engine has kept it.
   */
  #watch(container: Inspected, output: AsyncIterable<Buffer> | undefined): ContainerWatch {
    const { terminationGraceMs, logBytesKept, log } = this.#settings
    const watched = new ContainerWatch(container, output, {
      engine: this.#engine,
      inspect: (name) => this.#inspect(name),
      ...{ terminationGraceMs, logBytesKept, log },
      closing: this.#closing.signal,
    })
    const { name } = watched
    this.#watched.set(name, watched)
    const forget = () => {
      if (this.#watched.get(name) === watched) this.#watched.delete(name)
    }
    watched.ended.then(forget, forget)
    return watched
  }

  async #terminate(name: string, held?: ContainerWatch): Promise<void> {
    // One that is being made would be there after we have looked.
    await this.#making.get(name)?.catch(() => {})
    const container = await this.#inspect(name)
    if (container) {
      if (container.State.Status === 'running') {
        await (held ?? this.#watched.get(name) ?? this.#watch(container, undefined)).stop()
      }
      await this.#remove(container.Id)
    }
  }

  async #remove(id: string): Promise<void> {
    for (;;) {
      try {
        const query = { force: 'true', v: 'true' }
        await this.#engine.text('DELETE', `/containers/${id}`, { query })
      } catch (err) {
        if (!(err instanceof EngineError)) throw err
        if (err.status === 404) return
        // 409: it is being removed already.
        if (err.status !== 409) throw err
      }
      await pause(REMOVAL_MS)
    }
  }

  /** One of ours, by its name or id. */
  async #inspect(name: string): Promise<Inspected | undefined> {
    try {
      const path = `/containers/${name}/json`
      const container = await this.#engine.json<Inspected>('GET', path)
      const isOurs = container.Config.Labels[LABELS.instance] === this.#settings.instance
      return isOurs ? container : undefined
    } catch (err) {
      if (err instanceof EngineError && err.status === 404) return undefined
      throw err
    }
  }

  #answered<T>(step: () => Promise<T>, signal: AbortSignal): Promise<T> {
    return untilAnswered(step, { signal, log: this.#settings.log })
  }

  #machineOnce(): Promise<{ cpus: number; isPodman: boolean }> {
    this.#machine ??= this.#askMachine().catch((err: unknown) => {
      this.#machine = undefined
      throw err
    })
    return this.#machine
  }

  async #askMachine(): Promise<{ cpus: number; isPodman: boolean }> {
    const [info, version] = await Promise.all([
      this.#engine.json<{ NCPU: number }>('GET', '/info'),
      this.#engine.json<{ Components?: Array<{ Name: string }> }>('GET', '/version'),
    ])
    const isPodman = (version.Components ?? []).some(({ Name }) => Name.includes('Podman'))
    return { cpus: info.NCPU, isPodman }
  }
}

/** The engine's words, as a reason its user can act on. */
function workerErrorOf(err: unknown): unknown {
  if (!(err instanceof EngineError)) return err
  if (/no space left on device/.test(err.message)) {
    return new WorkerError('internal_error', `The engine's disk is full: ${err.message}`)
  }
  return new WorkerError('startup_failed', `The container could not be started: ${err.message}`)
}
