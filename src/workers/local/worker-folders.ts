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
import { classified, classifiedAs, codeOf, isTemporary, LocalFailure } from './failures.ts'
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
import { type OnUnremovable, Removal, removeIfSmall } from './removal.ts'
import { ShortPaths } from './short-paths.ts'
import { assertCopied, copyTasks, isUntouched, type TasksCopy } from './tasks-copy.ts'

/** Maximum folders kept for reuse: most machines run fewer tasks at a time. */
const SPARES_MAX = 64
/** Attempts to move a folder: a missing target and permissions are repaired in between. */
const MOVES_MAX = 3
const TRIAL = Buffer.alloc(16 * 1024, ' ')

/** State of a folder when its task began. */
interface Fingerprints {
  byName: ReadonlyMap<string, string>
  tasks: TasksCopy
}

interface Spare {
  folder: string
  /** Undefined: the folder has no copy of the tasks. */
  tasks: TasksCopy | undefined
}

/**
 * Makes the folders of workers, and reuses them. ext4 allocates inodes slowly for 5 s after many
 * were freed, and creating and removing files waits for the journal, which the store's commits
 * write. So a folder is kept for the next task, without the files that its task made or changed.
 */
export class WorkerFolders {
  /** Inode of the workers' folder at the start. */
  readonly #inode: number
  readonly #realDir: string
  /** Folder of the spare folders, beside that of the workers. */
  readonly #sparesDir: string
  /** Folder of the slot shells' pipes; the shells make it. */
  readonly pipesDir: string
  readonly #spares: Spare[] = []
  /** State of the folders that this process made, by their paths. */
  readonly #fingerprints = new Map<string, Fingerprints>()
  /** Our own folders, which may be inside the tasks folder. */
  readonly #notCopied: readonly string[]
  readonly #removal: Removal
  readonly #shortPaths: ShortPaths

