import type { FastifyBaseLogger } from 'fastify'
import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { type ErrorCode, TaskRunnerError } from '../core/errors.ts'
import { healthSchema } from '../wire/responses.ts'
import { okResponse } from './responses.ts'

export const healthRoutes: FastifyPluginAsyncZod<{
  /** Checks by the name of the part; each throws if its part is not ready. */
  parts: Record<string, () => Promise<void>>
  /** Reads problems that an operator should know although the service accepts tasks. */
  warnings: () => Promise<string[]>
  isDraining: () => boolean
}> = async (app, { parts, warnings, isDraining }) => {
  app.get(
    '/health/live',
    {
      schema: {
        tags: ['Health'],
        operationId: 'live',
        summary: 'Check that the process responds',
        security: [],
        response: { ...okResponse('Alive', healthSchema) },
      },
    },
    async () => ({ success: true, message: 'alive' }),
  )

  app.get(
    '/health/ready',
    {
      schema: {
        tags: ['Health'],
        operationId: 'ready',
        summary: 'Check that the service can accept tasks',
        description: 'Names the part that is not ready.',
        security: [],
        response: {
          ...okResponse('Ready', healthSchema),
          503: {
            description: 'Not ready',
            content: { 'application/json': { schema: healthSchema } },
          },
        },
      },
    },
    async (request, reply) => {
      if (isDraining()) {
        return reply
          .code(503)
          .send({ success: false, code: 'draining' satisfies ErrorCode, message: 'shutting down' })
      }
      const states = await Promise.all(
        Object.entries(parts).map(async ([name, check]) => {
          try {
            await check()
            return [name, 'ok'] as const
          } catch (err) {
            request.log.warn({ err, part: name }, 'not ready')
            // Only our own errors have messages for callers; others go to the log.
            return [name, err instanceof TaskRunnerError ? err.message : 'failed'] as const
          }
        }),
      )
      const failed = states.filter(([, state]) => state !== 'ok').map(([name]) => name)
      const ok = failed.length === 0
      const message = ok ? 'ready' : `not ready: ${failed.join(', ')}`
      return reply.code(ok ? 200 : 503).send({
        success: ok,
        ...(ok ? {} : { code: 'not_ready' satisfies ErrorCode }),
        message,
        parts: Object.fromEntries(states),
        ...(ok ? { warnings: await warnings().catch(asWarning(request.log)) } : {}),
      })
    },
  )
}

/** Turns the failure to read the warnings into a warning. */
function asWarning(log: FastifyBaseLogger) {
  return (err: unknown): string[] => {
    log.warn({ err }, 'the tasks folder could not be read')
    return ['the tasks folder could not be read; the log says why']
  }
}
