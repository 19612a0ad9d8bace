import { closeSync, fstatSync, type Stats, statSync } from 'node:fs'
import { setTimeout as pause } from 'node:timers/promises'
import type { Completion } from '../../core/ports.ts'
import { lost, overLogLimit } from '../completion.ts'
import { isLoss, isOurs } from './failures.ts'
import * as folders from './folders.ts'
import { NO_EXIT } from './known-workers.ts'
import type { ProcessSource } from './leftover-finder.ts'
import { killAll, leftOf } from './leftovers.ts'
import { persistently } from './persistently.ts'
import { groupOf, isAlive, kill, killIfSame, type ProcessIdentity, writersOf } from './processes.ts'
import type { SlotPool } from './slot-pool.ts'
import { openPipeOf, type SlotShell } from './slot-shell.ts'
import { TaskLog } from './task-log.ts'

/** How often a log over its limit is measured: a task may write gigabytes a second. */
const OVER_LIMIT_WATCH_MS = 5
/** Taken from a pipe in one turn. */
export const TAKE_BYTES = 1024 * 1024
/** How long what a task leaves behind may still write into its log: filters such as `exec > >(tee …)`. */
const LAST_WORDS_MS = 2_000
const LAST_WORDS_LOOK_MAX_MS = 50
/** As long as a process takes to end, once it has closed its files. */
const ENDING_MS = 20
/** Names of ended processes in the log. */
const NAMES_MAX = 5
const ROUND_MS = 5
const BEGIN_ROUNDS_MAX = 200
const READER_ROUNDS_MAX = 400

/** What all runs of a service share. */
export interface RunContext {
  terminationGraceMs: number
  pipesDir: string
  slots: SlotPool
  processes: ProcessSource
  isClosed: () => boolean
  /** Reads how a task has ended from its worker's folder. Throws a `LocalFailure` while that cannot be read. */
  completionOf: (record: folders.WorkerRecord) => Completion
  /** Called when there may be something to take from the pipe of a run. */
  onOutput: () => void
  /** Called when the task has another shell, as the record says. */
  onMoved: (run: LocalRun) => void
  /** Called once the outcome is known, before `outcome` settles. `isClean`: no process of the task is left. */
  onEnd: (run: LocalRun, isClean: boolean) => void
}

/** The shell that was told to run a task, and what was told to it. */
export interface Start {
  slot: SlotShell
  job: string
  log: TaskLog
}

/**
 * One task on a local worker, from its start, or since we attached to it after a restart, until its outcome is known. What is
 * known here counts, whatever the task does to its worker's record.
 */
export class LocalRun {
  readonly #context: RunContext
  readonly #folder: string
  #record: folders.WorkerRecord
  /** Undefined: a shell that an earlier process started. */
  #slot: SlotShell | undefined
  /** Undefined: what took it over from an earlier process writes it. */
  #log: TaskLog | undefined
  /** The pipe of a shell of an earlier process, when nothing else reads from it any more. */
  #pipe: number | undefined
  /** What the shell was told to run; undefined when an earlier process did. */
  readonly #job: string | undefined
  /** The shell could not start the task, and another one is awaited. */
  #waitsForSlot = false
  #isEnding = false
  #hasEnded = false
  #endedByItself = false
  #isOverLogLimit = false
  /** Until when what a stopped task has started may go on, by `performance.now()`. Undefined: nobody stops it. */
  #graceUntil: number | undefined
  readonly #outcome = Promise.withResolvers<Completion>()

