/**
 * Glossary
 * - task: one accepted request to run a task file, known by its `taskId`.
 * - task file: a script in the tasks folder.
 * - backend: the kind of place a task runs on. worker: one such place, made for one task.
 * - queue: the tasks with status `queued`. slot: a place among the tasks that run at a time on an
 *   instance; a task that waits for something gives it to others.
 * - claim: a number that rises when an instance takes the task; every later write names it, so that
 *   an instance that was thought dead changes nothing when it wakes up (a fencing token).
 * - callback: what the caller asked for. delivery: sending it, over one or more attempts.
 *
 * States and moves
 *
 *   queued -> provisioning -> running -> succeeded | failed | cancelled
 *      |            |
 *      +------------+------------------> failed | cancelled
 *
 * The final status is set once, by compare-and-set; whoever comes second changes nothing.
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

/** What the caller asked for, validated and free of wire spelling. */
export interface TaskRequest {
  taskId: string
  taskFileName: string
  /** As given in the request, without the defaults of the worker files. */
  workerConfig: WorkerConfig
  callbackUrl: string | null
  callbackUrlToken: string | null
  terminateOnCompletion: boolean
  timeoutSeconds: number | null
  /** 0 to 9; undefined: 0. */
  priority?: number | undefined
}

/** A task as lists show it: nothing in here is secret. */
export interface TaskSummary {
  /** Rises with each accepted task; the cursor of lists. */
  seq: number
  taskId: string
  taskFileName: string
  status: TaskStatus
  reason: Reason | null
  /** A sentence for people that goes with the reason. */
  message: string | null
  exitCode: number | null
  signal: string | null
  workerName: string
  terminateOnCompletion: boolean
  timeoutSeconds: number
  priority: number
  claim: number
  /** The instance that claimed it last. */
  instance: string | null
  /** Of the caller's trace (W3C Trace Context). */
  traceparent: string | null
  createdAt: number
  /** When a worker was first asked for. */
  claimedAt: number | null
  startedAt: number | null
  finishedAt: number | null
  /**
   * What a live task waits for, as a sentence for people: a trouble of the service, its machine or
   * its engine.
   */
  waitingFor: string | null
  callbackStatus: CallbackStatus
  /** Bytes the task logged in all, also where only the tail of them was kept. */
  logBytes: number | null
}

/** A task whole, with what is sealed at rest. */
export interface Task extends TaskSummary {
  workerConfig: WorkerConfig
  callbackUrl: string | null
  callbackUrlToken: string | null
  /** Values of the named secrets that its worker was given; none once it has ended. */
  secretValues: readonly string[]
}

/** For log lines: the trace that the caller's own belongs to. */
export function traceOf({ traceparent }: Pick<TaskSummary, 'traceparent'>): { traceId?: string } {
  return traceparent === null ? {} : { traceId: traceparent.split('-')[1] ?? '' }
}

/**
 * Waiting that a step of priority is worth, so that nobody waits for ever. The store's index of
 * waiting tasks holds it as well.
 */
export const PRIORITY_STEP_MS = 60_000

/** Returns a waiting task's place in the queue, in ms: the lowest goes first. It ages by itself. */
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
 * The worker's name comes from the task id alone, so that provisioning twice finds the first worker.
 * A DNS label: `task-<slug>-<hash>`, 48 characters at most (Kubernetes allows 63, and adds suffixes). Two ids share a name only
 * by a collision of 80 bits, and what is found under a name is compared with the task id all the same.
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

/** Whether `workerNameFor`, of this release or of those before, can have made the name. */
export function isWorkerName(name: string): boolean {
  return /^task-(?:[a-z0-9-]{1,22}-)?[0-9a-f]{12,20}$/.test(name)
}
