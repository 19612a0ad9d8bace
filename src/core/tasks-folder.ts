/** What workers get of the tasks folder, what is left out, and whose trouble it is when something cannot be read. */
import type { Dirent } from 'node:fs'
import {
  access,
  constants,
  open,
  opendir,
  readdir,
  readlink,
  realpath,
  stat,
} from 'node:fs/promises'
import { dirname, join, resolve, sep } from 'node:path'
import { UnavailableError } from './errors.ts'
import { WorkerError } from './ports.ts'

/** Folders that workers get no copy of. */
export const NOT_COPIED: readonly string[] = ['.git', '__pycache__']
/** Installed packages are many files that tasks only read: local workers get a link, images bring their own. */
export const LINKED: readonly string[] = ['node_modules', '.venv']

/** Flags to open what should be a file: opening a FIFO must not wait for its writer. */
export const READ = constants.O_RDONLY | constants.O_NONBLOCK

const NOTES_MAX = 10
/** Editors and git replace a file in two steps: one that went away so recently may be about to come back. */
const SETTLED_MS = 1_000

/** Something that users expect in a copy of the tasks folder, and why it is not there. */
export interface LeftOut {
  path: string
  why: string
}

/** An entry of the tasks folder, by its path in there. Links are not followed. */
export interface TasksEntry {
  path: string
  kind: 'file' | 'folder' | 'link'
}

/**
 * Kinds of errors when something in the tasks folder is read. `gone`: it was removed, or leads nowhere. `refused`: it cannot be
 * read as it is. `ours`: the process or the machine has no more descriptors or memory. Any other error is of the disk.
 */
export const READ_FAULTS: Readonly<Record<string, 'gone' | 'refused' | 'ours'>> = {
  ENOENT: 'gone',
  ENOTDIR: 'gone',
  ENAMETOOLONG: 'gone',
  // Something else has taken its place.
  EISDIR: 'gone',
  EACCES: 'refused',
  EPERM: 'refused',
  // A link that leads to itself.
  ELOOP: 'refused',
  // A socket.
  ENXIO: 'refused',
  EMFILE: 'ours',
  ENFILE: 'ours',
  ENOMEM: 'ours',
}

/** Returns the code of a failed system call. Throws what is no such failure. */
export function codeOf(err: unknown): string {
  if (err instanceof Error && 'syscall' in err && 'code' in err) return String(err.code)
  throw err
}

export function tasksFolderUnavailable(err: unknown): UnavailableError {
  return new UnavailableError(`The tasks folder cannot be read (${codeOf(err)})`, { cause: err })
}

/**
 * Judges a failure to read what is at `path` in the tasks folder. Undefined: it is gone, which is nothing to tell of while
 * somebody works in there. Throws `UnavailableError` for a trouble of ours.
 */
export function leftOutFor(path: string, err: unknown): LeftOut | undefined {
  const why = codeOf(err)
  if (READ_FAULTS[why] === 'ours') throw tasksFolderUnavailable(err)
  return READ_FAULTS[why] === 'gone' ? undefined : { path, why }
}

/** True of a name as Node has decoded it. */
export function isUtf8(name: string): boolean {
  return !name.includes('\uFFFD')
}

/** Judges an entry that lies at `path` in the tasks folder. Undefined: it can be looked at. */
export function oddEntry(path: string, entry: Dirent): LeftOut | undefined {
  if (!isUtf8(entry.name)) return { path, why: 'its name is not UTF-8' }
  const isUsual = entry.isFile() || entry.isDirectory() || entry.isSymbolicLink()
  return isUsual ? undefined : { path, why: 'neither a file nor a folder' }
}

/** Both are absolute paths. */
export function isInside(root: string, path: string): boolean {
  return path === root || path.startsWith(root + sep)
}

/** Returns where a link in the tasks folder leads; `root` is the folder's real path. Undefined: out of the folder. */
export async function linkedTo(link: string, root: string): Promise<string | undefined> {
  try {
    const real = await realpath(link)
    return isInside(root, real) ? real : undefined
  } catch (err) {
    // What is outside is not for us to tell of.
    if (isInside(root, resolve(dirname(link), await readlink(link)))) throw err
    return undefined
  }
}

