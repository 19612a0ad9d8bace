import { randomUUID } from 'node:crypto'
import {
  closeSync,
  fstatSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  type Stats,
  statSync,
} from 'node:fs'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import type { Completion, LogTail, WorkerSpec, WorkerStatus } from '../../core/ports.ts'
import { isWorkerName } from '../../core/task.ts'
import { completionOf, lost, overLogLimit } from '../completion.ts'
import { repositoryFiles } from '../repositories.ts'
import { SlotCgroups, WorkerProcesses } from './cgroup.ts'
import { localEnvironment } from './environment.ts'
import { codeOf, FAULT_OF, isOurs, LocalFailure, sorted, sortedAs } from './failures.ts'
import * as folders from './folders.ts'
import { type Interpreters, jobText } from './job.ts'
import {
  groupOf,
  identify,
  isAlive,
  kill,
  killIfSame,
  LeftoverFinder,
  nameOf,
  type ProcessIdentity,
  TASK_RUNNER_FOLDER,
  writersOf,
} from './processes.ts'
import type { OnUnremovable } from './removal.ts'
import { openPipeOf, SlotShell } from './slot-shell.ts'
import { TaskLog } from './task-log.ts'
import { WorkerFolders } from './worker-folders.ts'

export interface LocalSettings {
  /** One folder per worker in here. */
  workersDir: string
  tasksDir: string
  bootstrap: string
  interpreters: Interpreters
  /** What every task's environment starts from, besides its own folders. */
  environment: Record<string, string>
  /** Of the tasks; the service's own is stricter. */
  umask: number
  /** Of the tasks; undefined: the service's own. */
  openFiles?: number | undefined
  terminationGraceMs: number
  /** What `freeSpace` leaves of a log. */
  logBytesKept: number
}

export interface WorkerInfo {
  name: string
  /** Empty where nobody knows any more: the task broke its worker's record, and the service was restarted. */
  taskId: string
  size: string | null
  createdAt: number
  status: WorkerStatus
}

/** How often logs are measured, and shells of an earlier process looked at. */
const WATCH_MS = 100
/** How often a log over its limit is measured: a task may write gigabytes a second. */
const OVER_LIMIT_WATCH_MS = 5
/** How often pipes are looked into: by turns of the loop while there is much, then ever more seldom. */
const TAKE_MS = 4
const TAKE_MAX_MS = 50
/** Taken from a pipe in one turn. */
const TAKE_BYTES = 1024 * 1024
/** How long what a task leaves behind may still write into its log: filters such as `exec > >(tee …)`. */
const LAST_WORDS_MS = 2_000
/** As long as a process takes to end, once it has closed its files. */
const ENDING_MS = 20
/** Of those that were ended with the task, as far as the log names them. */
const NAMES_MAX = 5
const KILL_ROUND_MS = 5
const KILL_ROUNDS_MAX = 400
const BEGIN_ROUNDS_MAX = 200
const SHORT_LOG_BYTES = 64 * 1024
const RETRY_MS = 100
const RETRY_MAX_MS = 2_000
/**
 * A process id used again could hide a leftover from the finder's memory for so long; and what could not be removed is
 * tried again.
 */
const SWEEP_MS = 60_000

const NO_EXIT = 'The worker ended without recording an exit code (killed, or the machine restarted)'
const COPIED = "The worker's folder was copied or moved: its record is of another one"

export interface End {
  completion: Completion
  /** When it is short and can grow no more: then nobody need ask for it. */
  wholeLog: LogTail | undefined
}

/** A worker as its record has it. */
interface Known extends Omit<folders.WorkerRecord, 'slot'> {
  /** Undefined: it is of another folder's worker, and none of our business. */
  slot: ProcessIdentity | undefined
}

/** A worker whose task has not ended, as far as we know. What is known here counts, whatever the task does to its record. */
interface Live {
  folder: string
  record: folders.WorkerRecord
  /** Undefined: a shell that an earlier process started. */
  slot: SlotShell | undefined
  /** Undefined: what took it over from an earlier process writes it. */
  log: TaskLog | undefined
  /** The pipe of a shell of an earlier process, when nothing else reads from it any more. */
  pipe: number | undefined
  /** What its shell was told to run; undefined when an earlier process did. */
  job: string | undefined
  /** Its shell could not start it. */
  waitsForSlot: boolean
  ended: PromiseWithResolvers<Completion>
  settling: boolean
  /** Before anybody stopped it. */
  endedByItself: boolean
  overLogLimit: boolean
  /** Until when what a stopped task has started may go on, by `performance.now()`. Undefined: nobody stops it. */
  graceUntil: number | undefined
}

