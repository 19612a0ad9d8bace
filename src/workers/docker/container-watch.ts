import { setTimeout as pause } from 'node:timers/promises'
import type { Completion, Logger } from '../../core/ports.ts'
import { retrying } from '../../core/retrying.ts'
import { completionOf, lost, overLogLimit } from '../completion.ts'
import { BOOTSTRAP_END_MS } from '../worker-files.ts'
import {
  type Inspected,
  isOver,
  knownOf,
  LABELS,
  type Listed,
  logLimitOf,
  waited,
} from './container.ts'
import { ContainerLog, type Span } from './container-log.ts'
import { type Engine, EngineError, isFailure, outputOf } from './engine.ts'
import { readExitFile } from './exit-file.ts'

export const REMOVED = 'The container was removed from outside'
export const EXIT_BROKEN =
  'The exit code is lost: the task has overwritten the file "exit" in the folder of its worker'

const RETRY_MS = 250
const RETRY_MAX_MS = 5_000
/** Maximum time of one wait: a connection that is dead without a word delays an end no longer. */
const WAIT_LIMIT_MS = 300_000
/** How often a worker that stays is asked whether its task has ended. */
const KEPT_POLL_MS = 500
/** In a container that stays, the last output is on the way to the engine for a moment. */
const LAST_OUTPUT_MS = 200
const KILLED_EXIT_CODE = 137
/** Of the init process, which then has nothing to run. */
const COULD_NOT_RUN = [126, 127]

/** An engine that saw a container end has told so by then: it waits two seconds for the last output. */
const END_TOLD_SECONDS = 3

export const END_UNSEEN =
  '[task-runner] The container engine was down when the task ended: the end of the log may be missing\n'

export interface ContainerWatchOptions {
  engine: Engine
  /** Inspects the container with this id; undefined when it is gone. */
  inspect: (id: string) => Promise<Inspected | undefined>
  terminationGraceMs: number
  logBytesKept: number
  /** Aborts when the service lets go of its workers. */
  closing: AbortSignal
  log: Logger
}

