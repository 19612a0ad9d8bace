import { setTimeout as pause } from 'node:timers/promises'
import { unpackTar } from 'modern-tar'
import {
  type Completion,
  type Logger,
  type Worker,
  type WorkerBackend,
  WorkerError,
  type WorkerSpec,
  type WorkerStatus,
} from '../../core/ports.ts'
import { until } from '../../core/until.ts'
import { completionOf, type Exit, lost, overLogLimit, parseExit } from '../completion.ts'
import { type ImageNames, imageFor } from '../image.ts'
import { LogRing } from '../log-ring.ts'
import { WORKER_FOLDER, workerTar } from '../worker-files.ts'
import { containerRequest, type Inspected, LABELS } from './container.ts'
import {
  discard,
  Engine,
  type EngineAddress,
  EngineError,
  EngineUnreachableError,
  outputOf,
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
  log: Logger
}

const RETRY_MS = 250
const RETRY_MAX_MS = 5_000
/** How often a worker that stays is asked whether its task has ended. */
const KEPT_POLL_MS = 500
/** After a task's end its last output is on the way for a moment: one that stands still for so long has ended. */
const LAST_OUTPUT_MS = 5_000
const QUIET_MS = 200
const KILLED_EXIT_CODE = 137
/** Of the init process, which then has nothing to run. */
const COULD_NOT_RUN = [126, 127]

/** A container whose log and end are watched. */
interface Watched {
  name: string
  id: string
  maxLogBytes: number
  keeps: boolean
  ring: LogRing
  /** Of its log, again and again: more than the ring has of it. */
  bytesRead: number
  ended: Promise<Completion>
  completion: Completion | undefined
  overLogLimit: boolean
}

/** Workers that are containers of a Docker or Podman engine, found again by their name and labels. */
export class DockerBackend implements WorkerBackend {
  readonly name = 'docker'
  readonly #settings: DockerSettings
  readonly #engine: Engine
  readonly #watched = new Map<string, Watched>()
  readonly #making = new Map<string, Promise<Worker>>()
  readonly #closing = new AbortController()
  #machine: Promise<{ cpus: number; isPodman: boolean }> | undefined

  constructor(settings: DockerSettings) {
    this.#settings = settings
    this.#engine = new Engine(settings.engine)
  }

  async provision(spec: WorkerSpec, signal: AbortSignal): Promise<Worker> {
    signal.throwIfAborted()
    const making =
      this.#making.get(spec.name) ??
      this.#provision(spec, signal).finally(() => this.#making.delete(spec.name))
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
    await this.#engine.text('GET', '/_ping')
  }

  async close(): Promise<void> {
    this.#closing.abort()
    await this.#engine.close()
  }

