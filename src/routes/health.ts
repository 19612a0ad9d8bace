import type { FastifyBaseLogger } from 'fastify'
import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { type ErrorCode, TaskRunnerError } from '../core/errors.ts'
import { healthSchema } from '../wire/responses.ts'
import { answer } from './responses.ts'

export const healthRoutes: FastifyPluginAsyncZod<{
  /** Each part by its name; throws what is wrong with it. */
  parts: Record<string, () => Promise<void>>
  /** What does not keep the service from taking tasks, but an operator should know. */
  warnings: () => Promise<string[]>
  isDraining: () => boolean
}> = async (app, { parts, warnings, isDraining }) => {
  app.get(
    '/health/live',
    {
      schema: {
        tags: ['Health'],
        operationId: 'live',
        summary: 'Does the process answer?',
        security: [],
        response: { ...answer('It does', healthSchema) },
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
        summary: 'Can it take tasks?',
        description: 'Names the part that is not ready.',
        security: [],
        response: {
          ...answer('Ready', healthSchema),
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
            // The message of one of our own errors is meant for callers; others stay in the log.
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

/** They cannot be had, which is one itself. */
function asWarning(log: FastifyBaseLogger) {
  return (err: unknown): string[] => {
    log.warn({ err }, 'the tasks folder could not be looked at')
    return ['the tasks folder could not be looked at; the log says why']
  }
}