/** A container that was started: its log as it comes, and how its task ends. */
export class ContainerWatch {
  readonly id: string
  readonly name: string
  readonly log: ContainerLog
  /** Rejects only when the service lets go. */
  readonly ended: Promise<Completion>
  /** Resolves when the log has twice the bytes of its limit. */
  readonly #flooded = Promise.withResolvers<void>()
  readonly #keeps: boolean
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
    this.id = container.Id
    this.name = knownOf(container).name
    this.#keeps = Boolean(container.Config.Labels[LABELS.keeps])
    this.#maxLogBytes = logLimitOf(container)
    this.#options = options
    this.log = new ContainerLog(output, {
      open: () => this.#logs(),
      lastLine: (unwatched) => this.#lastLine(unwatched),
      onGrown: (totalBytes) => this.#onLogGrown(totalBytes),
      bytesKept: options.logBytesKept,
      closing: options.closing,
    })
    this.ended = this.#end()
    // While we shut down nobody waits for it.
    this.ended.catch(() => {})
  }

  /** Undefined while the task runs. */
  get completion(): Completion | undefined {
    return this.#completion
  }

  /**
   * Sends TERM, upon which the bootstrap ends the task within its grace period; and KILL to all of
   * the container should it not, or as soon as the log has twice the bytes of its limit. Settles
   * with the task's end. Idempotent.
   */
  async stop(): Promise<void> {
    if (this.#completion) return
    await this.#signal('SIGTERM')
    const inTime = new AbortController()
    const graceMs = this.#options.terminationGraceMs + BOOTSTRAP_END_MS
    const grace = pause(graceMs, undefined, { signal: inTime.signal })
    await Promise.race([this.ended, grace.catch(() => {}), this.#flooded.promise])
    inTime.abort()
    if (!this.#completion) await this.#signal('SIGKILL')
    await this.ended
  }

  async #signal(signal: string): Promise<void> {
    try {
      const call = { query: { signal }, expect: [204] }
      await this.#options.engine.text('POST', `/containers/${this.id}/kill`, call)
    } catch (err) {
      // Not running, or gone.
      if (!isFailure(err, 'not_found', 'conflict')) throw err
    }
  }

  #onLogGrown(totalBytes: number): void {
    if (totalBytes > 2 * this.#maxLogBytes) this.#flooded.resolve()
    if (totalBytes <= this.#maxLogBytes || this.#isOverLogLimit) return
    this.#isOverLogLimit = true
    const { closing: signal, log } = this.#options
    void untilAnswered(() => this.stop(), { signal, log }).catch((err: unknown) => {
      if (!signal.aborted) log.error({ err, worker: this.name }, 'ending a task failed')
    })
  }

  /** Returns what to say at the end of the log; undefined: it goes on. */
  async #lastLine(unwatched: Span): Promise<string | undefined> {
    const container = await this.#options.inspect(this.id)
    if (!container) throw new EngineError('not_found', `container ${this.id}`)
    if (!['exited', 'dead', 'removing'].includes(container.State.Status)) return undefined
    return (await this.#endedUnseen(container, unwatched)) ? END_UNSEEN : ''
  }

  /**
   * Whether the engine was down when the container ended. What is written then waits in a pipe for the engine, which
   * goes with the container: an engine that keeps containers while it is down finds only what one left that runs.
   */
  async #endedUnseen(container: Inspected, unwatched: Span): Promise<boolean> {
    // Podman's containers have their logs written by a process of their own.
    if (container.HostConfig.LogConfig.Type !== 'local') return false
    const endedAt = Date.parse(container.State.FinishedAt)
    if (endedAt < unwatched.from || endedAt > unwatched.to) return false
    // Perhaps only we were cut off: then it has seen the end, and tells of it.
    const until = endedAt / 1000 + END_TOLD_SECONDS
    return !(await this.#hadEvent(container, 'die', { since: endedAt / 1000, until }))
  }

  async #logs(follow = true): Promise<AsyncIterable<Buffer>> {
    const query = { follow: String(follow), stdout: 'true', stderr: 'true' }
    const { engine, closing: signal } = this.#options
    return outputOf(await engine.stream('GET', `/containers/${this.id}/logs`, { query, signal }))
  }

  /** How the task ended, once it has. Whatever befalls the engine meanwhile, the task is not judged by it. */
  async #end(): Promise<Completion> {
    const { engine, inspect, closing: signal, log } = this.#options
    const { id } = this
    const judge = async (): Promise<Completion> => {
      for (;;) {
        const container = await inspect(id)
        if (!container) return lost(REMOVED)
        const { Status } = container.State
        if (Status === 'exited' || Status === 'dead') return this.#completionOf(container)
        if (this.#keeps && (await hasEnded(engine, container))) return this.#completionOf(container)
        // Of one that was not started, or that stays, waiting for its end would be of no use.
        if (Status === 'created' || this.#keeps) {
          await pause(KEPT_POLL_MS, undefined, { signal })
        } else {
          const call = { query: { condition: 'not-running' }, signal, limitMs: WAIT_LIMIT_MS }
          await engine.json('POST', `/containers/${id}/wait`, waited, call).catch(untilNextInspect)
        }
      }
    }
    const completion = await untilAnswered(judge, { signal, log })
    await this.#lastOutput()
    this.#completion = this.#isOverLogLimit ? overLogLimit(this.#maxLogBytes) : completion
    return this.#completion
  }

  /**
   * Waits for the log to be whole. The stream of a container that stays does not end: it has to
   * bring as many bytes as the engine has.
   */
  async #lastOutput(): Promise<void> {
    if (!this.#keeps) return this.log.end(Infinity)
    const { closing: signal } = this.#options
    await pause(LAST_OUTPUT_MS, undefined, { signal }).catch(() => {})
    // An engine that is away stores no more: what was read has to do.
    await this.log.end(await this.#bytesStored().catch(() => 0))
  }

  async #bytesStored(): Promise<number> {
    let bytes = 0
    for await (const piece of await this.#logs(false)) bytes += piece.length
    return bytes
  }

  async #completionOf(container: Inspected): Promise<Completion> {
    const { Id, State, HostConfig } = container
    const file = await readExitFile(this.#options.engine, Id)
    const exit = typeof file === 'string' ? undefined : file
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
    if (file === 'broken') return lost(EXIT_BROKEN)
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
  async #hadOom(container: Inspected): Promise<boolean> {
    const { State } = container
    const since = Date.parse(State.StartedAt) / 1000
    // One that stays has not finished.
    const end = State.Status === 'running' ? Date.now() : Date.parse(State.FinishedAt)
    return this.#hadEvent(container, 'oom', { since, until: Math.ceil(end / 1000) + 1 })
  }

  /** In seconds since 1970. Waits for `until`. */
  async #hadEvent(
    { Id }: Inspected,
    event: string,
    { since, until }: { since: number; until: number },
  ): Promise<boolean> {
    const filters = JSON.stringify({ container: [Id], event: [event] })
    const query = { since: Math.floor(since), until: Math.ceil(until), filters }
    return (await this.#options.engine.text('GET', '/events', { query })).trim() !== ''
  }
}

/** Whether the task of a container that stays has ended. */
export async function hasEnded(engine: Engine, container: Inspected | Listed): Promise<boolean> {
  const exit = await readExitFile(engine, container.Id)
  return typeof exit !== 'string' && isOver(container, exit)
}

/** Repeats a step until the engine gives a sensible answer. Rejects when `signal` aborts. */
export async function untilAnswered<T>(
  step: () => Promise<T>,
  { signal, log }: { signal: AbortSignal; log: Logger },
): Promise<T> {
  return retrying(step, {
    ...{ signal, fromMs: RETRY_MS, toMs: RETRY_MAX_MS },
    isWorthIt: (err) => err instanceof EngineError,
    onRetry: (err) => log.warn({ err }, 'waiting for the engine'),
  })
}

/** Ignores that the container is gone, or that the wait was long: the next inspect tells. */
function untilNextInspect(err: unknown): void {
  if (!isFailure(err, 'not_found', 'timeout')) throw err
}
