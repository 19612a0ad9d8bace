import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import type { Submissions } from '../core/submissions.ts'
import type { TaskFiles } from '../core/task-files.ts'
import { acceptedSchema, taskFilesSchema } from '../wire/responses.ts'
import { taskRequestSchema, toTaskRequest } from '../wire/task-request.ts'
import { traceparentOf } from '../wire/traceparent.ts'
import type { BackendRules } from '../wire/worker-config.ts'
import { errorResponses, okResponse } from './responses.ts'
import { sampleRefusal } from './sample-callbacks.ts'

/**
 * Routes to run a task and to list task files. The router ignores a trailing slash, which clients
 * of the Practicus AI app send.
 */
export const taskRunnerRoute: FastifyPluginAsyncZod<{
  submissions: Submissions
  files: TaskFiles
  timeoutSecondsMax: number
  rules: BackendRules
  basePath: string
  /** Whether the sample receivers are disabled, so that callbacks to them would get a 404. */
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
          'Accepts a task and responds immediately: after a 200 the task is stored and will run, even if the service restarts. The outcome is POSTed to `callback_url`. Repeating the same request is safe: it starts nothing, and the message contains the status of the task.',
        headers: z.object({
          traceparent: z
            .string()
            .optional()
            .describe(
              'W3C Trace Context: passed to the task as `TRACEPARENT`, and to the receiver of the callback',
            ),
        }),
        body: taskRequestSchema(timeoutSecondsMax),
        response: {
          ...okResponse('Accepted, or accepted before', acceptedSchema),
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
        summary: 'List task files',
        description: 'The files in the tasks folder; files in git repositories are not listed.',
        response: { ...okResponse('Their names', taskFilesSchema), ...errorResponses(401, 503) },
      },
    },
    async () => ({ task_files: await files.list() }),
  )
}
