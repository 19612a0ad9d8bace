/** Ports of the core, which adapters implement, and the records that they exchange. */
import type {
  CallbackStatus,
  Outcome,
  Reason,
  Task,
  TaskRequest,
  TaskStatus,
  TaskSummary,
} from './task.ts'
import type { WorkerConfig } from './worker-config.ts'

export interface Logger {
  debug(fields: object, message: string): void
  info(fields: object, message: string): void
  warn(fields: object, message: string): void
  error(fields: object, message: string): void
}

// ---------------------------------------------------------------- workers

/** A repository that a worker clones before its task runs. */
export interface Repository {
  /** http, https or ssh, without a password. */
  url: string
  /** Target folder below the worker's home. */
  directory: string
  branch: string | undefined
  /** Number of the last commits to fetch; undefined: all. */
  depth: number | undefined
  /** Folders to check out; empty: all. */
  sparseFolders: readonly string[]
  /** Allowed addresses of the host; empty if the URL contains an address. */
  addresses: readonly string[]
  /** `password` is a private key if the URL is of ssh. */
  credential: { username: string; password: string } | undefined
  /** Keeps the credential for the task's own use of git. */
  keepCredential: boolean
}

export interface WorkerResources {
  cpus: number
  memoryBytes: number
  gpus: number
}

/** How a worker's image is pulled. */
export interface ImageConfig {
  pullPolicy?: 'Always' | 'IfNotPresent' | 'Never'
  credential?: { username: string; password: string }
  /** Name of an existing pull secret of Kubernetes. */
  pullSecretName?: string
}

export interface WorkerSpec {
  name: string
  taskId: string
  /** Relative to `taskFolder`. */
  taskFileName: string
  /** Working directory: the copy of the tasks folder, or a repository below home. */
  taskFolder: 'tasks' | `home/${string}`
  repositories: readonly Repository[]
  environment: Record<string, string>
  startupScript?: string | undefined
  image?: string | undefined
  imageConfig?: ImageConfig | undefined
  size?: string | undefined
  /** Resources of the size; undefined: no limit. */
  resources?: WorkerResources | undefined
  /** Keeps the worker for inspection after its task has ended. */
  keepAfterwards: boolean
  /** A task that logs more is ended with reason `log_limit`. */
  maxLogBytes: number
  /** Time limit, for engines that can enforce it while the service is down. */
  timeoutSeconds: number
  /** First lines of the task's log, for people. */
  notes: string[]
}

export type WorkerStatus = 'Provisioning' | 'Running' | 'Completed' | 'Terminating'

export interface Completion {
  reason: Exclude<Reason, 'cancelled' | 'internal_error'>
  exitCode: number | null
  signal: string | null
  message: string | null
}

export interface LogTail {
  content: Buffer
  /** Length of the whole log; `content` may be only its end. */
  totalBytes: number
}

export interface Worker {
  readonly name: string
  /** Empty if the task has deleted the file that holds it. */
  readonly taskId: string
  readonly backend: string
  readonly image: string | null
  readonly size: string | null
  readonly createdAt: number
  /** Another deployment may have made it: it is ours only if the store has its task. */
  readonly mayBeForeign?: boolean
  status(): Promise<WorkerStatus>
  /** Waits for the task's exit. Rejects only when `signal` aborts. */
  completion(signal: AbortSignal): Promise<Completion>
  /** Ends the task's processes (TERM, grace period, KILL) and keeps log and files. Idempotent. */
  stop(): Promise<void>
  /** True once the task has exited by itself, even if its children still write to the log. */
  hasEnded?(): Promise<boolean>
  /** Reads the end of the log. */
  logs(options: { maxBytes: number }): Promise<LogTail>
  /** Streams the log from an offset on, until the task has ended. */
  follow(options: { from: number; signal: AbortSignal }): AsyncIterable<Buffer>
  /** Ends the processes and removes all of the worker. Idempotent. Rejects if anything is left. */
  terminate(): Promise<void>
  /** Removes an ended task's files, but not its outcome, from the store's disk. Idempotent. */
  freeSpace?(): Promise<void>
}

