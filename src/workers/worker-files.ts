/** Makes the files of a container's worker folder; the same for all container engines. */
import { constants } from 'node:fs'
import { type FileHandle, open, readFile, realpath, stat } from 'node:fs/promises'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createTarPacker, type TarHeader } from 'modern-tar'
import type { WorkerSpec } from '../core/ports.ts'
import {
  assertTaskFile,
  type LeftOut,
  leftOutFor,
  leftOutNotes,
  linkedTo,
  listTasks,
  READ,
  type TasksEntry,
  tasksFolderUnavailable,
} from '../core/tasks-folder.ts'
import { COMMON_ENVIRONMENT } from './environment.ts'
import { quote } from './quote.ts'
import { type NamedContent, preparationFiles } from './repositories.ts'

const CHUNK_BYTES = 64 * 1024

/** Path of the worker's folder in every container. */
export const WORKER_FOLDER = '/worker'
/** User id of tasks, so that no image makes them root. */
export const WORKER_USER = 10_001

export const BOOTSTRAP = fileURLToPath(new URL('./bootstrap.sh', import.meta.url))

/** Time after the grace period in which the bootstrap kills and logs the remaining processes. */
export const BOOTSTRAP_END_MS = 2_000

/** Returns the command of a worker's container. `messageFile`: where the engine reads the exit. */
export function workerCommand(
  spec: WorkerSpec,
  { terminationGraceMs, messageFile = '' }: { terminationGraceMs: number; messageFile?: string },
): string[] {
  const keep = spec.keepAfterwards ? 'keep' : ''
  const interpreters = ['python3', 'bash', 'node']
  const args = [
    WORKER_FOLDER,
    keep,
    messageFile,
    String(Math.ceil(terminationGraceMs)),
    spec.taskFolder,
    spec.taskFileName,
    ...interpreters,
  ]
  return ['/bin/sh', `${WORKER_FOLDER}/bootstrap.sh`, 'contain', ...args]
}

/**
 * Returns the files of one worker only, which hold its secrets, by their names in its folder.
 * `home`: the task's home, unless it is in that folder.
 */
export function ownFiles(spec: WorkerSpec, home?: string): NamedContent[] {
  const exports = Object.entries({
    LANG: 'C.UTF-8',
    ...COMMON_ENVIRONMENT,
    ...spec.environment,
  }).map(([name, value]) => `export ${name}=${quote(value)}\n`)
  const itsHome = home === undefined ? '"$__tr_folder/home"' : quote(home)
  const folders = `export HOME=${itsHome} TMPDIR="$__tr_folder/tmp"\n`
  return [
    { name: 'environment.sh', content: folders + exports.join('') },
    { name: 'notes', content: spec.notes.map((note) => `[task-runner] ${note}\n`).join('') },
    ...preparationFiles(spec),
  ]
}

/** Files that all workers share. */
export interface SharedTar {
  /** The bootstrap and the tasks folder; equal files give equal bytes. */
  tar: AsyncIterable<Uint8Array>
  /** Complete once the tar has been read to its end. */
  leftOut: readonly LeftOut[]
}

type Add = (
  header: Pick<TarHeader, 'name'> & Partial<TarHeader>,
  body?: Iterable<Uint8Array> | AsyncIterable<Uint8Array>,
) => Promise<void>

/** Throws `UnavailableError`, as does reading the tar, if the tasks folder cannot be read. */
export async function sharedTar(tasksDir: string): Promise<SharedTar> {
  const listed = await listTasks(tasksDir)
  const tar = packed(async (add) => {
    const mtime = new Date(0)
    const same: Add = (header, body) => add({ ...header, mtime }, body)
    await addContent(same, './bootstrap.sh', await readFile(BOOTSTRAP))
    await addTasks(same, './tasks', tasksDir, listed)
  })
  return { tar, leftOut: listed.leftOut }
}

/**
 * Packs the worker's whole folder, below `worker/`, with notes of the files that are left out. If
 * `home` is elsewhere, packs it as an empty folder, too: the image may have one with files. Throws
 * what `assertTaskFile` throws; reading the tar throws `UnavailableError` if the tasks folder
 * cannot be read.
 */
export async function workerTar(
  spec: WorkerSpec,
  { tasksDir, home }: { tasksDir: string; home?: string | undefined },
): Promise<AsyncIterable<Uint8Array>> {
  if (spec.taskFolder === 'tasks') await assertTaskFile(tasksDir, spec.taskFileName)
  const listed = await listTasks(tasksDir)
  const root = WORKER_FOLDER.slice(1)
  return packed(async (add) => {
    for (const name of ['', '/tmp']) await addFolder(add, `${root}${name}`)
    await addFolder(add, home?.slice(1) ?? `${root}/home`)
    if (home !== undefined) {
      await add({ name: `${root}/home`, type: 'symlink', mode: 0o700, linkname: home })
    }
    await addContent(add, `${root}/bootstrap.sh`, await readFile(BOOTSTRAP))
    await addTasks(add, `${root}/tasks`, tasksDir, listed)
    const notes = [...spec.notes, ...leftOutNotes(listed.leftOut)]
    for (const { name, content } of ownFiles({ ...spec, notes }, home)) {
      await addContent(add, `${root}/${name}`, Buffer.from(content))
    }
  })
}

