/** What the rules need from the outside world. Adapters implement these; nothing here knows which. */
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
  /** http, https or ssh; without a password. */
  url: string
  /** Where to, below the worker's home. */
  directory: string
  branch: string | undefined
  /** Only the last commits, that many. */
  depth: number | undefined
  /** Only these folders, when there are any. */
  sparseFolders: readonly string[]
  /** What the host's name was found to be and may be dialled; empty when the URL holds the address itself. */
  addresses: readonly string[]
  /** ssh: `password` is a private key. */
  credential: { username: string; password: string } | undefined
  /** Leaves the credential for the task's own use of git. */
  keepCredential: boolean
}

export interface WorkerResources {
  cpus: number
  memoryBytes: number
  gpus: number
}

/** How a worker's image is had. */
export interface ImageConfig {
  pullPolicy?: 'Always' | 'IfNotPresent' | 'Never'
  credential?: { username: string; password: string }
  /** Kubernetes: a pull secret that is there already. */
  pullSecretName?: string
}

export interface WorkerSpec {
  name: string
  taskId: string
  /** Relative to `taskFolder`. */
  taskFileName: string
  /** Where the task runs: the copy of the tasks folder, or a repository's directory below home. */
  taskFolder: 'tasks' | `home/${string}`
  repositories: readonly Repository[]
  environment: Record<string, string>
  startupScript?: string | undefined
  image?: string | undefined
  imageConfig?: ImageConfig | undefined
  size?: string | undefined
  /** What the size means; undefined: as much as there is. */
  resources?: WorkerResources | undefined
  /** The worker stays for a look inside after its task has ended. */
  keepAfterwards: boolean
  /** A task that logs more is ended with reason `log_limit`. */
  maxLogBytes: number
  /** How long the task may run: for engines that end it should we be away. */
  timeoutSeconds: number
  /** Lines for people, put at the top of the task's log. */
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
  /** Bytes logged in all; more than `content` holds when the beginning was cut. */
  totalBytes: number
}

export interface Worker {
  readonly name: string
  /** Empty where the task made away with what told it. */
  readonly taskId: string
  readonly backend: string
  readonly image: string | null
  readonly size: string | null
  readonly createdAt: number
  /** Another service may have made it: it is ours only if the store knows its task. */
  readonly mayBeForeign?: boolean
  status(): Promise<WorkerStatus>
  /** Settles when the task's exit is known; rejects only when `signal` aborts. */
  completion(signal: AbortSignal): Promise<Completion>
  /** Ends the task's processes (TERM, a grace period, KILL); log and files stay readable. Idempotent. */
  stop(): Promise<void>
  /** True once the task has ended of its own accord, also while something of it may still write into its log. */
  hasEnded?(): Promise<boolean>
  /** The last bytes of the log. */
  logs(options: { maxBytes: number }): Promise<LogTail>
  /** The log's bytes from an offset on, as they come; ends when the task has ended and all was read. */
  follow(options: { from: number; signal: AbortSignal }): AsyncIterable<Buffer>
  /** Ends the processes and removes everything the worker had. Idempotent; rejects when something is left. */
  terminate(): Promise<void>
  /**
   * Empties what takes space and is not needed for the outcome, where that is on the disk of the store. Only after the task has
   * ended. Idempotent.
   */
  freeSpace?(): Promise<void>
}

export interface WorkerBackend {
  readonly name: string
  /**
   * Makes the worker and starts its task. Idempotent by `spec.name`. Throws `WorkerError` where what the task asked for
   * cannot be had, which ends the task, and `UnavailableError` where no task could get a worker now. After any other error
   * the task waits, too, and is tried again. `mayStart` is asked when all is there but what the task cannot start without, in engines that we share with
   * others: when it rejects, the task does not start.
   */
  provision(spec: WorkerSpec, signal: AbortSignal, mayStart?: () => Promise<void>): Promise<Worker>
  find(name: string): Promise<Worker | undefined>
  /** What really exists, not what is remembered. */
  list(): Promise<Worker[]>
  /**
   * Does what provisioning does, as far as that leaves nothing behind. Throws `UnavailableError` while workers are unavailable.
   */
  check(): Promise<void>
  /** Why no worker could be given the task files as they are now; undefined: they are fine. */
  taskFilesProblem?(): Promise<string | undefined>
  /** What workers that have ended left on our disk, and what cannot be removed. */
  leftBehind?(): number
  /** Lets go of workers without ending them. */
  close(): Promise<void>
}

