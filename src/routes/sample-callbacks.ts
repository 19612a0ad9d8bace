import type { FastifyRequest } from 'fastify'
import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import { InvalidRequestError, TaskRunnerError } from '../core/errors.ts'
import { isLoopbackName } from '../core/loopback.ts'
import { callbackResponseSchema, callbackSchema } from '../wire/callback.ts'
import { isObject } from '../wire/fields.ts'
import { parseJson } from '../wire/json.ts'
import { answer, errorResponses } from './responses.ts'

/** A callback carries up to 5 MB of log, which JSON can make up to six times as long. */
const BODY_BYTES_MAX = 32 * 1024 * 1024
/**
 * Bodies of more bytes are read two at a time: anybody may send them, and each takes several times
 * its size in memory.
 */
const LARGE_BYTES_MIN = 16 * 1024
const LARGE_AT_A_TIME = 2
const LOG_SHOWN_MAX = 2_000

const anyObject = z
  .record(z.string(), z.unknown())
  .meta({ id: 'AnyObject', examples: [{ task_id: 'my-first-task', success: true }] })

/** Receivers to try callbacks with; open, since a callback brings its own token or none. */
export const sampleCallbackRoutes: FastifyPluginAsyncZod = async (app) => {
  let large = 0
  // Before anything of the body is read.
  app.addHook('onRequest', async ({ headers }, reply) => {
    const isChunked = headers['transfer-encoding'] !== undefined
    const bytes = isChunked ? Number.POSITIVE_INFINITY : Number(headers['content-length'] ?? 0)
    if (bytes <= LARGE_BYTES_MIN) return
    if (large >= LARGE_AT_A_TIME) {
      const message = 'Other large bodies are being read'
      throw new TaskRunnerError('busy', message, { retryAfterSeconds: 1 })
    }
    large += 1
    reply.raw.once('close', () => {
      large -= 1
    })
  })

  // The tutorial of the old app names the second path.
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
            ...answer('Done', callbackResponseSchema),
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
        summary: 'A receiver that takes any JSON object',
        description: 'Or a JSON string that holds one, as the predecessor of this service sent it.',
        security: [],
        body: z.union([anyObject, z.string()], 'must be an object, or a string that holds one'),
        response: {
          ...answer('Done', callbackResponseSchema),
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
 * Says why a callback URL is refused that names one of these receivers while they are off;
 * undefined when it names none. The service is reached at loopback with the port that the request
 * came to, and at the host that the request names.
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
  const how = 'the operator can switch them on with SAMPLE_CALLBACKS=true'
  return `names a sample receiver of this service, and these are off; ${how}`
}

function parseObject(json: string): object {
  try {
    const value = parseJson(Buffer.from(json))
    if (isObject(value)) return value
  } catch (err) {
    // Answered like any other value that is not an object.
    if (!(err instanceof SyntaxError)) throw err
  }
  throw new InvalidRequestError([{ path: '', message: 'the string does not hold a JSON object' }])
}
