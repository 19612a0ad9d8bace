/** Which entries of the tasks folder workers get, and whose fault it is if one cannot be read. */
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
/** Folders of installed packages. Local workers get a link to them; images have their own. */
export const LINKED: readonly string[] = ['node_modules', '.venv']

/** Flags for opening a file; opening a FIFO must not wait for its writer. */
export const READ = constants.O_RDONLY | constants.O_NONBLOCK

const NOTES_MAX = 10
/** Time in which a missing file may come back: editors and git replace a file in two steps. */
const SETTLED_MS = 1_000

/** An entry that is left out of copies of the tasks folder, and why. */
export interface LeftOut {
  path: string
  why: string
}

/** An entry of the tasks folder; `path` is relative to it. Links are not followed. */
export interface TasksEntry {
  path: string
  kind: 'file' | 'folder' | 'link'
}

/**
 * Faults by error code of reading an entry. `gone`: removed, or a link to nothing. `refused`: not
 * readable as it is. `ours`: out of descriptors or memory. Any other error is the disk's.
 */
export const READ_FAULTS: Readonly<Record<string, 'gone' | 'refused' | 'ours'>> = {
  ENOENT: 'gone',
  ENOTDIR: 'gone',
  ENAMETOOLONG: 'gone',
  // A folder has taken its place.
  EISDIR: 'gone',
  EACCES: 'refused',
  EPERM: 'refused',
  // A cycle of links.
  ELOOP: 'refused',
  // A socket.
  ENXIO: 'refused',
  EMFILE: 'ours',
  ENFILE: 'ours',
  ENOMEM: 'ours',
}

/** Returns the code of a failed system call. Throws any other error. */
export function codeOf(err: unknown): string {
  if (err instanceof Error && 'syscall' in err && 'code' in err) return String(err.code)
  throw err
}

export function tasksFolderUnavailable(err: unknown): UnavailableError {
  return new UnavailableError(`The tasks folder cannot be read (${codeOf(err)})`, { cause: err })
}

/**
 * Returns how a failure to read an entry is reported. Undefined: it is gone, as happens while
 * somebody edits the folder. Throws `UnavailableError` if the fault is `ours`.
 */
export function leftOutFor(path: string, err: unknown): LeftOut | undefined {
  const why = codeOf(err)
  if (READ_FAULTS[why] === 'ours') throw tasksFolderUnavailable(err)
  return READ_FAULTS[why] === 'gone' ? undefined : { path, why }
}

/** Returns whether a file name was UTF-8: Node replaces other bytes by U+FFFD. */
export function isUtf8(name: string): boolean {
  return !name.includes('\uFFFD')
}

/** Returns why an entry is left out by its name or kind. Undefined: it is not. */
export function oddEntry(path: string, entry: Dirent): LeftOut | undefined {
  if (!isUtf8(entry.name)) return { path, why: 'its name is not UTF-8' }
  const isUsual = entry.isFile() || entry.isDirectory() || entry.isSymbolicLink()
  return isUsual ? undefined : { path, why: 'neither a file nor a folder' }
}

/** Returns whether `path` is `root` or below it; both are absolute. */
export function isInside(root: string, path: string): boolean {
  return path === root || path.startsWith(root + sep)
}

/** Returns a link's target; `root` is the folder's real path. Undefined: it is outside. */
export async function linkedTo(link: string, root: string): Promise<string | undefined> {
  try {
    const real = await realpath(link)
    return isInside(root, real) ? real : undefined
  } catch (err) {
    // Of a target outside the folder, the error must not be reported.
    if (isInside(root, resolve(dirname(link), await readlink(link)))) throw err
    return undefined
  }
}

/** Returns lines such as `dump.sql (EACCES)`, at most `max`, and the number of any further ones. */
export function leftOutLines(all: readonly LeftOut[], max: number): string[] {
  // A name may contain line ends and terminal escapes.
  const lines = all.slice(0, max).map(({ path, why }) => `${path.replace(/\p{C}/gu, '?')} (${why})`)
  return all.length > max ? [...lines, `${all.length - max} more`] : lines
}

/** Returns the lines for a task's log. */
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
 * Throws a `WorkerError` when the task file is missing or unreadable, `UnavailableError` when the
 * whole folder is unreadable, and another error when a retry may succeed.
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
 * Returns the error for an unreadable task file. `code`: why opening it failed; empty if it is no
 * plain file. `changedAt`: when files were last added to its folder or removed, in epoch ms.
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
 * Lists the entries that copies contain, sorted by path, without opening them. Throws
 * `UnavailableError` when the folder itself cannot be read.
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
