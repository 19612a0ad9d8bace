/** Short paths to the folders of workers, below the system's folder for temporary files. */
import { hash } from 'node:crypto'
import {
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readlinkSync,
  readSync,
  rmdirSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { SAFELY } from './folders.ts'

/** What the path of a folder for temporary files may have, so that `TMPDIR` has no more than 40. */
const BASE_LENGTH_MAX = 13
const BASE_DEFAULT = '/tmp'
const PREFIX = 'tr-'
const NAME_LENGTH = 12
const NAME = new RegExp(`^[0-9a-f]{${NAME_LENGTH}}$`)

/**
 * Keeps a link to each worker's folder. The path of a socket may have 107 bytes (unix(7)), and Python takes 32 of them below
 * TMPDIR: with the data folder's path and a task's id in it there is no room for that. The links lie in a folder that nobody
 * else may enter, under a name that nobody can guess; a file beside the workers' folder has it, for the next process. A link
 * there would lead whoever walks through the data folder into the workers twice.
 */
export class ShortPaths {
  readonly #pointer: string
  #root: string | undefined

  /** Removes the links of workers that are gone. Makes nothing. */
  constructor(workersDir: string) {
    this.#pointer = `${workersDir}-short`
    this.#root = this.#rootOfBefore()
    if (this.#root !== undefined) removeDangling(this.#root)
  }

  /** Returns a path to the folder that is short; the folder's own where none can be made. Repeating it is safe. */
  to(folder: string): string {
    try {
      const path = join(this.#sureRoot(), shortNameFor(folder))
      link(folder, path)
      return path
    } catch {
      // A task that needs no socket does without.
      return folder
    }
  }

  remove(folder: string): void {
    if (this.#root !== undefined)
      tried(() => unlinkSync(join(this.#root ?? '', shortNameFor(folder))))
  }

  /** Leaves what workers need that run on. */
  close(): void {
    const root = this.#root
    if (root !== undefined && tried(() => rmdirSync(root))) tried(() => unlinkSync(this.#pointer))
  }

  /** Cleaners of temporary files may have removed it, and others made a folder of its name since. */
  #sureRoot(): string {
    if (this.#root !== undefined && isOurs(this.#root)) return this.#root
    this.#root = this.#rootOfBefore()
    if (this.#root !== undefined) return this.#root
    const root = makeRoot()
    tried(() => unlinkSync(this.#pointer))
    try {
      writeFileSync(this.#pointer, root, { flag: 'wx', mode: 0o600 })
    } catch (err) {
      // Nobody would find it again.
      rmdirSync(root)
      throw err
    }
    this.#root = root
    return root
  }

  #rootOfBefore(): string | undefined {
    let file: number | undefined
    try {
      file = openSync(this.#pointer, constants.O_RDONLY | SAFELY)
      if (!fstatSync(file).isFile()) return undefined
      const content = Buffer.alloc(BASE_LENGTH_MAX + PREFIX.length + 'XXXXXX/'.length)
      const root = content.toString('utf8', 0, readSync(file, content))
      return isOurs(root) ? root : undefined
    } catch {
      return undefined
    } finally {
      if (file !== undefined) closeSync(file)
    }
  }
}

function makeRoot(): string {
  const base = tmpdir()
  return mkdtempSync(join(base.length <= BASE_LENGTH_MAX ? base : BASE_DEFAULT, PREFIX))
}

/** True of a folder, and no link to one, that is ours and in which nobody else can do anything. */
function isOurs(path: string): boolean {
  const stats = lstatSync(path, { throwIfNoEntry: false })
  const isClosed = stats !== undefined && (stats.mode & 0o777) === 0o700
  return isClosed && stats.isDirectory() && stats.uid === process.getuid?.()
}

function link(folder: string, path: string): void {
  try {
    symlinkSync(folder, path)
  } catch (err) {
    if ((err as NodeJS.ErrnoException).code !== 'EEXIST') throw err
    // Of the same worker, or what a task made of it.
    unlinkSync(path)
    symlinkSync(folder, path)
  }
}

function removeDangling(root: string): void {
  for (const name of readdirSync(root).filter((each) => NAME.test(each))) {
    const path = join(root, name)
    tried(() => {
      if (!lstatSync(readlinkSync(path), { throwIfNoEntry: false })) unlinkSync(path)
    })
  }
}

/** What names a worker's folder in its short path, and in no other worker's. */
function shortNameFor(folder: string): string {
  return hash('sha256', folder).slice(0, NAME_LENGTH)
}

/** False where it failed, which does not matter here. */
function tried(act: () => void): boolean {
  try {
    act()
    return true
  } catch {
    return false
  }
}