/** Packs the entries that `write` adds, as fast as the tar is read. */
function packed(write: (add: Add) => Promise<void>): AsyncIterable<Uint8Array> {
  const { readable, controller } = createTarPacker()
  const add: Add = async (header, body = []) => {
    const owner = { uid: WORKER_USER, gid: WORKER_USER, uname: '', gname: '' }
    const entry = controller.add({ size: 0, ...owner, ...header }).getWriter()
    for await (const chunk of body) await entry.write(chunk)
    await entry.close()
  }
  write(add)
    .then(() => controller.finalize())
    .catch((err: unknown) => controller.error(err))
  return readable
}

async function addFolder(add: Add, name: string): Promise<void> {
  await add({ name: `${name}/`, type: 'directory', mode: 0o700 })
}

async function addContent(add: Add, name: string, content: Buffer): Promise<void> {
  await add({ name, type: 'file', size: content.length, mode: 0o600 }, [content])
}

/**
 * Adds the readable entries of the tasks folder, and the others to `leftOut`. Follows links inside
 * the folder; leaves out links that leave it, and installed packages, which images bring along.
 */
async function addTasks(
  add: Add,
  name: string,
  tasksDir: string,
  { entries, leftOut }: { entries: readonly TasksEntry[]; leftOut: LeftOut[] },
): Promise<void> {
  const root = await realpath(tasksDir).catch((err: unknown) => {
    throw tasksFolderUnavailable(err)
  })
  await addFolder(add, name)
  for (const { path, kind } of entries) {
    const found = await find(root, path, kind).catch((err: unknown) => {
      const left = leftOutFor(path, err)
      if (left) leftOut.push(left)
    })
    if (found === 'folder') await addFolder(add, `${name}/${path}`)
    else if (found && 'linkname' in found) {
      await add({ name: `${name}/${path}`, type: 'symlink', mode: 0o700, ...found })
    } else if (found) {
      try {
        const { size, mode, mtime } = found
        const header = { name: `${name}/${path}`, size, mode: (mode & 0o777) | 0o600, mtime }
        await add({ ...header, type: 'file' }, contentOf(found))
      } finally {
        await found.file.close()
      }
    }
  }
}

interface OpenFile {
  file: FileHandle
  size: number
  mode: number
  mtime: Date
  /** First bytes: if they can be read, the rest usually can. */
  start: Buffer
}

/** Opens an entry of the tasks folder. Returns undefined if workers do not get it. */
async function find(
  root: string,
  path: string,
  kind: TasksEntry['kind'],
): Promise<'folder' | { linkname: string } | OpenFile | undefined> {
  if (kind === 'folder') return kind
  const source = join(root, path)
  if (kind === 'file') return openFile(source)
  const real = await linkedTo(source, root)
  if (real === undefined) return undefined
  const stats = await stat(real)
  if (stats.isFile()) return openFile(real)
  // Links to the same folder in the copy: a copied folder could contain itself.
  return stats.isDirectory() ? { linkname: relative(dirname(source), real) || '.' } : undefined
}

async function openFile(path: string): Promise<OpenFile | undefined> {
  const file = await open(path, READ | constants.O_NOFOLLOW)
  try {
    const stats = await file.stat()
    if (stats.isFile()) {
      const start = await readChunk(file, stats.size)
      // The file may have shrunk since `stat`.
      const size = stats.size <= CHUNK_BYTES ? start.length : stats.size
      return { file, size, mode: stats.mode, mtime: stats.mtime, start }
    }
  } catch (err) {
    await file.close()
    throw err
  }
  await file.close()
  return undefined
}

async function* contentOf({ file, size, start }: OpenFile): AsyncGenerator<Uint8Array> {
  yield start
  for (let left = size - start.length; left > 0; ) {
    const chunk = await readChunk(file, left).catch((err: unknown) => {
      throw tasksFolderUnavailable(err)
    })
    // The file has shrunk since its header was written: zeros fill it up, as in other tar programs.
    const filled = chunk.length === 0 ? Buffer.alloc(Math.min(left, CHUNK_BYTES)) : chunk
    left -= filled.length
    yield filled
  }
}

async function readChunk(file: FileHandle, bytes: number): Promise<Buffer> {
  const length = Math.min(bytes, CHUNK_BYTES)
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length)
  return buffer.subarray(0, bytesRead)
}
