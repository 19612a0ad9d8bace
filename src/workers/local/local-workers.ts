import { lstatSync, mkdirSync } from 'node:fs'
import { setTimeout as pause } from 'node:timers/promises'
import type { Completion, LogTail, WorkerSpec, WorkerStatus } from '../../core/ports.ts'
import { isWorkerName } from '../../core/task.ts'
import { preparationFiles } from '../repositories.ts'
import { SlotCgroups, WorkerProcesses } from './cgroup.ts'
import { isFolderBroken, LocalFailure } from './failures.ts'
import * as folders from './folders.ts'
import { type Interpreters, jobOf } from './job.ts'
import { type KnownWorker, KnownWorkers } from './known-workers.ts'
import { LeftoverFinder } from './leftover-finder.ts'
import { killAll, leftoversOf, readerEnded } from './leftovers.ts'
import { LocalRun, type RunContext } from './local-run.ts'
import { OutputPoller } from './output-poller.ts'
import { isAlive } from './processes.ts'
import type { OnUnremovable } from './removal.ts'
import { SlotPool } from './slot-pool.ts'
import { TaskLog } from './task-log.ts'
import { WorkerFolders } from './worker-folders.ts'

export interface LocalSettings {
  /** Folder that holds the folders of the workers. */
  workersDir: string
  tasksDir: string
  bootstrap: string
  interpreters: Interpreters
  /** Variables of every task, besides those for its folders. */
  environment: Record<string, string>
  /** Umask of the tasks; the service's own is stricter. */
  umask: number
  /** Soft limit of the tasks' open files; undefined: the service's own. */
  openFiles?: number | undefined
  terminationGraceMs: number
  /** Last bytes of a log that `freeSpace` keeps. */
  logBytesKept: number
}

export interface WorkerInfo {
  name: string
  /** Empty if it is unknown: the task broke its worker's record, and the service was restarted. */
  taskId: string
  size: string | null
  createdAt: number
  status: WorkerStatus
}

/** Interval at which logs and the shells of an earlier process are checked. */
const POLL_MS = 100
const BEGIN_POLL_MS = 5
/**
 * Interval at which the cache of processes is cleared, in which a reused pid could hide a process,
 * and removals are tried again.
 */
const SWEEP_MS = 60_000

export interface End {
  completion: Completion
  /** Given for a short log that is complete, which saves a call of `tail`. */
  wholeLog: LogTail | undefined
}

/**
 * Makes, finds and ends local workers. Runs on its own thread (thread.ts), since everything here
 * may block. All its state can be read again from the workers' folders. Tasks may break those: that
 * affects only the task's own worker.
 */
export class LocalWorkers {
  readonly #settings: LocalSettings
  readonly #folders: WorkerFolders
  /** Runs of workers whose task has not ended, as far as we know. */
  readonly #runs = new Map<string, LocalRun>()
  readonly #known: KnownWorkers
  readonly #terminating = new Set<string>()
  /** Workers that are being made, until they are made or terminated. */
  readonly #making = new Map<string, { taskId: string; made: Promise<WorkerInfo> }>()
  /** Workers whose task has ended here, with whether all its processes have. */
  readonly #ended = new Map<string, boolean>()
  readonly #processes: WorkerProcesses
  readonly #slots: SlotPool
  readonly #context: RunContext
  readonly #output = new OutputPoller(this.#runs)
  readonly #pollTimer: NodeJS.Timeout
  readonly #sweepTimer: NodeJS.Timeout
  #isClosed = false

