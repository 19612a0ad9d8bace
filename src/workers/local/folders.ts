/** Writes and reads a worker's folder, the only source about a worker after a restart. */
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
import { classified, codeOf, isTemporary, LocalFailure } from './failures.ts'
import type { ProcessIdentity } from './processes.ts'

/** Content of `worker.json`. */
export interface WorkerRecord {
  name: string
  taskId: string
  size: string | null
  createdAt: number
  maxLogBytes: number
  slot: ProcessIdentity
  /** Process that writes the log after the service has died. Absent: the task writes it itself. */
  reader?: ProcessIdentity
  /** Cgroup of the shell. */
  cgroup?: string
  /** Identity of the folder the record was written into. Absent in records of older releases. */
  folder?: string
}

export interface Contents {
  record: WorkerRecord
  /** Empty when the task file is one of a repository. */
  taskFile: string
  files: readonly NamedContent[]
  notes: string[]
}

/** Maximum size of `exit` and `worker.json`: the service writes less. */
const READ_BYTES_MAX = 16 * 1024
const SHORT_LOG_BYTES = 64 * 1024
/** Flags to open a file that a task may have replaced: follows no link, and blocks on no FIFO. */
export const SAFE_OPEN = constants.O_NOFOLLOW | constants.O_NONBLOCK

/** Length of the longest exit without a message; a longer one fits into the same disk block. */
const EXIT_LENGTH = 11
const NO_EXIT = `${' '.repeat(EXIT_LENGTH)}\n`

/** Directories of a folder when a task begins, with the number of their entries. */
export const DIRECTORIES: Readonly<Record<string, number>> = {
  tmp: 0,
  home: 3,
  'home/projects': 0,
  'home/my': 1,
  'home/practicus': 1,
}
/** Links that scripts for Practicus AI expect. bootstrap.sh makes the same in containers. */
export const LINKS: Readonly<Record<string, string>> = {
  'home/my/projects': '../projects',
  'home/practicus/task': '../../tasks',
}
/** Files that are emptied after each task, and written again for the next one. */
export const REWRITTEN: readonly string[] = ['exit', 'worker.json', 'package.json']
/** Files that are kept in a folder whose space was freed. */
export const OUTCOME: readonly string[] = ['exit', 'worker.json', 'log']

/**
 * Content of package.json: ends Node's upward search for the type of `.js` modules, which would
 * find the package.json of the service. It does not end the search for packages.
 */
const PACKAGE = '{}\n'

/** Makes `tmp` and `home` with its links, unless they exist. */
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

/** Writes the files of a task into a folder that has its directories and the tasks. */
export function fill(folder: string, contents: Contents): void {
  for (const { name, content } of contents.files) {
    writeFileSync(join(folder, name), content, { mode: 0o600 })
  }
  const lines = contents.notes.map((note) => `[task-runner] ${note}\n`).join('')
  writeFileSync(join(folder, 'log'), lines, { mode: 0o600 })
  // Made here for its mode, and with room for the exit: the disk may be full when the task ends.
  write(join(folder, 'exit'), NO_EXIT)
  write(join(folder, 'worker.json'), JSON.stringify(contents.record))
  write(join(folder, 'package.json'), PACKAGE)
}

/** Writes an empty or a new file. */
function write(path: string, text: string): void {
  writeFileSync(path, text, { flag: 'a', mode: 0o600 })
}

/**
 * Empties the rewritten files. Done here and not in `fill`: after a loss of power, a file then
 * never has the content of the task before; and ext4 flushes a file when it is truncated and
 * written at once.
 */
export function empty(folder: string): void {
  for (const name of REWRITTEN) {
    try {
      truncateSync(join(folder, name))
    } catch (err) {
      if (codeOf(err) !== 'ENOENT') throw err
    }
  }
}

/** Resets a folder, whose task has not run, for another shell. */
export function rewrite(folder: string, record: WorkerRecord): void {
  overwrite(folder, 'worker.json', JSON.stringify(record))
  overwrite(folder, 'exit', NO_EXIT)
}

