import { z } from 'zod'
import { ERROR_CODES } from '../core/errors.ts'
import type { DeliveryState, Worker, WorkerStatus } from '../core/ports.ts'
import {
  CALLBACK_STATUSES,
  REASONS,
  TASK_STATUSES,
  type Task,
  type TaskSummary,
} from '../core/task.ts'
import { maskedWorkerConfig } from './worker-config.ts'

export const taskStatus = z.enum(TASK_STATUSES).meta({ id: 'TaskStatus' })
export const taskReason = z.enum(REASONS).meta({ id: 'TaskReason' })
export const callbackStatus = z.enum(CALLBACK_STATUSES).meta({ id: 'CallbackStatus' })
const workerStatus = z
  .enum(['Provisioning', 'Running', 'Completed', 'Terminating'] satisfies WorkerStatus[])
  .meta({ id: 'WorkerStatus' })
const time = z.iso.datetime().describe('UTC, ISO 8601')

export const acceptedSchema = z
  .object({
    success: z.literal(true),
    message: z.string(),
    task_id: z.string(),
  })
  .meta({
    id: 'TaskRunnerResponse',
    examples: [{ success: true, message: 'Started Task successfully', task_id: 'my-first-task' }],
  })

export const taskFilesSchema = z
  .object({ task_files: z.array(z.string()) })
  .meta({ id: 'TaskFileList', examples: [{ task_files: ['hello.py', 'parameters.sh'] }] })

/** A string and not an enum: a code that is added later must not break a client. */
const errorCode = z.string().meta({
  description: 'Identifies the error. Codes do not change, but new ones may be added',
  examples: ERROR_CODES,
})

const fieldErrorSchema = z.object({ path: z.string(), message: z.string() }).meta({
  id: 'FieldError',
  examples: [{ path: 'worker_config.log_level', message: 'must not be empty' }],
})

export const errorSchema = z
  .object({
    success: z.literal(false),
    code: errorCode,
    message: z.string().describe('A sentence for people; it may change'),
    errors: z
      .array(fieldErrorSchema)
      .optional()
      .describe('The invalid fields, if that is the error'),
  })
  .meta({
    id: 'ErrorResponse',
    description: 'Every error of every route has this shape.',
    examples: [
      { success: false, code: 'task_not_found', message: 'There is no task "my-first-task"' },
    ],
  })

const summaryFields = {
  task_id: z.string(),
  task_file_name: z.string(),
  status: taskStatus,
  reason: taskReason.nullable().describe('Why the task ended; null until then'),
  message: z.string().nullable().describe('A sentence for people that explains the reason'),
  waiting_for: z
    .string()
    .nullable()
    .describe('A sentence for people that says what delays the task; null if nothing does'),
  exit_code: z.int().nullable(),
  signal: z.string().nullable(),
  created_at: time,
  claimed_at: time.nullable().describe('When an instance took the task from the queue'),
  started_at: time.nullable(),
  finished_at: time.nullable(),
  worker_name: z.string(),
  instance: z.string().nullable().describe('The instance of the service that claimed the task'),
  priority: z.int(),
  traceparent: z.string().nullable().describe('The `traceparent` header of the request'),
  callback_status: callbackStatus,
}

const exampleSummary = {
  task_id: 'my-first-task',
  task_file_name: 'parameters.sh',
  status: 'succeeded',
  reason: 'completed',
  message: null,
  waiting_for: null,
  exit_code: 0,
  signal: null,
  created_at: '2026-01-05T08:00:00.000Z',
  claimed_at: '2026-01-05T08:00:00.004Z',
  started_at: '2026-01-05T08:00:00.012Z',
  finished_at: '2026-01-05T08:00:00.030Z',
  worker_name: 'task-my-first-task-e4c2a1f09b7d',
  instance: 'ci-host',
  priority: 0,
  traceparent: null,
  callback_status: 'none',
} as const

export const taskSummarySchema = z
  .object(summaryFields)
  .meta({ id: 'TaskSummary', examples: [exampleSummary] })

