/** Copies the tasks folder for a worker, whose task may change its copy. */
import { hash } from 'node:crypto'
import {
  accessSync,
  closeSync,
  constants,
  copyFileSync,
  type Dirent,
  existsSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readlinkSync,
  readSync,
  realpathSync,
  rmSync,
  type Stats,
  statSync,
  symlinkSync,
  utimesSync,
} from 'node:fs'
import { dirname, join, relative, resolve, sep } from 'node:path'
import {
  codeOf,
  isInside,
  isUtf8,
  type LeftOut,
  LINKED,
  leftOutFor,
  NOT_COPIED,
  oddEntry,
  READ,
  READ_FAULTS,
  taskFileError,
  tasksFolderUnavailable,
} from '../../core/tasks-folder.ts'

/** Fingerprints of a copy and its original: unchanged folders have the same fingerprints. */
export interface TasksCopy {
  original: string
  copy: string
  leftOut: readonly LeftOut[]
}

/** Age after which another change must alter the time stamp: file systems tick every 10 ms. */
const SETTLED_MS = 1000
/** Equals no fingerprint. */
const NEVER = ''
const MAYBE = { throwIfNoEntry: false } as const
/** A file may be replaced again and again while it is copied. */
const ATTEMPTS = 3
/** Errors that only writing causes. */
const WRITE_FAULTS: readonly string[] = ['ENOSPC', 'EDQUOT', 'EROFS', 'EFBIG']
const CHUNK_BYTES = 1024 * 1024

/**
 * Copies the tasks folder to `to`, unless the `last` copy there is still up to date. Uses reflinks
 * if the disk supports them. Follows links inside the tasks folder; leaves out links that leave it,
 * and what cannot be read. `notCopied`: real paths of folders that may be in the tasks folder.
 * Throws `UnavailableError` when the folder itself cannot be read; any other error is of writing
 * the copy.
 */
export function copyTasks(
  tasksDir: string,
  to: string,
  notCopied: readonly string[],
  last: TasksCopy | undefined,
): TasksCopy {
  const root = rootOf(tasksDir)
  const isSettledAt = Date.now() - SETTLED_MS
  const entriesIn = (folder: string) => entriesOf(folder, notCopied)
  const { hash: original, changedAt } = fingerprint(root, entriesIn)
  if (last?.original === original && isUntouched(to, last)) return last
  rmSync(to, { recursive: true, force: true })
  const { leftOut, isRepeatable } = copyFolders(root, to, entriesIn)
  const isSettled = changedAt < isSettledAt && isRepeatable
  return { original: isSettled ? original : NEVER, copy: fingerprint(to).hash, leftOut }
}

/**
 * Returns whether a copy exists and is unchanged. Copied files have the times of their originals,
 * so that any later write shows. Checked before each use as well: a process that was not found may
 * have written since.
 */
export function isUntouched(folder: string, { copy }: TasksCopy): boolean {
  return existsSync(folder) && fingerprint(folder).hash === copy
}

/**
 * Throws when a copy lacks a task file: a `WorkerError` when the file is missing or may not be
 * read, `UnavailableError` when the whole folder cannot be read, and another error when a retry may
 * succeed.
 */
export function assertCopied(
  name: string,
  { tasksDir, to, leftOut }: { tasksDir: string; to: string; leftOut: readonly LeftOut[] },
): void {
  if (existsSync(join(to, name))) return
  rootOf(tasksDir)
  const path = join(tasksDir, name)
  const code = leftOut.find((left) => left.path === name)?.why ?? codeOfReading(path)
  if (code === undefined) {
    throw new Error(`The task file "${name}" was replaced while it was copied`)
  }
  throw taskFileError(name, code, statSync(dirname(path), MAYBE)?.mtimeMs ?? 0)
}

/** Returns the real path of the tasks folder. Throws `UnavailableError` when it cannot be read. */
function rootOf(tasksDir: string): string {
  try {
    const root = realpathSync.native(tasksDir)
    // The slash makes this fail for a file.
    accessSync(root + sep, constants.R_OK | constants.X_OK)
    return root
  } catch (err) {
    throw tasksFolderUnavailable(err)
  }
}