  /** Starts the task, or, without `start`, attaches to one that an earlier process has started. */
  constructor(context: RunContext, folder: string, record: folders.WorkerRecord, start?: Start) {
    this.#context = context
    this.#folder = folder
    this.#record = record
    this.#slot = start?.slot
    this.#log = start?.log
    this.#job = start?.job
    if (start) this.#begin(start.slot, start.job)
    else this.#takeOver()
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

  /** True once the task itself has ended before anybody stopped it, also while something of it may still write into its log. */
  get endedByItself(): boolean {
    return this.#endedByItself
  }

  /** Moves what the task has written into its log. Returns how many bytes that was. */
  take(): number {
    const pipe = this.#pipe ?? this.#slot?.pipe
    return this.#log && pipe !== undefined ? this.#log.take(pipe, TAKE_BYTES) : 0
  }

  /** Looks whether the log is over its limit, and whether a shell of an earlier process, which reports nothing, has ended. */
  look(): void {
    if (this.#isEnding) return
    try {
      if (!this.#isOverLogLimit && this.#logBytes() > this.#record.maxLogBytes) {
        void this.#endAtLogLimit()
      }
      if (this.#slot || this.#waitsForSlot) return
      if (!this.#log) this.#takeOver()
      if (this.#hasExit() || !isAlive(this.#record.slot)) void this.settle()
    } catch (err) {
      // Looked at again in a moment.
      if (!isOurs(err)) throw err
    }
  }

  /** Sends TERM to all of the task's processes, and KILL after the grace period. Settles when the task has ended. */
  async stop(): Promise<void> {
    // A shell that has not begun would take the signal for itself, and then begin.
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
    // By now it may be another worker's.
    if (!this.#hasEnded && isAlive(slot)) {
      kill(-slot.pid, 'SIGTERM')
      for (const identity of this.#left()) {
        if (groupOf(identity) !== slot.pid) killIfSame(identity, 'SIGTERM')
      }
    }
    const inTime = new AbortController()
    void this.outcome.then(() => inTime.abort())
    const grace = pause(terminationGraceMs, undefined, { signal: inTime.signal })
    await Promise.race([this.outcome, grace.catch(() => {})])
  }

  /**
   * Handles the end of the slot's shell. One that failed with nothing of the task run could not fork: that is no outcome of the
   * task. Never rejects.
   */
  async slotEnded(hasFailed: boolean): Promise<void> {
    const hasNotRun = () => hasFailed && this.#job !== undefined && !this.#hasExit()
    if (await persistently(hasNotRun)) await this.#runAgain()
    else await this.settle()
  }

  /** Ends what the task left behind, frees its slot, and reports how it went. Repeating it is safe. Never rejects. */
  async settle(): Promise<void> {
    if (this.#isEnding) return
    this.#isEnding = true
    this.#endedByItself = this.#graceUntil === undefined
    const { maxLogBytes } = this.#record
    const isEmpty = await persistently(() => this.#letFinish())
    const killed: string[] = []
    const isClean =
      isEmpty || (await persistently(() => killAll(() => this.#left(), killed))) === true
    await this.#endLog(killed)
    const completion = await persistently(() => this.#context.completionOf(this.#record))
    this.#hasEnded = true
    this.#context.onEnd(this, isClean)
    // Without an exit nothing would tell after a restart that the shell is this worker's no more.
    const isReusable = this.#slot?.isAlive && isClean && completion?.reason !== 'worker_lost'
    if (this.#slot && isReusable) this.#context.slots.giveBack(this.#slot)
    else this.#slot?.retire()
    this.#outcome.resolve(
      this.#isOverLogLimit ? overLogLimit(maxLogBytes) : (completion ?? lost(NO_EXIT)),
    )
  }

  /** Lets the task go on without us. */
  release(): void {
    this.#slot?.retire()
  }

  #begin(slot: SlotShell, job: string): void {
    slot.run(this.#record.name, job)
    this.#context.onOutput()
  }

  /** Where nothing reads any more what the task of an earlier process writes, we do. */
  #takeOver(): void {
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
      // The task broke its log, and what it wrote is gone; or we look again in a moment.
      if (!isLoss(err) && !isOurs(err)) throw err
    }
  }

  /** TERM, and KILL at twice the limit: on a fast disk a task that ignores TERM writes ten times that in its grace period. */
  async #endAtLogLimit(): Promise<void> {
    this.#isOverLogLimit = true
    const { maxLogBytes } = this.#record
    const stopping = persistently(() => this.stop())
    while (!this.#isEnding) {
      if (await persistently(() => this.#logBytes() >= 2 * maxLogBytes)) await this.#kill()
      else await pause(OVER_LIMIT_WATCH_MS)
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

  /** Gives the task to another shell as soon as one can start it, unless it is ended meanwhile. Never rejects. */
  async #runAgain(): Promise<void> {
    const { slots, isClosed, onMoved } = this.#context
    this.#slot = undefined
    this.#waitsForSlot = true
    const isOver = () => this.#isEnding || isClosed()
    const slot = await persistently(() => slots.takeProven(), isOver)
    if (!slot) return
    const record = { ...this.#record, slot: slot.identity, ...slot.traces }
    try {
      if (!isOver()) await persistently(() => folders.rewrite(this.#folder, record), isOver)
    } catch (err) {
      if (!isLoss(err)) throw err
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
   * Waits for what the task has started: until it has ended, or the grace of a stopped task is over, or, of any other task, until
   * it cannot write into the log any more, two seconds at most. Returns whether nothing is left.
   */
  async #letFinish(): Promise<boolean> {
    const lastWordsUntil = performance.now() + LAST_WORDS_MS
    let isQuiet = false
    for (let waitMs = 1; ; waitMs = Math.min(2 * waitMs, LAST_WORDS_LOOK_MAX_MS)) {
      this.take()
      const left = this.#left()
      if (left.length === 0) return true
      const isStopped = this.#graceUntil !== undefined
      if (performance.now() >= (this.#graceUntil ?? lastWordsUntil)) return false
      const pipe = this.#pipeStats()
      if (!isStopped && (!pipe || writersOf(pipe, left).length === 0)) {
        // One that is ending has closed its files before it is gone.
        if (isQuiet) return false
        isQuiet = true
        await pause(ENDING_MS)
      } else await pause(waitMs)
    }
  }

  /** Nothing of the task is left that could write: what it wrote is in its log when this settles. */
  async #endLog(killed: readonly string[]): Promise<void> {
    const { reader } = this.#record
    if (this.#log) {
      // More than a pipe holds.
      this.take()
    } else if (reader) {
      for (let round = 0; round < READER_ROUNDS_MAX && isAlive(reader); round += 1) {
        await pause(ROUND_MS)
      }
    }
    if (this.#pipe !== undefined) closeSync(this.#pipe)
    try {
      const log = this.#log ?? (killed.length > 0 ? new TaskLog(this.#folder, Infinity) : undefined)
      if (killed.length > 0) log?.add([wordsOfKilled(killed)])
      log?.close()
    } catch (err) {
      // The task made something else of its log.
      if (!isLoss(err)) throw err
    }
  }

  #left(): ProcessIdentity[] {
    const { processes } = this.#context
    return leftOf(processes, this.#record.name, this.#record, { log: this.#pipeStats() })
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

  /** As far as it is known here: what took the log over from an earlier process writes into the file alone. */
  #logBytes(): number {
    return this.#log ? this.#log.seenBytes : folders.logBytes(this.#folder)
  }

  /** True also where it cannot be told any more. */
  #hasStarted(): boolean {
    return unlessLost(() => folders.hasStarted(this.#folder))
  }

  /** True also where it cannot be told any more. */
  #hasExit(): boolean {
    return unlessLost(() => folders.readExit(this.#folder) !== undefined)
  }
}

function unlessLost(look: () => boolean): boolean {
  try {
    return look()
  } catch (err) {
    if (!isLoss(err)) throw err
    return true
  }
}

function wordsOfKilled(names: readonly string[]): string {
  const shown = [...new Set(names)].slice(0, NAMES_MAX)
  const more = new Set(names).size - shown.length
  const list = shown.join(', ') + (more > 0 ? ` and ${more} more` : '')
  return names.length === 1
    ? `Ended 1 process that was still running: ${list}`
    : `Ended ${names.length} processes that were still running: ${list}`
}
