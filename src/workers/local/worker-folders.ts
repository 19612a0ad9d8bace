import { randomUUID } from 'node:crypto'
import { lstatSync, mkdirSync, readdirSync, renameSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { type Contents, DIRECTORIES, fill, REWRITTEN, remove } from './folders.ts'

/** More than run at a time on most machines. */
const SPARES_MAX = 64

/** What must not have changed, by name. */
type Prints = Readonly<Record<string, string>>

/**
 * Makes the folders of workers, and uses them again. A file system makes a new inode ever more slowly while it takes leave of
 * others (ext4 looks past all that were freed in the last five seconds), and making and removing waits for the disk whenever
 * the store does. So what a task did not touch is kept for the next one: its folder, without anything in it that a task may find.
 */
export class WorkerFolders {
  /** Beside the folder of the workers: what is in there is no worker. */
  readonly #sparesDir: string
  readonly #spares: string[] = []
  /** Of the workers that got their folder here. */
  readonly #prints = new Map<string, Prints>()

  constructor(workersDir: string) {
    this.#sparesDir = `${workersDir}-spare`
    // Of a service that was killed.
    remove(this.#sparesDir)
  }

  /** Makes the folder ready for its task. It comes to its place by renaming: once it is there, it is whole. */
  prepare(folder: string, tasksDir: string, contents: Contents): void {
    const draft = this.#spares.pop() ?? join(this.#sparesDir, randomUUID())
    try {
      for (const name of DIRECTORIES) {
        mkdirSync(join(draft, name), { recursive: true, mode: 0o700 })
      }
      fill(draft, tasksDir, contents, [dirname(folder), this.#sparesDir])
      const prints = printsOf(draft)
      moveTo(folder, draft)
      this.#prints.set(folder, prints)
    } catch (err) {
      remove(draft)
      throw err
    }
  }

  /** The worker has ended, and nothing of it runs. */
  release(folder: string): void {
    const prints = this.#prints.get(folder)
    this.#prints.delete(folder)
    const spare = join(this.#sparesDir, randomUUID())
    if (prints && this.#spares.length < SPARES_MAX && isMoved(folder, spare)) {
      try {
        removeChanged(spare, prints)
        this.#spares.push(spare)
      } catch {
        remove(spare)
      }
    } else {
      remove(folder)
    }
  }

  close(): void {
    for (const spare of this.#spares) remove(spare)
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

function removeChanged(folder: string, prints: Prints): void {
  if (printOf(folder) !== prints['.']) throw new Error('the folder itself was changed')
  for (const name of readdirSync(folder)) {
    const path = join(folder, name)
    const isAsItWas = prints[name] !== undefined && printOf(path, name) === prints[name]
    if (!isAsItWas || (DIRECTORIES.includes(name) && readdirSync(path).length > 0)) remove(path)
  }
}

function printsOf(folder: string): Prints {
  const names = [...DIRECTORIES, ...REWRITTEN]
  return Object.fromEntries([
    ['.', printOf(folder)],
    ...names.map((name) => [name, printOf(join(folder, name), name)]),
  ])
}

/** A directory's tells also whether anything was ever in it; the other files are written by others than the task. */
function printOf(path: string, name = '.'): string {
  const { ino, mode, uid, gid, nlink, ctimeMs } = lstatSync(path)
  if (DIRECTORIES.includes(name)) return [ino, mode, uid, gid, ctimeMs].join(' ')
  return [ino, mode, uid, gid, ...(name === '.' ? [] : [nlink])].join(' ')
}