export interface WorkerBackend {
  readonly name: string
  /**
   * Makes the worker and starts its task. Idempotent by `spec.name`. Throws a `WorkerError`, which
   * ends the task, if the task's own request cannot be met; `UnavailableError` if no task can get a
   * worker now. After that and any other error, the caller retries. An engine shared with other
   * instances calls `mayStart` right before the start; if it rejects, the task does not start.
   */
  provision(spec: WorkerSpec, signal: AbortSignal, mayStart?: () => Promise<void>): Promise<Worker>
  find(name: string): Promise<Worker | undefined>
  /** Lists the workers that exist. */
  list(): Promise<Worker[]>
  /** Tries the parts of `provision` that leave nothing. Throws `UnavailableError` if they fail. */
  check(): Promise<void>
  /** Returns why workers cannot get the task files in their present state; undefined: they can. */
  taskFilesProblem?(): Promise<string | undefined>
  /** Returns the number of workers' folders that could not be removed. */
  leftBehind?(): number
  /** Closes connections and threads; workers go on. */
  close(): Promise<void>
}

/** A worker cannot be provisioned, for a reason that the task's author can act on. */
export class WorkerError extends Error {
  override name = 'WorkerError'
  readonly reason: Reason

  constructor(reason: Reason, message: string, options: { cause?: unknown } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.reason = reason
  }
}

/** Named secrets. Not cached, so that a rotated one needs no restart. */
export interface SecretSource {
  /**
   * Undefined: no such secret. Throws `UnusableSecretError`, or another error with a message for
   * people while the service cannot read it.
   */
  read(name: string): Promise<string | undefined>
}

/** The secret exists and is unusable; the message says why, without its value. */
export class UnusableSecretError extends Error {
  override name = 'UnusableSecretError'
}

/** Hosts that repositories may be cloned from. */
export interface GitHosts {
  /** Returns why a URL is refused; undefined: it may be allowed, subject to its addresses. */
  refusal(url: URL): string | undefined
  /**
   * Returns the allowed addresses of the URL's host. Throws a `WorkerError` if there are none, and
   * another error, with a message for people, while the lookup fails.
   */
  addresses(url: URL): Promise<string[]>
}

/** A live task with the claim it had when read: an instance can take it over only by that claim. */
export interface SeenTask {
  taskId: string
  /** 0: never claimed. */
  claim: number
}

// ---------------------------------------------------------------- other instances

export interface OrphanedTask extends SeenTask {
  /** Instance that has died. */
  instance: string
  /** The worker ran on the instance's host, which has not come back in time. */
  isLost: boolean
}

/** The instances of a deployment, which share the tasks. */
export interface Cluster {
  /** Stores a heartbeat. False: the last one had expired, and others may have claimed our tasks. */
  beat(): Promise<boolean>
  /** Returns whether the last heartbeat is still valid, without a query. */
  isMember(): boolean
  /** Returns the live tasks that this instance has claimed. */
  ours(): Promise<SeenTask[]>
  /** Returns a random share of the running tasks of dead instances; call it again for the rest. */
  orphans(): Promise<OrphanedTask[]>
  /** Returns tasks of this instance whose cancel is requested. */
  cancelRequests(): Promise<string[]>
  /** Lets others take over the tasks of this instance at once. */
  leave(): Promise<void>
}

/** Messages between instances. They may get lost: polling finds the same, later. */
export interface Hints {
  /** Announces that tasks wait. */
  tasksWait(): void
  /** Announces that a task's cancel is requested. */
  cancelRequested(taskId: string): void
}

// ---------------------------------------------------------------- store

export interface NewTask extends TaskRequest {
  /** The request's config, merged with the defaults of the worker files. */
  workerConfig: WorkerConfig
  timeoutSeconds: number
  priority: number
  traceparent: string | null
  /** Digest of the request: tells a repetition from another request with the same id. */
  digest: string
  workerName: string
  createdAt: number
}

export interface ClaimedTask extends Task {
  cancelRequested: boolean
  /** Set if the sealed parameters are unreadable: the task lacks them and can only be ended. */
  damage?: DamagedTaskError
}

/**
 * The sealed columns of a stored task are damaged. `task` has the others, so that it can still be
 * ended. The secrets in its log are unknown: the log must not be stored.
 */
export class DamagedTaskError extends Error {
  override name = 'DamagedTaskError'
  readonly task: Task

  constructor(task: Task, options: { cause: unknown }) {
    super(`The stored parameters of task "${task.taskId}" are damaged`, options)
    this.task = task
  }
}

