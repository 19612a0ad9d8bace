import { expect, test } from 'vitest'
import { traceparentOf } from '../../src/wire/traceparent.ts'

const TRACE = '0af7651916cd43dd8448eb211c80319c'
const VALID = `00-${TRACE}-b7ad6b7169203331-01`

test.each([
  VALID,
  `01-${TRACE}-b7ad6b7169203331-00`,
  `cc-${TRACE}-b7ad6b7169203331-01-what-comes-later`,
])('%s is one', (header) => expect(traceparentOf(header)).toBe(header))

test.each([
  undefined,
  '',
  'nonsense',
  VALID.toUpperCase(),
  `${VALID}-more`,
  `${VALID} `,
  `${VALID}\n`,
  `ff-${TRACE}-b7ad6b7169203331-01`,
  `00-${'0'.repeat(32)}-b7ad6b7169203331-01`,
  `00-${TRACE}-${'0'.repeat(16)}-01`,
  `00-${TRACE}-b7ad6b7169203331`,
  `cc-${TRACE}-b7ad6b7169203331-01-${'x'.repeat(300)}`,
])('%j is none', (header) => expect(traceparentOf(header)).toBeUndefined())
