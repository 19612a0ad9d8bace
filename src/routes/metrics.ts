import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import { errorResponses } from './responses.ts'

export const metricsRoute: FastifyPluginAsyncZod<{
  metrics: { contentType: string; text(): Promise<string> }
}> = async (app, { metrics }) => {
  app.get(
    '/metrics',
    {
      schema: {
        tags: ['Health'],
        operationId: 'metrics',
        summary: 'Metrics for Prometheus',
        response: {
          200: {
            description: "In Prometheus' text format",
            content: { 'text/plain': { schema: z.string() } },
          },
          ...errorResponses(401, 503),
        },
      },
    },
    async (_, reply) => {
      const text = await metrics.text()
      return reply.type(metrics.contentType).send(text)
    },
  )
}
