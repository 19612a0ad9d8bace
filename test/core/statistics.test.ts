import { expect, test } from 'vitest'
import { type EndedTasks, Statistics } from '../../src/core/statistics.ts'

const none = { mean: null, max: null }
const NOTHING: EndedTasks = {
  ...{ succeeded: 0, failed: 0, cancelled: 0, reasons: [] },
  ...{ queueWait: none, callbackDelay: none },
}

function statistics() {
  const clock = { now: 1_000_500 }
  const asked: string[] = []
  let failing = false
  const store = {
    ended: async (from: number, to: number) => {
      asked.push(`${from}..${to}`)
      if (failing) throw new Error('away')
      return { ...NOTHING, succeeded: from }
    },
  }
  return {
    clock,
    /** What was asked of the store since the last time. */
    asked: () => asked.splice(0),
    fail: (is: boolean) => {
      failing = is
    },
    last: (count: number) => new Statistics(store, () => clock.now).last(count, 1_000),
    subject: new Statistics(store, () => clock.now),
  }
}

test('spans follow each other up to now, the one under way included', async () => {
  const { last, asked } = statistics()
  const buckets = await last(3)
  expect(buckets.map(({ at, succeeded }) => [at, succeeded])).toEqual([
    [998_000, 998_000],
    [999_000, 999_000],
    [1_000_000, 1_000_000],
  ])
  expect(asked()).toEqual(['998000..999000', '999000..1000000', '1000000..1001000'])
})

test('what is long over is asked for once, what may change again and again, but not by everybody at once', async () => {
  const { subject, asked, clock } = statistics()
  await Promise.all([subject.last(100, 1_000), subject.last(100, 1_000)])
  expect(asked()).toHaveLength(100)
  clock.now += 5_000
  await subject.last(100, 1_000)
  const again = asked()
  expect(again[0]).toBe('940000..941000')
  expect(again.at(-1)).toBe('1005000..1006000')
  expect(again).toHaveLength(66)
})

test('a question that failed is asked again', async () => {
  const { subject, fail, asked } = statistics()
  fail(true)
  await expect(subject.last(2, 1_000)).rejects.toThrow('away')
  fail(false)
  asked()
  expect(await subject.last(2, 1_000)).toHaveLength(2)
  expect(asked()).toHaveLength(2)
})