/** A worker could not be had, for a reason its user can act on. */
export class WorkerError extends Error {
  override name = 'WorkerError'
  readonly reason: Reason

  constructor(reason: Reason, message: string, options: { cause?: unknown } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.reason = reason
  }
}

/** Named secrets, read anew each time, so that a rotated one needs no restart. */
export interface SecretSource {
  /**
   * Undefined: there is none of this name. Throws `UnusableSecretError`, and any other error, with
   * words for people, while it cannot be read for a reason of ours.
   */
  read(name: string): Promise<string | undefined>
}

/** There is a secret, and it cannot be used; the message says why, and nothing of its value. */
export class UnusableSecretError extends Error {
  override name = 'UnusableSecretError'
}

/** Which hosts repositories may be cloned from. */
export interface GitHosts {
  /** Why a URL can be refused without asking anybody; undefined when only looking it up will tell. */
  refusal(url: URL): string | undefined
  /**
   * The addresses of the URL's host that may be dialled. Throws a `WorkerError` when there are
   * none, and any other error, with words for people, while nobody can tell.
   */
  addresses(url: URL): Promise<string[]>
}

/** A live task as it was when it was looked at: whoever takes it on names this claim, and is the only one to. */
export interface SeenTask {
  taskId: string
  /** 0: nobody has claimed it yet. */
  claim: number
}

// ---------------------------------------------------------------- other instances

export interface OrphanedTask extends SeenTask {
  /** The one that has died. */
  instance: string
  /** Its worker is out of reach with the host, which had its time to come back. */
  isLost: boolean
}

/** The instances of the service that share a store, and with it the tasks. */
export interface Cluster {
  /** Says that this instance lives. False: it has been silent for so long that others may have taken its tasks. */
  beat(): Promise<boolean>
  /** Others know that this one lives; false once its last beat is too long ago. Asks nobody. */
  isMember(): boolean
  /** Tasks that this instance has claimed and not ended. */
  ours(): Promise<SeenTask[]>
  /**
   * Running tasks of instances that have died, some of them: there may be many, and others to take their share. Asked
   * again, also for what others have not taken.
   */
  orphans(): Promise<OrphanedTask[]>
  /** Tasks of ours that someone wants ended. */
  cancelRequests(): Promise<string[]>
  /** Others may take over at once what this instance leaves behind. */
  leave(): Promise<void>
}

/** Messages between instances. One may get lost: they only make things quicker. */
export interface Hints {
  /** Says that tasks wait. */
  tasksWait(): void
  /** Says that someone wants the task ended. */
  cancelRequested(taskId: string): void
}

// ---------------------------------------------------------------- store

export interface NewTask extends TaskRequest {
  /** With the defaults of the worker files laid under. */
  workerConfig: WorkerConfig
  timeoutSeconds: number
  priority: number
  traceparent: string | null
  /** Of the request as given: tells a repeated request from another one under the same id. */
  digest: string
  workerName: string
  createdAt: number
}

/** What a claim tells beyond the task itself. */
export interface ClaimedTask extends Task {
  cancelRequested: boolean
  /** Set where its sealed parameters cannot be read: it has none of them, and can only be ended. */
  damage?: DamagedTaskError
}

/**
 * What is sealed of a stored task is damaged. `task` is the rest of it, with nothing sealed, so
 * that the task can still be noted as waiting, or ended. The secrets that its log may hold are
 * unknown: the log must not be kept.
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
  /** The instance that commits makes the first attempt itself until then; null leaves it to any. */
  leaseUntil: number | null
}

