import { lstatSync, mkdirSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import type { Completion, LogTail, WorkerSpec, WorkerStatus } from '../../core/ports.ts'
import { isWorkerName } from '../../core/task.ts'
import { completionOf, lost, overLogLimit } from '../completion.ts'
import { repositoryFiles } from '../repositories.ts'
import { FAULT_OF, isOurs, LocalFailure, sorted, sortedAs } from './failures.ts'
import * as folders from './folders.ts'
import { type Interpreters, jobText } from './job.ts'
import { identify, isAlive, kill, LeftoverFinder, type ProcessIdentity } from './processes.ts'
import type { OnUnremovable } from './removal.ts'
import { SlotShell } from './slot-shell.ts'
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
  /** What its shell was told to run; undefined when an earlier process did. */
  job: string | undefined
  /** Its shell could not start it. */
  waitsForSlot: boolean
  ended: PromiseWithResolvers<Completion>
  settling: boolean
  overLogLimit: boolean
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
  /** Workers of an earlier process that made away with their folders, and whose processes run. */
  readonly #homeless = new Set<string>()
  readonly #watch: NodeJS.Timeout
  readonly #sweep: NodeJS.Timeout
  #isClosed = false

  /** Throws when the folder of the workers cannot be used. */
  constructor(settings: LocalSettings, onUnremovable?: OnUnremovable) {
    this.#settings = settings
    mkdirSync(settings.workersDir, { recursive: true, mode: 0o700 })
    this.#folders = new WorkerFolders(settings.workersDir, onUnremovable)
    this.#leftovers = new LeftoverFinder(settings.workersDir)
    for (const name of readdirSync(settings.workersDir)) void this.#endIfHalfMade(name)
    for (const name of this.#leftovers.workers()) {
      const isThere = lstatSync(this.#folder(name), { throwIfNoEntry: false }) !== undefined
      if (!isThere) this.#homeless.add(name)
    }
    this.#watch = setInterval(() => this.#look(), WATCH_MS)
    this.#sweep = setInterval(() => {
      this.#leftovers.forget()
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
    const job = jobText(
      {
        name: spec.name,
        folder,
        taskFolder: spec.taskFolder,
        taskFileName: spec.taskFileName,
        environment: {
          ...this.#settings.environment,
          HOME: join(folder, 'home'),
          TMPDIR: join(folder, 'tmp'),
          ...spec.environment,
        },
        needsPreparing: files.length > 0,
      },
      this.#settings.interpreters,
      this.#settings.bootstrap,
    )
    this.#records.set(spec.name, record)
    this.#live.set(spec.name, newLive(folder, record, slot, job))
    slot.run(job)
    return this.#info(record)
  }

  find(name: string): WorkerInfo | undefined {
    try {
      const record = this.#record(name)
      return record && this.#info(record)
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
      // By now it may be another worker's.
      if (!live.settling && isAlive(slot)) kill(-slot.pid, 'SIGTERM')
      const inTime = new AbortController()
      void ended.then(() => inTime.abort())
      const grace = pause(this.#settings.terminationGraceMs, undefined, { signal: inTime.signal })
      await Promise.race([ended, grace.catch(() => {})])
    }
    await this.#kill(live)
    await ended
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
    clearInterval(this.#sweep)
    this.#folders.close()
    for (const slot of this.#idleSlots) slot.retire()
    for (const { slot } of this.#live.values()) slot?.retire()
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
    const live = newLive(folder, whole, undefined, undefined)
    this.#records.set(name, whole)
    this.#live.set(name, live)
    return live
  }

  #startSlot(): Promise<SlotShell> {
    return SlotShell.start({
      bootstrap: this.#settings.bootstrap,
      umask: this.#settings.umask,
      onTaskEnd: (slot, name) => {
        const live = this.#live.get(name)
        if (live?.slot === slot) void this.#settle(live)
      },
      onExit: (slot, hasFailed) => {
        const idle = this.#idleSlots.indexOf(slot)
        if (idle >= 0) this.#idleSlots.splice(idle, 1)
        for (const live of this.#live.values()) {
          if (live.slot === slot) void this.#endOrRunAgain(live, hasFailed)
        }
      },
    })
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
        if (!live.overLogLimit && folders.logBytes(live.folder) > maxLogBytes) {
          void this.#endAtLogLimit(live)
        }
        if (live.slot || live.waitsForSlot) continue
        if (this.#hasExit(live) || !isAlive(slot)) void this.#settle(live)
      } catch (err) {
        // Looked at again in a moment.
        if (!isOurs(err)) throw err
      }
    }
  }

  /** TERM, and KILL at twice the limit: on a fast disk a task that ignores TERM writes ten times that in its grace period. */
  async #endAtLogLimit(live: Live): Promise<void> {
    live.overLogLimit = true
    const { name, maxLogBytes } = live.record
    const stopping = this.#persistently(() => this.stop(name))
    const isFarOver = async () => folders.logBytes(live.folder) > 2 * maxLogBytes
    while (!live.settling) {
      if (await this.#persistently(isFarOver)) await this.#kill(live)
      else await pause(OVER_LIMIT_WATCH_MS)
    }
    await stopping
  }

  async #kill(live: Live): Promise<void> {
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
    const record = { ...live.record, slot: slot.identity }
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
    slot.run(live.job ?? '')
  }

  /** The task has ended: end what it left behind, free its slot, tell how it went. Never rejects. */
  async #settle(live: Live): Promise<void> {
    if (live.settling) return
    live.settling = true
    const { name, maxLogBytes } = live.record
    const clean = await this.#persistently(() => this.#endLeftovers(name))
    const completion = await this.#persistently(async () => this.#completionIn(name))
    this.#live.delete(name)
    this.#ended.set(name, clean === true)
    if (live.slot?.isAlive) {
      // Without an exit nothing would tell after a restart that the shell is this worker's no more.
      if (clean && completion?.reason !== 'worker_lost') this.#giveBack(live.slot)
      else live.slot.retire()
    }
    live.ended.resolve(
      live.overLogLimit ? overLogLimit(maxLogBytes) : (completion ?? lost(NO_EXIT)),
    )
  }

  /**
   * Ends whatever carries the worker's name or is in the group of its shell, besides the shell. False: some
   * cannot be ended (another user's, or stuck in the kernel).
   */
  async #endLeftovers(name: string): Promise<boolean> {
    const live = this.#live.get(name)
    const { slot } = live?.record ?? this.#recordIfWhole(name) ?? {}
    // The group counts while the shell is this worker's, and after it has gone. A shell that serves another
    // worker by now, or a process that got its number, has a group of others.
    const isOwn = slot && (live || identify(slot.pid) === undefined)
    const group = isOwn ? slot.pid : undefined
    for (let round = 0; round < KILL_ROUNDS_MAX; round += 1) {
      const pids = this.#leftovers.find(name, group)
      if (pids.length === 0) return true
      for (const pid of pids) kill(pid)
      await pause(KILL_ROUND_MS)
    }
    return false
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

function newLive(
  folder: string,
  record: folders.WorkerRecord,
  slot: SlotShell | undefined,
  job: string | undefined,
): Live {
  const ended = Promise.withResolvers<Completion>()
  const flags = { waitsForSlot: false, settling: false, overLogLimit: false }
  return { folder, record, slot, job, ended, ...flags }
}