/** Copies all readable files. `isRepeatable`: another copy would leave out the same files. */
function copyFolders(
  root: string,
  to: string,
  entriesIn: (folder: string) => Dirent[],
): { leftOut: LeftOut[]; isRepeatable: boolean } {
  const leftOut: LeftOut[] = []
  let isRepeatable = true
  const leave = (path: string, err: unknown) => {
    const left = leftOutFor(relative(root, path), err)
    if (left) leftOut.push(left)
    // It may become readable without a change of the fingerprint.
    if (READ_FAULTS[codeOf(err)] !== 'refused') isRepeatable = false
  }
  /** Returns undefined, and notes the failure, if it cannot be read. */
  const reading = <T>(path: string, read: () => T): T | undefined => {
    try {
      return read()
    } catch (err) {
      if (path === root) throw tasksFolderUnavailable(err)
      leave(path, err)
      return undefined
    }
  }
  const copyFile = (source: string, target: string, path: string) => {
    for (let attempt = 1; ; attempt += 1) {
      try {
        copyFileSync(source, target, constants.COPYFILE_FICLONE)
        const { atime, mtime } = statSync(source)
        utimesSync(target, atime, mtime)
        return
      } catch (err) {
        if (WRITE_FAULTS.includes(codeOf(err))) throw err
        const isReadable = reading(path, () => readThrough(source)) !== undefined
        if (!isReadable) return rmSync(target, { force: true })
        if (attempt === ATTEMPTS) throw err
      }
    }
  }
  const copyLinked = (link: string, target: string) => {
    const real = reading(link, () => realOf(link, root))
    if (!real) return
    const stats = reading(link, () => statSync(real))
    if (stats?.isFile()) copyFile(real, target, link)
    // Links to the same folder in the copy: a copied folder could contain itself.
    else if (stats?.isDirectory()) symlinkSync(relative(dirname(link), real) || '.', target)
  }
  const copyFolder = (from: string, target: string) => {
    const entries = reading(from, () => entriesIn(from))
    if (!entries) return
    mkdirSync(target, { mode: 0o700 })
    for (const entry of entries) {
      const source = join(from, entry.name)
      const copy = join(target, entry.name)
      const odd = oddEntry(relative(root, source), entry)
      if (odd) leftOut.push(odd)
      else if (LINKED.includes(entry.name)) symlinkSync(source, copy)
      else if (entry.isDirectory()) copyFolder(source, copy)
      else if (entry.isFile()) copyFile(source, copy, source)
      else copyLinked(source, copy)
    }
  }
  copyFolder(root, to)
  return { leftOut, isRepeatable }
}

/** Returns the target of a link; empty if it is missing or outside of the folder. */
function realOf(link: string, root: string): string {
  try {
    const real = realpathSync.native(link)
    return isInside(root, real) ? real : ''
  } catch (err) {
    if (!isInside(root, resolve(dirname(link), readlinkSync(link)))) return ''
    throw err
  }
}

/** Returns the error code of reading a file; undefined if it can be read. */
function codeOfReading(path: string): string | undefined {
  try {
    readThrough(path)
    return undefined
  } catch (err) {
    return codeOf(err)
  }
}

/** Reads a whole file. Throws if it cannot be read. */
function readThrough(path: string): true {
  const file = openSync(path, READ)
  try {
    const chunk = Buffer.alloc(CHUNK_BYTES)
    while (readSync(file, chunk) > 0);
    return true
  } finally {
    closeSync(file)
  }
}

/**
 * Returns a hash of the attributes of all files, and the time of the last change in epoch ms. On a
 * network file system, both are as old as its attribute cache.
 */
function fingerprint(
  root: string,
  entriesIn = (folder: string) => readdirSync(folder, { withFileTypes: true }),
): { hash: string; changedAt: number } {
  const lines: string[] = []
  let changedAt = 0
  const add = (path: string, stats: Stats | undefined) => {
    const { ino, mode, size, mtimeMs, ctimeMs } = stats ?? {}
    lines.push([relative(root, path), ino, mode, size, mtimeMs, ctimeMs].join(' '))
    // A file that has just disappeared is changing now.
    changedAt = Math.max(changedAt, ctimeMs ?? Number.POSITIVE_INFINITY)
  }
  const withErrors = (path: string, act: () => void) => {
    try {
      act()
    } catch (err) {
      const code = codeOf(err)
      lines.push(`${relative(root, path)} ${code}`)
      if (READ_FAULTS[code] !== 'refused') changedAt = Number.POSITIVE_INFINITY
    }
  }
  const walk = (folder: string) => {
    add(folder, lstatSync(folder))
    for (const entry of entriesIn(folder)) {
      const path = join(folder, entry.name)
      withErrors(path, () => {
        // A name that is not UTF-8 cannot be opened.
        if (!isUtf8(entry.name)) lines.push(relative(root, path))
        else if (entry.isDirectory() && !LINKED.includes(entry.name)) walk(path)
        else {
          add(path, lstatSync(path, MAYBE))
          // `existsSync` is false for a broken link and for one that leads to itself.
          if (entry.isSymbolicLink() && existsSync(path)) add(path, statSync(path, MAYBE))
        }
      })
    }
  }
  withErrors(root, () => walk(root))
  return { hash: hash('sha256', lines.join('\n')), changedAt }
}

function entriesOf(folder: string, skip: readonly string[]): Dirent[] {
  return readdirSync(folder, { withFileTypes: true }).filter(
    ({ name }) => !NOT_COPIED.includes(name) && !skip.includes(join(folder, name)),
  )
}