/**
 * Local workers. Everything here may block, so it runs on a thread of its own (thread.ts); what it knows it
 * can find again from the workers' folders. Tasks may have made anything of those: whatever is odd about one is that worker's
 * trouble alone.
 */
export class LocalWorkers {
  readonly #settings: LocalSettings
  readonly #folders: WorkerFolders
  readonly #live = new Map<string, Live>()
  /** Of workers that this process made or attached to, until they are terminated. */
  readonly #records = new Map<string, folders.WorkerRecord>()
  readonly #idleSlots: SlotShell[] = []
  readonly #terminating = new Set<string>()
  /** Workers whose making is under way; one that is terminated meanwhile is not among them any more. */
  readonly #making = new Map<string, { taskId: string; made: Promise<WorkerInfo> }>()
  /** Workers whose task has ended here. True: with nothing left behind, and nothing can come after that. */
  readonly #ended = new Map<string, boolean>()
  readonly #leftovers: LeftoverFinder
  readonly #cgroups: SlotCgroups | undefined
  readonly #processes: WorkerProcesses
  /** Of shells that have ended, in which something may still live. */
  #oldCgroups: string[] = []
  /** Workers of an earlier process that made away with their folders, and whose processes run. */
  readonly #homeless = new Set<string>()
  #taking: NodeJS.Timeout | undefined
  #takeMs = TAKE_MS
  readonly #watch: NodeJS.Timeout
  readonly #sweep: NodeJS.Timeout
  #isClosed = false

