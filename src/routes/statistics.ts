import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import type { TaskStore } from '../core/ports.ts'
import type { Statistics } from '../core/statistics.ts'
import { fromStatistics, statisticsSchema } from '../wire/statistics.ts'
import { errorResponses, okResponse } from './responses.ts'

const BUCKETS = 60
const MINUTES_DEFAULT = 60
const MINUTES_MAX = 1440

export const statisticsRoute: FastifyPluginAsyncZod<{
  statistics: Statistics
  tasks: Pick<TaskStore, 'countLive'>
  now: () => number
}> = async (app, { statistics, tasks, now }) => {
  app.get(
    '/statistics',
    {
      schema: {
        tags: ['Tasks'],
        operationId: 'statistics',
        summary: 'Get statistics of the last hours',
        description: `How tasks ended, how long they were queued and how late their callbacks were sent, in ${BUCKETS} equal time spans up to now.`,
        querystring: z.strictObject({
          minutes: z.coerce
            .number()
            .int()
            .min(5)
            .max(MINUTES_MAX)
            .optional()
            .describe(`How far to look back. Default ${MINUTES_DEFAULT}`),
        }),
        response: {
          ...okResponse('The statistics', statisticsSchema),
          ...errorResponses(401, 422, 503),
        },
      },
    },
    async ({ query }) => {
      const bucketMs = ((query.minutes ?? MINUTES_DEFAULT) * 60_000) / BUCKETS
      const [buckets, live] = await Promise.all([
        statistics.last(BUCKETS, bucketMs),
        tasks.countLive(),
      ])
      return fromStatistics(buckets, live, { bucketMs, now: now() })
    },
  )
}
