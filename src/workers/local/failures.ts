/** Every kind of failure of local workers: what it means for a task, and in what words. */
import { UnavailableError } from '../../core/errors.ts'
import { WorkerError } from '../../core/ports.ts'

export type FailureKind =
  | 'disk_full'
  | 'disk_read_only'
  | 'disk_failing'
  | 'no_descriptors'
  | 'no_processes'
  | 'no_memory'
  | 'tasks_folder_away'
  | 'workers_folder_away'
  | 'no_answer'
  | 'task_file_unusable'
  | 'name_taken'
  | 'folder_broken'

/**
 * `ours`: the machine's trouble, which hinders all tasks alike and is waited for. `task`: what the task asked for cannot be had.
 * `lost`: what the task made of its worker's folder tells no outcome any more.
 */
export const FAULT_OF = {
  disk_full: 'ours',
  disk_read_only: 'ours',
  disk_failing: 'ours',
  no_descriptors: 'ours',
  no_processes: 'ours',
  no_memory: 'ours',
  tasks_folder_away: 'ours',
  workers_folder_away: 'ours',
  no_answer: 'ours',
  task_file_unusable: 'task',
  name_taken: 'task',
  folder_broken: 'lost',
} as const satisfies Record<FailureKind, 'ours' | 'task' | 'lost'>

/** Codes of the system (errno(3)) that mean the same wherever they come from. Others depend on what was touched. */
const KIND_OF_CODE: Readonly<Record<string, FailureKind>> = {
  ENOSPC: 'disk_full',
  EDQUOT: 'disk_full',
  EROFS: 'disk_read_only',
  EIO: 'disk_failing',
  ENODEV: 'disk_failing',
  ESTALE: 'disk_failing',
  ENOTCONN: 'disk_failing',
  ETIMEDOUT: 'disk_failing',
  EHOSTDOWN: 'disk_failing',
  EUCLEAN: 'disk_failing',
  EMFILE: 'no_descriptors',
  ENFILE: 'no_descriptors',
  EAGAIN: 'no_processes',
  ENOMEM: 'no_memory',
}

const WORDS = {
  disk_full: 'The disk of the workers is full',
  disk_read_only: 'The disk of the workers is read-only',
  disk_failing: 'The disk of the workers fails',
  no_descriptors: 'The service has no file descriptors left',
  no_processes: 'No process could be started',
  no_memory: 'The machine has no memory left',
  tasks_folder_away: 'The tasks folder cannot be read',
  workers_folder_away: 'The folder of the workers cannot be used',
  no_answer: 'The local workers do not answer',
  task_file_unusable: 'The task file cannot be used',
  name_taken: 'Another task has a worker of this name',
  folder_broken: "The worker's folder is broken",
} satisfies Record<FailureKind, string>

/** A failure that is sorted. Of its fields `kind` is what a message between threads keeps. */
export class LocalFailure extends Error {
  override name = 'LocalFailure'
  readonly kind: FailureKind

  /** `message`: a sentence for people, where the usual one is not enough. */
  constructor(kind: FailureKind, options: { message?: string; cause?: unknown } = {}) {
    const { message = WORDS[kind], cause } = options
    const code = codeOf(cause)
    super(code === undefined ? message : `${message} (${code})`, { cause })
    this.kind = kind
  }
}

export function codeOf(err: unknown): string | undefined {
  const code = err instanceof Error && 'code' in err ? err.code : undefined
  return typeof code === 'string' && code !== '' ? code : undefined
}

/** Sorts an error of the system. One that is sorted already, or that means nothing by itself, comes back as it is. */
export function sorted(err: unknown): unknown {
  if (err instanceof LocalFailure) return err
  // What the copy of the tasks folder has sorted: a message between threads loses what class it was.
  const { message } = err instanceof Error ? err : { message: '' }
  if (err instanceof UnavailableError) return new LocalFailure('tasks_folder_away', { message })
  if (err instanceof WorkerError) return new LocalFailure('task_file_unusable', { message })
  const kind = KIND_OF_CODE[codeOf(err) ?? '']
  return kind === undefined ? err : new LocalFailure(kind, { cause: err })
}

/** Like `sorted`; what means nothing by itself is of `kind`. */
export function sortedAs(kind: FailureKind, err: unknown): LocalFailure {
  const known = sorted(err)
  return known instanceof LocalFailure ? known : new LocalFailure(kind, { cause: err })
}

/** True where trying again later may help, and nothing is known about the task. */
export function isOurs(err: unknown): boolean {
  const known = sorted(err)
  return known instanceof LocalFailure && FAULT_OF[known.kind] === 'ours'
}

/** True where what the task made of its worker's folder tells no outcome any more. */
export function isLoss(err: unknown): err is LocalFailure {
  return err instanceof LocalFailure && FAULT_OF[err.kind] === 'lost'
}

/** What the core makes of an error that came from the thread of the workers. */
export function toCore(err: unknown): unknown {
  const kind = err instanceof Error && 'kind' in err ? (err.kind as FailureKind) : undefined
  if (!(err instanceof Error) || kind === undefined || !Object.hasOwn(FAULT_OF, kind)) return err
  const outcomes = {
    ours: () => new UnavailableError(err.message, { cause: err }),
    task: () => new WorkerError('startup_failed', err.message, { cause: err }),
    lost: () => err,
  }
  return outcomes[FAULT_OF[kind]]()
}
