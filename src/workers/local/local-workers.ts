import { lstatSync, mkdirSync } from 'node:fs'
import { setTimeout as pause } from 'node:timers/promises'
import type { Completion, LogTail, WorkerSpec, WorkerStatus } from '../../core/ports.ts'
import { isWorkerName } from '../../core/task.ts'
import { preparationFiles } from '../repositories.ts'
import { SlotCgroups, WorkerProcesses } from './cgroup.ts'
import { isLoss, LocalFailure } from './failures.ts'
import * as folders from './folders.ts'
import { type Interpreters, jobOf } from './job.ts'
import { type KnownWorker, KnownWorkers } from './known-workers.ts'
import { LeftoverFinder } from './leftover-finder.ts'
import { killAll, leftOf } from './leftovers.ts'
import { LocalRun, type RunContext, TAKE_BYTES } from './local-run.ts'
import { isAlive, type ProcessIdentity } from './processes.ts'
import type { OnUnremovable } from './removal.ts'
import { SlotPool } from './slot-pool.ts'
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
/** How often pipes are looked into: by turns of the loop while there is much, then ever more seldom. */
const TAKE_MS = 4
const TAKE_MAX_MS = 50
const BEGIN_LOOK_MS = 5
const SHORT_LOG_BYTES = 64 * 1024
/**
 * A process id used again could hide a leftover from the finder's memory for so long; and what could not be removed is
 * tried again.
 */
const SWEEP_MS = 60_000

export interface End {
  completion: Completion
  /** When it is short and can grow no more: then nobody need ask for it. */
  wholeLog: LogTail | undefined
}

/**
 * Local workers. Everything here may block, so it runs on a thread of its own (thread.ts); what it knows it
 * can find again from the workers' folders. Tasks may have made anything of those: whatever is odd about one is that worker's
 * trouble alone.
 */
