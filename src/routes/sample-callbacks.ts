import type { FastifyRequest } from 'fastify'
import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import { InvalidRequestError, TaskRunnerError } from '../core/errors.ts'
import { isLoopbackName } from '../core/loopback.ts'
import { callbackResponseSchema, callbackSchema } from '../wire/callback.ts'
import { isObject } from '../wire/fields.ts'
import { parseJson } from '../wire/json.ts'
import { errorResponses, okResponse } from './responses.ts'

/** Maximum bytes of a body: up to 5 MB of log, which JSON escapes make up to six times as long. */
const BODY_BYTES_MAX = 32 * 1024 * 1024
/** Size above which bodies are read two at a time: each takes several times its size in memory. */
const LARGE_BYTES_MIN = 16 * 1024
const LARGE_AT_A_TIME = 2
const LOG_SHOWN_MAX = 2_000

const anyObject = z
  .record(z.string(), z.unknown())
  .meta({ id: 'AnyObject', examples: [{ task_id: 'my-first-task', success: true }] })

/** Receivers to try callbacks with. They need no API token: a callback has its own, or none. */
export const sampleCallbackRoutes: FastifyPluginAsyncZod = async (app) => {
  let large = 0
  // This hook runs before the body is read.
  app.addHook('onRequest', async ({ headers }, reply) => {
    const isChunked = headers['transfer-encoding'] !== undefined
    const bytes = isChunked ? Number.POSITIVE_INFINITY : Number(headers['content-length'] ?? 0)
    if (bytes <= LARGE_BYTES_MIN) return
    if (large >= LARGE_AT_A_TIME) {
      const message = 'Too many large bodies are being read; retry later'
      throw new TaskRunnerError('busy', message, { retryAfterSeconds: 1 })
    }
    large += 1
    reply.raw.once('close', () => {
      large -= 1
    })
  })

  // The tutorial of the Practicus AI app uses the second path.
  for (const [path, operationId] of [
    ['/sample-task-runner-callback', 'sampleCallback'],
    ['/task-runner-callback', 'sampleTaskRunnerCallback'],
  ] as const) {
    app.post(
      path,
      {
        bodyLimit: BODY_BYTES_MAX,
        schema: {
          tags: ['Samples'],
          operationId,
          summary: 'A receiver to try callbacks with',
          description: 'Checks that the body has the four fields, and logs the outcome.',
          security: [],
          body: callbackSchema,
          response: {
            ...okResponse('Done', callbackResponseSchema),
            ...errorResponses(413, 415, 422, 503),
          },
        },
      },
      async ({ body, log }) => {
        const { task_name: taskName, task_id: taskId, success, logs } = body
        log.info(
          { taskName, taskId, success, logs: logs.slice(-LOG_SHOWN_MAX) },
          'sample callback received',
        )
        return { success: true, message: 'ok' }
      },
    )
  }

  app.post(
    '/sample-task-runner-callback2',
    {
      bodyLimit: BODY_BYTES_MAX,
      schema: {
        tags: ['Samples'],
        operationId: 'sampleCallback2',
        summary: 'A receiver that accepts any JSON object',
        description: 'Also a JSON string that contains one, as sent by the Practicus AI app.',
        security: [],
        body: z.union([anyObject, z.string()], 'must be an object, or a string that holds one'),
        response: {
          ...okResponse('Done', callbackResponseSchema),
          ...errorResponses(413, 415, 422, 503),
        },
      },
    },
    async ({ body, log }) => {
      const received = typeof body === 'string' ? parseObject(body) : body
      log.info(
        { received: JSON.stringify(received).slice(0, LOG_SHOWN_MAX) },
        'sample callback 2 received',
      )
      return { success: true, message: 'ok' }
    },
  )
}

/**
 * Returns why a callback URL is refused, if it is one of these receivers while they are disabled.
 * The service's own addresses are loopback with the port of the request, and the request's `Host`.
 */
export function sampleRefusal(
  callbackUrl: string | null | undefined,
  { headers, socket }: Pick<FastifyRequest, 'headers' | 'socket'>,
  basePath: string,
): string | undefined {
  const url = callbackUrl == null ? null : URL.parse(callbackUrl)
  if (!url?.pathname.startsWith(basePath)) return undefined
  const path = url.pathname.slice(basePath.length)
  if (!/^\/(sample-task-runner-callback2?|task-runner-callback)\/?$/.test(path)) return undefined
  const isOwnPort = Number(url.port || (url.protocol === 'https:' ? 443 : 80)) === socket.localPort
  const named = URL.parse(`${url.protocol}//${headers.host}`)
  const isOwn = (isOwnPort && isLoopbackName(url.hostname)) || url.host === named?.host
  if (!isOwn) return undefined
  const how = 'the operator can enable it with SAMPLE_CALLBACKS=true'
  return `is a sample receiver of this service, which is disabled; ${how}`
}

function parseObject(json: string): object {
  try {
    const value = parseJson(Buffer.from(json))
    if (isObject(value)) return value
  } catch (err) {
    // Reported like any other value that is not an object.
    if (!(err instanceof SyntaxError)) throw err
  }
  throw new InvalidRequestError([{ path: '', message: 'the string does not hold a JSON object' }])
}
