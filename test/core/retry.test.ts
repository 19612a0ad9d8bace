import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { longestDelaysMs, retryDelayMs } from '../../src/core/retry.ts'

const delaysMs = [5_000, 300_000, 0]
const middle = () => 0.5

describe('retryDelayMs', () => {
  test('each failed attempt has the delay that stands for it', () => {
    const schedule = { delaysMs, random: middle }
    expect(retryDelayMs(1, schedule)).toBe(5_000)
    expect(retryDelayMs(2, schedule)).toBe(300_000)
    expect(retryDelayMs(3, schedule)).toBe(0)
  })

  test('past the end of the schedule there is none', () => {
    expect(retryDelayMs(4, { delaysMs, random: middle })).toBeUndefined()
    expect(retryDelayMs(1, { delaysMs: [], random: middle })).toBeUndefined()
    expect(retryDelayMs(0, { delaysMs, random: middle })).toBeUndefined()
  })

  test('the jitter spans 20 % both ways', () => {
    expect(retryDelayMs(1, { delaysMs, random: () => 0 })).toBe(4_000)
    expect(retryDelayMs(1, { delaysMs, random: () => 1 - Number.EPSILON })).toBe(6_000)
  })

  test('the longest delays, by the attempts made, are what the jitter can make of the schedule', () => {
    expect(longestDelaysMs({ delaysMs, random: middle })).toEqual([0, 6_000, 360_000, 0])
    for (const [attempts, longestMs] of longestDelaysMs({ delaysMs, random: middle }).entries()) {
      const delayMs = retryDelayMs(attempts, { delaysMs, random: () => 1 - Number.EPSILON }) ?? 0
      expect(delayMs).toBeLessThanOrEqual(longestMs)
    }
  })

  test('any delay stays within 20 % of the schedule, and is whole', () => {
    fc.assert(
      fc.property(
        fc.double({ min: 0, max: 2e9, noNaN: true }),
        fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }),
        (delayMs, random) => {
          const jittered = retryDelayMs(1, { delaysMs: [delayMs], random: () => random }) ?? -1
          expect(Number.isInteger(jittered)).toBe(true)
          expect(Math.abs(jittered - delayMs)).toBeLessThanOrEqual(delayMs * 0.2 + 1)
        },
      ),
    )
  })
})
