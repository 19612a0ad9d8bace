import { setTimeout as pause } from 'node:timers/promises'
import { unpackTar } from 'modern-tar'
import type { Completion, Logger } from '../../core/ports.ts'
import { completionOf, type Exit, lost, overLogLimit, parseExit } from '../completion.ts'
import { LogRing } from '../log-ring.ts'
import { WORKER_FOLDER } from '../worker-files.ts'
import { type Inspected, LABELS } from './container.ts'
import { type Engine, EngineError, outputOf, untilAnswered } from './engine.ts'
import { LogRereader } from './log-rereader.ts'

export const REMOVED = 'The container was removed from outside'

const RETRY_MS = 250
/** How often a worker that stays is asked whether its task has ended. */
const KEPT_POLL_MS = 500
/** After a task's end its last output is on the way for a moment: one that stands still for so long has ended. */
const LAST_OUTPUT_MS = 5_000
const QUIET_MS = 200
const KILLED_EXIT_CODE = 137
/** Of the init process, which then has nothing to run. */
const COULD_NOT_RUN = [126, 127]

export interface ContainerWatchOptions {
  engine: Engine
  /** One of ours, by its name; undefined when it is gone. */
  inspect: (name: string) => Promise<Inspected | undefined>
  terminationGraceMs: number
  logBytesKept: number
  /** Aborts when the service lets go of its workers. */
  closing: AbortSignal
  log: Logger
}

/** A container that was started: its log as it comes, and how its task ends. */
export class ContainerWatch {
  readonly name: string
  readonly ring: LogRing
  /** Rejects only when the service lets go. */
  readonly ended: Promise<Completion>
  readonly #id: string
  readonly #keeps: boolean
  readonly #rereader: LogRereader
  readonly #maxLogBytes: number
  readonly #options: ContainerWatchOptions
  #completion: Completion | undefined
  #isOverLogLimit = false

