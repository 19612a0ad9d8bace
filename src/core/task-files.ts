import { access, constants, lstat, open, realpath, stat } from 'node:fs/promises'
import { join, sep } from 'node:path'
import { InvalidRequestError, TaskRunnerError, UnavailableError } from './errors.ts'
import { SharedLook } from './shared-look.ts'
import {
  assertTasksFolder,
  codeOf,
  type LeftOut,
  leftOutFor,
  leftOutLines,
  linkedTo,
  listTasks,
  NOT_COPIED,
  READ,
  READ_FAULTS,
  type TasksEntry,
  tasksFolderUnavailable,
} from './tasks-folder.ts'
import { mergeWorkerConfigs, type WorkerConfig } from './worker-config.ts'

export const TASK_FILE_EXTENSIONS = ['.py', '.sh', '.js', '.mjs', '.cjs', '.ts'] as const

const LISTED_MAX = 1_000
const WARNINGS_MAX = 20
const DEFAULTS_BYTES_MAX = 1_000_000
/** Maximum files checked by each readiness probe. */
const CHECKED_MAX = 1_000
const UNREADABLE_KNOWN_MS = 60_000

/** The tasks folder: the files that may run, and the worker defaults beside them. */
export class TaskFiles {
  readonly #folder: string
  readonly #parseDefaults: (content: Buffer) => WorkerConfig
  readonly #lookups = new SharedLook(async (name) => {
    const defaults = this.defaultsFor(name)
    // Awaited second: an unreadable task file is reported rather than its broken defaults.
    defaults.catch(() => {})
    const isThere = await this.has(name)
    return { isThere, defaults: await defaults }
  })
  readonly #warnings = new SharedLook(() => this.#findWarnings())
  #unreadable: { files: readonly LeftOut[]; until: number } | undefined

  constructor(folder: string, parseDefaults: (content: Buffer) => WorkerConfig) {
    this.#folder = folder
    this.#parseDefaults = parseDefaults
  }

  /** Returns, and throws, what `has` and `defaultsFor` do; concurrent calls share the work. */
  look(name: string): Promise<{ isThere: boolean; defaults: WorkerConfig }> {
    return this.#lookups.at(name)
  }

  /**
   * Returns whether `name` is a file of the folder. Throws `invalid_request` for a link out of it,
   * `task_file_not_found` for an unreadable file, `UnavailableError` for an unreadable folder.
   */
  async has(name: string): Promise<boolean> {
    try {
      const isThere = await this.#has(name)
      // If the folder is unreadable, the file may exist.
      if (!isThere) await this.check()
      return isThere
    } catch (err) {
      if (err instanceof TaskRunnerError) throw err
      await this.check()
      const code = codeOf(err)
      if (READ_FAULTS[code] === 'gone') return false
      if (READ_FAULTS[code] !== 'refused') throw tasksFolderUnavailable(err)
      const message = `The task file "${name}" cannot be read (${code})`
      throw new TaskRunnerError('task_file_not_found', message, { cause: err })
    }
  }

  async #has(name: string): Promise<boolean> {
    // Fast path: a plain file directly in the folder is behind no link.
    const isPlain = !name.includes('/') && !NOT_COPIED.includes(name)
    if (isPlain && (await lstat(join(this.#folder, name)).catch(ignoreMissing))?.isFile())
      return true
    const folder = await realpath(this.#folder)
    const isCopied = !name.split('/').some((part) => NOT_COPIED.includes(part))
    const path = !isCopied ? undefined : await realpath(join(folder, name)).catch(ignoreMissing)
    if (path !== undefined && !path.startsWith(folder + sep) && path !== folder) {
      throw new InvalidRequestError([
        { path: 'task_file_name', message: 'leads out of the tasks folder' },
      ])
    }
    return path !== undefined && (await stat(path)).isFile()
  }

  /**
   * Reads `default_worker.json`, overlaid with `<task name>_worker.json`. Not cached, so that edits
   * take effect at once. Throws `defaults_file_broken`, which names the file.
   */
  async defaultsFor(taskFileName: string): Promise<WorkerConfig> {
    const own = taskFileName.replace(/\.[^.]+$/, '_worker.json')
    const [common, specific] = await Promise.all([
      this.#defaults('default_worker.json'),
      this.#defaults(own),
    ])
    return mergeWorkerConfigs(common, specific)
  }

  /** Lists the files that may run, sorted, at most `LISTED_MAX`. */
  async list(): Promise<string[]> {
    const { entries } = await listTasks(this.#folder)
    const named = entries
      .filter(({ path, kind }) => kind !== 'folder' && !isBehindMount(path))
      .map(({ path }) => path)
      .filter((path) => TASK_FILE_EXTENSIONS.some((ending) => path.endsWith(ending)))
      .slice(0, LISTED_MAX)
    // A link may lead nowhere, or out of the folder.
    const canRun = await Promise.all(
      named.map(async (name) => {
        const readable = access(join(this.#folder, name), constants.R_OK)
        return readable.then(() => this.has(name)).catch(() => false)
      }),
    )
    return named.filter((_, index) => canRun[index])
  }

  /** Throws `UnavailableError` when the folder cannot be read. */
  check(): Promise<void> {
    return assertTasksFolder(this.#folder)
  }

  /** Returns a sentence for each broken defaults file and each file that workers get no copy of. */
  warnings(): Promise<string[]> {
    return this.#warnings.at('')
  }

  async #findWarnings(): Promise<string[]> {
    const { entries, leftOut } = await listTasks(this.#folder)
    const left = [...leftOut, ...(await this.#findUnreadable(entries))]
    const files = [...entries.filter(({ kind }) => kind !== 'folder'), ...leftOut]
    const broken = await this.#brokenDefaults(files.map(({ path }) => path))
    return [
      ...broken.slice(0, WARNINGS_MAX),
      ...leftOutLines(left, WARNINGS_MAX).map((line) => `Tasks get no copy of ${line}`),
    ]
  }

  /** Finds unreadable files. Every probe calls this, so the result for many files is cached. */
  async #findUnreadable(entries: readonly TasksEntry[]): Promise<readonly LeftOut[]> {
    if (this.#unreadable && this.#unreadable.until > performance.now()) {
      return this.#unreadable.files
    }
    const root = await realpath(this.#folder)
    const found = await Promise.all(
      entries.map(({ path, kind }) =>
        tryRead(join(root, path), kind, root).catch((err: unknown) => leftOutFor(path, err)),
      ),
    )
    const files = found.filter((one) => one !== undefined)
    const isLong = entries.length > CHECKED_MAX
    this.#unreadable = isLong
      ? { files, until: performance.now() + UNREADABLE_KNOWN_MS }
      : undefined
    return files
  }

  async #brokenDefaults(paths: readonly string[]): Promise<string[]> {
    const names = paths.filter((path) => path.endsWith('_worker.json') && !isBehindMount(path))
    const results = await Promise.allSettled(names.map((name) => this.#defaults(name)))
    return results.flatMap((result) => {
      if (result.status === 'fulfilled') return []
      if (result.reason instanceof TaskRunnerError) return [result.reason.message]
      throw result.reason
    })
  }

  async #defaults(name: string): Promise<WorkerConfig> {
    try {
      const content = await this.#read(name)
      return content === undefined ? {} : this.#parseDefaults(content)
    } catch (err) {
      if (err instanceof UnavailableError) throw err
      const why = err instanceof Error ? err.message : String(err)
      throw new TaskRunnerError(
        'defaults_file_broken',
        `The worker defaults file "${name}" cannot be used: ${why}`,
        { cause: err },
      )
    }
  }

  /** Undefined: no such file. Throws `UnavailableError`, or why the file is unusable. */
  async #read(name: string): Promise<Buffer | undefined> {
    const file = await open(join(this.#folder, name), READ).catch(async (err: unknown) => {
      const code = codeOf(err)
      if (READ_FAULTS[code] === 'gone') return undefined
      await assertTasksFolder(this.#folder)
      if (READ_FAULTS[code] === 'ours') throw tasksFolderUnavailable(err)
      throw new Error(`it cannot be read (${code})`, { cause: err })
    })
    if (!file) return undefined
    try {
      const stats = await file.stat()
      if (!stats.isFile()) throw new Error('it is not a plain file')
      if (stats.size > DEFAULTS_BYTES_MAX) throw new Error('it is larger than 1 MB')
      const { buffer, bytesRead } = await file.read(Buffer.alloc(stats.size), 0, stats.size, 0)
      return buffer.subarray(0, bytesRead)
    } finally {
      await file.close()
    }
  }
}

/** Returns whether a path is in the `..<time>` folder that the links of a ConfigMap lead to. */
function isBehindMount(path: string): boolean {
  return path.split('/').some((part) => part.startsWith('..'))
}

/** Throws when an entry of the tasks folder cannot be read. */
async function tryRead(path: string, kind: TasksEntry['kind'], root: string): Promise<undefined> {
  const real = kind === 'link' ? await linkedTo(path, root) : path
  if (kind !== 'folder' && real !== undefined) await access(real, constants.R_OK)
}

function ignoreMissing(err: NodeJS.ErrnoException): undefined {
  if (READ_FAULTS[err.code ?? ''] === 'gone') return undefined
  throw err
}
