import { createHmac } from 'node:crypto'
import { InvalidRequestError, TaskRunnerError } from './errors.ts'
import type { Logger, TaskStore } from './ports.ts'
import { type TaskRequest, type TaskStatus, traceOf, workerNameFor } from './task.ts'
import type { TaskFiles } from './task-files.ts'
import type { TaskQueue } from './task-queue.ts'
import { mergeWorkerConfigs } from './worker-config.ts'
import { locateInRepository, type WorkerSetup } from './worker-setup.ts'

const RETRY_AFTER_SECONDS = 5

export type Submitted = { isNew: true } | { isNew: false; status: TaskStatus }

export interface SubmissionContext {
  traceparent?: string | null
  /** Why the route refuses the callback URL. */
  callbackRefusal?: string | undefined
}

export interface SubmissionOptions {
  queuedMax: number
  defaultTimeoutSeconds: number
  /** Keys the digest of requests, which covers tokens. */
  digestKey: Buffer
  /** Returns why a URL may not be called, as far as is known without a DNS lookup. */
  callbackUrlRefusal: (url: string) => string | undefined
  /** Returns why workers cannot get the task files in their present state. */
  taskFilesProblem: () => Promise<string | undefined>
  now: () => number
  log: Logger
}

/** Accepts tasks. A task is on disk once `submit` resolves. */
export class Submissions {
  readonly #store: TaskStore
  readonly #queue: TaskQueue
  readonly #files: TaskFiles
  readonly #setup: WorkerSetup
  readonly #options: SubmissionOptions
  #draining = false
  #arriving = 0

  constructor(
    ports: { store: TaskStore; queue: TaskQueue; files: TaskFiles; setup: WorkerSetup },
    options: SubmissionOptions,
  ) {
    this.#store = ports.store
    this.#queue = ports.queue
    this.#files = ports.files
    this.#setup = ports.setup
    this.#options = options
  }

  get draining(): boolean {
    return this.#draining
  }

  /** Rejects new tasks from now on. */
  drain(): void {
    this.#draining = true
  }

  /**
   * Accepts a task. Safe to repeat: the same request returns the task's status.
   * Throws `task_id_conflict`, `task_file_not_found`, `invalid_request`, `queue_full`, `draining`,
   * `defaults_file_broken`, `store_unavailable`, `workers_unavailable`.
   */
  async submit(request: TaskRequest, context: SubmissionContext = {}): Promise<Submitted> {
    const digest = this.#digest(request)
    try {
      return await this.#submitNew(request, digest, context)
    } catch (err) {
      // A task accepted before stays accepted. Looked up only now: most requests are new, and a
      // lookup waits for the commit under way.
      const known = await this.#known(request.taskId, digest)
      if (known) return known
      throw err
    }
  }

  async #submitNew(
    request: TaskRequest,
    digest: string,
    context: SubmissionContext,
  ): Promise<Submitted> {
    if (this.#draining) {
      throw new TaskRunnerError('draining', 'The service is shutting down', {
        retryAfterSeconds: RETRY_AFTER_SECONDS,
      })
    }
    // Tasks being accepted count, too: many requests may be at this point at once.
    if (this.#queue.length + this.#arriving >= this.#options.queuedMax) {
      throw new TaskRunnerError('queue_full', `${this.#queue.length} tasks are waiting already`, {
        retryAfterSeconds: RETRY_AFTER_SECONDS,
      })
    }
    this.#arriving += 1
    try {
      return await this.#accept(request, digest, context)
    } finally {
      this.#arriving -= 1
    }
  }

  async #accept(
    request: TaskRequest,
    digest: string,
    { traceparent = null, callbackRefusal }: SubmissionContext,
  ): Promise<Submitted> {
    const refusal =
      callbackRefusal ??
      (request.callbackUrl && this.#options.callbackUrlRefusal(request.callbackUrl))
    if (refusal) throw new InvalidRequestError([{ path: 'callback_url', message: refusal }])
    const { taskId, taskFileName } = request
    const { isThere, defaults } = await this.#files.look(taskFileName)
    const workerConfig = mergeWorkerConfigs(defaults, request.workerConfig)
    // Only the worker can see the files of a repository.
    if (!isThere && !locateInRepository(taskFileName, workerConfig.gitConfigs)) {
      throw new TaskRunnerError('task_file_not_found', `There is no task file "${taskFileName}"`)
    }
    await this.#setup.check(workerConfig)
    const problem = await this.#options.taskFilesProblem()
    if (problem) throw new InvalidRequestError([{ path: 'task_file_name', message: problem }])
    const inserted = await this.#store.insert({
      ...request,
      workerConfig,
      timeoutSeconds: request.timeoutSeconds ?? this.#options.defaultTimeoutSeconds,
      priority: request.priority ?? 0,
      traceparent,
      digest,
      workerName: workerNameFor(taskId),
      createdAt: this.#options.now(),
    })
    if (!inserted) {
      const raced = await this.#known(taskId, digest)
      if (raced) return raced
      throw new TaskRunnerError('store_unavailable', 'The task could not be stored')
    }
    this.#queue.added()
    const fields = { taskId, ...traceOf({ traceparent }), taskFileName }
    this.#options.log.info(fields, 'task accepted')
    return { isNew: true }
  }

  async #known(taskId: string, digest: string): Promise<Submitted | undefined> {
    const known = await this.#store.digestOf(taskId)
    if (!known) return undefined
    if (known.digest !== digest) {
      throw new TaskRunnerError(
        'task_id_conflict',
        `task_id "${taskId}" was already used by a different request`,
      )
    }
    return { isNew: false, status: known.status }
  }

  /** Keyed: the digest covers tokens, and a stolen database must not allow guessing them. */
  #digest(request: TaskRequest): string {
    return createHmac('sha256', this.#options.digestKey)
      .update(JSON.stringify(sorted(request)))
      .digest('hex')
  }
}

/** Returns the value with the keys of all its objects sorted. */
function sorted(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(sorted)
  if (value === null || typeof value !== 'object') return value
  return Object.fromEntries(
    Object.entries(value)
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .map(([key, child]) => [key, sorted(child)]),
  )
}