  /** `output`: from the container's start; undefined: its log is read again, as far as the engine has kept it. */
  constructor(
    container: Inspected,
    output: AsyncIterable<Buffer> | undefined,
    options: ContainerWatchOptions,
  ) {
    const labels = container.Config.Labels
    this.name = container.Name.replace(/^\//, '')
    this.ring = new LogRing(options.logBytesKept)
    this.#rereader = new LogRereader(this.ring)
    this.#id = container.Id
    this.#keeps = Boolean(labels[LABELS.keeps])
    this.#maxLogBytes = Number(labels[LABELS.maxLogBytes])
    this.#options = options
    void this.#feed(output)
    this.ended = this.#end()
    // While we shut down nobody waits for it.
    this.ended.catch(() => {})
  }

  /** Undefined while the task runs. */
  get completion(): Completion | undefined {
    return this.#completion
  }

  /** TERM, a grace period, KILL; settles with the task's end. Idempotent. */
  async stop(): Promise<void> {
    if (this.#completion) return
    await this.#signal('SIGTERM')
    const inTime = new AbortController()
    const grace = pause(this.#options.terminationGraceMs, undefined, { signal: inTime.signal })
    await Promise.race([this.ended, grace.catch(() => {})])
    inTime.abort()
    if (!this.#completion) await this.#signal('SIGKILL')
    await this.ended
  }

  async #signal(signal: string): Promise<void> {
    try {
      await this.#options.engine.text('POST', `/containers/${this.#id}/kill`, { query: { signal } })
    } catch (err) {
      // Not running, or gone; Podman says the former with a 500.
      const isOver =
        err instanceof EngineError &&
        ([404, 409].includes(err.status) || err.message.includes('container state improper'))
      if (!isOver) throw err
    }
  }

  /** Fills the ring until the container has ended, across cuts of the stream. Never rejects. */
  async #feed(first: AsyncIterable<Buffer> | undefined): Promise<void> {
    const { ring } = this
    const { closing: signal, inspect, log } = this.#options
    for (let output = first; !signal.aborted; output = undefined) {
      try {
        for await (const piece of output ?? this.#rereader.unseen(await this.#logs())) {
          ring.append(piece)
          if (ring.totalBytes > this.#maxLogBytes && !this.#isOverLogLimit) {
            this.#isOverLogLimit = true
            void this.stop().catch((err: unknown) =>
              log.error({ err, worker: this.name }, 'ending a task failed'),
            )
          }
        }
        const state = (await inspect(this.name))?.State.Status
        if (state === undefined || ['exited', 'dead', 'removing'].includes(state)) break
      } catch (err) {
        if (err instanceof EngineError && err.status === 404) break
      }
      await pause(RETRY_MS, undefined, { signal }).catch(() => {})
    }
    ring.end()
  }

  async #logs(follow = true): Promise<AsyncIterable<Buffer>> {
    const query = { follow: String(follow), stdout: 'true', stderr: 'true' }
    const { engine, closing: signal } = this.#options
    return outputOf(await engine.stream('GET', `/containers/${this.#id}/logs`, { query, signal }))
  }

  /** How the task ended, once it has. Whatever befalls the engine meanwhile, the task is not judged by it. */
  async #end(): Promise<Completion> {
    const { engine, inspect, closing: signal, log } = this.#options
    const id = this.#id
    const judge = async (): Promise<Completion> => {
      for (;;) {
        const container = await inspect(this.name)
        if (container?.Id !== id) return lost(REMOVED)
        const { Status } = container.State
        if (Status === 'exited' || Status === 'dead') return this.#completionOf(container)
        if (this.#keeps && (await exitOf(engine, id))) return this.#completionOf(container)
        // Of one that was not started, or that stays, waiting for its end would be of no use.
        if (Status === 'created' || this.#keeps) {
          await pause(KEPT_POLL_MS, undefined, { signal })
        } else {
          const query = { condition: 'not-running' }
          await engine.text('POST', `/containers/${id}/wait`, { query, signal }).catch(ifGone)
        }
      }
    }
    const completion = await untilAnswered(judge, { signal, log })
    await this.#lastOutput()
    this.#completion = this.#isOverLogLimit ? overLogLimit(this.#maxLogBytes) : completion
    return this.#completion
  }

  /** Waits for the log to be whole. The stream of a container that stays does not end: what the engine has, has to do. */
  async #lastOutput(): Promise<void> {
    const { ring } = this
    const keeps = this.#keeps
    const { closing: signal } = this.#options
    const stay = (ms: number) => pause(ms, undefined, { signal }).catch(() => {})
    if (keeps) await stay(QUIET_MS)
    const whole = keeps ? await this.#bytesLogged().catch(() => ring.totalBytes) : Infinity
    let movedAt = performance.now()
    for (let seen = -1; !ring.isEnded && ring.totalBytes < whole && !signal.aborted; ) {
      // Reading again what the ring has takes its time, too.
      const progress = ring.totalBytes + this.#rereader.bytesRead
      if (progress !== seen) movedAt = performance.now()
      else if (performance.now() - movedAt > LAST_OUTPUT_MS) break
      seen = progress
      await stay(QUIET_MS / 10)
    }
    ring.end()
  }

  /** What the ring has to have. */
  async #bytesLogged(): Promise<number> {
    let bytes = 0
    for await (const piece of await this.#logs(false)) bytes += piece.length
    return this.#rereader.inRing(bytes)
  }

  async #completionOf(container: Inspected): Promise<Completion> {
    const { Id, State, HostConfig } = container
    const exit = await exitOf(this.#options.engine, Id)
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
    const text = await this.#options.engine.text('GET', '/events', {
      query: {
        since: seconds(State.StartedAt),
        until: Math.ceil(end) + 1,
        filters: JSON.stringify({ container: [Id], event: ['oom'] }),
      },
    })
    return text.trim() !== ''
  }
}

/** What the bootstrap wrote down; undefined when it did not come to that. */
export async function exitOf(engine: Engine, id: string): Promise<Exit | undefined> {
  try {
    const query = { path: `${WORKER_FOLDER}/exit` }
    const tar = await engine.stream('GET', `/containers/${id}/archive`, { query })
    const chunks: Buffer[] = []
    for await (const chunk of tar) chunks.push(chunk)
    const [file] = await unpackTar(Buffer.concat(chunks))
    return file?.data && parseExit(Buffer.from(file.data).toString())
  } catch (err) {
    if (err instanceof EngineError && err.status === 404) return undefined
    throw err
  }
}

/** Removed while it was waited for: the next look tells. */
function ifGone(err: unknown): void {
  if (!(err instanceof EngineError && err.status === 404)) throw err
}