export interface LiveTask extends SeenTask {
  status: TaskStatus
}

export interface TaskFilter {
  status?: TaskStatus | undefined
  taskFileName?: string | undefined
  callbackStatus?: CallbackStatus | undefined
  limit: number
  /** Only tasks accepted before the one with this `seq`. */
  before?: number | undefined
}

export interface NewDelivery {
  webhookId: string
  origin: string
  /** Lease of the committing instance for the first attempt; null: any instance may attempt it. */
  leaseUntil: number | null
}

export interface WorkerOwner {
  status: TaskStatus
  finishedAt: number | null
  /** The worker is kept for inspection. */
  kept: boolean
  /** The task waits for the service. */
  isHindered: boolean
}

export interface TaskStore {
  /** Durable once it resolves. False: the id is taken. */
  insert(task: NewTask): Promise<boolean>
  digestOf(taskId: string): Promise<{ digest: string; status: TaskStatus } | undefined>
  /** Throws `DamagedTaskError`. */
  get(taskId: string): Promise<Task | undefined>
  /** Newest first. */
  list(filter: TaskFilter): Promise<TaskSummary[]>
  log(taskId: string): Promise<LogTail | undefined>
  /**
   * Claims up to `limit` waiting tasks in the order of `queuePosition`; with `runningMax`, at most
   * that many tasks run on all instances. A claim whose reply is lost is found by `Cluster.ours`.
   */
  claimNext(options: {
    at: number
    limit: number
    runningMax?: number | undefined
  }): Promise<ClaimedTask[]>
  /** Returns a task that was claimed by `claimNext`, and not begun, to the queue. */
  putBack(task: Pick<Task, 'taskId' | 'claim'>): Promise<void>
  /** Counts waiting tasks of all instances, up to `max`. */
  countQueued(max: number): Promise<number>
  /**
   * Claims a live task whose claim is still `seen` (default: 0, never claimed): raises the claim
   * and moves `queued` to `provisioning`. Undefined: the task is final, gone or another instance's.
   * Safe to repeat.
   */
  claim(taskId: string, at: number, seen?: number): Promise<ClaimedTask | undefined>
  /** Stores the values to mask in the task's log, sealed, until the task ends. */
  keepSecretValues(task: Task, values: readonly string[]): Promise<void>
  /**
   * Stores what a live task waits for, in a sentence, if the claim still holds. Null: nothing;
   * `claim`, `markRunning` and `finish` store null, too.
   */
  noteWaiting(task: Pick<Task, 'taskId' | 'claim'>, waitingFor: string | null): Promise<void>
  /** False: another instance has claimed the task, or it is final. */
  markRunning(task: Task, startedAt: number): Promise<boolean>
  /**
   * Commits outcome, log and delivery in one transaction, and deletes secrets no longer needed.
   * False: the task was final or claimed by another instance. Safe to repeat.
   */
  finish(
    task: Task,
    end: {
      outcome: Outcome
      log: LogTail
      /** Length of the log with our last line, before it was masked and cut. */
      logBytes: number
      delivery: NewDelivery | undefined
      finishedAt: number
      keepWorker: boolean
    },
  ): Promise<boolean>
  /** Stores a request to cancel the task. Undefined: it is final or unknown. */
  requestCancel(taskId: string, at: number): Promise<TaskSummary | undefined>
  /** Counts live tasks of all instances. */
  countLive(): Promise<Array<{ status: TaskStatus; count: number; oldestCreatedAt: number }>>
  /**
   * Returns the live tasks that this instance resumes at its start, oldest first: those that it had
   * claimed, and waiting ones whose cancel is requested.
   */
  live(): Promise<LiveTask[]>
  workerOwner(taskId: string): Promise<WorkerOwner | undefined>
  /** Returns ended tasks of this instance whose worker is still to be terminated. */
  workersToTerminate(): Promise<Array<{ taskId: string; workerName: string }>>
  workerTerminated(taskId: string): Promise<void>
  /**
   * Returns tasks that ended before `at` without a `workerTerminated`. With `instance`, only those
   * of its host and of unknown hosts.
   */
  workersRemembered(at: number, instance?: string): Promise<string[]>
  /** Removes ended tasks with their logs, unless the delivery is pending. Returns how many. */
  removeFinishedBefore(at: number): Promise<number>
  /** Throws `store_unavailable` when the store cannot be read. */
  check(): Promise<void>
}

