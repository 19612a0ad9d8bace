/** Makes short paths to the folders of workers, below the system's folder for temporary files. */
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
import { SAFE_OPEN } from './folders.ts'

/** Maximum length of the temporary folder's path, for a `TMPDIR` of at most 40 characters. */
const BASE_LENGTH_MAX = 13
const BASE_DEFAULT = '/tmp'
const PREFIX = 'tr-'
const NAME_LENGTH = 12
const NAME = new RegExp(`^[0-9a-f]{${NAME_LENGTH}}$`)

/**
 * Keeps a link to each worker's folder. The path of a socket has at most 107 bytes (unix(7)), of
 * which Python uses 32 below TMPDIR: the data folder's path and a task's id may leave too few. The
 * links are in a folder that only this user may enter, with a name that cannot be guessed. A file
 * beside the workers' folder stores its path for the next process; a symbolic link would make tools
 * that walk the data folder visit the workers twice.
 */
export class ShortPaths {
  readonly #pointer: string
  #root: string | undefined

  /** Removes the links of workers that are gone. */
  constructor(workersDir: string) {
    this.#pointer = `${workersDir}-short`
    this.#root = this.#readRoot()
    if (this.#root !== undefined) removeDangling(this.#root)
  }

  /** Returns a short path to the folder, or its own path if none can be made. Idempotent. */
  to(folder: string): string {
    try {
      const path = join(this.#ensureRoot(), linkNameFor(folder))
      link(folder, path)
      return path
    } catch {
      // Most tasks need no socket.
      return folder
    }
  }

  remove(folder: string): void {
    if (this.#root !== undefined)
      tried(() => unlinkSync(join(this.#root ?? '', linkNameFor(folder))))
  }

  /** Removes the folder of the links, unless running workers need them. */
  close(): void {
    const root = this.#root
    if (root !== undefined && tried(() => rmdirSync(root))) tried(() => unlinkSync(this.#pointer))
  }

  /** Returns the folder of the links. Makes it again if a cleaner of temporary files removed it. */
  #ensureRoot(): string {
    if (this.#root !== undefined && isPrivate(this.#root)) return this.#root
    this.#root = this.#readRoot()
    if (this.#root !== undefined) return this.#root
    const root = makeRoot()
    tried(() => unlinkSync(this.#pointer))
    try {
      writeFileSync(this.#pointer, root, { flag: 'wx', mode: 0o600 })
    } catch (err) {
      // The next process could not find it.
      rmdirSync(root)
      throw err
    }
    this.#root = root
    return root
  }

  #readRoot(): string | undefined {
    let file: number | undefined
    try {
      file = openSync(this.#pointer, constants.O_RDONLY | SAFE_OPEN)
      if (!fstatSync(file).isFile()) return undefined
      const content = Buffer.alloc(BASE_LENGTH_MAX + PREFIX.length + 'XXXXXX/'.length)
      const root = content.toString('utf8', 0, readSync(file, content))
      return isPrivate(root) ? root : undefined
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

/** Returns whether the path is a folder, not a link, that only this user may enter. */
function isPrivate(path: string): boolean {
  const stats = lstatSync(path, { throwIfNoEntry: false })
  const isClosed = stats !== undefined && (stats.mode & 0o777) === 0o700
  return isClosed && stats.isDirectory() && stats.uid === process.getuid?.()
}

function link(folder: string, path: string): void {
  try {
    symlinkSync(folder, path)
  } catch (err) {
    if ((err as NodeJS.ErrnoException).code !== 'EEXIST') throw err
    // The worker's own link, or what a task replaced it with.
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

/** Returns the name of the link to a worker's folder. */
function linkNameFor(folder: string): string {
  return hash('sha256', folder).slice(0, NAME_LENGTH)
}

/** Returns whether the act succeeded; ignores its error. */
function tried(act: () => void): boolean {
  try {
    act()
    return true
  } catch {
    return false
  }
}
