import { setTimeout as pause } from 'node:timers/promises'
import type { Completion, Logger, LogTail } from '../../core/ports.ts'
import { retrying } from '../../core/retrying.ts'
import { completionOf, lost, overLogLimit } from '../completion.ts'
import { LogRing } from '../log-ring.ts'
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
/** After a task's end its last output is on the way for a moment: one that stands still for so long has ended. */
const LAST_OUTPUT_MS = 5_000
const QUIET_MS = 200
/** For what there is of a log that nobody has followed here. */
const FIRST_PIECE_MS = 1_000
const KILLED_EXIT_CODE = 137
/** Of the init process, which then has nothing to run. */
const COULD_NOT_RUN = [126, 127]
/** Time after which a log that is read again takes the place of what was read before. */
const READ_AGAIN_MS = 1_000
const NEWLINE = 10

/** An engine that saw a container end has told so by then: it waits two seconds for the last output. */
const END_TOLD_SECONDS = 3

export const END_UNSEEN =
  '[task-runner] The container engine was down when the task ended: the end of the log may be missing\n'

/** Tells followers that some of the log comes again. */
export const READ_AGAIN =
  '[task-runner] The log was cut off and is read again: some lines may come twice\n'

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
  /** Rejects only when the service lets go. */
  readonly ended: Promise<Completion>
  readonly #begun = Promise.withResolvers<void>()
  /** Resolves when the log has twice the bytes of its limit. */
  readonly #flooded = Promise.withResolvers<void>()
  readonly #keeps: boolean
  readonly #maxLogBytes: number
  readonly #options: ContainerWatchOptions
  /** Replaced when the log was read again. */
  #ring: LogRing
  /** Bytes read of the log, those that were read again included. */
  #bytesRead = 0
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
    this.#ring = new LogRing(options.logBytesKept)
    this.#keeps = Boolean(container.Config.Labels[LABELS.keeps])
    this.#maxLogBytes = logLimitOf(container)
    this.#options = options
    setTimeout(this.#begun.resolve, FIRST_PIECE_MS).unref()
    void this.#feed(output)
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

  /**
   * Reads the log until the container has ended. One whose stream was cut is read again from its
   * beginning, into a new ring: an engine that was killed has lost what it had not stored, so that
   * counting bytes would skip others. Never rejects.
   */
  async #feed(first: AsyncIterable<Buffer> | undefined): Promise<void> {
    const { closing: signal, inspect, logBytesKept } = this.#options
    let cutAt = Number.POSITIVE_INFINITY
    for (let output = first; !signal.aborted && !this.#ring.isEnded; output = undefined) {
      const ring = this.#bytesRead === 0 ? this.#ring : new LogRing(logBytesKept)
      try {
        const pieces = output ?? (await this.#logs())
        const unwatched = { from: cutAt, to: Date.now() }
        try {
          await this.#read(pieces, ring)
        } finally {
          cutAt = Date.now()
        }
        const container = await inspect(this.id)
        if (!container) break
        if (['exited', 'dead', 'removing'].includes(container.State.Status)) {
          // If the engine has nothing, what was read before is all there is.
          if (ring.totalBytes > 0) this.#replace(ring)
          if (await this.#endedUnseen(container, unwatched)) this.#note(END_UNSEEN)
          break
        }
      } catch (err) {
        if (isFailure(err, 'not_found')) break
      }
      await pause(RETRY_MS, undefined, { signal }).catch(() => {})
    }
    this.#ring.end()
  }

  /** Reads into a ring, which takes the place of the one before once it has as much, or in time. */
  async #read(pieces: AsyncIterable<Buffer>, ring: LogRing): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    try {
      for await (const piece of pieces) {
        if (this.#ring.isEnded) return
        this.#append(ring, piece)
        if (ring.totalBytes >= this.#ring.totalBytes) this.#replace(ring)
        timer ??= setTimeout(() => this.#replace(ring), READ_AGAIN_MS)
      }
    } finally {
      clearTimeout(timer)
    }
  }

  #replace(ring: LogRing): void {
    const before = this.#ring
    if (ring === before || before.isEnded) return
    this.#ring = ring
    before.end()
  }

  /** Returns the last bytes of the log. */
  tail(maxBytes: number): LogTail {
    return this.#ring.tail(maxBytes)
  }

  /**
   * Reads the log from an offset on, as it comes. When it was read again, a line that had not ended
   * comes again, since the engine may have lost its beginning; and so does all that is kept of a log
   * that has become shorter, since the engine has dropped its beginning.
   */
  async *follow(from: number, signal: AbortSignal): AsyncGenerator<Buffer, void> {
    let at = from
    let lineAt = from
    for (let ring = this.#ring; ; ring = this.#ring) {
      for await (const piece of ring.follow(at, signal)) {
        const lineEnd = piece.lastIndexOf(NEWLINE)
        if (lineEnd >= 0) lineAt = at + lineEnd + 1
        at += piece.length
        yield piece
      }
      if (signal.aborted || ring === this.#ring) return
      const isInLine = lineAt < at
      if (lineAt > this.#ring.totalBytes) lineAt = 0
      if (lineAt < at) yield Buffer.from(`${isInLine ? '\n' : ''}${READ_AGAIN}`)
      at = lineAt
    }
  }

  /** Settles with the first of its log, or when there seems to be none yet. */
  begun(): Promise<void> {
    return this.#begun.promise
  }

  #append(ring: LogRing, piece: Buffer): void {
    ring.append(piece)
    this.#bytesRead += piece.length
    this.#begun.resolve()
    if (ring.totalBytes > 2 * this.#maxLogBytes) this.#flooded.resolve()
    if (ring.totalBytes <= this.#maxLogBytes || this.#isOverLogLimit) return
    this.#isOverLogLimit = true
    const { closing: signal, log } = this.#options
    void untilAnswered(() => this.stop(), { signal, log }).catch((err: unknown) => {
      if (!signal.aborted) log.error({ err, worker: this.name }, 'ending a task failed')
    })
  }

  /** On a line of its own. */
  #note(line: string): void {
    const { content } = this.#ring.tail(1)
    const isInLine = content.length > 0 && content.toString() !== '\n'
    this.#ring.append(Buffer.from(`${isInLine ? '\n' : ''}${line}`))
  }

  /**
   * Whether the engine was down when the container ended. What is written then waits in a pipe for the engine, which
   * goes with the container: an engine that keeps containers while it is down finds only what one left that runs.
   */
  async #endedUnseen(
    container: Inspected,
    unwatched: { from: number; to: number },
  ): Promise<boolean> {
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
    const { closing: signal } = this.#options
    const stay = (ms: number) => pause(ms, undefined, { signal }).catch(() => {})
    if (this.#keeps) await stay(QUIET_MS)
    // An engine that is away stores no more: what was read has to do.
    const whole = this.#keeps ? await this.#bytesStored().catch(() => 0) : Infinity
    let movedAt = performance.now()
    for (let seen = -1; !this.#ring.isEnded && !signal.aborted; await stay(QUIET_MS / 10)) {
      if (this.#ring.totalBytes >= whole) break
      if (this.#bytesRead !== seen) movedAt = performance.now()
      else if (performance.now() - movedAt > LAST_OUTPUT_MS) break
      seen = this.#bytesRead
    }
    this.#ring.end()
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
