import { lstatSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import type { Completion } from '../../core/ports.ts'
import { isWorkerName } from '../../core/task.ts'
import { completionOf, lost } from '../completion.ts'
import { classified, classifiedAs, isFolderBroken, LocalFailure } from './failures.ts'
import * as folders from './folders.ts'
import type { ProcessIdentity } from './processes.ts'
import type { WorkerFolders } from './worker-folders.ts'

export const NO_EXIT =
  'The worker ended without recording an exit code (killed, or the machine restarted)'
const COPIED = "The worker's folder was copied or moved: its record belongs to another folder"

/** A worker according to its record. */
export interface KnownWorker extends Omit<folders.WorkerRecord, 'slot'> {
  /** Undefined: the record was copied from another worker's folder. */
  slot: ProcessIdentity | undefined
}

/** Reads the folders of workers that have no run in this process; tasks may have broken them. */
export class KnownWorkers {
  readonly #workersDir: string
  readonly #folders: WorkerFolders
  /** Records of workers that this process made or attached to, until they are terminated. */
  readonly #records = new Map<string, folders.WorkerRecord>()
  /** Workers of an earlier process that have processes, but no folder any more. */
  readonly #withoutFolder: Set<string>

  /** `withProcesses`: names of the workers that have processes. */
  constructor(workersDir: string, workerFolders: WorkerFolders, withProcesses: Iterable<string>) {
    this.#workersDir = workersDir
    this.#folders = workerFolders
    const hasNoFolder = (name: string) => !lstatSync(this.folder(name), { throwIfNoEntry: false })
    this.#withoutFolder = new Set([...withProcesses].filter(hasNoFolder))
  }

  folder(name: string): string {
    return join(this.#workersDir, name)
  }

  /** Returns names that may be those of workers. Throws a `LocalFailure` if they cannot be read. */
  names(): string[] {
    try {
      return [...readdirSync(this.#workersDir), ...this.#withoutFolder]
    } catch (err) {
      throw classifiedAs('workers_folder_away', err)
    }
  }

  keep(record: folders.WorkerRecord): void {
    this.#records.set(record.name, record)
  }

  forget(name: string): void {
    this.#records.delete(name)
    this.#withoutFolder.delete(name)
  }

  /** Returns a worker; undefined if its task was not started. Throws like `folders.readRecord`. */
  read(name: string): KnownWorker | undefined {
    // Other files in the workers' folder are left alone.
    if (!isWorkerName(name)) return undefined
    const folder = this.folder(name)
    const stats = lstatSync(folder, { throwIfNoEntry: false })
    if (!stats && this.#withoutFolder.has(name)) throw broken("The worker's folder is gone")
    if (!stats || this.#folders.isReleased(folder)) return undefined
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

  /** Returns the same as `read`, but undefined when the task broke the record. */
  readIfWhole(name: string): KnownWorker | undefined {
    try {
      return this.read(name)
    } catch (err) {
      if (!isFolderBroken(err)) throw err
      return undefined
    }
  }

  /**
   * Returns how an ended task ended. `record`: used instead of the one in the folder. Throws a
   * `LocalFailure` while the folder cannot be read, unless the task broke it.
   */
  completion(name: string, record?: KnownWorker): Completion {
    let message = NO_EXIT
    try {
      const exit = folders.readExit(this.folder(name))
      if (exit) return completionOf(exit)
      const known = record ?? this.read(name)
      if (known && !known.slot) message = COPIED
    } catch (err) {
      if (!isFolderBroken(err)) throw classified(err)
      message = err.message
    }
    // An unmounted disk has no exit file either.
    this.#folders.assertWorkersDir()
    return lost(message)
  }
}

function broken(message: string): LocalFailure {
  return new LocalFailure('folder_broken', { message })
}