export interface WorkerOwner {
  status: TaskStatus
  finishedAt: number | null
  /** The worker stays for a look inside. */
  kept: boolean
  /** The task waits for what is ours to mend. */
  isHindered: boolean
}

export interface TaskStore {
  /** Durable when it resolves. False: the id is taken. */
  insert(task: NewTask): Promise<boolean>
  digestOf(taskId: string): Promise<{ digest: string; status: TaskStatus } | undefined>
  /** Throws `DamagedTaskError`. */
  get(taskId: string): Promise<Task | undefined>
  /** Newest first. */
  list(filter: TaskFilter): Promise<TaskSummary[]>
  log(taskId: string): Promise<LogTail | undefined>
  /**
   * Claims up to `limit` waiting tasks, the first by `queuePosition`, and returns them in that
   * order; with `runningMax`, no more than that many tasks run on all instances. A claim whose
   * answer is lost is found by `Cluster.ours`.
   */
  claimNext(options: {
    at: number
    limit: number
    runningMax?: number | undefined
  }): Promise<ClaimedTask[]>
  /** Makes a task wait again that `claimNext` has given out and nothing was done for. */
  putBack(task: Pick<Task, 'taskId' | 'claim'>): Promise<void>
  /** Counts waiting tasks of all instances, up to `max`. */
  countQueued(max: number): Promise<number>
  /**
   * Takes a live task that is still at the claim `seen`, or was taken by this very call before:
   * raises its claim, moves `queued` to `provisioning`. Without `seen`: one that nobody has
   * claimed. Undefined: it is final, gone, or someone else's. Safe to repeat.
   */
  claim(taskId: string, at: number, seen?: number): Promise<ClaimedTask | undefined>
  /** Keeps, sealed, what must not show in the task's log, until the task ends. */
  keepSecretValues(task: Task, values: readonly string[]): Promise<void>
  /**
   * Notes what hinders the task, in a sentence, while this claim holds and it has not ended; null: nothing any more. `claim`,
   * `markRunning` and `finish` note null by themselves.
   */
  noteWaiting(task: Pick<Task, 'taskId' | 'claim'>, waitingFor: string | null): Promise<void>
  /** False: the claim is not ours any more, or the task is final. */
  markRunning(task: Task, startedAt: number): Promise<boolean>
  /**
   * Sets the outcome once, with log and delivery, in one transaction, and forgets the secrets that are not
   * needed any more. False: someone else was first. Safe to repeat.
   */
  finish(
    task: Task,
    end: {
      outcome: Outcome
      log: LogTail
      /** Bytes of the log, our last line included, before anything was masked or cut. */
      logBytes: number
      delivery: NewDelivery | undefined
      finishedAt: number
      keepWorker: boolean
    },
  ): Promise<boolean>
  /** Notes that someone wants the task ended. Undefined: it is final already, or unknown. */
  requestCancel(taskId: string, at: number): Promise<TaskSummary | undefined>
  /** Of all instances. */
  countLive(): Promise<Array<{ status: TaskStatus; count: number; oldestCreatedAt: number }>>
  /**
   * Live tasks that are for this instance to take up at its start, in the order they came: those
   * that it had claimed, and waiting ones that someone wants ended.
   */
  live(): Promise<LiveTask[]>
  /** What is remembered about the task a worker says it is for. */
  workerOwner(taskId: string): Promise<WorkerOwner | undefined>
  /** Finished tasks of this instance whose worker is still to be terminated. */
  workersToTerminate(): Promise<Array<{ taskId: string; workerName: string }>>
  workerTerminated(taskId: string): Promise<void>
  /**
   * Tasks that ended before `at` and whose worker nobody has noted as gone. With `instance`, only those of its host, and
   * of hosts that are forgotten.
   */
  workersRemembered(at: number, instance?: string): Promise<string[]>
  /** Removes finished tasks with their logs, never one whose delivery is pending. Returns how many. */
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

/** A log that is read when it is needed: attempts that wait hold none of it. Each `read` gives the same. */
export interface StoredLog {
  /** Tells large ones from others. */
  bytes: number
  read(): Promise<LogTail>
}

/** What an attempt sends, and where. */
export interface DeliveryContent {
  url: string
  token: string | null
  traceparent: string | null
  payload: CallbackPayload
  facts: CallbackFacts
  /** The receiver refused the whole log as too large: this is its end. */
  isCut: boolean
}

/** How the task ended, for those who look at headers. */
export interface CallbackFacts {
  status: TaskStatus
  reason: Reason | null
  exitCode: number | null
  /** Time from the task's start to its end; null: it never started. */
  durationMs: number | null
}

export interface DueDelivery {
  taskId: string
  webhookId: string
  origin: string
  /** Attempts made before this one. */
  attempts: number
  /** How many of them a person asked for. */
  manualAttempts: number
  /** A person asked for this one: the schedule goes on as if it had not been made. */
  manual: boolean
  /** When the schedule goes on after an attempt by hand; null where it has ended. */
  resumeAt: number | null
  /** An earlier attempt succeeded. */
  deliveredBefore: boolean
  /** Until then, in epoch ms, nobody else makes an attempt. */
  leaseUntil: number
}

export interface AttemptRecord {
  number: number
  startedAt: number
  durationMs: number
  statusCode: number | null
  error: string | null
  /** A person asked for it. */
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
   * Takes the oldest due delivery, of an origin that is not in `exceptOrigins`, and is in `onlyOrigins` if those are given; it
   * is ours until `leaseUntil`.
   */
  takeDue(options: {
    now: number
    leaseUntil: number
    exceptOrigins: readonly string[]
    onlyOrigins?: readonly string[] | undefined
  }): Promise<DueDelivery | undefined>
  /** When the next delivery becomes due, in epoch ms. */
  nextDueAt(): Promise<number | undefined>
  content(taskId: string): Promise<DeliveryContent | undefined>
  recordAttempt(
    taskId: string,
    attempt: AttemptRecord,
    next: { status: Exclude<CallbackStatus, 'none'>; nextAttemptAt: number | null },
    /** Nothing is recorded when that lease is not held any more. */
    leaseUntil?: number,
  ): Promise<void>
  /** Moves all that is due in the future by as much as the clock was set back or forth. */
  shiftDue(byMs: number): Promise<void>
  /**
   * Bounds what a clock set back while nobody ran would put off: a delivery whose last attempt, or
   * whose task's end, lies more than `toleranceMs` ahead of `now` is due no later than
   * `longestDelaysMs[attempts made]` from now, and at once where there is none. Safe to repeat.
   */
  boundDue(options: {
    now: number
    toleranceMs: number
    longestDelaysMs: readonly number[]
  }): Promise<void>
  /** Gives a delivery back without an attempt made, if that lease is still held. */
  release(taskId: string, leaseUntil?: number): Promise<void>
  /**
   * Makes an attempt due now that leaves the schedule as it is. `in_flight`: an attempt is under way. Undefined: there is no
   * delivery. Safe to repeat.
   */
  redeliver(taskId: string, now: number): Promise<'queued' | 'in_flight' | undefined>
  state(taskId: string): Promise<DeliveryState | undefined>
}

export interface CallbackSender {
  /** One attempt. Never throws for what a receiver or a network does. */
  send(
    request: Omit<DeliveryContent, 'isCut'> & {
      webhookId: string
      /** Of this attempt, in unix seconds. */
      timestamp: number
    },
    signal: AbortSignal,
  ): Promise<AttemptResult>
  close(): Promise<void>
}

export interface AttemptResult {
  statusCode: number | null
  /** Coarse, for people: what went wrong without a port scanner's detail. */
  error: string | null
  /** What the receiver asked for, in ms. */
  retryAfterMs: number | null
  /** No further attempt makes sense: the address may not be called. */
  blocked?: boolean
}
