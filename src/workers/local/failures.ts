/** Classifies the failures of local workers: what they mean for a task, and their messages. */
import { UnavailableError } from '../../core/errors.ts'
import { WorkerError } from '../../core/ports.ts'

type Fault = 'ours' | 'task' | 'lost'

/**
 * Kinds of failures, and whose fault they are. `ours`: the machine's, for all tasks; retried until
 * it ends. `task`: the request cannot be fulfilled. `lost`: the task broke its worker's folder, and
 * its outcome is unknown.
 */
export const FAILURES = {
  disk_full: { fault: 'ours', message: "The workers' disk is full" },
  disk_read_only: { fault: 'ours', message: "The workers' disk is read-only" },
  disk_failing: { fault: 'ours', message: "The workers' disk reports errors" },
  no_descriptors: { fault: 'ours', message: 'The service has no file descriptors left' },
  no_processes: { fault: 'ours', message: 'No process could be started' },
  no_memory: { fault: 'ours', message: 'The machine has no memory left' },
  tasks_folder_away: { fault: 'ours', message: 'The tasks folder cannot be read' },
  workers_folder_away: { fault: 'ours', message: "The workers' folder cannot be used" },
  no_answer: { fault: 'ours', message: 'The local workers do not answer' },
  task_file_unusable: { fault: 'task', message: 'The task file cannot be used' },
  name_taken: { fault: 'task', message: 'Another task has a worker with this name' },
  folder_broken: { fault: 'lost', message: "The worker's folder is broken" },
} as const satisfies Record<string, { fault: Fault; message: string }>
export type FailureKind = keyof typeof FAILURES

/** Failures by system error code (errno(3)); the meaning of other codes depends on the path. */
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

/** A classified failure. Of its fields, only `kind` survives a message between threads. */
export class LocalFailure extends Error {
  override name = 'LocalFailure'
  readonly kind: FailureKind

  /** `message`: replaces the usual sentence of the kind. */
  constructor(kind: FailureKind, options: { message?: string; cause?: unknown } = {}) {
    const { message = FAILURES[kind].message, cause } = options
    const code = codeOf(cause)
    super(code === undefined ? message : `${message} (${code})`, { cause })
    this.kind = kind
  }
}

export function codeOf(err: unknown): string | undefined {
  const code = err instanceof Error && 'code' in err ? err.code : undefined
  return typeof code === 'string' && code !== '' ? code : undefined
}

/** Returns a system error as a `LocalFailure`, and any other error unchanged. */
export function classified(err: unknown): unknown {
  if (err instanceof LocalFailure) return err
  // Errors of copying the tasks folder: a message between threads would lose their classes.
  const { message } = err instanceof Error ? err : { message: '' }
  if (err instanceof UnavailableError) return new LocalFailure('tasks_folder_away', { message })
  if (err instanceof WorkerError) return new LocalFailure('task_file_unusable', { message })
  const kind = KIND_OF_CODE[codeOf(err) ?? '']
  return kind === undefined ? err : new LocalFailure(kind, { cause: err })
}

/** Returns an error as a `LocalFailure`, by default of `kind`. */
export function classifiedAs(kind: FailureKind, err: unknown): LocalFailure {
  const known = classified(err)
  return known instanceof LocalFailure ? known : new LocalFailure(kind, { cause: err })
}

/** Returns whether an error says nothing about the task, and a retry may succeed. */
export function isTemporary(err: unknown): boolean {
  const known = classified(err)
  return known instanceof LocalFailure && FAILURES[known.kind].fault === 'ours'
}

/** Returns whether an error means that the task broke its worker's folder. */
export function isFolderBroken(err: unknown): err is LocalFailure {
  return err instanceof LocalFailure && FAILURES[err.kind].fault === 'lost'
}

/** Returns an error of the workers' thread as one that the core knows. */
export function toCoreError(err: unknown): unknown {
  const kind = err instanceof Error && 'kind' in err ? (err.kind as FailureKind) : undefined
  if (!(err instanceof Error) || kind === undefined || !Object.hasOwn(FAILURES, kind)) return err
  const outcomes = {
    ours: () => new UnavailableError(err.message, { cause: err }),
    task: () => new WorkerError('startup_failed', err.message, { cause: err }),
    lost: () => err,
  }
  return outcomes[FAILURES[kind].fault]()
}
