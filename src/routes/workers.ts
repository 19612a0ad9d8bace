import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import { TaskRunnerError } from '../core/errors.ts'
import { Masker } from '../core/masking.ts'
import type { TaskStore, Worker, WorkerBackend } from '../core/ports.ts'
import type { Reaper } from '../core/reaper.ts'
import { isFinal, type Task } from '../core/task.ts'
import { LOG_BYTES_KEPT, type TaskRunner } from '../core/task-runner.ts'
import { line } from '../wire/fields.ts'
import {
  cleanupRequestSchema,
  cleanupSchema,
  doneSchema,
  fromWorker,
  workerListSchema,
  workerSchema,
} from '../wire/responses.ts'
import { type KeptLogs, liveTail, sendLog } from './log-pieces.ts'
import { errorResponses, okResponse } from './responses.ts'

const CLEANUP_SECONDS_DEFAULT = 59
const nameParams = z.object({
  name: line(63, { pattern: /^[a-z0-9-]+$/, message: () => 'is not a worker name' }),
})

/** Routes of workers. They ask the backend, not the store. */
export const workerRoutes: FastifyPluginAsyncZod<{
  tasks: TaskStore
  kept: KeptLogs
  backend: WorkerBackend
  runner: TaskRunner
  reaper: Reaper
  maskerFor: (task: Task) => Masker
}> = async (app, { tasks, kept, backend, runner, reaper, maskerFor }) => {
  app.get(
    '/workers',
    {
      schema: {
        tags: ['Workers'],
        operationId: 'listWorkers',
        summary: 'List workers',
        response: { ...okResponse('All workers', workerListSchema), ...errorResponses(401, 503) },
      },
    },
    async () => {
      const listed = await backend.list()
      const areOurs = await Promise.all(listed.map(isOurs))
      const ours = listed.filter((_, index) => areOurs[index])
      return { workers: await Promise.all(ours.map(fromWorker)) }
    },
  )

  app.get(
    '/workers/:name',
    {
      schema: {
        tags: ['Workers'],
        operationId: 'getWorker',
        summary: 'Get a worker',
        params: nameParams,
        response: {
          ...okResponse('The worker', workerSchema),
          ...errorResponses(401, 404, 422, 503),
        },
      },
    },
    async ({ params }) => fromWorker(await workerOr404(params.name)),
  )

  app.get(
    '/workers/:name/logs',
    {
      schema: {
        tags: ['Workers'],
        operationId: 'getWorkerLogs',
        summary: "Read a worker's log",
        description: 'The last 5 MB.',
        params: nameParams,
        response: {
          200: { description: 'The log', content: { 'text/plain': { schema: z.string() } } },
          ...errorResponses(401, 404, 422, 503),
        },
      },
    },
    async ({ params }, reply) => {
      const worker = await workerOr404(params.name)
      const task = await tasks.get(worker.taskId)
      // The log of a final task is stored masked, and the values to mask are erased.
      const stored =
        task && isFinal(task.status) ? await kept.tail(task.taskId, LOG_BYTES_KEPT) : undefined
      const masker = task ? maskerFor(task) : new Masker([])
      const gone = new AbortController()
      reply.raw.on('close', () => gone.abort())
      const options = { maxBytes: LOG_BYTES_KEPT, signal: gone.signal }
      return sendLog(reply, stored ?? (await liveTail(worker, masker, options)))
    },
  )

  app.delete(
    '/workers/:name',
    {
      schema: {
        tags: ['Workers'],
        operationId: 'terminateWorker',
        summary: 'Terminate a worker',
        description: 'If its task is still running, the task is cancelled first.',
        params: nameParams,
        response: { ...okResponse('Done', doneSchema), ...errorResponses(401, 404, 422, 503) },
      },
    },
    async ({ params }) => {
      const worker = await workerOr404(params.name)
      const owner = await tasks.workerOwner(worker.taskId)
      if (owner && !isFinal(owner.status)) {
        await runner.cancel(worker.taskId)
        return { success: true as const, message: 'Cancelling its task, then terminating' }
      }
      await worker.terminate()
      await tasks.workerTerminated(worker.taskId)
      return { success: true as const, message: 'Terminated' }
    },
  )

  app.post(
    '/workers/cleanup',
    {
      schema: {
        tags: ['Workers'],
        operationId: 'cleanUpWorkers',
        summary: 'Terminate workers stuck in Provisioning',
        description: 'Returns their names.',
        body: cleanupRequestSchema.nullish(),
        response: {
          ...okResponse('The workers terminated', cleanupSchema),
          ...errorResponses(401, 422, 503),
        },
      },
    },
    async ({ body }) => {
      const seconds = body?.older_than_seconds ?? CLEANUP_SECONDS_DEFAULT
      const workers = await reaper.cleanup(seconds * 1000)
      const message = `Terminated ${workers.length} workers`
      return { success: true as const, message, workers }
    },
  )

  async function workerOr404(name: string): Promise<Worker> {
    const worker = await backend.find(name)
    if (worker && (await isOurs(worker))) return worker
    throw new TaskRunnerError('worker_not_found', `There is no worker "${name}"`)
  }

  /** Returns false if the worker may be another service's and its task is unknown here. */
  async function isOurs(worker: Worker): Promise<boolean> {
    return !worker.mayBeForeign || (await tasks.workerOwner(worker.taskId)) !== undefined
  }
}