export const taskSchema = z
  .object({
    ...summaryFields,
    worker_config: z
      .record(z.string(), z.unknown())
      .describe('Includes the defaults of the worker files; values of variables are masked'),
    callback_url: z.string().nullable().describe('Its query, if any, is masked'),
    terminate_on_completion: z.boolean(),
    timeout_seconds: z.int(),
    log_bytes: z.int().nullable().describe('Total bytes logged; the last 5 MB are kept'),
  })
  .meta({
    id: 'Task',
    examples: [
      {
        ...exampleSummary,
        worker_config: { env_variables: { MY_FIRST_PARAM: '***' } },
        callback_url: null,
        terminate_on_completion: true,
        timeout_seconds: 86400,
        log_bytes: 43,
      },
    ],
  })

export const taskListSchema = z
  .object({
    tasks: z.array(taskSummarySchema),
    next_cursor: z
      .string()
      .nullable()
      .describe('Pass as `cursor` for the next page; null at the end'),
  })
  .meta({ id: 'TaskList', examples: [{ tasks: [exampleSummary], next_cursor: null }] })

export const logEndSchema = z
  .object({ status: taskStatus, reason: taskReason.nullable() })
  .meta({ id: 'LogEnd', examples: [{ status: 'succeeded', reason: 'completed' }] })

/** Events of a followed log. */
export const logEventSchema = z.union([
  z
    .object({
      id: z
        .string()
        .optional()
        .describe('Offset of the end of this piece: send it as `Last-Event-ID` to resume there'),
      data: z.string(),
    })
    .meta({
      id: 'LogPieceEvent',
      description: 'A piece of the log',
      examples: [{ id: '6', data: 'hello\n' }],
    }),
  z
    .object({
      event: z.literal('end'),
      data: z.string().meta({
        contentMediaType: 'application/json',
        contentSchema: { $ref: '#/components/schemas/LogEnd' },
      }),
    })
    .meta({
      id: 'LogEndEvent',
      description: 'The task has ended, and the log is complete',
      examples: [{ event: 'end', data: '{"status":"succeeded","reason":"completed"}' }],
    }),
])

export const cancelledSchema = z
  .object({
    success: z.literal(true),
    message: z.string(),
    task_id: z.string(),
    status: taskStatus,
  })
  .meta({
    id: 'CancelResponse',
    examples: [
      { success: true, message: 'Cancelling', task_id: 'my-first-task', status: 'running' },
    ],
  })

const exampleAttempt = {
  number: 1,
  started_at: '2026-01-05T08:00:00.031Z',
  duration_ms: 4,
  status_code: 200,
  error: null,
  manual: false,
}
const attemptSchema = z
  .object({
    number: z.int(),
    started_at: time,
    duration_ms: z.int(),
    status_code: z.int().nullable(),
    error: z.string().nullable(),
    manual: z.boolean().describe('Requested by a person; does not count for the retry schedule'),
  })
  .meta({ id: 'CallbackAttempt', examples: [exampleAttempt] })

export const callbackStateSchema = z
  .object({
    task_id: z.string(),
    status: callbackStatus,
    webhook_id: z.string().nullable().describe('The same for every attempt'),
    next_attempt_at: time.nullable(),
    attempts: z.array(attemptSchema),
  })
  .meta({
    id: 'CallbackState',
    examples: [
      {
        task_id: 'my-first-task',
        status: 'delivered',
        webhook_id: 'msg_3f2a8c0e5b7d4a61b2c3d4e5f6a7b8c9',
        next_attempt_at: null,
        attempts: [exampleAttempt],
      },
    ],
  })

const exampleWorker = {
  name: 'task-my-first-task-e4c2a1f09b7d',
  status: 'Running',
  creation_time: '2026-01-05T08:00:00.010Z',
  backend: 'local',
  image: null,
  size: null,
  task_id: 'my-first-task',
} as const

export const workerSchema = z
  .object({
    name: z.string(),
    status: workerStatus,
    creation_time: time,
    backend: z.string(),
    image: z.string().nullable(),
    size: z.string().nullable(),
    task_id: z.string(),
  })
  .meta({ id: 'Worker', examples: [exampleWorker] })