  /** `workersDir` must exist. */
  constructor(workersDir: string, onUnremovable: OnUnremovable = () => {}) {
    this.#realDir = realpathSync.native(workersDir)
    this.#inode = lstatSync(this.#realDir).ino
    this.#sparesDir = `${workersDir}-spare`
    this.pipesDir = `${workersDir}-pipes`
    this.#removal = new Removal(this.#sparesDir, onUnremovable)
    this.#removeEarlier()
    this.#shortPaths = new ShortPaths(workersDir)
    const around = realpathSync.native(dirname(workersDir))
    const beside = [this.#sparesDir, this.pipesDir].map((path) => join(around, basename(path)))
    this.#notCopied = [this.#realDir, ...beside]
  }

  /**
   * Prepares a folder for its task. It is renamed into place last, so that an existing folder is
   * complete. Throws a `LocalFailure` for known failures, and leaves no files then.
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
      const identity = this.#identityOf(lstatSync(draft).ino, basename(folder))
      fill(draft, {
        ...contents,
        record: { ...contents.record, folder: identity },
        notes: [...contents.notes, ...leftOutNotes(leftOut)],
      })
      const byName = fingerprintsOf(draft)
      this.#moveTo(folder, draft)
      this.#fingerprints.set(folder, { byName, tasks })
    } catch (err) {
      void this.#removal.add(draft)
      throw this.#failureOf(err, tasksDir)
    }
  }

  /** Returns the path of the folder's `tmp`, if possible a short one. */
  tmpOf(folder: string): string {
    return join(this.#shortPaths.to(folder), 'tmp')
  }

  /** Returns the identity of a folder, by which a record in a copy of it is detected. */
  #identityOf(inode: number, name: string): string {
    return `${inode} ${join(this.#realDir, name)}`
  }

  isOf(record: WorkerRecord, inode: number): boolean {
    return record.folder === undefined || record.folder === this.#identityOf(inode, record.name)
  }

  /** Returns whether the worker has ended, and its folder is being removed or cannot be. */
  isReleased(folder: string): boolean {
    return this.#removal.has(folder)
  }

  /**
   * Removes the folder of a worker without processes, or keeps it for reuse. Settles once it is
   * gone or cannot be moved or removed.
   */
  async release(folder: string): Promise<void> {
    this.#shortPaths.remove(folder)
    const fingerprints = this.#fingerprints.get(folder)
    let spare: string | undefined
    try {
      spare = this.#moveAside(folder)
    } catch (err) {
      if (isTemporary(err)) throw classified(err)
      this.#fingerprints.delete(folder)
      await this.#removal.add(folder)
      return
    }
    this.#fingerprints.delete(folder)
    if (spare === undefined) return
    if (fingerprints && this.#spares.length < SPARES_MAX) {
      try {
        const tasks = removeChanged(spare, fingerprints)
        empty(spare)
        this.#spares.push({ folder: spare, tasks })
        return
      } catch {
        // It cannot be reused.
      }
    }
    void this.#removal.add(spare)
  }

  /** Removes all but the outcome of an ended task and its log's end, and the spare folders. */
  async freeSpace(folder: string, logBytesKept: number): Promise<void> {
    // Without fingerprints, the folder is not reused.
    this.#fingerprints.delete(folder)
    const spares = this.#spares.splice(0).map((spare) => this.#removal.add(spare.folder))
    if (lstatSync(folder, { throwIfNoEntry: false })?.isDirectory()) {
      await this.#removal.empty(folder, OUTCOME)
      cutLog(folder, logBytesKept)
    }
    await Promise.all(spares)
  }

  /** Checks that `prepare` can work, with a trial folder. Throws a `LocalFailure`. */
  check(tasksDir: string): void {
    this.assertWorkersDir()
    try {
      const trial = this.#spareFolder()
      this.#makeFolder(trial)
      try {
        // As many files as `prepare` makes: a disk may be out of inodes only.
        makeDirectories(trial)
        for (const name of REWRITTEN) writeFileSync(join(trial, name), '', { mode: 0o600 })
        writeFileSync(join(trial, 'log'), TRIAL, { mode: 0o600 })
      } finally {
        removeIfSmall(trial)
      }
    } catch (err) {
      throw classifiedAs('workers_folder_away', err)
    }
    assertTasksDir(tasksDir)
  }

  /** Throws a `LocalFailure` if the workers' folder was replaced, as by an unmounted disk. */
  assertWorkersDir(): void {
    try {
      if (lstatSync(this.#realDir).ino === this.#inode) {
        assertListable(this.#realDir)
        return
      }
    } catch (err) {
      throw classifiedAs('workers_folder_away', err)
    }
    throw new LocalFailure('workers_folder_away')
  }

  /** Tries again to remove what could not be removed. */
  retry(): void {
    this.#removal.retry()
  }

  close(): void {
    for (const { folder } of this.#spares.splice(0)) void this.#removal.add(folder)
    this.#removal.close()
    this.#shortPaths.close()
  }

  /** Removes the spare folders of an earlier process, and what it could not remove. */
  #removeEarlier(): void {
    void this.#removal.add(this.pipesDir)
    let left: string[]
    try {
      left = readdirSync(this.#sparesDir)
    } catch (err) {
      // It is no folder: a file, for example.
      if (codeOf(err) !== 'ENOENT') void this.#removal.add(this.#sparesDir)
      return
    }
    for (const name of left) void this.#removal.add(join(this.#sparesDir, name))
    try {
      rmdirSync(this.#sparesDir)
    } catch {
      // It is not empty: removals go on, or are impossible.
    }
  }

  #moveTo(folder: string, draft: string): void {
    try {
      renameSync(draft, folder)
    } catch (err) {
      // A folder of an earlier process, whose task never began.
      if (!['ENOTEMPTY', 'EEXIST', 'ENOTDIR'].includes(codeOf(err) ?? '')) throw err
      const aside = this.#moveAside(folder)
      if (aside !== undefined) void this.#removal.add(aside)
      renameSync(draft, folder)
    }
  }

  /** Moves a folder to the spare ones. Returns its path there; undefined if it did not exist. */
  #moveAside(folder: string): string | undefined {
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
        // The target may have been removed, or the folder's own permissions.
        if (code === 'ENOENT') mkdirSync(this.#sparesDir, { recursive: true, mode: 0o700 })
        else if (['EACCES', 'EPERM'].includes(code) && stats.isDirectory()) chmodSync(folder, 0o700)
        else throw err
      }
    }
  }

  /** Returns the failure to make a folder: the tasks folder's, the disk's, or the error itself. */
  #failureOf(err: unknown, tasksDir: string): unknown {
    const known = classified(err)
    // A failing disk may be that of the tasks folder: then the check fails.
    if (known instanceof LocalFailure && known.kind !== 'disk_failing') return known
    try {
      this.check(tasksDir)
      return known
    } catch (failure) {
      return failure
    }
  }

  /** Makes a folder and its parent; `recursive` alone would hide EROFS behind ENOENT. */
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
function assertTasksDir(tasksDir: string): void {
  try {
    assertListable(tasksDir)
  } catch (err) {
    const known = classified(err)
    const isItsOwn = !(known instanceof LocalFailure) || known.kind === 'disk_failing'
    throw isItsOwn ? new LocalFailure('tasks_folder_away', { cause: err }) : known
  }
}

/** Throws if a folder cannot be listed. Reads only some of its entries. */
function assertListable(folder: string): void {
  const directory = opendirSync(folder)
  try {
    directory.readSync()
  } finally {
    directory.closeSync()
  }
}

/**
 * Removes what the task made or changed. Returns the copy of the tasks if it is unchanged. Throws
 * if the folder cannot be reused.
 */
function removeChanged(folder: string, { byName, tasks }: Fingerprints): TasksCopy | undefined {
  if (fingerprintOf(folder) !== byName.get('.')) throw new Error('the folder itself was changed')
  const isUnchanged = (name: string) =>
    fingerprintOf(folder, name) === byName.get(name) &&
    (!(name in DIRECTORIES) || readdirSync(join(folder, name)).length === DIRECTORIES[name])
  let left: TasksCopy | undefined
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const { name } = entry
    const path = join(folder, name)
    if (name === 'tasks' && isUntouched(path, tasks)) {
      left = tasks
      continue
    }
    // The entry itself comes before its known content.
    const known = [...byName.keys()].filter((key) => key === name || key.startsWith(`${name}/`))
    if (known.length > 0 && known.every(isUnchanged)) continue
    if (!entry.isDirectory()) unlinkSync(path)
    else if (!removeIfSmall(path)) throw new Error('there is more to remove than takes a moment')
  }
  return left
}

function fingerprintsOf(folder: string): Fingerprints['byName'] {
  const names = ['.', ...Object.keys(DIRECTORIES), ...Object.keys(LINKS), ...REWRITTEN]
  return new Map(names.map((name) => [name, fingerprintOf(folder, name)]))
}

/**
 * Returns attributes that change when a task touches the entry. Files lack the ctime: the service
 * and the shell write them.
 */
function fingerprintOf(folder: string, name = '.'): string {
  const path = join(folder, name)
  const { ino, mode, uid, gid, nlink, ctimeMs } = lstatSync(path)
  const place = name in LINKS ? [readlinkSync(path)] : []
  if (name in DIRECTORIES || name in LINKS)
    return [ino, mode, uid, gid, ctimeMs, ...place].join(' ')
  return [ino, mode, uid, gid, ...(name === '.' ? [] : [nlink])].join(' ')
}
