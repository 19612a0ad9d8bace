import { closeSync, fstatSync, type Stats, statSync } from 'node:fs'
import { setTimeout as pause } from 'node:timers/promises'
import type { Completion } from '../../core/ports.ts'
import { lost, overLogLimit } from '../completion.ts'
import { isFolderBroken, isTemporary } from './failures.ts'
import * as folders from './folders.ts'
import { NO_EXIT } from './known-workers.ts'
import type { ProcessSource } from './leftover-finder.ts'
import { killAll, leftoversOf, readerEnded } from './leftovers.ts'
import { persistently } from './persistently.ts'
import { groupOf, isAlive, kill, killIfSame, type ProcessIdentity, writersOf } from './processes.ts'
import type { SlotPool } from './slot-pool.ts'
import { openPipeOf, type SlotShell } from './slot-shell.ts'
import { TaskLog } from './task-log.ts'

/** Interval at which a log over its limit is measured: a task may write gigabytes a second. */
const OVER_LIMIT_POLL_MS = 5
/** Maximum bytes moved from a pipe in one turn. */
export const DRAIN_BYTES = 1024 * 1024
/** How long other processes of an ended task may still write its log, such as `exec > >(tee …)`. */
const LAST_OUTPUT_MS = 2_000
const LAST_OUTPUT_POLL_MAX_MS = 50
/** Time that a process needs to end once it has closed its files. */
const ENDING_MS = 20
/** Maximum names of ended processes in the log. */
const NAMES_MAX = 5
const ROUND_MS = 5
const BEGIN_ROUNDS_MAX = 200

/** Settings and collaborators that all runs of a service share. */
export interface RunContext {
  terminationGraceMs: number
  pipesDir: string
  slots: SlotPool
  processes: ProcessSource
  isClosed: () => boolean
  /** Reads how a task ended from its worker's folder. Throws a `LocalFailure` if it cannot. */
  completionOf: (record: folders.WorkerRecord) => Completion
  /** Called when a run's pipe may have output. */
  onOutput: () => void
  /** Called when another shell runs the task, with the record changed. */
  onMoved: (run: LocalRun) => void
  /** Called before `outcome` settles. `isClean`: no process of the task is left. */
  onEnd: (run: LocalRun, isClean: boolean) => void
}

/** What is needed to start a task: a shell, its commands, and the task's log. */
export interface Start {
  slot: SlotShell
  job: string
  log: TaskLog
}

/**
 * Follows one task on a local worker until its outcome is known, from its start, or from a restart
 * of the service on. Uses its own copy of the worker's record, which the task may change.
 */
export class LocalRun {
  readonly #context: RunContext
  readonly #folder: string
  #record: folders.WorkerRecord
  /** Undefined: an earlier process of the service started the shell. */
  #slot: SlotShell | undefined
  /** Undefined: the slot's reader writes it, since an earlier process has died. */
  #log: TaskLog | undefined
  /** The pipe of a shell that an earlier process started, if its reader has ended. */
  #pipe: number | undefined
  /** The shell's commands; undefined if an earlier process sent them. */
  readonly #job: string | undefined
  /** The shell could not start the task, and we wait for another. */
  #waitsForSlot = false
  #isEnding = false
  #hasEnded = false
  #endedByItself = false
  #isOverLogLimit = false
  /** End of a stopped task's grace period, by `performance.now()`. Undefined: it is not stopped. */
  #graceUntil: number | undefined
  readonly #outcome = Promise.withResolvers<Completion>()

  /** Starts the task; without `start`, attaches to a task that an earlier process started. */
  constructor(context: RunContext, folder: string, record: folders.WorkerRecord, start?: Start) {
    this.#context = context
    this.#folder = folder
    this.#record = record
    this.#slot = start?.slot
    this.#log = start?.log
    this.#job = start?.job
    if (start) this.#begin(start.slot, start.job)
    else this.#adoptPipe()
  }

  get record(): folders.WorkerRecord {
    return this.#record
  }

  get slot(): SlotShell | undefined {
    return this.#slot
  }

  get outcome(): Promise<Completion> {
    return this.#outcome.promise
  }

  /** True once the task has ended unstopped, even if other processes still write its log. */
  get endedByItself(): boolean {
    return this.#endedByItself
  }

  /** Moves the task's output into its log. Returns the number of bytes. */
  drain(): number {
    const pipe = this.#pipe ?? this.#slot?.pipe
    return this.#log && pipe !== undefined ? this.#log.drain(pipe, DRAIN_BYTES) : 0
  }

