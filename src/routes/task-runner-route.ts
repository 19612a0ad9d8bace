import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import type { Submissions } from '../core/submissions.ts'
import type { TaskFiles } from '../core/task-files.ts'
import { acceptedSchema, taskFilesSchema } from '../wire/responses.ts'
import { taskRequestSchema, toTaskRequest } from '../wire/task-request.ts'
import { traceparentOf } from '../wire/traceparent.ts'
import type { BackendRules } from '../wire/worker-config.ts'
import { answer, errorResponses } from './responses.ts'
import { sampleRefusal } from './sample-callbacks.ts'

/** `POST /task-runner`, the main job, and what it can run; the slash that clients of the old app send is ignored by the router. */
export const taskRunnerRoute: FastifyPluginAsyncZod<{
  submissions: Submissions
  files: TaskFiles
  timeoutSecondsMax: number
  rules: BackendRules
  basePath: string
  /** Callbacks to the sample receivers would be 404s. */
  samplesAreOff: boolean
}> = async (app, options) => {
  const { submissions, files, timeoutSecondsMax, rules, basePath, samplesAreOff } = options

  app.post(
    '/task-runner',
    {
      schema: {
        tags: ['Run'],
        operationId: 'runTask',
        summary: 'Run a task',
        description:
          'Accepts a task and answers at once: with 200 it is stored and will run, whatever happens to the service. The outcome is POSTed to `callback_url`. Repeating the same request is safe: it starts nothing, and the message names the status of the task.',
        headers: z.object({
          traceparent: z
            .string()
            .optional()
            .describe(
              'W3C Trace Context: handed to the task as `TRACEPARENT`, and to the receiver',
            ),
        }),
        body: taskRequestSchema(timeoutSecondsMax),
        response: {
          ...answer('Accepted, or accepted before', acceptedSchema),
          ...errorResponses(401, 404, 409, 413, 415, 422, 429, 500, 503),
        },
      },
    },
    async (request) => {
      const { body, headers } = request
      const submitted = await submissions.submit(toTaskRequest(body, rules), {
        traceparent: traceparentOf(headers.traceparent) ?? null,
        callbackRefusal: samplesAreOff
          ? sampleRefusal(body.callback_url, request, basePath)
          : undefined,
      })
      const message = submitted.isNew
        ? 'Started Task successfully'
        : `Already accepted: ${submitted.status}`
      return { success: true as const, message, task_id: body.task_id }
    },
  )

  app.get(
    '/task-files',
    {
      schema: {
        tags: ['Run'],
        operationId: 'listTaskFiles',
        summary: 'List what can be run',
        description: 'The task files in the tasks folder; those of repositories are not known.',
        response: { ...answer('Their names', taskFilesSchema), ...errorResponses(401, 503) },
      },
    },
    async () => ({ task_files: await files.list() }),
  )
}
