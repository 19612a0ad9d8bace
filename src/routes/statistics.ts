import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import type { TaskStore } from '../core/ports.ts'
import type { Statistics, StatisticsStore } from '../core/statistics.ts'
import { fromStatistics, statisticsSchema } from '../wire/statistics.ts'
import { answer, errorResponses } from './responses.ts'

const BUCKETS = 60
const MINUTES_DEFAULT = 60
const MINUTES_MAX = 1440
/** Many may look at once, and each look reads every task of the span. */
const KEPT_MS = 5_000

export const statisticsRoute: FastifyPluginAsyncZod<{
  statistics: StatisticsStore
  tasks: Pick<TaskStore, 'countLive'>
  now: () => number
}> = async (app, { statistics, tasks, now }) => {
  const known = new Map<number, { until: number; ended: Promise<Statistics> }>()

  /** Asks the store again only when what is known is older than a few seconds, or a part of a bucket. */
  function ended(bucketMs: number): Promise<Statistics> {
    const kept = known.get(bucketMs)
    if (kept && kept.until > now()) return kept.ended
    const from = (Math.floor(now() / bucketMs) + 1 - BUCKETS) * bucketMs
    const asked = statistics.ended({ from, bucketMs, count: BUCKETS })
    const until = now() + Math.max(KEPT_MS, bucketMs / 12)
    known.set(bucketMs, { until, ended: asked })
    asked.catch(() => known.delete(bucketMs))
    return asked
  }

  app.get(
    '/statistics',
    {
      schema: {
        tags: ['Tasks'],
        operationId: 'statistics',
        summary: 'Look at the last hour',
        description: `How tasks ended, how long they waited and how late their callbacks were, in ${BUCKETS} spans up to now.`,
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
          ...answer('What ended, and what is there', statisticsSchema),
          ...errorResponses(401, 422, 503),
        },
      },
    },
    async ({ query }) => {
      const bucketMs = ((query.minutes ?? MINUTES_DEFAULT) * 60_000) / BUCKETS
      const [known, live] = await Promise.all([ended(bucketMs), tasks.countLive()])
      return fromStatistics(known, live, { bucketMs, now: now() })
    },
  )
}
