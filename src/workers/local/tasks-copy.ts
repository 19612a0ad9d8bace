/** A worker's own copy of the tasks folder: a task may change what it likes in there. */
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

/** Prints of a copy, and of what it was made from. Both are as they were while their prints are the same. */
export interface TasksCopy {
  original: string
  copy: string
  leftOut: readonly LeftOut[]
}

/** Clocks of file systems tick every 10 ms or faster: a file may change again in the tick in which it was looked at. */
const SETTLED_MS = 1000
const NEVER = ''
const MAYBE = { throwIfNoEntry: false } as const
/** A file may come and go again while it is copied. */
const ATTEMPTS = 3
/** Errors of writing alone, where the file that is read need not be looked at. */
const WRITE_FAULTS: readonly string[] = ['ENOSPC', 'EDQUOT', 'EROFS', 'EFBIG']
const CHUNK_BYTES = 1024 * 1024

/**
 * Makes `to` a copy of the tasks folder; nothing is done where the `last` copy, untouched since, still is one. Reflinks where
 * the disk can. Links are followed inside the tasks folder, and left out where they leave it. What cannot be read is left
 * out. `notCopied`: real paths of folders that may lie in there. Throws `UnavailableError` when the folder itself cannot
 * be read; any other error is of writing the copy.
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
  const { print, changedAt } = look(root, entriesIn)
  if (last?.original === print && isUntouched(to, last)) return last
  rmSync(to, { recursive: true, force: true })
  const { leftOut, isRepeatable } = copyFolders(root, to, entriesIn)
  const isSettled = changedAt < isSettledAt && isRepeatable
  return { original: isSettled ? print : NEVER, copy: look(to).print, leftOut }
}

/**
 * False also when it is gone. A write to a file shows even in the tick of the copying: copies have the times of their originals.
 * Asked before each use, too: what the finder of leftovers does not know may have written since the last one.
 */
export function isUntouched(folder: string, { copy }: TasksCopy): boolean {
  return existsSync(folder) && look(folder).print === copy
}

/**
 * Throws when a copy lacks a task file: a `WorkerError` when that is not there or is not for us to read, `UnavailableError`
 * when the whole folder cannot be read, and another error when the file may be readable in a moment.
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
    // With a slash, for what is no folder.
    accessSync(root + sep, constants.R_OK | constants.X_OK)
    return root
  } catch (err) {
    throw tasksFolderUnavailable(err)
  }
}

/** Copies what can be read. `isRepeatable`: another copy would leave out the same. */
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
    // It may be back, or the disk be mended, with nothing that shows in a print.
    if (READ_FAULTS[codeOf(err)] !== 'refused') isRepeatable = false
  }
  /** Undefined: it could not be read. */
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
    // Leads to the same place inside the copy; a linked folder may contain itself.
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

/** Where a link leads. Empty: out of the folder, or nowhere. */
function realOf(link: string, root: string): string {
  try {
    const real = realpathSync.native(link)
    return isInside(root, real) ? real : ''
  } catch (err) {
    if (!isInside(root, resolve(dirname(link), readlinkSync(link)))) return ''
    throw err
  }
}

/** Returns the code of the failure to read a file. Undefined: it can be read. */
function codeOfReading(path: string): string | undefined {
  try {
    readThrough(path)
    return undefined
  } catch (err) {
    return codeOf(err)
  }
}

/** Throws why a file cannot be read. */
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

/** `changedAt`: milliseconds since the epoch. On a network file system as new as its cache of attributes. */
function look(
  root: string,
  entriesIn = (folder: string) => readdirSync(folder, { withFileTypes: true }),
): { print: string; changedAt: number } {
  const lines: string[] = []
  let changedAt = 0
  const add = (path: string, stats: Stats | undefined) => {
    const { ino, mode, size, mtimeMs, ctimeMs } = stats ?? {}
    lines.push([relative(root, path), ino, mode, size, mtimeMs, ctimeMs].join(' '))
    // What went away while we look is changing just now.
    changedAt = Math.max(changedAt, ctimeMs ?? Number.POSITIVE_INFINITY)
  }
  const looking = (path: string, at: () => void) => {
    try {
      at()
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
      looking(path, () => {
        // By this name it cannot be looked at.
        if (!isUtf8(entry.name)) lines.push(relative(root, path))
        else if (entry.isDirectory() && !LINKED.includes(entry.name)) walk(path)
        else {
          add(path, lstatSync(path, MAYBE))
          // Links may lead nowhere, or in a circle.
          if (entry.isSymbolicLink() && existsSync(path)) add(path, statSync(path, MAYBE))
        }
      })
    }
  }
  looking(root, () => walk(root))
  return { print: hash('sha256', lines.join('\n')), changedAt }
}

function entriesOf(folder: string, skip: readonly string[]): Dirent[] {
  return readdirSync(folder, { withFileTypes: true }).filter(
    ({ name }) => !NOT_COPIED.includes(name) && !skip.includes(join(folder, name)),
  )
}
