import { lstat, readdir, readFile, realpath, stat } from 'node:fs/promises'
import { join, sep } from 'node:path'
import { InvalidRequestError, TaskRunnerError } from './errors.ts'
import { SharedLook } from './shared-look.ts'
import { mergeWorkerConfigs, type WorkerConfig } from './worker-config.ts'

/** Folders that workers get no copy of. */
export const NOT_COPIED: readonly string[] = ['.git', '__pycache__']
/** Installed packages are many files that tasks only read: workers get a link. */
export const LINKED: readonly string[] = ['node_modules', '.venv']

export const TASK_FILE_EXTENSIONS = ['.py', '.sh', '.js', '.mjs', '.ts'] as const

const LISTED_MAX = 1_000

/** The tasks folder: which files may run, and the worker defaults that lie beside them. */
export class TaskFiles {
  readonly #folder: string
  readonly #parseDefaults: (json: string) => WorkerConfig
  readonly #looks = new SharedLook(async (name) => {
    const [isThere, defaults] = await Promise.all([this.has(name), this.defaultsFor(name)])
    return { isThere, defaults }
  })

  constructor(folder: string, parseDefaults: (json: string) => WorkerConfig) {
    this.#folder = folder
    this.#parseDefaults = parseDefaults
  }

  /** What `has` and `defaultsFor` tell, at a price that many who ask at once share. Throws what they throw. */
  look(name: string): Promise<{ isThere: boolean; defaults: WorkerConfig }> {
    return this.#looks.at(name)
  }

  /** Whether `name` is a file of the folder. Throws `invalid_request` when a link leads out of the folder. */
  async has(name: string): Promise<boolean> {
    // Nearly all are plain files of the folder itself, where no link can lead out.
    const isPlain = !name.includes('/') && !NOT_COPIED.includes(name)
    if (isPlain && (await lstat(join(this.#folder, name)).catch(ignoreMissing))?.isFile())
      return true
    const folder = await realpath(this.#folder)
    const isCopied = !name.split('/').some((part) => NOT_COPIED.includes(part))
    const path = !isCopied ? undefined : await realpath(join(folder, name)).catch(ignoreMissing)
    if (path !== undefined && !path.startsWith(folder + sep)) {
      throw new InvalidRequestError([
        { path: 'task_file_name', message: 'leads out of the tasks folder' },
      ])
    }
    return path !== undefined && (await stat(path)).isFile()
  }

  /**
   * `default_worker.json`, overlaid with `<task name>_worker.json`; read anew each time, so that edits
   * take effect at once. Throws `defaults_file_broken`, naming the file.
   */
  async defaultsFor(taskFileName: string): Promise<WorkerConfig> {
    const own = taskFileName.replace(/\.[^.]+$/, '_worker.json')
    const [common, specific] = await Promise.all([
      this.#defaults('default_worker.json'),
      this.#defaults(own),
    ])
    return mergeWorkerConfigs(common, specific)
  }

  /** The files that may run, by name: the first of them, where there are very many. */
  async list(): Promise<string[]> {
    const named = (await this.#walk(''))
      .filter((name) => TASK_FILE_EXTENSIONS.some((ending) => name.endsWith(ending)))
      .sort()
      .slice(0, LISTED_MAX)
    // Links may lead nowhere, or out of the folder.
    const canRun = await Promise.all(named.map((name) => this.has(name).catch(() => false)))
    return named.filter((_, index) => canRun[index])
  }

  /** Throws when the folder cannot be read. */
  async check(): Promise<void> {
    if (!(await stat(this.#folder)).isDirectory()) throw new Error('TASKS_DIR is not a folder')
  }

  /** What is wrong with defaults files, a sentence for each that is broken. */
  async warnings(): Promise<string[]> {
    const names = (await this.#walk('')).filter((name) => name.endsWith('_worker.json'))
    const results = await Promise.allSettled(names.map((name) => this.#defaults(name)))
    return results.flatMap((result) => {
      if (result.status === 'fulfilled') return []
      if (result.reason instanceof TaskRunnerError) return [result.reason.message]
      throw result.reason
    })
  }

  /** Every file that workers get a copy of. */
  async #walk(folder: string): Promise<string[]> {
    // What goes away while we look is not there.
    const entries =
      (await readdir(join(this.#folder, folder), { withFileTypes: true }).catch(ignoreMissing)) ??
      []
    const nested = entries.map(async (entry) => {
      const name = join(folder, entry.name)
      if (!entry.isDirectory()) return [name]
      const isSkipped = [...NOT_COPIED, ...LINKED].includes(entry.name)
      return isSkipped ? [] : this.#walk(name)
    })
    return (await Promise.all(nested)).flat()
  }

  async #defaults(name: string): Promise<WorkerConfig> {
    try {
      const json = await readFile(join(this.#folder, name), 'utf8').catch(ignoreMissing)
      return json === undefined ? {} : this.#parseDefaults(json)
    } catch (err) {
      const why = err instanceof Error ? err.message : String(err)
      throw new TaskRunnerError(
        'defaults_file_broken',
        `The worker defaults file "${name}" cannot be used: ${why}`,
        { cause: err },
      )
    }
  }
}

/** A name that cannot be is as good as one that is not there. */
const MISSING = new Set(['ENOENT', 'ENOTDIR', 'ENAMETOOLONG', 'ELOOP'])

function ignoreMissing(err: NodeJS.ErrnoException): undefined {
  if (MISSING.has(err.code ?? '')) return undefined
  throw err
}
