import { randomUUID } from 'node:crypto'
import { lstatSync, mkdirSync, readdirSync, realpathSync, renameSync, unlinkSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { leftOutNotes } from '../../core/tasks-folder.ts'
import { type Contents, DIRECTORIES, empty, fill, REWRITTEN, remove } from './folders.ts'
import { assertCopied, copyTasks, isUntouched, type TasksCopy } from './tasks-copy.ts'

/** More than run at a time on most machines. */
const SPARES_MAX = 64

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
  /** Beside the folder of the workers: what is in there is no worker. */
  readonly #sparesDir: string
  readonly #spares: Spare[] = []
  /** Of the workers that got their folder here. */
  readonly #prints = new Map<string, Prints>()
  /** They may lie in the tasks folder. */
  readonly #notCopied: readonly string[]

  /** `workersDir` must be there. */
  constructor(workersDir: string) {
    this.#sparesDir = `${workersDir}-spare`
    // Of a service that was killed.
    remove(this.#sparesDir)
    const around = realpathSync.native(dirname(workersDir))
    this.#notCopied = [realpathSync.native(workersDir), join(around, basename(this.#sparesDir))]
  }

  /** Makes the folder ready for its task. It comes to its place by renaming: once it is there, it is whole. */
  prepare(folder: string, tasksDir: string, contents: Contents): void {
    const spare = this.#spares.pop()
    const draft = spare?.folder ?? this.#spareFolder()
    try {
      for (const name of DIRECTORIES) {
        mkdirSync(join(draft, name), { recursive: true, mode: 0o700 })
      }
      const to = join(draft, 'tasks')
      const tasks = copyTasks(tasksDir, to, this.#notCopied, spare?.tasks)
      const { leftOut } = tasks
      if (contents.taskFile !== '') assertCopied(contents.taskFile, { tasksDir, to, leftOut })
      fill(draft, { ...contents, notes: [...contents.notes, ...leftOutNotes(leftOut)] })
      const byName = printsOf(draft)
      moveTo(folder, draft)
      this.#prints.set(folder, { byName, tasks })
    } catch (err) {
      remove(draft)
      throw err
    }
  }

  /** The worker has ended, and nothing of it runs. */
  release(folder: string): void {
    const prints = this.#prints.get(folder)
    this.#prints.delete(folder)
    const spare = this.#spareFolder()
    if (prints && this.#spares.length < SPARES_MAX && isMoved(folder, spare)) {
      try {
        const tasks = removeChanged(spare, prints)
        empty(spare)
        this.#spares.push({ folder: spare, tasks })
      } catch {
        remove(spare)
      }
    } else {
      remove(folder)
    }
  }

  close(): void {
    for (const { folder } of this.#spares) remove(folder)
  }

  #spareFolder(): string {
    return join(this.#sparesDir, randomUUID())
  }
}

function moveTo(folder: string, draft: string): void {
  try {
    renameSync(draft, folder)
  } catch (err) {
    // Left by an earlier process, whose task never began.
    if (!['ENOTEMPTY', 'EEXIST', 'ENOTDIR'].includes((err as NodeJS.ErrnoException).code ?? '')) {
      throw err
    }
    remove(folder)
    renameSync(draft, folder)
  }
}

/** False: it could not be. A task may have made something else of its folder. */
function isMoved(from: string, to: string): boolean {
  try {
    renameSync(from, to)
    return true
  } catch {
    return false
  }
}

/** What is left of the tasks. Throws when the folder is of no more use. */
function removeChanged(folder: string, { byName, tasks }: Prints): TasksCopy | undefined {
  if (printOf(folder) !== byName.get('.')) throw new Error('the folder itself was changed')
  let left: TasksCopy | undefined
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const { name } = entry
    const path = join(folder, name)
    if (name === 'tasks' && isUntouched(path, tasks)) {
      left = tasks
      continue
    }
    const isAsItWas = byName.has(name) && printOf(path, name) === byName.get(name)
    if (isAsItWas && !(DIRECTORIES.includes(name) && readdirSync(path).length > 0)) continue
    if (entry.isDirectory()) remove(path)
    else unlinkSync(path)
  }
  return left
}

function printsOf(folder: string): Prints['byName'] {
  const names = [...DIRECTORIES, ...REWRITTEN]
  return new Map([
    ['.', printOf(folder)],
    ...names.map((name): [string, string] => [name, printOf(join(folder, name), name)]),
  ])
}

/** A directory's tells also whether anything was ever in it; the other files are written by others than the task. */
function printOf(path: string, name = '.'): string {
  const { ino, mode, uid, gid, nlink, ctimeMs } = lstatSync(path)
  if (DIRECTORIES.includes(name)) return [ino, mode, uid, gid, ctimeMs].join(' ')
  return [ino, mode, uid, gid, ...(name === '.' ? [] : [nlink])].join(' ')
}
