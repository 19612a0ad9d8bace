import { lstatSync, mkdirSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import type { Completion, LogTail, WorkerSpec, WorkerStatus } from '../../core/ports.ts'
import { completionOf, lost, overLogLimit } from '../completion.ts'
import { repositoryFiles } from '../repositories.ts'
import * as folders from './folders.ts'
import { type Interpreters, jobText } from './job.ts'
import { identify, isAlive, kill, LeftoverFinder } from './processes.ts'
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
}

export interface WorkerInfo {
  name: string
  taskId: string
  size: string | null
  createdAt: number
  status: WorkerStatus
}

/** How often logs are measured, and shells of an earlier process looked at. */
const WATCH_MS = 100
const KILL_ROUND_MS = 5
const KILL_ROUNDS_MAX = 400
const BEGIN_ROUNDS_MAX = 200
const SHORT_LOG_BYTES = 64 * 1024
/** A process id used again could hide a leftover from the finder's memory for so long. */
const FORGET_MS = 60_000

export interface End {
  completion: Completion
  /** When it is short and can grow no more: then nobody need ask for it. */
  wholeLog: LogTail | undefined
}

/** A worker whose task has not ended, as far as we know. */
interface Live {
  folder: string
  record: folders.WorkerRecord
  /** Undefined: a shell that an earlier process started. */
  slot: SlotShell | undefined
  ended: PromiseWithResolvers<Completion>
  settling: boolean
  overLogLimit: boolean
}

/**
 * Local workers. Everything here may block, so it runs on a thread of its own (thread.ts); what it knows it
 * can find again from the workers' folders.
 */
export class LocalWorkers {
  readonly #settings: LocalSettings
  readonly #folders: WorkerFolders
  readonly #live = new Map<string, Live>()
  readonly #idleSlots: SlotShell[] = []
  readonly #terminating = new Set<string>()
  /** Workers whose making is under way; one that is terminated meanwhile is not among them any more. */
  readonly #making = new Map<string, Promise<WorkerInfo>>()
  /** Workers whose task has ended with nothing left behind: nothing can come after that. */
  readonly #clean = new Set<string>()
  readonly #leftovers: LeftoverFinder
  readonly #watch: NodeJS.Timeout
  readonly #forget: NodeJS.Timeout

  constructor(settings: LocalSettings) {
    this.#settings = settings
    mkdirSync(settings.workersDir, { recursive: true, mode: 0o700 })
    this.#folders = new WorkerFolders(settings.workersDir)
    this.#leftovers = new LeftoverFinder(settings.workersDir)
    // A folder without its record was being made when the service was killed: nothing runs in it.
    for (const name of readdirSync(settings.workersDir)) {
      const folder = this.#folder(name)
      if (!folders.readRecord(folder)) folders.remove(folder)
    }
    this.#watch = setInterval(() => this.#look(), WATCH_MS)
    this.#forget = setInterval(() => this.#leftovers.forget(), FORGET_MS)
  }

