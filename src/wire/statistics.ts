import { z } from 'zod'
import type { Bucket, Durations } from '../core/statistics.ts'
import type { Reason, TaskStatus } from '../core/task.ts'
import { taskReason } from './responses.ts'

const none = { mean: null, max: null }
const at = '2026-01-05T08:00:00.000Z'
const exampleBucket = {
  at,
  succeeded: 12,
  failed: 1,
  cancelled: 0,
  queue_wait_seconds: { mean: 0.004, max: 0.02 },
  callback_delay_seconds: none,
}
const exampleCount = { reason: 'exit_code', count: 1 } as const

const durationsSchema = z
  .object({ mean: z.number().nullable(), max: z.number().nullable() })
  .meta({ id: 'Durations', examples: [exampleBucket.queue_wait_seconds] })

const bucketSchema = z
  .object({
    at: z.iso.datetime(),
    succeeded: z.int(),
    failed: z.int(),
    cancelled: z.int(),
    queue_wait_seconds: durationsSchema.describe('From accepted to claimed'),
    callback_delay_seconds: durationsSchema.describe('From the end to the first delivery attempt'),
  })
  .meta({ id: 'StatisticsBucket', examples: [exampleBucket] })

const reasonCountSchema = z
  .object({ reason: taskReason, count: z.int() })
  .meta({ id: 'ReasonCount', examples: [exampleCount] })

/** Counts of the tasks that ended in each bucket. Durations without a value are null. */
export const statisticsSchema = z
  .object({
    from: z.iso.datetime(),
    to: z.iso.datetime(),
    bucket_seconds: z.number(),
    buckets: z.array(bucketSchema),
    reasons: z
      .array(reasonCountSchema)
      .describe('Reasons of the tasks that did not succeed, most frequent first'),
    live: z.object({ queued: z.int(), provisioning: z.int(), running: z.int() }),
    oldest_queued_seconds: z.number().nullable(),
  })
  .meta({
    id: 'Statistics',
    examples: [
      {
        from: at,
        to: '2026-01-05T09:00:00.000Z',
        bucket_seconds: 60,
        buckets: [exampleBucket],
        reasons: [exampleCount],
        live: { queued: 0, provisioning: 0, running: 3 },
        oldest_queued_seconds: null,
      },
    ],
  })

export function fromStatistics(
  buckets: Bucket[],
  live: Array<{ status: TaskStatus; count: number; oldestCreatedAt: number }>,
  { bucketMs, now }: { bucketMs: number; now: number },
): z.input<typeof statisticsSchema> {
  const from = buckets[0]?.at ?? now
  const count = (wanted: TaskStatus) => live.find(({ status }) => status === wanted)?.count ?? 0
  const oldest = live.find(({ status }) => status === 'queued')?.oldestCreatedAt
  return {
    from: iso(from),
    to: iso(from + buckets.length * bucketMs),
    bucket_seconds: bucketMs / 1000,
    buckets: buckets.map(({ at, succeeded, failed, cancelled, queueWait, callbackDelay }) => ({
      at: iso(at),
      succeeded,
      failed,
      cancelled,
      queue_wait_seconds: rounded(queueWait),
      callback_delay_seconds: rounded(callbackDelay),
    })),
    reasons: summed(buckets.flatMap(({ reasons }) => reasons)),
    live: {
      queued: count('queued'),
      provisioning: count('provisioning'),
      running: count('running'),
    },
    oldest_queued_seconds: oldest === undefined ? null : Math.max(0, (now - oldest) / 1000),
  }
}

function summed(counts: Array<{ reason: Reason; count: number }>) {
  const sums = new Map<Reason, number>()
  for (const { reason, count } of counts) sums.set(reason, (sums.get(reason) ?? 0) + count)
  return [...sums]
    .map(([reason, count]) => ({ reason, count }))
    .sort((one, other) => other.count - one.count)
}

/** Rounds to milliseconds, the precision of the measurement. */
function rounded({ mean, max }: Durations): Durations {
  return { mean: mean === null ? null : Math.round(mean * 1000) / 1000, max }
}

function iso(ms: number): string {
  return new Date(ms).toISOString()
}
