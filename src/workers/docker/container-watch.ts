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
/** Maximum time of one wait, and thus of the delay that a dead connection causes. */
const WAIT_LIMIT_MS = 300_000
/** Interval of checking whether the task of a kept container has ended. */
const KEPT_POLL_MS = 500
/** Time for the last output of a kept container to reach the engine. */
const LAST_OUTPUT_MS = 200
const KILLED_EXIT_CODE = 137
/** Exit codes of an init process that could not start the bootstrap. */
const COULD_NOT_RUN = [126, 127]

/** Time in which the engine reports an end: it waits two seconds for the last output. */
const END_EVENT_SECONDS = 3

export const END_UNSEEN =
  '[task-runner] The container engine was down when the task ended: the end of the log may be missing\n'

export interface ContainerWatchOptions {
  engine: Engine
  /** Inspects the container with this id; undefined when it is gone. */
  inspect: (id: string) => Promise<Inspected | undefined>
  terminationGraceMs: number
  logBytesKept: number
  /** Aborts when the service releases its workers. */
  closing: AbortSignal
  log: Logger
}

/** Watches a started container: its log, and how its task ends. */
export class ContainerWatch {
  readonly id: string
  readonly name: string
  readonly log: ContainerLog
  /** Rejects only when the service closes. */
  readonly ended: Promise<Completion>
  /** Resolves when the log has twice the bytes of its limit. */
  readonly #flooded = Promise.withResolvers<void>()
  readonly #keeps: boolean
  readonly #maxLogBytes: number
  readonly #options: ContainerWatchOptions
  #completion: Completion | undefined
  #isOverLogLimit = false

  /** `output`: stream from the container's start; undefined: the log is opened. */
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
    // On close, no caller may be waiting.
    this.ended.catch(() => {})
  }

  /** Undefined while the task runs. */
  get completion(): Completion | undefined {
    return this.#completion
  }

  /**
   * Sends TERM, upon which the bootstrap ends the task within its grace period, then KILL to the
   * whole container if it does not, or if the log reaches twice its limit. Waits for the task's
   * end. Idempotent.
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

  /** Returns the last line of the log, maybe empty; undefined: the container still runs. */
  async #lastLine(unwatched: Span): Promise<string | undefined> {
    const container = await this.#options.inspect(this.id)
    if (!container) throw new EngineError('not_found', `container ${this.id}`)
    if (!['exited', 'dead', 'removing'].includes(container.State.Status)) return undefined
    return (await this.#endedUnseen(container, unwatched)) ? END_UNSEEN : ''
  }

  /**
   * Returns whether the engine was down when the container ended. Output waits for the engine in a
   * pipe, which is lost with the container; only a container that still runs keeps it.
   */
  async #endedUnseen(container: Inspected, unwatched: Span): Promise<boolean> {
    // Podman has a logging process per container.
    if (container.HostConfig.LogConfig.Type !== 'local') return false
    const endedAt = Date.parse(container.State.FinishedAt)
    if (endedAt < unwatched.from || endedAt > unwatched.to) return false
    // If only our connection was cut, the engine has seen the end and has an event of it.
    const until = endedAt / 1000 + END_EVENT_SECONDS
    return !(await this.#hadEvent(container, 'die', { since: endedAt / 1000, until }))
  }

  async #logs(follow = true): Promise<AsyncIterable<Buffer>> {
    const query = { follow: String(follow), stdout: 'true', stderr: 'true' }
    const { engine, closing: signal } = this.#options
    return outputOf(await engine.stream('GET', `/containers/${this.id}/logs`, { query, signal }))
  }

  /** Returns how the task ended, once it has; failures of the engine are retried. */
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
        // The engine's wait does not report a start, nor the end of a task in a kept container.
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
   * Waits for the complete log. The stream of a kept container does not end, so it is complete
   * with as many bytes as the engine has.
   */
  async #lastOutput(): Promise<void> {
    if (!this.#keeps) return this.log.end(Infinity)
    const { closing: signal } = this.#options
    await pause(LAST_OUTPUT_MS, undefined, { signal }).catch(() => {})
    // If the engine is unavailable, the bytes read so far are all.
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
    // A task may succeed though a child was killed.
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
      `The container ended with exit code ${State.ExitCode}, not by its task (${hint})${words}`,
    )
  }

  /** Checks events, since the flag in the container's state is unreliable (moby/moby#15621). */
  async #hadOom(container: Inspected): Promise<boolean> {
    const { State } = container
    const since = Date.parse(State.StartedAt) / 1000
    // A kept container has not finished.
    const end = State.Status === 'running' ? Date.now() : Date.parse(State.FinishedAt)
    return this.#hadEvent(container, 'oom', { since, until: Math.ceil(end / 1000) + 1 })
  }

  /** Returns whether the engine has the event, between two times in seconds; waits for `until`. */
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

/** Returns whether the task of a kept container has ended. */
export async function hasEnded(engine: Engine, container: Inspected | Listed): Promise<boolean> {
  const exit = await readExitFile(engine, container.Id)
  return typeof exit !== 'string' && isOver(container, exit)
}

/** Repeats a step while the engine is unavailable. Rejects when `signal` aborts. */
export async function untilAnswered<T>(
  step: () => Promise<T>,
  { signal, log }: { signal: AbortSignal; log: Logger },
): Promise<T> {
  return retrying(step, {
    signal,
    fromMs: RETRY_MS,
    toMs: RETRY_MAX_MS,
    isWorthIt: (err) => err instanceof EngineError,
    onRetry: (err) => log.warn({ err }, 'waiting for the engine'),
  })
}

/** Ignores a missing container and a timeout, which the next inspect resolves. */
function untilNextInspect(err: unknown): void {
  if (!isFailure(err, 'not_found', 'timeout')) throw err
}