// ---------------------------------------------------------------- deliveries

export interface CallbackPayload {
  taskName: string
  taskId: string
  success: boolean
  logs: StoredLog
}

/** A log that is read only when sent, so that waiting attempts do not hold it. */
export interface StoredLog {
  /** Length of the log. */
  bytes: number
  read(): Promise<LogTail>
}

/** Target and content of an attempt. */
export interface DeliveryContent {
  url: string
  token: string | null
  traceparent: string | null
  payload: CallbackPayload
  facts: CallbackFacts
  /** The receiver rejected the whole log as too large: only its end is sent. */
  isCut: boolean
}

/** Facts about the task's end, sent as headers. */
export interface CallbackFacts {
  status: TaskStatus
  reason: Reason | null
  exitCode: number | null
  /** Time from start to end; null: the task never started. */
  durationMs: number | null
}

export interface DueDelivery {
  taskId: string
  webhookId: string
  origin: string
  /** Attempts made before this one. */
  attempts: number
  /** Number of them that were requested by hand. */
  manualAttempts: number
  /** Requested by hand: the schedule continues as if it had not been made. */
  manual: boolean
  /** When the schedule continues after an attempt by hand; null: it has ended. */
  resumeAt: number | null
  /** An earlier attempt succeeded. */
  deliveredBefore: boolean
  /** End of the lease, in epoch ms. */
  leaseUntil: number
}

export interface AttemptRecord {
  number: number
  startedAt: number
  durationMs: number
  statusCode: number | null
  error: string | null
  /** Requested by hand. */
  manual: boolean
}

export interface DeliveryState {
  status: CallbackStatus
  webhookId: string
  nextAttemptAt: number | null
  attempts: AttemptRecord[]
}

export interface DeliveryStore {
  /**
   * Leases the oldest due delivery until `leaseUntil`. Its origin is not in `exceptOrigins`, and in
   * `onlyOrigins` if given.
   */
  takeDue(options: {
    now: number
    leaseUntil: number
    exceptOrigins: readonly string[]
    onlyOrigins?: readonly string[] | undefined
  }): Promise<DueDelivery | undefined>
  /** Returns when the next delivery is due, in epoch ms. */
  nextDueAt(): Promise<number | undefined>
  content(taskId: string): Promise<DeliveryContent | undefined>
  recordAttempt(
    taskId: string,
    attempt: AttemptRecord,
    next: { status: Exclude<CallbackStatus, 'none'>; nextAttemptAt: number | null },
    /** Nothing is recorded if this lease is lost. */
    leaseUntil?: number,
  ): Promise<void>
  /** Moves all future due times, after the clock was set. */
  shiftDue(byMs: number): Promise<void>
  /**
   * Corrects due times after the clock was set back while no instance ran: a delivery whose last
   * attempt, or task's end, is more than `toleranceMs` in the future is due within
   * `longestDelaysMs[attempts made]`, or at once if there is no such delay. Safe to repeat.
   */
  boundDue(options: {
    now: number
    toleranceMs: number
    longestDelaysMs: readonly number[]
  }): Promise<void>
  /** Ends the lease without an attempt, if it is still held. */
  release(taskId: string, leaseUntil?: number): Promise<void>
  /**
   * Makes an extra attempt due now, without a change of the schedule. `in_flight`: an attempt is
   * under way. Undefined: no delivery. Safe to repeat.
   */
  redeliver(taskId: string, now: number): Promise<'queued' | 'in_flight' | undefined>
  state(taskId: string): Promise<DeliveryState | undefined>
}

export interface CallbackSender {
  /** Makes one attempt. Failures of receiver or network are results, not errors. */
  send(
    request: Omit<DeliveryContent, 'isCut'> & {
      webhookId: string
      /** Time of this attempt, in unix seconds. */
      timestamp: number
    },
    signal: AbortSignal,
  ): Promise<AttemptResult>
  close(): Promise<void>
}

export interface AttemptResult {
  statusCode: number | null
  /** Failure for people, too coarse to scan ports with. */
  error: string | null
  /** `Retry-After` of the receiver, in ms. */
  retryAfterMs: number | null
  /** The address may not be called: no further attempt is made. */
  blocked?: boolean
}