  /** Throws when the workers' folder cannot be used. */
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
    for (const name of this.#known.names()) void this.#removeHalfMade(name)
    this.#pollTimer = setInterval(() => {
      for (const run of this.#runs.values()) run.poll()
    }, POLL_MS)
    this.#sweepTimer = setInterval(() => {
      leftovers.forget()
      this.#slots.removeCgroups()
      this.#folders.retry()
    }, SWEEP_MS)
  }

  #makeSlots(cgroups: SlotCgroups | undefined): SlotPool {
    return new SlotPool(
      {
        ...this.#settings,
        pipesDir: this.#folders.pipesDir,
        onTaskEnd: (slot, name) => {
          const run = this.#runs.get(name)
          if (run?.slot === slot) void run.settle()
        },
        onExit: (slot, hasFailed) => {
          for (const run of this.#runs.values()) {
            if (run.slot === slot) void run.slotExited(hasFailed)
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
      onOutput: () => this.#output.soon(),
      onMoved: ({ record }) => this.#known.keep(record),
      onEnd: ({ record }, isClean) => {
        this.#runs.delete(record.name)
        this.#ended.set(record.name, isClean)
      },
    }
  }

  /** Makes a worker. Idempotent by name: never starts a task twice. */
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
      ...slot.recordFields,
    }
    try {
      // The caller has given up: the task must not run later.
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
      // Listed, so that the reaper terminates a worker whose caller has given up.
      const making = this.#making.get(name)
      const status = 'Provisioning' as const
      return making && { name, taskId: making.taskId, size: null, createdAt: Date.now(), status }
    } catch (err) {
      if (!isFolderBroken(err)) throw err
      return this.#lostInfo(name, '')
    }
  }

  list(): WorkerInfo[] {
    // A task may have removed its folder.
    const all = new Set([...this.#known.names(), ...this.#runs.keys()])
    return [...all].flatMap((name) => this.find(name) ?? [])
  }

  async completion(name: string): Promise<End> {
    await this.#making.get(name)?.made
    const run = this.#runs.get(name) ?? this.#attach(name)
    // Waits before other processes are ended: the shell would report that as the task's end.
    const completion = run ? await run.outcome : this.#known.completion(name)
    if (!run) {
      await this.#endLeftovers(name)
      if (!this.#ended.has(name)) await readerEnded(this.#known.readIfWhole(name)?.reader)
    }
    const wholeLog = this.#ended.get(name) ? folders.readShortLog(this.#folder(name)) : undefined
    return { completion, wholeLog }
  }

  tail(name: string, maxBytes: number): LogTail {
    return folders.readTail(this.#folder(name), maxBytes)
  }

  /** Sends TERM to the task's processes, and KILL after the grace period. Idempotent. */
  async stop(name: string): Promise<void> {
    const run = this.#runs.get(name) ?? this.#attach(name)
    if (run) await run.stop()
    else await this.#endLeftovers(name)
  }

  /** Returns whether the task has ended unstopped, even if other processes still write its log. */
  hasEnded(name: string): boolean {
    return this.#runs.get(name)?.endedByItself ?? this.#ended.has(name)
  }

  /** Removes a worker. Idempotent. Rejects while processes of it are left. */
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

  /** Removes the files of an ended task but its outcome. Does nothing while the task runs. */
  async freeSpace(name: string): Promise<void> {
    if (this.#runs.has(name) || this.#making.has(name) || this.#attach(name)) return
    if (!this.#ended.get(name) && !(await this.#endLeftovers(name))) return
    await this.#folders.freeSpace(this.#folder(name), this.#settings.logBytesKept)
  }

  /** Checks that workers can be made: forks, writes, lists, reads. Throws a `LocalFailure`. */
  async check(): Promise<void> {
    this.#folders.check(this.#settings.tasksDir)
    this.#slots.giveBack(await this.#slots.takeProven())
  }

  /** Stops; running tasks go on. */
  close(): void {
    this.#isClosed = true
    clearInterval(this.#pollTimer)
    this.#output.close()
    clearInterval(this.#sweepTimer)
    this.#folders.close()
    for (const run of this.#runs.values()) run.release()
    this.#slots.close()
  }

  /** Removes a folder without a record, left by a loss of power before a task. Never rejects. */
  async #removeHalfMade(name: string): Promise<void> {
    try {
      const isWorker = isWorkerName(name)
      if (isWorker && this.#known.read(name) === undefined) await this.terminate(name)
    } catch {
      // Callers that ask for this worker get the error.
    }
  }

  /** Returns the worker of that name if its task was started. */
  async #existing({ name, taskId }: WorkerSpec): Promise<WorkerInfo | undefined> {
    let record: KnownWorker | undefined
    try {
      record = this.#runs.get(name)?.record ?? this.#known.read(name)
    } catch (err) {
      if (!isFolderBroken(err)) throw err
      // A task that was started must not run again.
      return this.#lostInfo(name, taskId)
    }
    if (!record) return undefined
    if (record.taskId !== taskId) throw new LocalFailure('name_taken')
    if (this.#runs.has(name)) return this.#info(record)
    const folder = this.#folder(name)
    try {
      // The shell either has the job in its pipe and will begin it, or reads the end of the pipe
      // and exits.
      while (!folders.hasStarted(folder) && isAlive(record.slot)) await pause(BEGIN_POLL_MS)
      return folders.hasStarted(folder) ? this.#info(record) : undefined
    } catch (err) {
      if (!isFolderBroken(err)) throw err
      return this.#info(record)
    }
  }

  /** Attaches to a running task; returns undefined if it has ended, or is lost. */
  #attach(name: string): LocalRun | undefined {
    if (this.#ended.has(name)) return undefined
    const folder = this.#folder(name)
    const record = this.#known.readIfWhole(name)
    if (!record?.slot) return undefined
    const { slot } = record
    try {
      if (folders.readExit(folder) || !isAlive(slot)) return undefined
    } catch (err) {
      if (!isFolderBroken(err)) throw err
      return undefined
    }
    const whole = { ...record, slot }
    const run = new LocalRun(this.#context, folder, whole)
    this.#known.keep(whole)
    this.#runs.set(name, run)
    return run
  }

  async #endLeftovers(name: string): Promise<boolean> {
    return killAll(() => leftoversOf(this.#processes, name, this.#known.readIfWhole(name) ?? {}))
  }

  #info(record: KnownWorker): WorkerInfo {
    const { name, taskId, size, createdAt } = record
    return { name, taskId, size, createdAt, status: this.#status(record) }
  }

  /** Returns what is known of a worker whose record is broken. */
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
      const isRunning = !folders.readExit(this.#folder(name)) && isAlive(slot)
      return isRunning ? 'Running' : 'Completed'
    } catch (err) {
      if (!isFolderBroken(err)) throw err
      return 'Completed'
    }
  }

  #folder(name: string): string {
    return this.#known.folder(name)
  }
}
