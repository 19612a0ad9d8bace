import { expect, test } from 'vitest'
import { eventually, exitAfter, get, startStage } from '../helpers/recovery.ts'

const HOUR_MS = 3_600_000

test('a callback comes in its time after the clock was set back by an hour while the service was down', async () => {
  await using stage = await startStage({
    env: { CALLBACK_RETRY_SECONDS: '3,3' },
    answer: (_, response, count) => response.writeHead(count === 1 ? 503 : 200).end('{}'),
  })
  const first = await stage.start()
  await stage.open('told', 'before', 'during', 'after')
  await stage.submit(first, 'told', 'r-story.sh')
  await eventually(async () => {
    const { body } = await get(first, '/tasks/told/callback')
    expect(body).toMatchObject({ attempts: [{ status_code: 503 }] })
  })
  expect(await exitAfter(first, 'SIGKILL')).toBe('SIGKILL')
  const second = await stage.start({
    NODE_OPTIONS: `--import ${new URL('../helpers/shifted-clock.ts', import.meta.url).pathname}`,
    CLOCK_SHIFT_MS: String(-HOUR_MS),
  })
  await eventually(async () => {
    expect(stage.receiver.received).toHaveLength(2)
    const { body } = await get(second, '/tasks/told/callback')
    expect(body).toMatchObject({ status: 'delivered' })
  })
}, 90_000)
