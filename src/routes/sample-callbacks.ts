import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import { InvalidRequestError } from '../core/errors.ts'
import { callbackSchema } from '../wire/callback.ts'
import { doneSchema } from '../wire/responses.ts'
import { answer, errorResponses } from './responses.ts'

/** A callback carries up to 5 MB of log, which JSON can make up to six times as long. */
const BODY_BYTES_MAX = 32 * 1024 * 1024
const LOG_SHOWN_MAX = 2_000

/** Receivers to try callbacks with; open, since a callback brings its own token or none. */
export const sampleCallbackRoutes: FastifyPluginAsyncZod = async (app) => {
  app.post(
    '/sample-task-runner-callback',
    {
      bodyLimit: BODY_BYTES_MAX,
      schema: {
        tags: ['Samples'],
        operationId: 'sampleCallback',
        summary: 'A receiver to try callbacks with',
        description: 'Checks that the body has exactly the four fields, and logs the outcome.',
        security: [],
        body: callbackSchema,
        response: { ...answer('Done', doneSchema), ...errorResponses(413, 415, 422) },
      },
    },
    async ({ body, log }) => {
      const { task_name: taskName, task_id: taskId, success, logs } = body
      log.info(
        { taskName, taskId, success, logs: logs.slice(-LOG_SHOWN_MAX) },
        'sample callback received',
      )
      return { success: true as const, message: 'ok' }
    },
  )

  app.post(
    '/sample-task-runner-callback2',
    {
      bodyLimit: BODY_BYTES_MAX,
      schema: {
        tags: ['Samples'],
        operationId: 'sampleCallback2',
        summary: 'A receiver that takes any JSON object',
        description: 'Or a JSON string that holds one, as the predecessor of this service sent it.',
        security: [],
        body: z.union([z.record(z.string(), z.unknown()), z.string()]),
        response: { ...answer('Done', doneSchema), ...errorResponses(413, 415, 422) },
      },
    },
    async ({ body, log }) => {
      const received = typeof body === 'string' ? parseObject(body) : body
      log.info(
        { received: JSON.stringify(received).slice(0, LOG_SHOWN_MAX) },
        'sample callback 2 received',
      )
      return { success: true as const, message: 'ok' }
    },
  )
}

function parseObject(json: string): object {
  try {
    const value: unknown = JSON.parse(json)
    if (value !== null && typeof value === 'object' && !Array.isArray(value)) return value
  } catch {
    // Answered like any other value that is not an object.
  }
  throw new InvalidRequestError([{ path: '', message: 'the string does not hold a JSON object' }])
}