  /** Checks the log's limit, and the shell of an earlier process, which reports nothing to us. */
  poll(): void {
    if (this.#isEnding) return
    try {
      if (!this.#isOverLogLimit && this.#logBytes() > this.#record.maxLogBytes) {
        void this.#endAtLogLimit()
      }
      if (this.#slot || this.#waitsForSlot) return
      if (!this.#log) this.#adoptPipe()
      if (this.#hasExit() || !isAlive(this.#record.slot)) void this.settle()
    } catch (err) {
      // The next poll tries again.
      if (!isTemporary(err)) throw err
    }
  }

  /** Sends TERM to the task's processes, then KILL. Settles when all have ended. */
  async stop(): Promise<void> {
    // A shell that has not begun the task would take the signal for itself, and then begin.
    for (let round = 0; round < BEGIN_ROUNDS_MAX && !this.#hasStarted(); round += 1) {
      if (this.#waitsForSlot) break
      await pause(ROUND_MS)
    }
    if (!this.#waitsForSlot) await this.#stopWithGrace()
    await this.#kill()
    await this.outcome
  }

  async #stopWithGrace(): Promise<void> {
    const { terminationGraceMs } = this.#context
    const { slot } = this.#record
    this.#graceUntil ??= performance.now() + terminationGraceMs
    // The shell may serve another worker by now.
    if (!this.#hasEnded && isAlive(slot)) {
      kill(-slot.pid, 'SIGTERM')
      for (const identity of this.#others()) {
        if (groupOf(identity) !== slot.pid) killIfSame(identity, 'SIGTERM')
      }
    }
    const inTime = new AbortController()
    void this.outcome.then(() => inTime.abort())
    const grace = pause(terminationGraceMs, undefined, { signal: inTime.signal })
    await Promise.race([this.outcome, grace.catch(() => {})])
  }

  /**
   * Handles the end of the slot's shell. If it failed before the task ran, it could not fork: the
   * task then gets another shell. Never rejects.
   */
  async slotExited(hasFailed: boolean): Promise<void> {
    const hasNotRun = () => hasFailed && this.#job !== undefined && !this.#hasExit()
    if (await persistently(hasNotRun)) await this.#restart()
    else await this.settle()
  }

  /** Ends other processes, frees the slot, reports the outcome. Idempotent. Never rejects. */
  async settle(): Promise<void> {
    if (this.#isEnding) return
    this.#isEnding = true
    this.#endedByItself = this.#graceUntil === undefined
    const { maxLogBytes } = this.#record
    const isEmpty = await persistently(() => this.#awaitOthers())
    const killed: string[] = []
    const isClean =
      isEmpty || (await persistently(() => killAll(() => this.#others(), killed))) === true
    await this.#closeLog(killed)
    const completion = await persistently(() => this.#context.completionOf(this.#record))
    this.#hasEnded = true
    this.#context.onEnd(this, isClean)
    // Without an exit file, the shell would be taken for this worker's after a restart.
    const isReusable = this.#slot?.isAlive && isClean && completion?.reason !== 'worker_lost'
    if (this.#slot && isReusable) this.#context.slots.giveBack(this.#slot)
    else this.#slot?.retire()
    this.#outcome.resolve(
      this.#isOverLogLimit ? overLogLimit(maxLogBytes) : (completion ?? lost(NO_EXIT)),
    )
  }

  /** Leaves the task running. */
  release(): void {
    this.#slot?.retire()
  }

  #begin(slot: SlotShell, job: string): void {
    slot.run(this.#record.name, job)
    this.#context.onOutput()
  }

  /** Takes over the pipe of an earlier process's task, if its reader has ended. */
  #adoptPipe(): void {
    const { reader, slot, maxLogBytes } = this.#record
    if (!reader || isAlive(reader)) return
    try {
      const log = new TaskLog(this.#folder, 2 * maxLogBytes)
      const pipe = openPipeOf(slot, this.#context.pipesDir)
      if (pipe === undefined) {
        log.close()
        return
      }
      this.#log = log
      this.#pipe = pipe
      this.#context.onOutput()
    } catch (err) {
      // The task broke its log, and its output is lost; or the next poll tries again.
      if (!isFolderBroken(err) && !isTemporary(err)) throw err
    }
  }

  /** Stops the task; kills it at twice the limit, since it could write gigabytes until then. */
  async #endAtLogLimit(): Promise<void> {
    this.#isOverLogLimit = true
    const { maxLogBytes } = this.#record
    const stopping = persistently(() => this.stop())
    while (!this.#isEnding) {
      if (await persistently(() => this.#logBytes() >= 2 * maxLogBytes)) await this.#kill()
      else await pause(OVER_LIMIT_POLL_MS)
    }
    await stopping
  }

  async #kill(): Promise<void> {
    this.#graceUntil = 0
    await persistently(() => {
      if (this.#isEnding || this.#waitsForSlot || !isAlive(this.#record.slot)) return
      if (this.#slot) this.#slot.kill()
      else kill(-this.#record.slot.pid)
    })
    await this.settle()
  }

  /** Gives the task to another shell once one can fork, unless it is ended. Never rejects. */
  async #restart(): Promise<void> {
    const { slots, isClosed, onMoved } = this.#context
    this.#slot = undefined
    this.#waitsForSlot = true
    const isOver = () => this.#isEnding || isClosed()
    const slot = await persistently(() => slots.takeProven(), isOver)
    if (!slot) return
    const record = { ...this.#record, slot: slot.identity, ...slot.recordFields }
    try {
      if (!isOver()) await persistently(() => folders.rewrite(this.#folder, record), isOver)
    } catch (err) {
      if (!isFolderBroken(err)) throw err
      slots.giveBack(slot)
      await this.settle()
      return
    }
    if (isOver()) {
      slots.giveBack(slot)
      return
    }
    this.#record = record
    this.#slot = slot
    this.#waitsForSlot = false
    onMoved(this)
    this.#begin(slot, this.#job ?? '')
  }

  /**
   * Waits for the task's other processes to end: for a stopped task until the grace period is over,
   * otherwise at most 2 s for those that can write to the log. Returns whether all have ended.
   */
  async #awaitOthers(): Promise<boolean> {
    const lastOutputUntil = performance.now() + LAST_OUTPUT_MS
    let isQuiet = false
    for (let waitMs = 1; ; waitMs = Math.min(2 * waitMs, LAST_OUTPUT_POLL_MAX_MS)) {
      this.drain()
      const left = this.#others()
      if (left.length === 0) return true
      const isStopped = this.#graceUntil !== undefined
      if (performance.now() >= (this.#graceUntil ?? lastOutputUntil)) return false
      const pipe = this.#pipeStats()
      if (!isStopped && (!pipe || writersOf(pipe, left).length === 0)) {
        // A process closes its files shortly before it is gone.
        if (isQuiet) return false
        isQuiet = true
        await pause(ENDING_MS)
      } else await pause(waitMs)
    }
  }

  /** Completes the log. No process is left that could write to it. */
  async #closeLog(killed: readonly string[]): Promise<void> {
    // Empties the pipe: it holds less than one turn moves.
    if (this.#log) this.drain()
    else await readerEnded(this.#record.reader)
    if (this.#pipe !== undefined) closeSync(this.#pipe)
    try {
      const log = this.#log ?? (killed.length > 0 ? new TaskLog(this.#folder, Infinity) : undefined)
      if (killed.length > 0) log?.add(killedNote(killed))
      log?.close()
    } catch (err) {
      // The task replaced its log.
      if (!isFolderBroken(err)) throw err
    }
  }

  #others(): ProcessIdentity[] {
    const { processes } = this.#context
    return leftoversOf(processes, this.#record.name, this.#record, { log: this.#pipeStats() })
  }

  #pipeStats(): Stats | undefined {
    const pipe = this.#pipe ?? this.#slot?.pipe
    const { reader } = this.#record
    try {
      if (pipe !== undefined) return fstatSync(pipe)
      return reader && statSync(`/proc/${reader.pid}/fd/0`)
    } catch {
      return undefined
    }
  }

  /** Returns the bytes that the task wrote; if the reader writes the log, the size of the file. */
  #logBytes(): number {
    return this.#log ? this.#log.seenBytes : folders.logBytes(this.#folder)
  }

  /** Returns true also if the task broke the folder. */
  #hasStarted(): boolean {
    return trueIfBroken(() => folders.hasStarted(this.#folder))
  }

  /** Returns true also if the task broke the folder. */
  #hasExit(): boolean {
    return trueIfBroken(() => folders.readExit(this.#folder) !== undefined)
  }
}

function trueIfBroken(check: () => boolean): boolean {
  try {
    return check()
  } catch (err) {
    if (!isFolderBroken(err)) throw err
    return true
  }
}

function killedNote(names: readonly string[]): string {
  const shown = [...new Set(names)].slice(0, NAMES_MAX)
  const more = new Set(names).size - shown.length
  const list = shown.join(', ') + (more > 0 ? ` and ${more} more` : '')
  return names.length === 1
    ? `Ended 1 process that was still running: ${list}`
    : `Ended ${names.length} processes that were still running: ${list}`
}