  /** Idempotent by name: a task that was started is attached to, never started again. */
  provision(spec: WorkerSpec, notes: string[]): Promise<WorkerInfo> {
    const { name } = spec
    const underWay = this.#making.get(name)
    if (underWay) return underWay
    const isWanted = () => this.#making.get(name) === making
    const making = this.#make(spec, notes, isWanted).finally(() => {
      if (isWanted()) this.#making.delete(name)
    })
    this.#making.set(name, making)
    return making
  }

  async #make(spec: WorkerSpec, notes: string[], isWanted: () => boolean): Promise<WorkerInfo> {
    const folder = this.#folder(spec.name)
    const existing = await this.#existing(spec.name)
    if (existing) return existing
    // Whoever waited for it has given up meanwhile: it must not run later.
    if (!isWanted()) throw new Error('terminated while it was being made')
    const slot = this.#idleSlots.pop() ?? this.#startSlot()
    const record: folders.WorkerRecord = {
      name: spec.name,
      taskId: spec.taskId,
      size: spec.size ?? null,
      createdAt: Date.now(),
      maxLogBytes: spec.maxLogBytes,
      slot: slot.identity,
    }
    const files = [
      ...(spec.startupScript === undefined
        ? []
        : [{ name: 'startup.sh', content: spec.startupScript }]),
      ...(spec.repositories.length === 0 ? [] : repositoryFiles(spec.repositories)),
    ]
    try {
      this.#folders.prepare(folder, this.#settings.tasksDir, {
        record,
        taskFile: spec.taskFolder === 'tasks' ? spec.taskFileName : '',
        files,
        notes,
      })
    } catch (err) {
      this.#idleSlots.push(slot)
      throw err
    }
    this.#live.set(spec.name, newLive(folder, record, slot))
    slot.run(
      jobText(
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
      ),
    )
    return this.#info(record)
  }

  find(name: string): WorkerInfo | undefined {
    const record = folders.readRecord(this.#folder(name))
    return record && this.#info(record)
  }

  list(): WorkerInfo[] {
    return readdirSync(this.#settings.workersDir).flatMap((name) => this.find(name) ?? [])
  }

  async completion(name: string): Promise<End> {
    await this.#making.get(name)
    const folder = this.#folder(name)
    const live = this.#live.get(name) ?? this.#attach(name)
    if (!live) await this.#endLeftovers(name)
    const completion = live ? await live.ended.promise : completionIn(folder)
    return { completion, wholeLog: this.#clean.has(name) ? shortLog(folder) : undefined }
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
    const { pid } = live.record.slot
    // A shell that has not begun would take the signal for itself, and then begin.
    for (let round = 0; round < BEGIN_ROUNDS_MAX && !folders.hasStarted(live.folder); round += 1) {
      await pause(KILL_ROUND_MS)
    }
    if (isAlive(live.record.slot)) kill(-pid, 'SIGTERM')
    const inTime = new AbortController()
    const ended = live.ended.promise.then(() => inTime.abort())
    await Promise.race([
      ended,
      pause(this.#settings.terminationGraceMs, undefined, { signal: inTime.signal }).catch(
        () => {},
      ),
    ])
    if (!live.settling) {
      if (isAlive(live.record.slot)) kill(-pid)
      await this.#settle(live)
    }
    await ended
  }

  async terminate(name: string): Promise<void> {
    this.#terminating.add(name)
    this.#making.delete(name)
    try {
      if (!this.#clean.has(name)) {
        await this.stop(name)
        if (!(await this.#endLeftovers(name))) {
          throw new Error('processes of the worker cannot be ended')
        }
      }
      this.#folders.release(this.#folder(name))
      this.#clean.delete(name)
    } finally {
      this.#terminating.delete(name)
    }
  }

  /** Lets go: tasks under way end without us. */
  close(): void {
    clearInterval(this.#watch)
    clearInterval(this.#forget)
    this.#folders.close()
    for (const slot of this.#idleSlots) slot.retire()
    for (const { slot } of this.#live.values()) slot?.retire()
  }

  /** What an earlier process made of the name. Undefined: nothing was started. */
  async #existing(name: string): Promise<WorkerInfo | undefined> {
    const folder = this.#folder(name)
    // Nearly always there is none, which this tells sooner than the failure to read it. Any other failure is thrown.
    const isThere = lstatSync(folder, { throwIfNoEntry: false }) !== undefined
    const record = isThere ? folders.readRecord(folder) : undefined
    if (!record) return undefined
    if (this.#live.has(name)) return this.#info(record)
    // Its shell either has the job in its pipe and is about to start it, or sees the pipe's end and goes.
    while (!folders.hasStarted(folder) && isAlive(record.slot)) {
      await pause(KILL_ROUND_MS)
    }
    return folders.hasStarted(folder) ? this.#info(record) : undefined
  }

  #attach(name: string): Live | undefined {
    const folder = this.#folder(name)
    const record = folders.readRecord(folder)
    if (!record || folders.readExit(folder) || !isAlive(record.slot)) return undefined
    const live = newLive(folder, record, undefined)
    this.#live.set(name, live)
    return live
  }

  #startSlot(): SlotShell {
    const slot = new SlotShell({
      bootstrap: this.#settings.bootstrap,
      umask: this.#settings.umask,
      onTaskEnd: (name) => {
        const live = this.#live.get(name)
        if (live) void this.#settle(live)
      },
      onExit: () => {
        const idle = this.#idleSlots.indexOf(slot)
        if (idle >= 0) this.#idleSlots.splice(idle, 1)
        for (const live of this.#live.values()) if (live.slot === slot) void this.#settle(live)
      },
    })
    return slot
  }

  /** Logs over their limit, and shells whose end nobody tells us. */
  #look(): void {
    for (const live of this.#live.values()) {
      if (live.settling) continue
      if (!live.overLogLimit && folders.logBytes(live.folder) > live.record.maxLogBytes) {
        live.overLogLimit = true
        void this.stop(live.record.name)
      }
      const ended = !live.slot && (folders.readExit(live.folder) || !isAlive(live.record.slot))
      if (ended) void this.#settle(live)
    }
  }

  /** The task has ended: end what it left behind, free its slot, tell how it went. Never rejects. */
  async #settle(live: Live): Promise<void> {
    if (live.settling) return
    live.settling = true
    const { name } = live.record
    const clean = await this.#endLeftovers(name)
    this.#live.delete(name)
    if (clean) this.#clean.add(name)
    if (live.slot?.isAlive) {
      if (clean) this.#idleSlots.push(live.slot)
      else live.slot.retire()
    }
    live.ended.resolve(
      live.overLogLimit ? overLogLimit(live.record.maxLogBytes) : completionIn(live.folder),
    )
  }

  /**
   * Ends whatever carries the worker's name or is in the group of its shell, besides the shell. False: some
   * cannot be ended (another user's, or stuck in the kernel).
   */
  async #endLeftovers(name: string): Promise<boolean> {
    const { slot } = this.#live.get(name)?.record ?? folders.readRecord(this.#folder(name)) ?? {}
    // The group counts while the shell is this worker's, and after it has gone. A shell that serves another
    // worker by now, or a process that got its number, has a group of others.
    const isOwn = slot && (this.#live.has(name) || identify(slot.pid) === undefined)
    const group = isOwn ? slot.pid : undefined
    for (let round = 0; round < KILL_ROUNDS_MAX; round += 1) {
      const pids = this.#leftovers.find(name, group)
      if (pids.length === 0) return true
      for (const pid of pids) kill(pid)
      await pause(KILL_ROUND_MS)
    }
    return false
  }

  #info(record: folders.WorkerRecord): WorkerInfo {
    const { name, taskId, size, createdAt } = record
    return { name, taskId, size, createdAt, status: this.#status(name) }
  }

  #status(name: string): WorkerStatus {
    const folder = this.#folder(name)
    if (this.#terminating.has(name)) return 'Terminating'
    if (this.#live.has(name)) return 'Running'
    const record = folders.readRecord(folder)
    return record && !folders.readExit(folder) && isAlive(record.slot) ? 'Running' : 'Completed'
  }

  #folder(name: string): string {
    return join(this.#settings.workersDir, name)
  }
}

function completionIn(folder: string): Completion {
  const exit = folders.readExit(folder)
  if (exit) return completionOf(exit)
  return lost('The worker ended without recording an exit code (killed, or the machine restarted)')
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

function newLive(folder: string, record: folders.WorkerRecord, slot: SlotShell | undefined): Live {
  const ended = Promise.withResolvers<Completion>()
  return { folder, record, slot, ended, settling: false, overLogLimit: false }
}