  /** Throws when the folder of the workers cannot be used. */
  constructor(settings: LocalSettings, onUnremovable?: OnUnremovable) {
    this.#settings = settings
    mkdirSync(settings.workersDir, { recursive: true, mode: 0o700 })
    this.#folders = new WorkerFolders(settings.workersDir, onUnremovable)
    this.#leftovers = new LeftoverFinder(settings.workersDir)
    this.#cgroups = SlotCgroups.open(settings.workersDir)
    this.#processes = new WorkerProcesses(this.#leftovers, this.#cgroups)
    for (const name of readdirSync(settings.workersDir)) void this.#endIfHalfMade(name)
    for (const name of this.#leftovers.workers()) {
      const isThere = lstatSync(this.#folder(name), { throwIfNoEntry: false }) !== undefined
      if (!isThere) this.#homeless.add(name)
    }
    this.#watch = setInterval(() => this.#look(), WATCH_MS)
    this.#sweep = setInterval(() => {
      this.#leftovers.forget()
      this.#removeCgroups()
      this.#folders.retry()
    }, SWEEP_MS)
  }

  /** Idempotent by name: a task that was started is attached to, never started again. */
  async provision(spec: WorkerSpec, notes: string[]): Promise<WorkerInfo> {
    const { name, taskId } = spec
    const underWay = this.#making.get(name)
    if (underWay) {
      if (underWay.taskId !== taskId) throw new LocalFailure('name_taken')
      return underWay.made
    }
    const isWanted = () => this.#making.get(name)?.made === made
    const made = this.#make(spec, notes, isWanted).finally(() => {
      if (isWanted()) this.#making.delete(name)
    })
    this.#making.set(name, { taskId, made })
    return made
  }

  async #make(spec: WorkerSpec, notes: string[], isWanted: () => boolean): Promise<WorkerInfo> {
    const folder = this.#folder(spec.name)
    const existing = await this.#existing(spec)
    if (existing) return existing
    const slot = this.#idleSlots.pop() ?? (await this.#startSlot())
    const files = [
      ...(spec.startupScript === undefined
        ? []
        : [{ name: 'startup.sh', content: spec.startupScript }]),
      ...(spec.repositories.length === 0 ? [] : repositoryFiles(spec.repositories)),
    ]
    const record: folders.WorkerRecord = {
      name: spec.name,
      taskId: spec.taskId,
      size: spec.size ?? null,
      createdAt: Date.now(),
      maxLogBytes: spec.maxLogBytes,
      slot: slot.identity,
      ...slot.traces,
    }
    try {
      // Whoever waited for it has given up meanwhile: it must not run later.
      if (!isWanted() || this.#isClosed) throw new Error('terminated while it was being made')
      this.#folders.prepare(folder, this.#settings.tasksDir, {
        record,
        taskFile: spec.taskFolder === 'tasks' ? spec.taskFileName : '',
        files,
        notes,
      })
    } catch (err) {
      this.#giveBack(slot)
      throw err
    }
    let log: TaskLog
    try {
      log = new TaskLog(folder, 2 * spec.maxLogBytes)
    } catch (err) {
      this.#giveBack(slot)
      await this.#folders.release(folder)
      throw err
    }
    const job = jobText(
      {
        name: spec.name,
        folder,
        taskFolder: spec.taskFolder,
        taskFileName: spec.taskFileName,
        environment: {
          ...localEnvironment(
            this.#settings.environment,
            { home: join(folder, 'home'), tmp: this.#folders.tmpOf(folder) },
            process.getuid?.() === 0,
          ),
          ...spec.environment,
          [TASK_RUNNER_FOLDER]: folder,
        },
        needsPreparing: files.length > 0,
      },
      this.#settings.interpreters,
      this.#settings.bootstrap,
    )
    this.#records.set(spec.name, record)
    this.#live.set(spec.name, newLive(folder, record, { slot, job, log }))
    slot.run(spec.name, job)
    this.#takeSoon(TAKE_MS)
    return this.#info(record)
  }

  find(name: string): WorkerInfo | undefined {
    try {
      const record = this.#record(name)
      if (record) return this.#info(record)
      // One that nobody waits for any more has to be terminated as well.
      const making = this.#making.get(name)
      const status = 'Provisioning' as const
      return making && { name, taskId: making.taskId, size: null, createdAt: Date.now(), status }
    } catch (err) {
      if (!isLoss(err)) throw err
      return this.#lostInfo(name, '')
    }
  }

  list(): WorkerInfo[] {
    let names: string[]
    try {
      names = readdirSync(this.#settings.workersDir)
    } catch (err) {
      throw sortedAs('workers_folder_away', err)
    }
    // A task may have made away with its folder.
    const all = new Set([...names, ...this.#live.keys(), ...this.#homeless])
    return [...all].flatMap((name) => this.find(name) ?? [])
  }

  async completion(name: string): Promise<End> {
    await this.#making.get(name)?.made
    const live = this.#live.get(name) ?? this.#attach(name)
    // Before what it left is ended: its shell would take that for the task's own end.
    const completion = live ? await live.ended.promise : this.#completionIn(name)
    if (!live) await this.#endLeftovers(name)
    const wholeLog = this.#ended.get(name) ? shortLog(this.#folder(name)) : undefined
    return { completion, wholeLog }
  }

  tail(name: string, maxBytes: number): LogTail {
    return folders.readTail(this.#folder(name), maxBytes)
  }

  /** TERM to the task's group, KILL after the grace period, then whatever carries the worker's name. */
  async stop(name: string): Promise<void> {
    const live = this.#live.get(name) ?? this.#attach(name)
    if (!live) {
      await this.#endLeftovers(name)
      return
    }
    // A shell that has not begun would take the signal for itself, and then begin.
    for (let round = 0; round < BEGIN_ROUNDS_MAX && !this.#hasStarted(live); round += 1) {
      if (live.waitsForSlot) break
      await pause(KILL_ROUND_MS)
    }
    const ended = live.ended.promise
    if (!live.waitsForSlot) {
      const { slot } = live.record
      live.graceUntil ??= performance.now() + this.#settings.terminationGraceMs
      // By now it may be another worker's.
      if (this.#live.get(name) === live && isAlive(slot)) {
        kill(-slot.pid, 'SIGTERM')
        for (const identity of this.#leftOf(name)) {
          if (groupOf(identity) !== slot.pid) killIfSame(identity, 'SIGTERM')
        }
      }
      const inTime = new AbortController()
      void ended.then(() => inTime.abort())
      const grace = pause(this.#settings.terminationGraceMs, undefined, { signal: inTime.signal })
      await Promise.race([ended, grace.catch(() => {})])
    }
    await this.#kill(live)
    await ended
  }

  /** True once the task itself has ended of its own accord, also while something of it may still write into its log. */
  hasEnded(name: string): boolean {
    const live = this.#live.get(name)
    return live ? live.endedByItself : this.#ended.has(name)
  }

  /** Repeating it is safe. Rejects while processes of the worker are left. */
  async terminate(name: string): Promise<void> {
    this.#terminating.add(name)
    this.#making.delete(name)
    try {
      if (!this.#ended.get(name)) {
        await this.stop(name)
        if (!(await this.#endLeftovers(name))) {
          throw new Error('processes of the worker cannot be ended')
        }
      }
      await this.#folders.release(this.#folder(name))
      this.#ended.delete(name)
      this.#records.delete(name)
      this.#homeless.delete(name)
    } finally {
      this.#terminating.delete(name)
    }
  }

  /** Gives back the space of what the outcome of an ended task does not need. Does nothing while the task runs. */
  async freeSpace(name: string): Promise<void> {
    if (this.#live.has(name) || this.#making.has(name) || this.#attach(name)) return
    if (!this.#ended.get(name) && !(await this.#endLeftovers(name))) return
    await this.#folders.freeSpace(this.#folder(name), this.#settings.logBytesKept)
  }

  /** Does what provisioning does, as far as that leaves nothing behind: forks, writes, lists, reads. Throws a `LocalFailure`. */
  async check(): Promise<void> {
    this.#folders.check(this.#settings.tasksDir)
    this.#giveBack(await this.#provenSlot())
  }

  /** Lets go: tasks under way end without us. */
  close(): void {
    this.#isClosed = true
    clearInterval(this.#watch)
    clearTimeout(this.#taking)
    clearInterval(this.#sweep)
    this.#folders.close()
    for (const slot of this.#idleSlots) slot.retire()
    for (const { slot } of this.#live.values()) slot?.retire()
    this.#removeCgroups()
    this.#cgroups?.close()
  }

  /** What is known about the worker of a name; undefined when nothing was started. Throws like `folders.readRecord`. */
  #record(name: string): Known | undefined {
    const known = this.#records.get(name)
    if (known && this.#live.has(name)) return known
    // Whoever puts something else beside the workers' folders may keep it there.
    if (!isWorkerName(name)) return undefined
    const folder = this.#folder(name)
    const stats = lstatSync(folder, { throwIfNoEntry: false })
    if (!stats && this.#homeless.has(name)) throw broken("The worker's folder is gone")
    if (!stats || this.#folders.isLeft(folder)) return undefined
    if (known) return known
    if (!stats.isDirectory()) throw broken("The worker's folder is not a folder any more")
    const record = folders.readRecord(folder)
    if (record?.name === name) {
      return this.#folders.isOf(record, stats.ino) ? record : { ...record, slot: undefined }
    }
    if (record) throw broken("The worker's record is another worker's")
    if (folders.hasStarted(folder)) throw broken("The worker's record is gone")
    return undefined
  }

  /** Like `#record`; undefined also when the record is broken. */
  #recordIfWhole(name: string): Known | undefined {
    try {
      return this.#record(name)
    } catch (err) {
      if (!isLoss(err)) throw err
      return undefined
    }
  }

  /** A folder without its record was being made when the power went: nothing runs in it, and the name is free. Never rejects. */
  async #endIfHalfMade(name: string): Promise<void> {
    try {
      const isOurs = isWorkerName(name)
      if (isOurs && this.#record(name) === undefined) await this.terminate(name)
    } catch {
      // It is lost, or out of reach: whoever asks for it is told.
    }
  }

  /** What an earlier process made of the name. Undefined: nothing was started. */
  async #existing({ name, taskId }: WorkerSpec): Promise<WorkerInfo | undefined> {
    let record: Known | undefined
    try {
      record = this.#record(name)
    } catch (err) {
      if (!isLoss(err)) throw err
      // What began must not run again.
      return this.#lostInfo(name, taskId)
    }
    if (!record) return undefined
    if (record.taskId !== taskId) throw new LocalFailure('name_taken')
    if (this.#live.has(name)) return this.#info(record)
    const folder = this.#folder(name)
    try {
      // Its shell either has the job in its pipe and is about to start it, or sees the pipe's end and goes.
      while (!folders.hasStarted(folder) && isAliveIfAny(record.slot)) await pause(KILL_ROUND_MS)
      return folders.hasStarted(folder) ? this.#info(record) : undefined
    } catch (err) {
      if (!isLoss(err)) throw err
      return this.#info(record)
    }
  }

  /** Undefined: it has ended, or is lost. */
  #attach(name: string): Live | undefined {
    if (this.#ended.has(name)) return undefined
    const folder = this.#folder(name)
    const record = this.#recordIfWhole(name)
    if (!record?.slot) return undefined
    const { slot } = record
    try {
      if (folders.readExit(folder) || !isAlive(slot)) return undefined
    } catch (err) {
      if (!isLoss(err)) throw err
      return undefined
    }
    const whole = { ...record, slot }
    const live = newLive(folder, whole)
    this.#takeOver(live)
    this.#records.set(name, whole)
    this.#live.set(name, live)
    return live
  }

  #startSlot(): Promise<SlotShell> {
    const cgroup = this.#makeCgroup()
    return SlotShell.start({
      cgroup,
      bootstrap: this.#settings.bootstrap,
      umask: this.#settings.umask,
      workersDir: this.#settings.workersDir,
      pipesDir: this.#folders.pipesDir,
      openFiles: this.#settings.openFiles,
      onTaskEnd: (slot, name) => {
        const live = this.#live.get(name)
        if (live?.slot === slot) void this.#settle(live)
      },
      onExit: (slot, hasFailed) => {
        if (cgroup !== undefined) this.#oldCgroups.push(cgroup)
        this.#removeCgroups()
        const idle = this.#idleSlots.indexOf(slot)
        if (idle >= 0) {
          this.#idleSlots.splice(idle, 1)
          slot.retire()
        }
        for (const live of this.#live.values()) {
          if (live.slot === slot) void this.#endOrRunAgain(live, hasFailed)
        }
      },
    })
  }

  /** Undefined where none can be made. */
  #makeCgroup(): string | undefined {
    try {
      return this.#cgroups?.make(`slot-${randomUUID()}`)
    } catch (err) {
      // There may be as many as there can be: then the marks that processes carry have to do.
      if (codeOf(err) === undefined) throw err
      return undefined
    }
  }

  #removeCgroups(): void {
    this.#oldCgroups = this.#oldCgroups.filter((path) => this.#cgroups?.remove(path) === false)
  }

  #giveBack(slot: SlotShell): void {
    if (this.#isClosed) slot.retire()
    else this.#idleSlots.push(slot)
  }

  /** A shell that can start a task: an idle one, or a new one. */
  async #provenSlot(): Promise<SlotShell> {
    const slot = this.#idleSlots.pop() ?? (await this.#startSlot())
    await slot.prove()
    return slot
  }

  /** Logs over their limit, and shells whose end nobody tells us. */
  #look(): void {
    for (const live of this.#live.values()) {
      if (live.settling) continue
      try {
        const { maxLogBytes, slot } = live.record
        if (!live.overLogLimit && logBytesOf(live) > maxLogBytes) {
          void this.#endAtLogLimit(live)
        }
        if (live.slot || live.waitsForSlot) continue
        if (!live.log) this.#takeOver(live)
        if (this.#hasExit(live) || !isAlive(slot)) void this.#settle(live)
      } catch (err) {
        // Looked at again in a moment.
        if (!isOurs(err)) throw err
      }
    }
  }

  #takeSoon(ms: number): void {
    if (this.#isClosed || (this.#taking && ms >= this.#takeMs)) return
    clearTimeout(this.#taking)
    this.#takeMs = ms
    this.#taking = setTimeout(() => {
      this.#taking = undefined
      let taken = 0
      for (const live of this.#live.values()) taken = Math.max(taken, this.#take(live))
      if (this.#live.size === 0) return
      const isMore = taken >= TAKE_BYTES
      this.#takeSoon(isMore ? 0 : taken > 0 ? TAKE_MS : Math.min(2 * ms || 1, TAKE_MAX_MS))
    }, ms)
  }

  /** Moves what the task has written into its log. Returns how much that was. */
  #take({ log, slot, pipe = slot?.pipe }: Live): number {
    return log && pipe !== undefined ? log.take(pipe, TAKE_BYTES) : 0
  }

  /** Where nothing reads any more what the task of an earlier process writes, we do. */
  #takeOver(live: Live): void {
    const { reader, slot } = live.record
    if (!reader || isAlive(reader)) return
    try {
      const log = new TaskLog(live.folder, 2 * live.record.maxLogBytes)
      const pipe = openPipeOf(slot, this.#folders.pipesDir)
      if (pipe === undefined) log.close()
      else {
        Object.assign(live, { log, pipe })
        this.#takeSoon(TAKE_MS)
      }
    } catch (err) {
      // The task broke its log, and what it wrote is gone; or we look again in a moment.
      if (!isLoss(err) && !isOurs(err)) throw err
    }
  }

  /** TERM, and KILL at twice the limit: on a fast disk a task that ignores TERM writes ten times that in its grace period. */
  async #endAtLogLimit(live: Live): Promise<void> {
    live.overLogLimit = true
    const { name, maxLogBytes } = live.record
    const stopping = this.#persistently(() => this.stop(name))
    const isFarOver = async () => logBytesOf(live) >= 2 * maxLogBytes
    while (!live.settling) {
      if (await this.#persistently(isFarOver)) await this.#kill(live)
      else await pause(OVER_LIMIT_WATCH_MS)
    }
    await stopping
  }

  async #kill(live: Live): Promise<void> {
    live.graceUntil = 0
    await this.#persistently(async () => {
      if (live.settling || live.waitsForSlot || !isAlive(live.record.slot)) return
      if (live.slot) live.slot.kill()
      else kill(-live.record.slot.pid)
    })
    await this.#settle(live)
  }

  /** A shell that failed with nothing of the task run could not fork: no outcome of the task. */
  async #endOrRunAgain(live: Live, hasFailed: boolean): Promise<void> {
    const hasNotRun = async () => hasFailed && live.job !== undefined && !this.#hasExit(live)
    if (await this.#persistently(hasNotRun)) await this.#runAgain(live)
    else await this.#settle(live)
  }

  /** Gives the task to another shell as soon as one can start it, unless it is ended meanwhile. Never rejects. */
  async #runAgain(live: Live): Promise<void> {
    live.slot = undefined
    live.waitsForSlot = true
    const isOver = () => live.settling || this.#isClosed
    const slot = await this.#persistently(() => this.#provenSlot(), isOver)
    if (!slot) return
    if (isOver()) {
      this.#giveBack(slot)
      return
    }
    const record = {
      ...live.record,
      slot: slot.identity,
      ...slot.traces,
    }
    try {
      await this.#persistently(async () => folders.rewrite(live.folder, record), isOver)
    } catch (err) {
      if (!isLoss(err)) throw err
      this.#giveBack(slot)
      await this.#settle(live)
      return
    }
    if (isOver()) {
      this.#giveBack(slot)
      return
    }
    Object.assign(live, { record, slot, waitsForSlot: false })
    this.#records.set(record.name, record)
    slot.run(record.name, live.job ?? '')
    this.#takeSoon(TAKE_MS)
  }

  /** The task has ended: end what it left behind, free its slot, tell how it went. Never rejects. */
  async #settle(live: Live): Promise<void> {
    if (live.settling) return
    live.settling = true
    live.endedByItself = live.graceUntil === undefined
    const { name, maxLogBytes } = live.record
    const isEmpty = await this.#persistently(() => this.#letFinish(live))
    const ended: string[] = []
    const clean = isEmpty || (await this.#persistently(() => this.#endLeftovers(name, ended)))
    await this.#endLog(live, ended)
    const completion = await this.#persistently(async () => this.#completionIn(name))
    this.#live.delete(name)
    this.#ended.set(name, clean === true)
    if (live.slot?.isAlive) {
      // Without an exit nothing would tell after a restart that the shell is this worker's no more.
      if (clean && completion?.reason !== 'worker_lost') this.#giveBack(live.slot)
      else live.slot.retire()
    } else live.slot?.retire()
    live.ended.resolve(
      live.overLogLimit ? overLogLimit(maxLogBytes) : (completion ?? lost(NO_EXIT)),
    )
  }

  /**
   * Waits for what the task has started: until it has ended, or the grace of a stopped task is over, or, of any other task, until
   * it cannot write into the log any more, two seconds at most. Returns whether nothing is left.
   */
  async #letFinish(live: Live): Promise<boolean> {
    const lastWordsUntil = performance.now() + LAST_WORDS_MS
    let isQuiet = false
    for (let waitMs = 1; ; waitMs = Math.min(2 * waitMs, TAKE_MAX_MS)) {
      this.#take(live)
      const left = this.#leftOf(live.record.name)
      if (left.length === 0) return true
      const isStopped = live.graceUntil !== undefined
      if (performance.now() >= (live.graceUntil ?? lastWordsUntil)) return false
      const pipe = this.#pipeOf(live)
      if (!isStopped && (!pipe || writersOf(pipe, left).length === 0)) {
        // One that is ending has closed its files before it is gone.
        if (isQuiet) return false
        isQuiet = true
        await pause(ENDING_MS)
      } else await pause(waitMs)
    }
  }

  #pipeOf({ slot, pipe = slot?.pipe, record }: Live): Stats | undefined {
    try {
      if (pipe !== undefined) return fstatSync(pipe)
      return record.reader && statSync(`/proc/${record.reader.pid}/fd/0`)
    } catch {
      return undefined
    }
  }

  /** Nothing of the task is left that could write: what it wrote is in its log when this settles. */
  async #endLog(live: Live, ended: readonly string[]): Promise<void> {
    const { log, pipe, record } = live
    const { reader } = record
    if (log) {
      // More than a pipe holds.
      this.#take(live)
    } else if (reader) {
      for (let round = 0; round < KILL_ROUNDS_MAX && isAlive(reader); round += 1) {
        await pause(KILL_ROUND_MS)
      }
    }
    if (pipe !== undefined) closeSync(pipe)
    try {
      const whole = log ?? (ended.length > 0 ? new TaskLog(live.folder, Infinity) : undefined)
      if (ended.length > 0) whole?.add([wordsOfEnded(ended)])
      whole?.close()
    } catch (err) {
      // The task made something else of its log.
      if (!isLoss(err)) throw err
    }
  }

  /**
   * Ends whatever carries the worker's name or is in the group of its shell, besides the shell. False: some
   * cannot be ended (another user's, or stuck in the kernel).
   */
  async #endLeftovers(name: string, ended?: string[]): Promise<boolean> {
    for (let round = 0; round < KILL_ROUNDS_MAX; round += 1) {
      const found = this.#leftOf(name)
      if (found.length === 0) return true
      if (round === 0) ended?.push(...found.flatMap((identity) => nameOf(identity) ?? []))
      for (const identity of found) killIfSame(identity)
      await pause(KILL_ROUND_MS)
    }
    return false
  }

  /** Processes of a worker, besides its shell and what writes its log. */
  #leftOf(name: string): ProcessIdentity[] {
    const live = this.#live.get(name)
    const { slot, reader, cgroup } = live?.record ?? this.#recordIfWhole(name) ?? {}
    // The group counts while the shell is this worker's, and after it has gone. A shell that serves another
    // worker by now, or a process that got its number, has a group of others.
    const isOwn = slot && (live || identify(slot.pid) === undefined)
    const found = this.#processes.find({
      ...{ worker: name, shell: slot },
      ...(isOwn && { group: slot.pid, cgroup }),
      log: live && this.#pipeOf(live),
    })
    return found.filter(({ pid }) => pid !== reader?.pid)
  }

  /**
   * How the task of a worker that runs no more has ended. Throws a `LocalFailure` while that cannot be read, for no fault of
   * the task's.
   */
  #completionIn(name: string): Completion {
    const folder = this.#folder(name)
    let why = NO_EXIT
    try {
      const exit = folders.readExit(folder)
      if (exit) return completionOf(exit)
      const record = this.#live.get(name)?.record ?? this.#record(name)
      if (record && !record.slot) why = COPIED
    } catch (err) {
      if (!isLoss(err)) throw sorted(err)
      // Holds: `isLoss` lets nothing else through.
      why = (err as LocalFailure).message
    }
    // With the disk away there is no exit either.
    this.#folders.sureOfWorkersDir()
    return lost(why)
  }

  /**
   * Repeats what the machine's trouble keeps from succeeding, with growing pauses. Undefined: `isOver`. Throws what is no such
   * trouble.
   */
  async #persistently<T>(act: () => Promise<T>, isOver = () => false): Promise<T | undefined> {
    for (let waitMs = RETRY_MS; !isOver(); waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)) {
      try {
        return await act()
      } catch (err) {
        if (!isOurs(err)) throw err
        await pause(waitMs, undefined, { ref: false })
      }
    }
    return undefined
  }

  #info(record: Known): WorkerInfo {
    const { name, taskId, size, createdAt } = record
    return { name, taskId, size, createdAt, status: this.#status(record) }
  }

  /** Of a worker whose record tells nothing any more. */
  #lostInfo(name: string, taskId: string): WorkerInfo {
    const { ctimeMs = Date.now() } = lstatSync(this.#folder(name), { throwIfNoEntry: false }) ?? {}
    const status = this.#terminating.has(name) ? 'Terminating' : 'Completed'
    return { name, taskId, size: null, createdAt: Math.floor(ctimeMs), status }
  }

  #status({ name, slot }: Known): WorkerStatus {
    if (this.#terminating.has(name)) return 'Terminating'
    if (this.#live.has(name)) return 'Running'
    if (this.#ended.has(name)) return 'Completed'
    try {
      const isRunning = !folders.readExit(this.#folder(name)) && isAliveIfAny(slot)
      return isRunning ? 'Running' : 'Completed'
    } catch (err) {
      if (!isLoss(err)) throw err
      return 'Completed'
    }
  }

  /** True also where it cannot be told any more. */
  #hasStarted(live: Live): boolean {
    return unlessLost(() => folders.hasStarted(live.folder))
  }

  /** True also where it cannot be told any more. */
  #hasExit(live: Live): boolean {
    return unlessLost(() => folders.readExit(live.folder) !== undefined)
  }

  #folder(name: string): string {
    return join(this.#settings.workersDir, name)
  }
}

