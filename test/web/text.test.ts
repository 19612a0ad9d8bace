import { expect, test } from 'vitest'
import { parseRoute, taskHref } from '../../web/src/route.ts'
import { bytes, clock, duration } from '../../web/src/text.ts'

test.each([
  [0, '0 ms'],
  [-5, '0 ms'],
  [999, '999 ms'],
  [1000, '1.0 s'],
  [59_949, '59.9 s'],
  [59_960, '1 min 0 s'],
  [3_599_400, '59 min 59 s'],
  [3_599_600, '1 h 0 min'],
  [86_400_000, '24 h 0 min'],
  [3 * 86_400_000, '3 d 0 h'],
])('%i ms are %s', (ms, text) => {
  expect(duration(ms)).toBe(text)
})

test('a time of another day has its date', () => {
  const at = new Date(2026, 0, 5, 8, 3, 9)
  expect(clock(at.getTime(), at.getTime() + 1000)).toBe('08:03:09')
  expect(clock(at.getTime(), at.getTime() + 86_400_000)).toBe('5 Jan 08:03:09')
})

test('bytes have the unit that fits', () => {
  expect([0, 1023, 1024, 5_242_880].map(bytes)).toEqual(['0 B', '1023 B', '1.0 KB', '5.0 MB'])
})

test.each(['plain', 'with/slash', 'a b#c?d%', '100%', 'ä \u{1f600}', '<img>'])(
  'the task %j is found by its link',
  (id) => {
    expect(parseRoute(taskHref(id))).toEqual({ page: 'task', id })
  },
)

test('a hash that means nothing is the overview', () => {
  expect(parseRoute('')).toEqual({ page: 'overview' })
  expect(parseRoute('#/nothing')).toEqual({ page: 'overview' })
  expect(parseRoute('#/tasks/%E0%A4%A')).toEqual({ page: 'task', id: '%E0%A4%A' })
})
