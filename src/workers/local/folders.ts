/** A worker's folder: everything a local worker has, and all that is known about it after a restart. */
import {
  closeSync,
  constants,
  fstatSync,
  ftruncateSync,
  lstatSync,
  mkdirSync,
  openSync,
  readSync,
  type Stats,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import type { LogTail } from '../../core/ports.ts'
import { type Exit, parseExit } from '../completion.ts'
import type { NamedContent } from '../repositories.ts'
import { codeOf, isOurs, LocalFailure, sorted } from './failures.ts'
import type { ProcessIdentity } from './processes.ts'

/** `worker.json`. */
export interface WorkerRecord {
  name: string
  taskId: string
  size: string | null
  createdAt: number
  maxLogBytes: number
  slot: ProcessIdentity
  /** What goes on with the log once the service has died. The task of a record without it writes the log itself. */
  reader?: ProcessIdentity
  /** Of the shell. */
  cgroup?: string
  /** Which folder it was written into. Records of the release before have none. */
  folder?: string
}

export interface Contents {
  record: WorkerRecord
  /** Empty when it is not a file of the tasks folder. */
  taskFile: string
  files: readonly NamedContent[]
  notes: string[]
}

/** Of `exit` and `worker.json`. More than that, the service never wrote. */
const READ_BYTES_MAX = 16 * 1024
/**
 * How files are opened that a task may have made something else of: a link is not followed, and a FIFO does not hold up whoever
 * opens it.
 */
export const SAFELY = constants.O_NOFOLLOW | constants.O_NONBLOCK

/** Enough for the longest without words, and a block of the disk has room for those. */
const EXIT_LENGTH = 11
const NO_EXIT = `${' '.repeat(EXIT_LENGTH)}\n`

/** Directories of a folder when a task begins, with the number of their entries. */
export const DIRECTORIES: Readonly<Record<string, number>> = {
  ...{ tmp: 0, home: 3 },
  ...{ 'home/projects': 0, 'home/my': 1, 'home/practicus': 1 },
}
/** Links of a home, by which scripts for Practicus AI find their places. bootstrap.sh makes the same in containers. */
export const LINKS: Readonly<Record<string, string>> = {
  'home/my/projects': '../projects',
  'home/practicus/task': '../../tasks',
}
/** Written anew for each task: empty until then. */
export const REWRITTEN: readonly string[] = ['exit', 'worker.json', 'package.json']
/** What is left of a folder whose space was freed. */
export const OUTCOME: readonly string[] = ['exit', 'worker.json', 'log']

/**
 * Node looks upwards for what kind of modules `.js` files are: what lies above the data folder, such as the service's own
 * package.json, is no matter of the task's. The search for packages goes on beyond it; nothing ends that one.
 */
const PACKAGE = '{}\n'

/** Makes `tmp` and `home`, unless they are there: a home has its links then. */
export function makeDirectories(folder: string): void {
  const options = { recursive: true, mode: 0o700 }
  const isThere = mkdirSync(join(folder, 'home'), options) === undefined
  for (const name of isThere ? ['tmp'] : Object.keys(DIRECTORIES)) {
    mkdirSync(join(folder, name), options)
  }
  for (const [name, target] of isThere ? [] : Object.entries(LINKS)) {
    symlinkSync(target, join(folder, name))
  }
}

/** Puts all that a task needs into a folder that has its directories and the tasks. */
export function fill(folder: string, contents: Contents): void {
  for (const { name, content } of contents.files) {
    writeFileSync(join(folder, name), content, { mode: 0o600 })
  }
  const lines = contents.notes.map((note) => `[task-runner] ${note}\n`).join('')
  writeFileSync(join(folder, 'log'), lines, { mode: 0o600 })
  // Made here for its mode, and with room for what the shell writes over it: a disk may be full by then.
  write(join(folder, 'exit'), NO_EXIT)
  write(join(folder, 'worker.json'), JSON.stringify(contents.record))
  write(join(folder, 'package.json'), PACKAGE)
}

/** Into an empty file, or a new one. */
function write(path: string, text: string): void {
  writeFileSync(path, text, { flag: 'a', mode: 0o600 })
}

/**
 * Empties what `fill` writes, for the next worker. Not only then: with the power gone, a file that was emptied earlier is empty or what was
 * written since, never what was in it before; and ext4 would write to the disk at once what follows an emptying in the same breath.
 */
export function empty(folder: string): void {
  for (const name of REWRITTEN) {
    try {
      truncateSync(join(folder, name))
    } catch (err) {
      ignoreMissing(err)
    }
  }
}

/** Makes it ready to be started by another shell. What began in it has not run. */
export function rewrite(folder: string, record: WorkerRecord): void {
  overwrite(folder, 'worker.json', JSON.stringify(record))
  overwrite(folder, 'exit', NO_EXIT)
}

/**
 * Undefined where there is none, also after a loss of power that took what was written. Throws a `LocalFailure` of kind
 * `folder_broken` where a task made something else of it.
 */
export function readRecord(folder: string): WorkerRecord | undefined {
  const json = readIfThere(folder, 'worker.json')
  if (!json) return undefined
  const record = parseRecord(json)
  if (!record) throw broken('worker.json', 'was changed by its task')
  return record
}

function parseRecord(json: string): WorkerRecord | undefined {
  let value: unknown
  try {
    value = JSON.parse(json)
  } catch {
    return undefined
  }
  // Holds: each field is looked at before it is used.
  const record = Object(value) as Partial<Record<keyof WorkerRecord, unknown>>
  const isWhole =
    typeof record.name === 'string' &&
    typeof record.taskId === 'string' &&
    (record.size === null || typeof record.size === 'string') &&
    Number.isFinite(record.createdAt) &&
    Number.isFinite(record.maxLogBytes) &&
    [record.folder, record.cgroup].every((path) => ['string', 'undefined'].includes(typeof path)) &&
    isIdentity(record.slot) &&
    (record.reader === undefined || isIdentity(record.reader))
  return isWhole ? (record as unknown as WorkerRecord) : undefined
}

function isIdentity(value: unknown): boolean {
  const { pid, startedAt } = Object(value) as Partial<Record<keyof ProcessIdentity, unknown>>
  // Signals to lower ones go to more than a group.
  return Number.isInteger(pid) && (pid as number) > 1 && typeof startedAt === 'string'
}

/**
 * True once the slot shell has begun with the task, and after its end: it must not be run again. Before, there are blanks.
 * Throws like `readRecord`.
 */
export function hasStarted(folder: string): boolean {
  return /^\w/.test(readIfThere(folder, 'exit') ?? '')
}

/** How the task ended; undefined while that is not written. Throws like `readRecord`. */
export function readExit(folder: string): Exit | undefined {
  return parseExit(readIfThere(folder, 'exit') ?? '')
}

/** 0 when there is no log. */
export function logBytes(folder: string): number {
  let stats: Stats | undefined
  try {
    stats = lstatSync(join(folder, 'log'), { throwIfNoEntry: false })
  } catch (err) {
    if (isOurs(err)) throw err
  }
  return stats?.isFile() ? stats.size : 0
}

/** Throws a `LocalFailure`. */
export function readTail(folder: string, maxBytes: number): LogTail {
  return withPlain(folder, 'log', constants.O_RDONLY, (file, { size: totalBytes }) => {
    const content = Buffer.alloc(Math.min(maxBytes, totalBytes))
    const read = readSync(file, content, 0, content.length, totalBytes - content.length)
    return { content: content.subarray(0, read), totalBytes }
  })
}

/**
 * Gives back the space of all but the log's last bytes. Its size stays, and with it every offset: what was cut is a hole. Needs
 * no space of the disk, which may be full.
 */
export function cutLog(folder: string, keptBytes: number): void {
  withPlain(folder, 'log', constants.O_RDWR, (file, { size, nlink }) => {
    // Somebody else's file as well, when it has another name.
    if (size <= keptBytes || nlink > 1) return
    const tail = Buffer.alloc(keptBytes)
    const read = readSync(file, tail, 0, keptBytes, size - keptBytes)
    ftruncateSync(file, 0)
    ftruncateSync(file, size)
    for (let at = 0; at < read; ) {
      at += writeSync(file, tail, at, read - at, size - keptBytes + at)
    }
  })
}

/** In place, so that a full disk has room for it. */
function overwrite(folder: string, name: string, text: string): void {
  withPlain(folder, name, constants.O_WRONLY, (file) => {
    const content = Buffer.from(text)
    writeSync(file, content, 0, content.length, 0)
    ftruncateSync(file, content.length)
  })
}

function readIfThere(folder: string, name: string): string | undefined {
  try {
    return withPlain(folder, name, constants.O_RDONLY, (file, { size }) => {
      if (size > READ_BYTES_MAX) throw broken(name, 'is larger than the service ever writes it')
      const content = Buffer.alloc(size)
      return content.toString('utf8', 0, readSync(file, content, 0, size, 0))
    })
  } catch (err) {
    if (err instanceof LocalFailure && codeOf(err.cause) === 'ENOENT') return undefined
    throw err
  }
}

/**
 * Works on a file of the worker's folder, if it still is a plain file. Throws a `LocalFailure`: of the machine's trouble, or of
 * kind `folder_broken`.
 */
function withPlain<T>(
  folder: string,
  name: string,
  flags: number,
  work: (file: number, stats: Stats) => T,
): T {
  let file: number | undefined
  try {
    file = openSync(join(folder, name), flags | SAFELY)
    const stats = fstatSync(file)
    if (!stats.isFile()) throw notPlain(name)
    return work(file, stats)
  } catch (err) {
    throw asBroken(name, err)
  } finally {
    if (file !== undefined) closeSync(file)
  }
}

const WHAT: Readonly<Record<string, string>> = {
  exit: 'exit file',
  log: 'log',
  'worker.json': 'record',
}

/** What it means that a file of a worker's folder cannot be opened: the machine's trouble, or the task's doing. */
export function asBroken(name: string, err: unknown): unknown {
  const known = sorted(err)
  if (known instanceof LocalFailure) return known
  // O_NOFOLLOW says so of a link, and a socket cannot be opened.
  if (['ELOOP', 'ENXIO'].includes(codeOf(err) ?? '')) return notPlain(name)
  return broken(name, 'cannot be read', err)
}

export function notPlain(name: string): LocalFailure {
  return broken(name, 'is not a plain file any more')
}

function broken(name: string, what: string, cause?: unknown): LocalFailure {
  const message = `The worker's ${WHAT[name] ?? name} ${what}`
  return new LocalFailure('folder_broken', { message, cause })
}

function ignoreMissing(err: unknown): void {
  if ((err as NodeJS.ErrnoException).code !== 'ENOENT') throw err
}
