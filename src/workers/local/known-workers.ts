import { lstatSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import type { Completion } from '../../core/ports.ts'
import { isWorkerName } from '../../core/task.ts'
import { completionOf, lost } from '../completion.ts'
import { isLoss, LocalFailure, sorted, sortedAs } from './failures.ts'
import * as folders from './folders.ts'
import type { ProcessIdentity } from './processes.ts'
import type { WorkerFolders } from './worker-folders.ts'

export const NO_EXIT =
  'The worker ended without recording an exit code (killed, or the machine restarted)'
const COPIED = "The worker's folder was copied or moved: its record is of another one"

/** A worker as its record has it. */
export interface KnownWorker extends Omit<folders.WorkerRecord, 'slot'> {
  /** Undefined: it is of another folder's worker, and none of our business. */
  slot: ProcessIdentity | undefined
}

/** What can be known of workers whose task does not run here: from their folders, which tasks may have broken. */
export class KnownWorkers {
  readonly #workersDir: string
  readonly #folders: WorkerFolders
  /** Records of workers that this process made or attached to, until they are terminated. */
  readonly #records = new Map<string, folders.WorkerRecord>()
  /** Workers of an earlier process that made away with their folders, and whose processes run. */
  readonly #homeless: Set<string>

  /** `withProcesses`: names of the workers of which processes run. */
  constructor(workersDir: string, workerFolders: WorkerFolders, withProcesses: Iterable<string>) {
    this.#workersDir = workersDir
    this.#folders = workerFolders
    const isGone = (name: string) => !lstatSync(this.folder(name), { throwIfNoEntry: false })
    this.#homeless = new Set([...withProcesses].filter(isGone))
  }

  folder(name: string): string {
    return join(this.#workersDir, name)
  }

  /** Returns the names of what may be workers. Throws a `LocalFailure` when their folder cannot be read. */
  names(): string[] {
    try {
      return [...readdirSync(this.#workersDir), ...this.#homeless]
    } catch (err) {
      throw sortedAs('workers_folder_away', err)
    }
  }

  keep(record: folders.WorkerRecord): void {
    this.#records.set(record.name, record)
  }

  forget(name: string): void {
    this.#records.delete(name)
    this.#homeless.delete(name)
  }

  /** Returns what is known about a worker; undefined when nothing was started. Throws like `folders.readRecord`. */
  read(name: string): KnownWorker | undefined {
    // Whoever puts something else beside the workers' folders may keep it there.
    if (!isWorkerName(name)) return undefined
    const folder = this.folder(name)
    const stats = lstatSync(folder, { throwIfNoEntry: false })
    if (!stats && this.#homeless.has(name)) throw broken("The worker's folder is gone")
    if (!stats || this.#folders.isLeft(folder)) return undefined
    const known = this.#records.get(name)
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

  /** Like `read`; undefined also when the record is broken. */
  readIfWhole(name: string): KnownWorker | undefined {
    try {
      return this.read(name)
    } catch (err) {
      if (!isLoss(err)) throw err
      return undefined
    }
  }

  /**
   * Returns how a task that runs no more has ended. `record`: its worker's, where that is known better than the folder tells.
   * Throws a `LocalFailure` while it cannot be read, for no fault of the task's.
   */
  completion(name: string, record?: KnownWorker): Completion {
    let why = NO_EXIT
    try {
      const exit = folders.readExit(this.folder(name))
      if (exit) return completionOf(exit)
      const known = record ?? this.read(name)
      if (known && !known.slot) why = COPIED
    } catch (err) {
      if (!isLoss(err)) throw sorted(err)
      why = err.message
    }
    // With the disk away there is no exit either.
    this.#folders.sureOfWorkersDir()
    return lost(why)
  }
}

function broken(message: string): LocalFailure {
  return new LocalFailure('folder_broken', { message })
}