/** Returns a line for each that is left out, such as `dump.sql (EACCES)`, and one for those beyond `max`. */
export function leftOutLines(all: readonly LeftOut[], max: number): string[] {
  // Names may hold line ends, and what moves a terminal's cursor.
  const lines = all.slice(0, max).map(({ path, why }) => `${path.replace(/\p{C}/gu, '?')} (${why})`)
  return all.length > max ? [...lines, `${all.length - max} more`] : lines
}

/** Returns notes for a task's log. */
export function leftOutNotes(all: readonly LeftOut[]): string[] {
  return leftOutLines(all, NOTES_MAX).map(
    (line) => `Left out of the copy of the tasks folder: ${line}`,
  )
}

/** Throws `UnavailableError` when the tasks folder itself cannot be read. */
export async function assertTasksFolder(folder: string): Promise<void> {
  try {
    await (await opendir(folder)).close()
    await access(folder, constants.X_OK)
  } catch (err) {
    throw tasksFolderUnavailable(err)
  }
}

/**
 * Throws a `WorkerError` when a task file is not there or is not for us to read, `UnavailableError` when the whole folder
 * cannot be read, and another error when the file may be readable in a moment.
 */
export async function assertTaskFile(folder: string, name: string): Promise<void> {
  const path = join(folder, name)
  let code = ''
  try {
    await using file = await open(path, READ)
    if ((await file.stat()).isFile()) return
  } catch (err) {
    code = codeOf(err)
  }
  await assertTasksFolder(folder)
  const changedAt = await stat(dirname(path)).then(
    ({ mtimeMs }) => mtimeMs,
    () => 0,
  )
  throw taskFileError(name, code, changedAt)
}

/**
 * Returns why a task file cannot be had, as an error. `code`: of the failure to open it; empty when it is no plain file.
 * `changedAt`: when files last came or went in its folder, in epoch ms.
 */
export function taskFileError(name: string, code: string, changedAt: number): Error {
  const words = code === '' ? 'is not a plain file' : `cannot be read (${code})`
  const isSettled = Math.abs(Date.now() - changedAt) > SETTLED_MS
  switch (code === '' ? 'refused' : READ_FAULTS[code]) {
    case 'refused':
      return new WorkerError('startup_failed', `The task file "${name}" ${words}`)
    case 'gone':
      return isSettled
        ? new WorkerError(
            'startup_failed',
            `The task file "${name}" is no longer in the tasks folder`,
          )
        : new Error(`The task file "${name}" is being replaced or removed`)
    case 'ours':
      return new UnavailableError(`The tasks folder cannot be read (${code})`)
    default:
      return new Error(`The task file "${name}" ${words}`)
  }
}

/**
 * Lists what is in the folder but for what workers never get, sorted by path. Whether a file can be opened is not known yet.
 * Throws `UnavailableError` when the folder itself cannot be read.
 */
export async function listTasks(
  folder: string,
): Promise<{ entries: TasksEntry[]; leftOut: LeftOut[] }> {
  const entries: TasksEntry[] = []
  const leftOut: LeftOut[] = []
  const walk = async (inside: string): Promise<void> => {
    const found = await readdir(join(folder, inside), { withFileTypes: true })
    if (inside !== '') entries.push({ path: inside, kind: 'folder' })
    const folders: string[] = []
    for (const entry of found) {
      const path = join(inside, entry.name)
      const odd = oddEntry(path, entry)
      if ([...NOT_COPIED, ...LINKED].includes(entry.name)) continue
      if (odd) leftOut.push(odd)
      else if (entry.isDirectory()) folders.push(path)
      else entries.push({ path, kind: entry.isFile() ? 'file' : 'link' })
    }
    await Promise.all(
      folders.map((path) =>
        walk(path).catch((err: unknown) => {
          if (err instanceof UnavailableError) throw err
          const left = leftOutFor(path, err)
          if (left) leftOut.push(left)
        }),
      ),
    )
  }
  try {
    await walk('')
  } catch (err) {
    throw err instanceof UnavailableError ? err : tasksFolderUnavailable(err)
  }
  return { entries: entries.toSorted(byPath), leftOut: leftOut.toSorted(byPath) }
}

function byPath(a: { path: string }, b: { path: string }): number {
  return a.path < b.path ? -1 : 1
}
