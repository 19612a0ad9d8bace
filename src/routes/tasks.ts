import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import type { CallbackDispatcher } from '../core/callbacks.ts'
import { TaskRunnerError } from '../core/errors.ts'
import type { DeliveryStore, TaskStore } from '../core/ports.ts'
import { isFinal, type Task, type TaskSummary } from '../core/task.ts'
import type { TaskRunner } from '../core/task-runner.ts'
import { line } from '../wire/fields.ts'
import {
  callbackStateSchema,
  callbackStatus,
  cancelledSchema,
  doneSchema,
  fromDelivery,
  fromTask,
  fromTaskSummary,
  taskListSchema,
  taskSchema,
  taskStatus,
} from '../wire/responses.ts'
import { errorResponses, okResponse } from './responses.ts'

const PAGE_DEFAULT = 50
const PAGE_MAX = 500
const CURSOR = /^before-([0-9]{1,15})$/

export const taskIdParams = z.object({
  task_id: line(255).meta({ examples: ['my-first-task'] }),
})

/** Tasks, their cancellation and their callbacks. Logs are in task-logs.ts. */
export const taskRoutes: FastifyPluginAsyncZod<{
  tasks: TaskStore
  deliveries: DeliveryStore
  runner: TaskRunner
  callbacks: CallbackDispatcher
}> = async (app, { tasks, deliveries, runner, callbacks }) => {
  /** Adds what the task waits for on this instance, which may be unable to store it (full disk). */
  const withWaitingFor = <T extends TaskSummary>(task: T): T => {
    const waitingFor = runner.waitingFor(task)
    return waitingFor === undefined ? task : { ...task, waitingFor }
  }

  app.get(
    '/tasks',
    {
      schema: {
        tags: ['Tasks'],
        operationId: 'listTasks',
        summary: 'List tasks',
        description:
          'Newest first, in pages. `callback_status=given_up` lists the tasks whose callback needs a manual redelivery.',
        querystring: z.strictObject({
          status: taskStatus.optional(),
          task_file_name: line(512).optional(),
          callback_status: callbackStatus.optional(),
          limit: z.coerce
            .number()
            .int()
            .min(1)
            .max(PAGE_MAX)
            .optional()
            .describe(`Default ${PAGE_DEFAULT}`),
          cursor: z
            .string()
            .regex(CURSOR, 'is not a cursor')
            .optional()
            .describe('`next_cursor` of the previous page'),
        }),
        response: {
          ...okResponse('A page of tasks', taskListSchema),
          ...errorResponses(401, 422, 503),
        },
      },
    },
    async ({ query }) => {
      const limit = query.limit ?? PAGE_DEFAULT
      const found = await tasks.list({
        status: query.status,
        taskFileName: query.task_file_name,
        callbackStatus: query.callback_status,
        limit: limit + 1,
        before: fromCursor(query.cursor),
      })
      const page = found.slice(0, limit)
      const last = page.at(-1)
      return {
        tasks: page.map((task) => fromTaskSummary(withWaitingFor(task))),
        next_cursor: found.length > limit && last ? toCursor(last.seq) : null,
      }
    },
  )

  app.get(
    '/tasks/:task_id',
    {
      schema: {
        tags: ['Tasks'],
        operationId: 'getTask',
        summary: 'Get a task',
        params: taskIdParams,
        response: { ...okResponse('The task', taskSchema), ...errorResponses(401, 404, 422, 503) },
      },
    },
    async ({ params }) => fromTask(withWaitingFor(await taskOr404(tasks, params.task_id))),
  )

  app.post(
    '/tasks/:task_id/cancel',
    {
      schema: {
        tags: ['Tasks'],
        operationId: 'cancelTask',
        summary: 'Cancel a task',
        description:
          'Sends SIGTERM to its processes, and SIGKILL after a grace period. Repeating it is safe; a task that has ended does not change.',
        params: taskIdParams,
        response: {
          ...okResponse('Cancelled, being cancelled, or already ended', cancelledSchema),
          ...errorResponses(401, 404, 422, 503),
        },
      },
    },
    async ({ params }) => {
      const { status } = await runner.cancel(params.task_id)
      const message =
        status === 'cancelled'
          ? 'The task is cancelled'
          : isFinal(status)
            ? `The task has already ${status}`
            : 'Cancelling'
      return { success: true as const, message, task_id: params.task_id, status }
    },
  )

  app.get(
    '/tasks/:task_id/callback',
    {
      schema: {
        tags: ['Callbacks'],
        operationId: 'getCallback',
        summary: 'Get a callback and its attempts',
        params: taskIdParams,
        response: {
          ...okResponse('The callback', callbackStateSchema),
          ...errorResponses(401, 404, 422, 503),
        },
      },
    },
    async ({ params }) => {
      const task = await taskOr404(tasks, params.task_id)
      return fromDelivery(task, await deliveries.state(params.task_id))
    },
  )

  app.post(
    '/tasks/:task_id/callback/redeliver',
    {
      schema: {
        tags: ['Callbacks'],
        operationId: 'redeliverCallback',
        summary: 'Send a callback again',
        description:
          'Allowed even if it was delivered or given up. The attempt has the same `webhook-id`. 409 while another attempt is in progress.',
        params: taskIdParams,
        response: { ...okResponse('Done', doneSchema), ...errorResponses(401, 404, 409, 422, 503) },
      },
    },
    async ({ params }) => {
      const task = await taskOr404(tasks, params.task_id)
      const result = await callbacks.redeliver(params.task_id)
      if (result === undefined) {
        const message = task.callbackUrl
          ? 'The callback is not sent before the task has ended'
          : 'The task has no callback_url'
        throw new TaskRunnerError('no_callback', message)
      }
      if (result === 'in_flight') {
        throw new TaskRunnerError(
          'delivery_in_flight',
          'An attempt is in progress; try again later',
        )
      }
      return { success: true as const, message: 'Queued for delivery' }
    },
  )
}

export async function taskOr404(tasks: TaskStore, taskId: string): Promise<Task> {
  const task = await tasks.get(taskId)
  if (!task) throw new TaskRunnerError('task_not_found', `There is no task "${taskId}"`)
  return task
}

/** Returns a cursor that is opaque to callers, so that its content can change. */
function toCursor(seq: number): string {
  return `before-${seq}`
}

function fromCursor(cursor = ''): number | undefined {
  const seq = CURSOR.exec(cursor)?.[1]
  return seq === undefined ? undefined : Number(seq)
}