  /** Goes on after `signal` has aborted as far as it takes to leave nothing behind. */
  async #provision(spec: WorkerSpec, signal: AbortSignal): Promise<Worker> {
    const existing = await this.#persistently(() => this.#inspect(spec.name), signal)
    if (existing && existing.State.Status !== 'created') return this.#worker(existing)
    // One that was never started was being made when the service was killed: nothing has run in it.
    if (existing) await this.#remove(existing.Id)
    const image = imageFor(spec.image, this.#settings.images)
    const notes = [...spec.notes]
    const pulledMs = await this.#persistently(
      () => pull(this.#engine, image, spec.imageConfig, signal),
      signal,
    )
    if (pulledMs !== undefined) notes.push(`pulled ${image} in ${Math.ceil(pulledMs / 1000)} s`)
    try {
      const container = await this.#persistently(
        () => this.#create({ ...spec, notes }, image, signal),
        signal,
      )
      signal.throwIfAborted()
      const watched = await this.#started(container, signal)
      this.#watched.set(spec.name, watched)
      return this.#worker(container)
    } catch (err) {
      const begun = await this.#inspect(spec.name).catch(() => undefined)
      // Started is started: it is found again. What never ran goes.
      if (begun?.State.Status === 'created') await this.#remove(begun.Id)
      throw err
    }
  }

  async #create(spec: WorkerSpec, image: string, signal: AbortSignal): Promise<Inspected> {
    const { cpus, isPodman } = await this.#machineOnce()
    const createdAt = Date.now()
    const { instance, network, mounts, tasksDir } = this.#settings
    const options = { instance, image, network, mounts, cpusMax: cpus, createdAt }
    const body = containerRequest(spec, {
      ...options,
      logDriver: isPodman ? 'json-file' : 'local',
    })
    try {
      await this.#engine.json('POST', '/containers/create', { query: { name: spec.name }, body })
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

  async #started(container: Inspected, signal: AbortSignal): Promise<Watched> {
    let isAgain = false
    return this.#persistently(async () => {
      // An earlier attempt may have got through, with its answer lost.
      const begun = isAgain ? await this.#inspect(container.Id) : undefined
      isAgain = true
      if (begun && begun.State.Status !== 'created') return this.#watch(begun, undefined)
      return this.#start(container, signal)
    }, signal)
  }

  /** Attached before it starts, so that no byte of its log is missed. */
  async #start(container: Inspected, signal: AbortSignal): Promise<Watched> {
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
    const watched = async () => {
      const known = this.#watched.get(name)
      if (known) return known
      const found = await this.#inspect(name)
      // Another look may have been faster.
      return this.#watched.get(name) ?? (found && this.#watchAgain(found))
    }
    return {
      name,
      taskId: labels[LABELS.taskId] ?? '',
      backend: this.name,
      image: container.Config.Image,
      size: labels[LABELS.size] || null,
      createdAt: Number(labels[LABELS.createdAt]),
      status: () => this.#status(name),
      completion: async (signal) => {
        const found = await until(this.#persistently(watched, signal), signal)
        return found ? until(found.ended, signal) : lost(REMOVED)
      },
      stop: async () => {
        const found = await watched()
        if (found) await this.#stop(found)
      },
      logs: async ({ maxBytes }) => {
        const found = await watched()
        if (!found) throw new Error('the container is gone')
        // A task that has ended may still have output on its way, or all of it when we have just come back.
        if (found.completion ?? (await this.#status(name)) !== 'Running') await found.ended
        return found.ring.tail(maxBytes)
      },
      follow: async function* ({ from, signal }) {
        const found = await watched()
        if (found) yield* found.ring.follow(from, signal)
      },
      terminate: () => this.#terminate(name),
    }
  }

  async #status(name: string): Promise<WorkerStatus> {
    if (this.#watched.get(name)?.completion) return 'Completed'
    const container = await this.#inspect(name)
    if (!container || container.State.Status === 'removing') return 'Terminating'
    if (container.State.Status === 'created') return 'Provisioning'
    if (['exited', 'dead'].includes(container.State.Status)) return 'Completed'
    const isOver = container.Config.Labels[LABELS.keeps] && (await this.#exitOf(container.Id))
    return isOver ? 'Completed' : 'Running'
  }

  /** A worker of before: its log is read again from its beginning, as far as the engine has kept it. */
  #watchAgain(container: Inspected): Watched {
    const watched = this.#watch(container, undefined)
    this.#watched.set(watched.name, watched)
    return watched
  }

  #watch(container: Inspected, output: AsyncIterable<Buffer> | undefined): Watched {
    const labels = container.Config.Labels
    const watched: Watched = {
      name: container.Name.replace(/^\//, ''),
      id: container.Id,
      maxLogBytes: Number(labels[LABELS.maxLogBytes]),
      keeps: Boolean(labels[LABELS.keeps]),
      ring: new LogRing(this.#settings.logBytesKept),
      bytesRead: 0,
      ended: Promise.resolve(lost(REMOVED)),
      completion: undefined,
      overLogLimit: false,
    }
    void this.#feed(watched, output)
    watched.ended = this.#end(watched)
    // While we shut down nobody waits for it.
    watched.ended.catch(() => {})
    return watched
  }

  /** Fills the ring until the container has ended, across cuts of the stream. Never rejects. */
  async #feed(watched: Watched, first: AsyncIterable<Buffer> | undefined): Promise<void> {
    const { id, ring } = watched
    const { signal } = this.#closing
    for (let output = first; !signal.aborted; output = undefined) {
      try {
        for await (const piece of output ?? unseen(await this.#logs(id), watched)) {
          ring.append(piece)
          if (ring.totalBytes > watched.maxLogBytes && !watched.overLogLimit) {
            watched.overLogLimit = true
            void this.#stop(watched).catch((err: unknown) =>
              this.#settings.log.error({ err, worker: watched.name }, 'ending a task failed'),
            )
          }
        }
        const state = (await this.#inspect(watched.name))?.State.Status
        if (state === undefined || ['exited', 'dead', 'removing'].includes(state)) break
      } catch (err) {
        if (err instanceof EngineError && err.status === 404) break
      }
      await pause(RETRY_MS, undefined, { signal }).catch(() => {})
    }
    ring.end()
  }

  async #logs(id: string, follow = true): Promise<AsyncIterable<Buffer>> {
    const query = { follow: String(follow), stdout: 'true', stderr: 'true' }
    const { signal } = this.#closing
    return outputOf(await this.#engine.stream('GET', `/containers/${id}/logs`, { query, signal }))
  }

  /** How the task ended, once it has. Whatever befalls the engine meanwhile, the task is not judged by it. */
  async #end(watched: Watched): Promise<Completion> {
    const { id, name } = watched
    const { signal } = this.#closing
    const judge = async (): Promise<Completion> => {
      for (;;) {
        const container = await this.#inspect(name)
        if (container?.Id !== id) return lost(REMOVED)
        const { Status } = container.State
        if (Status === 'exited' || Status === 'dead') return this.#completionOf(container)
        if (watched.keeps && (await this.#exitOf(id))) return this.#completionOf(container)
        // Of one that was not started, or that stays, waiting for its end would be of no use.
        if (Status === 'created' || watched.keeps) {
          await pause(KEPT_POLL_MS, undefined, { signal })
        } else {
          const query = { condition: 'not-running' }
          await this.#engine.text('POST', `/containers/${id}/wait`, { query, signal }).catch(ifGone)
        }
      }
    }
    const completion = await this.#persistently(judge, signal)
    await this.#lastOutput(watched)
    watched.completion = watched.overLogLimit ? overLogLimit(watched.maxLogBytes) : completion
    return watched.completion
  }

  /** Waits for the log to be whole. The stream of a container that stays does not end: what the engine has, has to do. */
  async #lastOutput(watched: Watched): Promise<void> {
    const { id, ring, keeps } = watched
    const { signal } = this.#closing
    const stay = (ms: number) => pause(ms, undefined, { signal }).catch(() => {})
    if (keeps) await stay(QUIET_MS)
    const whole = keeps ? await this.#bytesLogged(id).catch(() => ring.totalBytes) : Infinity
    let movedAt = performance.now()
    for (let seen = -1; !ring.isEnded && ring.totalBytes < whole && !signal.aborted; ) {
      // Reading again what the ring has takes its time, too.
      const progress = ring.totalBytes + watched.bytesRead
      if (progress !== seen) movedAt = performance.now()
      else if (performance.now() - movedAt > LAST_OUTPUT_MS) break
      seen = progress
      await stay(QUIET_MS / 10)
    }
    ring.end()
  }

  async #bytesLogged(id: string): Promise<number> {
    let bytes = 0
    for await (const piece of await this.#logs(id, false)) bytes += piece.length
    return bytes
  }

  async #completionOf(container: Inspected): Promise<Completion> {
    const { Id, State, HostConfig } = container
    const exit = await this.#exitOf(Id)
    // A task that did without the child that was killed has succeeded.
    if (exit?.code === 0) return completionOf(exit)
    const exitCode = exit?.code ?? State.ExitCode
    const wasKilled = exitCode === KILLED_EXIT_CODE
    if (State.OOMKilled || (wasKilled && (await this.#hadOom(container)))) {
      const limit = HostConfig.Memory > 0 ? ` of ${HostConfig.Memory / 2 ** 20} MB` : ''
      const message = `Ran out of memory: the worker's limit${limit} was reached; ask for a larger worker_size`
      return { reason: 'oom_killed', exitCode, signal: wasKilled ? 'SIGKILL' : null, message }
    }
    if (exit) return completionOf(exit)
    if (COULD_NOT_RUN.includes(State.ExitCode)) {
      const message = 'The container could not be started: its image has no /bin/sh that runs'
      return { reason: 'startup_failed', exitCode: null, signal: null, message }
    }
    const hint = wasKilled ? 'killed from outside, or out of memory' : 'stopped from outside'
    const words = State.Error === '' ? '' : `: ${State.Error}`
    return lost(
      `The container ended with exit code ${State.ExitCode}, and not by its task (${hint})${words}`,
    )
  }

  /** The flag in the container's state is not to be relied on (moby/moby#15621); the event is. */
  async #hadOom({ Id, State }: Inspected): Promise<boolean> {
    const seconds = (time: string) => Math.floor(Date.parse(time) / 1000)
    // One that stays has not finished.
    const end = State.Status === 'running' ? Date.now() / 1000 : seconds(State.FinishedAt)
    const text = await this.#engine.text('GET', '/events', {
      query: {
        since: seconds(State.StartedAt),
        until: Math.ceil(end) + 1,
        filters: JSON.stringify({ container: [Id], event: ['oom'] }),
      },
    })
    return text.trim() !== ''
  }

  /** What the bootstrap wrote down; undefined when it did not come to that. */
  async #exitOf(id: string): Promise<Exit | undefined> {
    try {
      const query = { path: `${WORKER_FOLDER}/exit` }
      const tar = await this.#engine.stream('GET', `/containers/${id}/archive`, { query })
      const chunks: Buffer[] = []
      for await (const chunk of tar) chunks.push(chunk)
      const [file] = await unpackTar(Buffer.concat(chunks))
      return file?.data && parseExit(Buffer.from(file.data).toString())
    } catch (err) {
      if (err instanceof EngineError && err.status === 404) return undefined
      throw err
    }
  }

  async #stop(watched: Watched): Promise<void> {
    if (watched.completion) return
    await this.#signal(watched.id, 'SIGTERM')
    const inTime = new AbortController()
    const grace = pause(this.#settings.terminationGraceMs, undefined, { signal: inTime.signal })
    await Promise.race([watched.ended, grace.catch(() => {})])
    inTime.abort()
    if (!watched.completion) await this.#signal(watched.id, 'SIGKILL')
    await watched.ended
  }

  async #signal(id: string, signal: string): Promise<void> {
    try {
      await this.#engine.text('POST', `/containers/${id}/kill`, { query: { signal } })
    } catch (err) {
      // Not running, or gone; Podman says the former with a 500.
      const isOver =
        err instanceof EngineError &&
        ([404, 409].includes(err.status) || err.message.includes('container state improper'))
      if (!isOver) throw err
    }
  }

  async #terminate(name: string): Promise<void> {
    // One that is being made would be there after we have looked.
    await this.#making.get(name)?.catch(() => {})
    const container = await this.#inspect(name)
    if (container) {
      if (container.State.Status === 'running') {
        await this.#stop(this.#watched.get(name) ?? this.#watchAgain(container))
      }
      await this.#remove(container.Id)
    }
    this.#watched.delete(name)
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
      await pause(RETRY_MS / 10)
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

  /** Repeats a step while the engine does not answer, or not sensibly. Rejects when `signal` aborts. */
  async #persistently<T>(step: () => Promise<T>, signal: AbortSignal): Promise<T> {
    for (let waitMs = RETRY_MS; ; waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)) {
      try {
        return await step()
      } catch (err) {
        const isBroken = err instanceof EngineError && err.status >= 500
        if (!(err instanceof EngineUnreachableError || isBroken)) throw err
        signal.throwIfAborted()
        this.#settings.log.warn({ err }, 'waiting for the engine')
        await pause(waitMs, undefined, { signal })
      }
    }
  }
}

