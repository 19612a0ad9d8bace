/** What a worker's folder holds when its container starts; the same for all container engines. */
import { readFile } from 'node:fs/promises'
import { basename } from 'node:path'
import { fileURLToPath } from 'node:url'
import { packTar, type TarSource } from 'modern-tar/fs'
import type { WorkerSpec } from '../core/ports.ts'
import { LINKED, NOT_COPIED } from '../core/task-files.ts'
import { quote } from './quote.ts'
import { repositoryFiles } from './repositories.ts'

const PATH_LENGTH_MAX = 1000

/** Where the worker's folder is in every container. */
export const WORKER_FOLDER = '/worker'
/** Tasks run as this user, so that no image makes them root. */
export const WORKER_USER = 10_001

export const BOOTSTRAP = fileURLToPath(new URL('./bootstrap.sh', import.meta.url))

/** The command of a worker's container. `messageFile`: where the engine looks for a container's last words. */
export function workerCommand(spec: WorkerSpec, messageFile = ''): string[] {
  const keep = spec.keepAfterwards ? 'keep' : ''
  const interpreters = ['python3', 'bash', 'node']
  const args = [
    WORKER_FOLDER,
    keep,
    messageFile,
    spec.taskFolder,
    spec.taskFileName,
    ...interpreters,
  ]
  return ['/bin/sh', `${WORKER_FOLDER}/bootstrap.sh`, 'contain', ...args]
}

/** Files of one worker alone, by their names in its folder. They hold its secrets. */
export function ownFiles(spec: WorkerSpec): Array<{ name: string; content: string }> {
  const exports = Object.entries({ LANG: 'C.UTF-8', ...spec.environment }).map(
    ([name, value]) => `export ${name}=${quote(value)}\n`,
  )
  const folders = 'export HOME="$__tr_folder/home" TMPDIR="$__tr_folder/tmp"\n'
  return [
    { name: 'environment.sh', content: folders + exports.join('') },
    { name: 'notes', content: spec.notes.map((note) => `[task-runner] ${note}\n`).join('') },
    ...(spec.startupScript === undefined
      ? []
      : [{ name: 'startup.sh', content: spec.startupScript }]),
    ...(spec.repositories.length === 0 ? [] : repositoryFiles(spec.repositories)),
  ]
}

/** What all workers share, as tar: the bootstrap and the tasks folder. The same files give the same bytes. */
export async function sharedTar(tasksDir: string): Promise<AsyncIterable<Buffer>> {
  return packed([await bootstrapIn('.'), tasksIn('.', tasksDir)], tasksDir, new Date(0))
}

/**
 * The worker's whole folder as tar, below `worker/`. Links inside the tasks folder are followed, those that leave it
 * are left out, as are installed packages: an image brings its own.
 */
export async function workerTar(
  spec: WorkerSpec,
  tasksDir: string,
): Promise<AsyncIterable<Buffer>> {
  const root = WORKER_FOLDER.slice(1)
  const folders = ['', '/home', '/tmp'].map((name): TarSource => {
    return { type: 'content', content: null, target: `${root}${name}/`, mode: 0o700 }
  })
  const own = ownFiles(spec).map(({ name, content }): TarSource => {
    return { type: 'content', content, target: `${root}/${name}`, mode: 0o600 }
  })
  const sources = [...folders, await bootstrapIn(root), ...own, tasksIn(root, tasksDir)]
  return packed(sources, tasksDir)
}

async function bootstrapIn(root: string): Promise<TarSource> {
  const content = await readFile(BOOTSTRAP)
  return { type: 'content', content, target: `${root}/bootstrap.sh`, mode: 0o600 }
}

function tasksIn(root: string, tasksDir: string): TarSource {
  return { type: 'directory', source: tasksDir, target: `${root}/tasks` }
}

function packed(sources: TarSource[], tasksDir: string, mtime?: Date): AsyncIterable<Buffer> {
  return packTar(sources, {
    dereference: true,
    baseDir: tasksDir,
    // A link to a folder that it lies in would lead on for ever.
    filter: (path) =>
      ![...LINKED, ...NOT_COPIED].includes(basename(path)) && path.length < PATH_LENGTH_MAX,
    map: (header) => ({
      ...header,
      type: header.name.endsWith('/') ? 'directory' : (header.type ?? 'file'),
      ...{ uid: WORKER_USER, gid: WORKER_USER, uname: '', gname: '' },
      ...(mtime ? { mtime } : {}),
      mode: (header.mode ?? 0) | (header.type === 'directory' ? 0o700 : 0o600),
    }),
  })
}
