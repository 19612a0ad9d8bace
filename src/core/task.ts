/**
 * Glossary
 * - task: one accepted request to run a task file, known by its `taskId`.
 * - task file: a script in the tasks folder.
 * - backend: the kind of place a task runs on. worker: one such place, made for one task.
 * - instance: one process of the service. deployment: all instances that share a database.
 * - queue: the tasks with status `queued`. slot: the right to run a task on an instance, which has
 *   a limited number; a task that waits for the service releases its slot.
 * - claim: a number that rises when an instance claims the task (a fencing token). Every later
 *   write names it, so that an instance considered dead changes nothing when it resumes.
 * - callback: the request that reports the outcome. delivery: sending it, over one or more
 *   attempts. lease: one instance's right to attempt a delivery, until a time.
 *
 * States and moves
 *
 *   queued -> provisioning -> running -> succeeded | failed | cancelled
 *      |            |
 *      +------------+------------------> failed | cancelled
 *
 * The final status is set once, by compare-and-set; a second attempt changes nothing.
 */
import { createHash } from 'node:crypto'
import type { WorkerConfig } from './worker-config.ts'

export const TASK_STATUSES = [
  'queued',
  'provisioning',
  'running',
  'succeeded',
  'failed',
  'cancelled',
] as const
export type TaskStatus = (typeof TASK_STATUSES)[number]
export type FinalStatus = Extract<TaskStatus, 'succeeded' | 'failed' | 'cancelled'>

export const LIVE_STATUSES = ['queued', 'provisioning', 'running'] as const

/** Why a task ended as it did. `completed` goes with `succeeded`, `cancelled` with `cancelled`. */
export const REASONS = [
  'completed',
  'exit_code',
  'timed_out',
  'cancelled',
  'oom_killed',
  'signal',
  'evicted',
  'image_pull_failed',
  'unschedulable',
  'provisioning_timeout',
  'startup_failed',
  'worker_lost',
  'log_limit',
  'internal_error',
] as const
export type Reason = (typeof REASONS)[number]

export const CALLBACK_STATUSES = ['none', 'pending', 'delivered', 'given_up'] as const
export type CallbackStatus = (typeof CALLBACK_STATUSES)[number]

/** A validated request, in the domain's spelling. */
export interface TaskRequest {
  taskId: string
  taskFileName: string
  /** The request's own, without the defaults of the worker files. */
  workerConfig: WorkerConfig
  callbackUrl: string | null
  callbackUrlToken: string | null
  terminateOnCompletion: boolean
  timeoutSeconds: number | null
  /** 0 to 9; undefined: 0. */
  priority?: number | undefined
}

/** A task as lists show it, without secrets. */
export interface TaskSummary {
  /** Rises with each accepted task; the cursor of lists. */
  seq: number
  taskId: string
  taskFileName: string
  status: TaskStatus
  reason: Reason | null
  /** The reason in a sentence for people. */
  message: string | null
  exitCode: number | null
  signal: string | null
  workerName: string
  terminateOnCompletion: boolean
  timeoutSeconds: number
  priority: number
  claim: number
  /** Instance that claimed it last. */
  instance: string | null
  /** The client's trace (W3C Trace Context). */
  traceparent: string | null
  createdAt: number
  /** When it was first claimed. */
  claimedAt: number | null
  startedAt: number | null
  finishedAt: number | null
  /** Fault of the service, its machine or engine that a live task waits for, in a sentence. */
  waitingFor: string | null
  callbackStatus: CallbackStatus
  /** Length of the whole log; only its end may be stored. */
  logBytes: number | null
}

/** A task with the fields that are sealed at rest. */
export interface Task extends TaskSummary {
  workerConfig: WorkerConfig
  callbackUrl: string | null
  callbackUrlToken: string | null
  /** Values of the named secrets that its worker got; empty once the task has ended. */
  secretValues: readonly string[]
}

/** Returns the client's trace id, for log lines. */
export function traceOf({ traceparent }: Pick<TaskSummary, 'traceparent'>): { traceId?: string } {
  return traceparent === null ? {} : { traceId: traceparent.split('-')[1] ?? '' }
}

/** Waiting time that one priority level is worth, so nothing starves. Also in the store's index. */
export const PRIORITY_STEP_MS = 60_000

/** Returns a waiting task's sort key in the queue, in ms; the lowest goes first. */
export function queuePosition(task: { createdAt: number; priority: number }): number {
  return task.createdAt - task.priority * PRIORITY_STEP_MS
}

/** How a run ended, before it is committed. */
export interface Outcome {
  status: FinalStatus
  reason: Reason
  message: string | null
  exitCode: number | null
  signal: string | null
}

export function isFinal(status: TaskStatus): status is FinalStatus {
  return status === 'succeeded' || status === 'failed' || status === 'cancelled'
}

/**
 * Returns the worker's name, which depends on the task id alone, so that provisioning twice finds
 * the first worker. A DNS label of at most 48 characters (Kubernetes allows 63, and adds suffixes).
 * The hash has 80 bits; a worker found by name is compared with the task id all the same.
 */
export function workerNameFor(taskId: string): string {
  const slug = taskId
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, '-')
    .slice(0, 22)
    .replace(/^-+|-+$/g, '')
  const hash = createHash('sha256').update(taskId).digest('hex').slice(0, 20)
  return slug === '' ? `task-${hash}` : `task-${slug}-${hash}`
}

/** Returns whether `workerNameFor`, of this or an earlier release, may have made the name. */
export function isWorkerName(name: string): boolean {
  return /^task-(?:[a-z0-9-]{1,22}-)?[0-9a-f]{12,20}$/.test(name)
}