function isLoss(err: unknown): boolean {
  return err instanceof LocalFailure && FAULT_OF[err.kind] === 'lost'
}

function unlessLost(look: () => boolean): boolean {
  try {
    return look()
  } catch (err) {
    if (!isLoss(err)) throw err
    return true
  }
}

function broken(message: string): LocalFailure {
  return new LocalFailure('folder_broken', { message })
}

function isAliveIfAny(slot: ProcessIdentity | undefined): boolean {
  return slot !== undefined && isAlive(slot)
}

function shortLog(folder: string): LogTail | undefined {
  try {
    const tail = folders.readTail(folder, SHORT_LOG_BYTES)
    return tail.totalBytes === tail.content.length ? tail : undefined
  } catch {
    // A task may have made away with it: whoever asks for it is told.
    return undefined
  }
}

/** As far as it is known here: what took the log over from an earlier process writes into the file alone. */
function logBytesOf({ log, folder }: Live): number {
  return log ? log.seenBytes : folders.logBytes(folder)
}

function wordsOfEnded(names: readonly string[]): string {
  const shown = [...new Set(names)].slice(0, NAMES_MAX)
  const more = new Set(names).size - shown.length
  const list = shown.join(', ') + (more > 0 ? ` and ${more} more` : '')
  return names.length === 1
    ? `Ended 1 process that was still running: ${list}`
    : `Ended ${names.length} processes that were still running: ${list}`
}

function newLive(
  folder: string,
  record: folders.WorkerRecord,
  { slot, job, log }: Partial<Pick<Live, 'slot' | 'job' | 'log'>> = {},
): Live {
  const ended = Promise.withResolvers<Completion>()
  const flags = { waitsForSlot: false, settling: false, endedByItself: false, overLogLimit: false }
  return { folder, record, slot, job, log, pipe: undefined, graceUntil: undefined, ended, ...flags }
}