export class LocalWorkers {
  readonly #settings: LocalSettings
  readonly #folders: WorkerFolders
  /** Of workers whose task has not ended, as far as we know. */
  readonly #runs = new Map<string, LocalRun>()
  readonly #known: KnownWorkers
  readonly #terminating = new Set<string>()
  /** Workers whose making is under way; one that is terminated meanwhile is not among them any more. */
  readonly #making = new Map<string, { taskId: string; made: Promise<WorkerInfo> }>()
  /** Workers whose task has ended here. True: with nothing left behind, and nothing can come after that. */
  readonly #ended = new Map<string, boolean>()
  readonly #processes: WorkerProcesses
  readonly #slots: SlotPool
  readonly #context: RunContext
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
    const leftovers = new LeftoverFinder(settings.workersDir)
    const cgroups = SlotCgroups.open(settings.workersDir)
    this.#processes = new WorkerProcesses(leftovers, cgroups)
    this.#slots = this.#makeSlots(cgroups)
    this.#context = this.#makeContext()
    this.#known = new KnownWorkers(settings.workersDir, this.#folders, leftovers.workers())
    for (const name of this.#known.names()) void this.#endIfHalfMade(name)
    this.#watch = setInterval(() => {
      for (const run of this.#runs.values()) run.look()
    }, WATCH_MS)
    this.#sweep = setInterval(() => {
      leftovers.forget()
      this.#slots.removeCgroups()
      this.#folders.retry()
    }, SWEEP_MS)
  }

  #makeSlots(cgroups: SlotCgroups | undefined): SlotPool {
    const { bootstrap, umask, workersDir, openFiles } = this.#settings
    return new SlotPool(
      {
        ...{ bootstrap, umask, workersDir, openFiles, pipesDir: this.#folders.pipesDir },
        onTaskEnd: (slot, name) => {
          const run = this.#runs.get(name)
          if (run?.slot === slot) void run.settle()
        },
        onExit: (slot, hasFailed) => {
          for (const run of this.#runs.values()) {
            if (run.slot === slot) void run.slotEnded(hasFailed)
          }
        },
      },
      cgroups,
    )
  }

  #makeContext(): RunContext {
    return {
      terminationGraceMs: this.#settings.terminationGraceMs,
      pipesDir: this.#folders.pipesDir,
      slots: this.#slots,
      processes: this.#processes,
      isClosed: () => this.#isClosed,
      completionOf: (record) => this.#known.completion(record.name, record),
      onOutput: () => this.#takeSoon(TAKE_MS),
      onMoved: ({ record }) => this.#known.keep(record),
      onEnd: ({ record }, isClean) => {
        this.#runs.delete(record.name)
        this.#ended.set(record.name, isClean)
      },
    }
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
    const slot = await this.#slots.take()
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
        files: preparationFiles(spec),
        notes,
      })
    } catch (err) {
      this.#slots.giveBack(slot)
      throw err
    }
    let log: TaskLog
    try {
      log = new TaskLog(folder, 2 * spec.maxLogBytes)
    } catch (err) {
      this.#slots.giveBack(slot)
      await this.#folders.release(folder)
      throw err
    }
    const job = jobOf(spec, { folder, tmp: this.#folders.tmpOf(folder), settings: this.#settings })
    this.#known.keep(record)
    this.#runs.set(spec.name, new LocalRun(this.#context, folder, record, { slot, job, log }))
    return this.#info(record)
  }

  find(name: string): WorkerInfo | undefined {
    try {
      const record = this.#runs.get(name)?.record ?? this.#known.read(name)
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
    // A task may have made away with its folder.
    const all = new Set([...this.#known.names(), ...this.#runs.keys()])
    return [...all].flatMap((name) => this.find(name) ?? [])
  }

  async completion(name: string): Promise<End> {
    await this.#making.get(name)?.made
    const run = this.#runs.get(name) ?? this.#attach(name)
    // Before what it left is ended: its shell would take that for the task's own end.
    const completion = run ? await run.outcome : this.#known.completion(name)
    if (!run) await this.#endLeftovers(name)
    const wholeLog = this.#ended.get(name) ? shortLog(this.#folder(name)) : undefined
    return { completion, wholeLog }
  }

  tail(name: string, maxBytes: number): LogTail {
    return folders.readTail(this.#folder(name), maxBytes)
  }

  /** Ends the task's processes and what it left: TERM, and KILL after the grace period. Repeating it is safe. */
  async stop(name: string): Promise<void> {
    const run = this.#runs.get(name) ?? this.#attach(name)
    if (run) await run.stop()
    else await this.#endLeftovers(name)
  }

  /** True once the task itself has ended of its own accord, also while something of it may still write into its log. */
  hasEnded(name: string): boolean {
    return this.#runs.get(name)?.endedByItself ?? this.#ended.has(name)
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
      this.#known.forget(name)
    } finally {
      this.#terminating.delete(name)
    }
  }

  /** Gives back the space of what the outcome of an ended task does not need. Does nothing while the task runs. */
  async freeSpace(name: string): Promise<void> {
    if (this.#runs.has(name) || this.#making.has(name) || this.#attach(name)) return
    if (!this.#ended.get(name) && !(await this.#endLeftovers(name))) return
    await this.#folders.freeSpace(this.#folder(name), this.#settings.logBytesKept)
  }

  /** Does what provisioning does, as far as that leaves nothing behind: forks, writes, lists, reads. Throws a `LocalFailure`. */
  async check(): Promise<void> {
    this.#folders.check(this.#settings.tasksDir)
    this.#slots.giveBack(await this.#slots.takeProven())
  }

  /** Lets go: tasks under way end without us. */
  close(): void {
    this.#isClosed = true
    clearInterval(this.#watch)
    clearTimeout(this.#taking)
    clearInterval(this.#sweep)
    this.#folders.close()
    for (const run of this.#runs.values()) run.release()
    this.#slots.close()
  }

  /** A folder without its record was being made when the power went: nothing runs in it, and the name is free. Never rejects. */
  async #endIfHalfMade(name: string): Promise<void> {
    try {
      const isOurs = isWorkerName(name)
      if (isOurs && this.#known.read(name) === undefined) await this.terminate(name)
    } catch {
      // It is lost, or out of reach: whoever asks for it is told.
    }
  }

  /** What an earlier process made of the name. Undefined: nothing was started. */
  async #existing({ name, taskId }: WorkerSpec): Promise<WorkerInfo | undefined> {
    let record: KnownWorker | undefined
    try {
      record = this.#runs.get(name)?.record ?? this.#known.read(name)
    } catch (err) {
      if (!isLoss(err)) throw err
      // What began must not run again.
      return this.#lostInfo(name, taskId)
    }
    if (!record) return undefined
    if (record.taskId !== taskId) throw new LocalFailure('name_taken')
    if (this.#runs.has(name)) return this.#info(record)
    const folder = this.#folder(name)
    try {
      // Its shell either has the job in its pipe and is about to start it, or sees the pipe's end and goes.
      while (!folders.hasStarted(folder) && isAliveIfAny(record.slot)) await pause(BEGIN_LOOK_MS)
      return folders.hasStarted(folder) ? this.#info(record) : undefined
    } catch (err) {
      if (!isLoss(err)) throw err
      return this.#info(record)
    }
  }

  /** Undefined: it has ended, or is lost. */
  #attach(name: string): LocalRun | undefined {
    if (this.#ended.has(name)) return undefined
    const folder = this.#folder(name)
    const record = this.#known.readIfWhole(name)
    if (!record?.slot) return undefined
    const { slot } = record
    try {
      if (folders.readExit(folder) || !isAlive(slot)) return undefined
    } catch (err) {
      if (!isLoss(err)) throw err
      return undefined
    }
    const whole = { ...record, slot }
    const run = new LocalRun(this.#context, folder, whole)
    this.#known.keep(whole)
    this.#runs.set(name, run)
    return run
  }

  #takeSoon(ms: number): void {
    if (this.#isClosed || (this.#taking && ms >= this.#takeMs)) return
    clearTimeout(this.#taking)
    this.#takeMs = ms
    this.#taking = setTimeout(() => {
      this.#taking = undefined
      let taken = 0
      for (const run of this.#runs.values()) taken = Math.max(taken, run.take())
      if (this.#runs.size === 0) return
      const isMore = taken >= TAKE_BYTES
      this.#takeSoon(isMore ? 0 : taken > 0 ? TAKE_MS : Math.min(2 * ms || 1, TAKE_MAX_MS))
    }, ms)
  }

  async #endLeftovers(name: string): Promise<boolean> {
    return killAll(() => leftOf(this.#processes, name, this.#known.readIfWhole(name) ?? {}))
  }

  #info(record: KnownWorker): WorkerInfo {
    const { name, taskId, size, createdAt } = record
    return { name, taskId, size, createdAt, status: this.#status(record) }
  }

  /** Of a worker whose record tells nothing any more. */
  #lostInfo(name: string, taskId: string): WorkerInfo {
    const { ctimeMs = Date.now() } = lstatSync(this.#folder(name), { throwIfNoEntry: false }) ?? {}
    const status = this.#terminating.has(name) ? 'Terminating' : 'Completed'
    return { name, taskId, size: null, createdAt: Math.floor(ctimeMs), status }
  }

  #status({ name, slot }: KnownWorker): WorkerStatus {
    if (this.#terminating.has(name)) return 'Terminating'
    if (this.#runs.has(name)) return 'Running'
    if (this.#ended.has(name)) return 'Completed'
    try {
      const isRunning = !folders.readExit(this.#folder(name)) && isAliveIfAny(slot)
      return isRunning ? 'Running' : 'Completed'
    } catch (err) {
      if (!isLoss(err)) throw err
      return 'Completed'
    }
  }

  #folder(name: string): string {
    return this.#known.folder(name)
  }
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