export const workerListSchema = z
  .object({ workers: z.array(workerSchema) })
  .meta({ id: 'WorkerList', examples: [{ workers: [exampleWorker] }] })

export const cleanupRequestSchema = z
  .strictObject({
    older_than_seconds: z
      .number()
      .min(0)
      .max(86_400 * 365)
      .nullish()
      .describe('Default 59'),
  })
  .meta({ id: 'CleanupRequest', examples: [{ older_than_seconds: 59 }] })

export const cleanupSchema = z
  .object({ success: z.literal(true), message: z.string(), workers: z.array(z.string()) })
  .meta({
    id: 'CleanupResponse',
    examples: [{ success: true, message: 'Terminated 0 workers', workers: [] }],
  })

export const doneSchema = z
  .object({ success: z.literal(true), message: z.string() })
  .meta({ id: 'SuccessResponse', examples: [{ success: true, message: 'ok' }] })

export const healthSchema = z
  .object({
    success: z.boolean(),
    code: errorCode.optional(),
    message: z.string(),
    parts: z
      .record(z.string(), z.string())
      .optional()
      .describe('Each part: `ok`, or what is wrong'),
    warnings: z
      .array(z.string())
      .optional()
      .describe('Problems that affect only some tasks, such as a broken defaults file'),
  })
  .meta({
    id: 'Health',
    examples: [
      {
        success: true,
        message: 'ready',
        parts: { store: 'ok', workers: 'ok', tasks_folder: 'ok' },
        warnings: [],
      },
    ],
  })

export function fromTaskSummary(task: TaskSummary): z.input<typeof taskSummarySchema> {
  return {
    task_id: task.taskId,
    task_file_name: task.taskFileName,
    status: task.status,
    reason: task.reason,
    message: task.message,
    waiting_for: task.waitingFor,
    exit_code: task.exitCode,
    signal: task.signal,
    created_at: iso(task.createdAt),
    claimed_at: isoOrNull(task.claimedAt),
    started_at: isoOrNull(task.startedAt),
    finished_at: isoOrNull(task.finishedAt),
    worker_name: task.workerName,
    instance: task.instance,
    priority: task.priority,
    traceparent: task.traceparent,
    callback_status: task.callbackStatus,
  }
}

export function fromTask(task: Task): z.input<typeof taskSchema> {
  return {
    ...fromTaskSummary(task),
    worker_config: maskedWorkerConfig(task.workerConfig),
    callback_url: task.callbackUrl && maskedUrl(task.callbackUrl),
    terminate_on_completion: task.terminateOnCompletion,
    timeout_seconds: task.timeoutSeconds,
    log_bytes: task.logBytes,
  }
}

export function fromDelivery(
  task: TaskSummary,
  delivery: DeliveryState | undefined,
): z.input<typeof callbackStateSchema> {
  return {
    task_id: task.taskId,
    status: delivery?.status ?? task.callbackStatus,
    webhook_id: delivery?.webhookId ?? null,
    next_attempt_at: isoOrNull(delivery?.nextAttemptAt ?? null),
    attempts: (delivery?.attempts ?? []).map((attempt) => ({
      number: attempt.number,
      started_at: iso(attempt.startedAt),
      duration_ms: Math.round(attempt.durationMs),
      status_code: attempt.statusCode,
      error: attempt.error,
      manual: attempt.manual,
    })),
  }
}

export async function fromWorker(worker: Worker): Promise<z.input<typeof workerSchema>> {
  return {
    name: worker.name,
    status: await worker.status(),
    creation_time: iso(worker.createdAt),
    backend: worker.backend,
    image: worker.image,
    size: worker.size,
    task_id: worker.taskId,
  }
}

/** Masks the query of a callback URL: most of them hold a secret. */
function maskedUrl(href: string): string {
  const url = new URL(href)
  if (url.search !== '') url.search = '?***'
  return url.href
}

function iso(epochMs: number): string {
  return new Date(epochMs).toISOString()
}

function isoOrNull(epochMs: number | null): string | null {
  return epochMs === null ? null : iso(epochMs)
}