/** However short its lines are, the engine's files hold so much of a log. */
const SURELY_KEPT_BYTES = 5 * 1024 * 1024
/** Where a log that is read again is recognised by. */
const LAST_BYTES = 64 * 1024

/** Of a log that is read from its beginning again, what is not in the ring. */
async function* unseen(
  pieces: AsyncIterable<Buffer>,
  watched: Watched,
): AsyncGenerator<Buffer, void> {
  const { ring } = watched
  let toSkip = ring.totalBytes
  // The engine may have dropped the beginning: then it goes on after what we have last.
  const last = toSkip > SURELY_KEPT_BYTES ? ring.tail(LAST_BYTES).content : undefined
  let window: Buffer = Buffer.alloc(0)
  for await (const piece of pieces) {
    watched.bytesRead += piece.length
    if (last === undefined || toSkip === 0) {
      const fresh = piece.subarray(toSkip)
      toSkip -= piece.length - fresh.length
      yield fresh
      continue
    }
    window = Buffer.concat([window, piece])
    const at = window.indexOf(last)
    if (at < 0) window = window.subarray(Math.max(0, window.length - last.length + 1))
    else {
      toSkip = 0
      yield window.subarray(at + last.length)
    }
  }
}

const REMOVED = 'The container was removed from outside'

/** Removed while it was waited for: the next look tells. */
function ifGone(err: unknown): void {
  if (!(err instanceof EngineError && err.status === 404)) throw err
}

/** The engine's words, as a reason its user can act on. */
function workerErrorOf(err: unknown): unknown {
  if (!(err instanceof EngineError)) return err
  if (/no space left on device/.test(err.message)) {
    return new WorkerError('internal_error', `The engine's disk is full: ${err.message}`)
  }
  return new WorkerError('startup_failed', `The container could not be started: ${err.message}`)
}
