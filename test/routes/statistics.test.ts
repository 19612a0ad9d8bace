import { expect, test } from 'vitest'
import { startApp, taskRequest } from '../helpers/app.ts'

test('the last hour, minute by minute, and what is there now', async () => {
  await using app = await startApp()
  const done = taskRequest()
  const failed = taskRequest({
    task_file_name: 'w-eval.sh',
    worker_config: { env_variables: { SCRIPT: 'exit 3' } },
  })
  for (const request of [done, failed]) {
    await app.submit(request)
    await app.finished(request.task_id)
  }
  const { status, body } = await app.get('/statistics')
  expect(status).toBe(200)
  const buckets = body.buckets as Array<Record<string, unknown>>
  expect(buckets).toHaveLength(60)
  expect(Date.parse(String(body.to)) - Date.parse(String(body.from))).toBe(3_600_000)
  expect(Date.parse(String(body.to))).toBeGreaterThan(Date.now())
  const sum = (what: string) => buckets.reduce((all, bucket) => all + Number(bucket[what]), 0)
  expect({ succeeded: sum('succeeded'), failed: sum('failed') }).toEqual({
    succeeded: 1,
    failed: 1,
  })
  expect(body).toMatchObject({
    bucket_seconds: 60,
    reasons: [{ reason: 'exit_code', count: 1 }],
    live: { queued: 0, provisioning: 0, running: 0 },
    oldest_queued_seconds: null,
  })
  expect((await app.get('/statistics?minutes=1440')).body).toMatchObject({ bucket_seconds: 1440 })
})

test.each(['4', '1441', 'x', '60&hours=1'])('minutes=%s is refused', async (minutes) => {
  await using app = await startApp()
  expect((await app.get(`/statistics?minutes=${minutes}`)).status).toBe(422)
})