/**
 * Returns the record; undefined when there is none, or when it was lost in a power failure. Throws
 * a `LocalFailure` of kind `folder_broken` when the task has changed it.
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
  // Each field is checked below.
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
  // Signals to lower pids reach more than one process group.
  return Number.isInteger(pid) && (pid as number) > 1 && typeof startedAt === 'string'
}

/**
 * Returns whether the slot shell has begun the task, which then must not run again. Before, the
 * exit file holds blanks. Throws like `readRecord`.
 */
export function hasStarted(folder: string): boolean {
  return /^\w/.test(readIfThere(folder, 'exit') ?? '')
}

/** Returns how the task ended; undefined while it is not recorded. Throws like `readRecord`. */
export function readExit(folder: string): Exit | undefined {
  return parseExit(readIfThere(folder, 'exit') ?? '')
}

/** Returns the size of the log; 0 when there is none. */
export function logBytes(folder: string): number {
  let stats: Stats | undefined
  try {
    stats = lstatSync(join(folder, 'log'), { throwIfNoEntry: false })
  } catch (err) {
    if (isTemporary(err)) throw err
  }
  return stats?.isFile() ? stats.size : 0
}

/** Returns the log's last bytes. Throws a `LocalFailure`. */
export function readTail(folder: string, maxBytes: number): LogTail {
  return withPlain(folder, 'log', constants.O_RDONLY, (file, { size: totalBytes }) => {
    const content = Buffer.alloc(Math.min(maxBytes, totalBytes))
    const read = readSync(file, content, 0, content.length, totalBytes - content.length)
    return { content: content.subarray(0, read), totalBytes }
  })
}

/** Returns the whole log if it is short; undefined if it is not, or cannot be read. */
export function readShortLog(folder: string): LogTail | undefined {
  try {
    const tail = readTail(folder, SHORT_LOG_BYTES)
    return tail.totalBytes === tail.content.length ? tail : undefined
  } catch {
    // `readTail` reports the error to callers that ask for the log.
    return undefined
  }
}

/**
 * Frees the space of all but the log's last bytes. The rest becomes a hole, so that its size and
 * all offsets stay. Works on a full disk.
 */
export function cutLog(folder: string, keptBytes: number): void {
  withPlain(folder, 'log', constants.O_RDWR, (file, { size, nlink }) => {
    // A hard link: the file may not be the task's.
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

/** Writes over a file without truncating it first, which works on a full disk. */
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
 * Works on a file of the worker's folder. Throws a `LocalFailure`: of kind `folder_broken` if it is
 * no plain file any more.
 */
function withPlain<T>(
  folder: string,
  name: string,
  flags: number,
  work: (file: number, stats: Stats) => T,
): T {
  let file: number | undefined
  try {
    file = openSync(join(folder, name), flags | SAFE_OPEN)
    const stats = fstatSync(file)
    if (!stats.isFile()) throw notPlainError(name)
    return work(file, stats)
  } catch (err) {
    throw brokenFileError(name, err)
  } finally {
    if (file !== undefined) closeSync(file)
  }
}

const FILE_NAMES: Readonly<Record<string, string>> = {
  exit: 'exit file',
  log: 'log',
  'worker.json': 'record',
}

/** Classifies an error of opening a worker's file as the machine's fault or the task's. */
export function brokenFileError(name: string, err: unknown): unknown {
  const known = classified(err)
  if (known instanceof LocalFailure) return known
  // ELOOP is a link, because of O_NOFOLLOW; ENXIO a socket.
  if (['ELOOP', 'ENXIO'].includes(codeOf(err) ?? '')) return notPlainError(name)
  return broken(name, 'cannot be read', err)
}

export function notPlainError(name: string): LocalFailure {
  return broken(name, 'is not a plain file any more')
}

function broken(name: string, what: string, cause?: unknown): LocalFailure {
  const message = `The worker's ${FILE_NAMES[name] ?? name} ${what}`
  return new LocalFailure('folder_broken', { message, cause })
}
