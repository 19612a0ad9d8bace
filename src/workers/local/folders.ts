/** A worker's folder: everything a local worker has, and all that is known about it after a restart. */
import {
  chmodSync,
  closeSync,
  lstatSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import type { LogTail } from '../../core/ports.ts'
import { type Exit, parseExit } from '../completion.ts'
import type { ProcessIdentity } from './processes.ts'

/** `worker.json`. */
export interface WorkerRecord {
  name: string
  taskId: string
  size: string | null
  createdAt: number
  maxLogBytes: number
  slot: ProcessIdentity
}

export interface Contents {
  record: WorkerRecord
  /** Empty when it is not a file of the tasks folder. */
  taskFile: string
  files: ReadonlyArray<{ name: string; content: string }>
  notes: string[]
}

const CRLF_LOOK_BYTES = 4096

/** Enough for the longest without words, and a block of the disk has room for those. */
const EXIT_LENGTH = 11

/** Empty when a task begins. */
export const DIRECTORIES: readonly string[] = ['home', 'tmp']
/** Written anew for each task: empty until then. */
export const REWRITTEN: readonly string[] = ['exit', 'worker.json']

/** Puts all that a task needs into a folder that has its directories and the tasks. */
export function fill(folder: string, contents: Contents): void {
  for (const { name, content } of contents.files) {
    writeFileSync(join(folder, name), content, { mode: 0o600 })
  }
  const notes = [...contents.notes, ...hints(join(folder, 'tasks', contents.taskFile))]
  const lines = notes.map((note) => `[task-runner] ${note}\n`).join('')
  writeFileSync(join(folder, 'log'), lines, { mode: 0o600 })
  // Made here for its mode, and with room for what the shell writes over it: a disk may be full by then.
  write(join(folder, 'exit'), `${' '.repeat(EXIT_LENGTH)}\n`)
  write(join(folder, 'worker.json'), JSON.stringify(contents.record))
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

/** Undefined also after a loss of power that took what was written. */
export function readRecord(folder: string): WorkerRecord | undefined {
  const json = readIfThere(join(folder, 'worker.json'))
  // Holds: it was written whole before the folder had its name, and only we may enter.
  return json ? (JSON.parse(json) as WorkerRecord) : undefined
}

/** True once the slot shell has begun with the task, and after its end: it must not be run again. Before, there are blanks. */
export function hasStarted(folder: string): boolean {
  return /^\w/.test(readIfThere(join(folder, 'exit')) ?? '')
}

/** How the task ended; undefined while that is not written. */
export function readExit(folder: string): Exit | undefined {
  return parseExit(readIfThere(join(folder, 'exit')) ?? '')
}

/** 0 when there is no log. */
export function logBytes(folder: string): number {
  return statSync(join(folder, 'log'), { throwIfNoEntry: false })?.size ?? 0
}

export function readTail(folder: string, maxBytes: number): LogTail {
  const file = openSync(join(folder, 'log'), 'r')
  try {
    const totalBytes = statSync(join(folder, 'log')).size
    const content = Buffer.alloc(Math.min(maxBytes, totalBytes))
    const read = readSync(file, content, 0, content.length, totalBytes - content.length)
    return { content: content.subarray(0, read), totalBytes }
  } finally {
    closeSync(file)
  }
}

/** Removes the folder, also where a task left directories without permissions (Go's module cache does). */
export function remove(folder: string): void {
  try {
    rmSync(folder, { recursive: true, force: true })
  } catch (err) {
    if (!['EACCES', 'EPERM'].includes((err as NodeJS.ErrnoException).code ?? '')) throw err
    openUp(folder)
    rmSync(folder, { recursive: true, force: true })
  }
}

/** What a user would otherwise search for long. */
function hints(taskFile: string): string[] {
  if (!taskFile.endsWith('.sh')) return []
  const start = Buffer.alloc(CRLF_LOOK_BYTES)
  const file = openSync(taskFile, 'r')
  try {
    const read = readSync(file, start)
    if (!start.subarray(0, read).includes('\r\n')) return []
  } finally {
    closeSync(file)
  }
  return [
    'this script has Windows line ends (CRLF), which shells do not understand; save it with LF',
  ]
}

function openUp(folder: string): void {
  if (!lstatSync(folder).isDirectory()) return
  chmodSync(folder, 0o700)
  for (const name of readdirSync(folder)) openUp(join(folder, name))
}

function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8')
  } catch (err) {
    ignoreMissing(err)
    return undefined
  }
}

function ignoreMissing(err: unknown): void {
  if ((err as NodeJS.ErrnoException).code !== 'ENOENT') throw err
}
