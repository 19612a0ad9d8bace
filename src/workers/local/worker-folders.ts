import { randomUUID } from 'node:crypto'
import {
  chmodSync,
  lstatSync,
  mkdirSync,
  opendirSync,
  readdirSync,
  readlinkSync,
  realpathSync,
  renameSync,
  rmdirSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { leftOutNotes } from '../../core/tasks-folder.ts'
import { codeOf, isOurs, LocalFailure, sorted, sortedAs } from './failures.ts'
import {
  type Contents,
  cutLog,
  DIRECTORIES,
  empty,
  fill,
  LINKS,
  makeDirectories,
  OUTCOME,
  REWRITTEN,
  type WorkerRecord,
} from './folders.ts'
import { type OnUnremovable, Removal, removedAtOnce } from './removal.ts'
import { ShortPaths } from './short-paths.ts'
import { assertCopied, copyTasks, isUntouched, type TasksCopy } from './tasks-copy.ts'

/** More than run at a time on most machines. */
const SPARES_MAX = 64
/** What hinders may be put right twice: there is no folder to move to, and no right to move. */
const MOVES_MAX = 3
const TRIAL = Buffer.alloc(16 * 1024, ' ')

/** What must not have changed. */
interface Prints {
  byName: ReadonlyMap<string, string>
  tasks: TasksCopy
}

interface Spare {
  folder: string
  /** Undefined: there is none in it. */
  tasks: TasksCopy | undefined
}

/**
 * Makes the folders of workers, and uses them again. A file system makes a new inode ever more slowly while it takes leave of
 * others (ext4 looks past all that were freed in the last five seconds), and making and removing waits for the disk whenever
 * the store does. So what a task did not touch is kept for the next one: its folder, without anything in it that a task may find.
 */
export class WorkerFolders {
  /** Of the workers' folder as it was found. */
  readonly #inode: number
  readonly #realDir: string
  /** Beside the folder of the workers: what is in there is no worker. */
  readonly #sparesDir: string
  /** For the pipes of slot shells. It may not be there. */
  readonly pipesDir: string
  readonly #spares: Spare[] = []
  /** Of the workers that got their folder here. */
  readonly #prints = new Map<string, Prints>()
  /** They may lie in the tasks folder. */
  readonly #notCopied: readonly string[]
  readonly #removal: Removal
  readonly #shortPaths: ShortPaths

  /** `workersDir` must be there. */
  constructor(workersDir: string, onUnremovable: OnUnremovable = () => {}) {
    this.#realDir = realpathSync.native(workersDir)
    this.#inode = lstatSync(this.#realDir).ino
    this.#sparesDir = `${workersDir}-spare`
    this.pipesDir = `${workersDir}-pipes`
    this.#removal = new Removal(this.#sparesDir, onUnremovable)
    this.#removeLeft()
    this.#shortPaths = new ShortPaths(workersDir)
    const around = realpathSync.native(dirname(workersDir))
    const beside = [this.#sparesDir, this.pipesDir].map((path) => join(around, basename(path)))
    this.#notCopied = [this.#realDir, ...beside]
  }

  /**
   * Makes the folder ready for its task. It comes to its place by renaming: once it is there, it is whole. Throws a
   * `LocalFailure` where that is anybody's fault, and leaves nothing then.
   */
  prepare(folder: string, tasksDir: string, contents: Contents): void {
    const spare = this.#spares.pop()
    const draft = spare?.folder ?? this.#spareFolder()
    try {
      if (!spare) this.#makeFolder(draft)
      makeDirectories(draft)
      const to = join(draft, 'tasks')
      const tasks = copyTasks(tasksDir, to, this.#notCopied, spare?.tasks)
      const { leftOut } = tasks
      if (contents.taskFile !== '') assertCopied(contents.taskFile, { tasksDir, to, leftOut })
      const identity = this.identityOf(lstatSync(draft).ino, basename(folder))
      fill(draft, {
        ...contents,
        record: { ...contents.record, folder: identity },
        notes: [...contents.notes, ...leftOutNotes(leftOut)],
      })
      const byName = printsOf(draft)
      this.#moveTo(folder, draft)
      this.#prints.set(folder, { byName, tasks })
    } catch (err) {
      void this.#removal.add(draft)
      throw this.#failureOf(err, tasksDir)
    }
  }

  /** Returns a short path to the folder's `tmp`, if there can be one. */
  tmpOf(folder: string): string {
    return join(this.#shortPaths.to(folder), 'tmp')
  }

  /** What a record is of: a copy of the folder is another one. */
  identityOf(inode: number, name: string): string {
    return `${inode} ${join(this.#realDir, name)}`
  }

  isOf(record: WorkerRecord, inode: number): boolean {
    return record.folder === undefined || record.folder === this.identityOf(inode, record.name)
  }

  /** True of the folder of a worker that has ended: only what cannot be removed is left of it. */
  isLeft(folder: string): boolean {
    return this.#removal.has(folder)
  }

  /** The worker has ended, and nothing of it runs. Its folder is out of the way when this settles, if it can be moved or removed. */
  async release(folder: string): Promise<void> {
    this.#shortPaths.remove(folder)
    const prints = this.#prints.get(folder)
    let spare: string | undefined
    try {
      spare = this.#movedAside(folder)
    } catch (err) {
      if (isOurs(err)) throw sorted(err)
      this.#prints.delete(folder)
      await this.#removal.add(folder)
      return
    }
    this.#prints.delete(folder)
    if (spare === undefined) return
    if (prints && this.#spares.length < SPARES_MAX) {
      try {
        const tasks = removeChanged(spare, prints)
        empty(spare)
        this.#spares.push({ folder: spare, tasks })
        return
      } catch {
        // It is of no use to a next worker.
      }
    }
    void this.#removal.add(spare)
  }

  /**
   * Empties the folder of a worker that has ended of all but its outcome, with the last bytes of its log; and gives up what is
   * spared.
   */
  async freeSpace(folder: string, logBytesKept: number): Promise<void> {
    // What is not as it was made is not used again.
    this.#prints.delete(folder)
    const spares = this.#spares.splice(0).map((spare) => this.#removal.add(spare.folder))
    if (lstatSync(folder, { throwIfNoEntry: false })?.isDirectory()) {
      await this.#removal.empty(folder, OUTCOME)
      cutLog(folder, logBytesKept)
    }
    await Promise.all(spares)
  }

  /** Does what `prepare` does, as far as that leaves nothing behind. Throws a `LocalFailure`. */
  check(tasksDir: string): void {
    this.sureOfWorkersDir()
    try {
      const trial = this.#spareFolder()
      this.#makeFolder(trial)
      try {
        // As many as a folder has: a disk may have room for bytes and not for files.
        makeDirectories(trial)
        for (const name of REWRITTEN) writeFileSync(join(trial, name), '', { mode: 0o600 })
        writeFileSync(join(trial, 'log'), TRIAL, { mode: 0o600 })
      } finally {
        removedAtOnce(trial)
      }
    } catch (err) {
      throw sortedAs('workers_folder_away', err)
    }
    sureOfTasks(tasksDir)
  }

  /** Throws a `LocalFailure` unless the folder of the workers is the one it was: a disk may be away, and with it every worker. */
  sureOfWorkersDir(): void {
    try {
      if (lstatSync(this.#realDir).ino === this.#inode) {
        listable(this.#realDir)
        return
      }
    } catch (err) {
      throw sortedAs('workers_folder_away', err)
    }
    throw new LocalFailure('workers_folder_away')
  }

  /** Tries again what could not be removed. */
  retry(): void {
    this.#removal.retry()
  }

  close(): void {
    for (const { folder } of this.#spares.splice(0)) void this.#removal.add(folder)
    this.#removal.close()
    this.#shortPaths.close()
  }

  /** Removes what an earlier process, which was killed, had spared, and tries again what it could not remove. */
  #removeLeft(): void {
    void this.#removal.add(this.pipesDir)
    let left: string[]
    try {
      left = readdirSync(this.#sparesDir)
    } catch (err) {
      // A file, or what else is in its place, holds no folder of a worker.
      if (codeOf(err) !== 'ENOENT') void this.#removal.add(this.#sparesDir)
      return
    }
    for (const name of left) void this.#removal.add(join(this.#sparesDir, name))
    try {
      rmdirSync(this.#sparesDir)
    } catch {
      // Some are still being removed, or cannot be.
    }
  }

  #moveTo(folder: string, draft: string): void {
    try {
      renameSync(draft, folder)
    } catch (err) {
      // Left by an earlier process, whose task never began.
      if (!['ENOTEMPTY', 'EEXIST', 'ENOTDIR'].includes(codeOf(err) ?? '')) throw err
      const aside = this.#movedAside(folder)
      if (aside !== undefined) void this.#removal.add(aside)
      renameSync(draft, folder)
    }
  }

  /** Where it is then; undefined when it was not there. */
  #movedAside(folder: string): string | undefined {
    const aside = this.#spareFolder()
    for (let tries = 1; ; tries += 1) {
      try {
        renameSync(folder, aside)
        return aside
      } catch (err) {
        const code = codeOf(err) ?? ''
        if (tries === MOVES_MAX) throw err
        const stats = lstatSync(folder, { throwIfNoEntry: false })
        if (!stats) return undefined
        // Somebody may have removed where it goes, or its own permissions, which moving it needs.
        if (code === 'ENOENT') mkdirSync(this.#sparesDir, { recursive: true, mode: 0o700 })
        else if (['EACCES', 'EPERM'].includes(code) && stats.isDirectory()) chmodSync(folder, 0o700)
        else throw err
      }
    }
  }

  /** Whose fault it is that a folder could not be made. */
  #failureOf(err: unknown, tasksDir: string): unknown {
    const known = sorted(err)
    // What a read may fail of as well is the tasks folder's when that fails again.
    if (known instanceof LocalFailure && known.kind !== 'disk_failing') return known
    try {
      this.check(tasksDir)
      return known
    } catch (failure) {
      return failure
    }
  }

  /** Not `recursive` at once, which says ENOENT of a disk that is read-only. */
  #makeFolder(path: string): void {
    try {
      mkdirSync(path, { mode: 0o700 })
    } catch (err) {
      if (codeOf(err) !== 'ENOENT') throw err
      mkdirSync(this.#sparesDir, { recursive: true, mode: 0o700 })
      mkdirSync(path, { mode: 0o700 })
    }
  }

  #spareFolder(): string {
    return join(this.#sparesDir, randomUUID())
  }
}

/** Throws a `LocalFailure` when the tasks folder cannot be read. */
function sureOfTasks(tasksDir: string): void {
  try {
    listable(tasksDir)
  } catch (err) {
    const known = sorted(err)
    const isItsOwn = !(known instanceof LocalFailure) || known.kind === 'disk_failing'
    throw isItsOwn ? new LocalFailure('tasks_folder_away', { cause: err }) : known
  }
}

/** Throws when it cannot be. Reads some entries at most: it may hold many. */
function listable(folder: string): void {
  const directory = opendirSync(folder)
  try {
    directory.readSync()
  } finally {
    directory.closeSync()
  }
}

/** What is left of the tasks. Throws when the folder is of no more use. */
function removeChanged(folder: string, { byName, tasks }: Prints): TasksCopy | undefined {
  if (printOf(folder) !== byName.get('.')) throw new Error('the folder itself was changed')
  const isAsItWas = (name: string) =>
    printOf(folder, name) === byName.get(name) &&
    (!(name in DIRECTORIES) || readdirSync(join(folder, name)).length === DIRECTORIES[name])
  let left: TasksCopy | undefined
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const { name } = entry
    const path = join(folder, name)
    if (name === 'tasks' && isUntouched(path, tasks)) {
      left = tasks
      continue
    }
    // With what is known to be in it, from the outside in.
    const known = [...byName.keys()].filter((key) => key === name || key.startsWith(`${name}/`))
    if (known.length > 0 && known.every(isAsItWas)) continue
    if (!entry.isDirectory()) unlinkSync(path)
    else if (!removedAtOnce(path)) throw new Error('there is more to remove than takes a moment')
  }
  return left
}

function printsOf(folder: string): Prints['byName'] {
  const names = ['.', ...Object.keys(DIRECTORIES), ...Object.keys(LINKS), ...REWRITTEN]
  return new Map(names.map((name) => [name, printOf(folder, name)]))
}

/** A directory's and a link's tell also whether anything was ever done to it; the files are written by others than the task. */
function printOf(folder: string, name = '.'): string {
  const path = join(folder, name)
  const { ino, mode, uid, gid, nlink, ctimeMs } = lstatSync(path)
  const place = name in LINKS ? [readlinkSync(path)] : []
  if (name in DIRECTORIES || name in LINKS)
    return [ino, mode, uid, gid, ctimeMs, ...place].join(' ')
  return [ino, mode, uid, gid, ...(name === '.' ? [] : [nlink])].join(' ')
}
