import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  isFinal,
  LIVE_STATUSES,
  TASK_STATUSES,
  type TaskStatus,
  workerNameFor,
} from '../../src/core/task.ts'

const taskId = fc.oneof(
  fc.string({ unit: 'binary', minLength: 1, maxLength: 255 }),
  fc.string({ unit: fc.constantFrom(...'aA0-._ /é'), minLength: 1, maxLength: 60 }),
)

describe('workerNameFor', () => {
  test('any id gives a DNS label (RFC 1123) with room for a suffix', () => {
    fc.assert(
      fc.property(taskId, (id) => {
        const name = workerNameFor(id)
        expect(name).toMatch(/^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/)
        expect(name.length).toBeLessThanOrEqual(40)
      }),
      { numRuns: 500 },
    )
  })

  test('different ids give different names, also where they look alike', () => {
    fc.assert(
      fc.property(fc.uniqueArray(taskId, { maxLength: 50 }), (ids) => {
        expect(new Set(ids.map(workerNameFor)).size).toBe(ids.length)
      }),
    )
    expect(new Set(['a b', 'a-b', 'A b', 'a.b', 'a  b', ' a b'].map(workerNameFor)).size).toBe(6)
  })

  test('an id gives the same name in every release from now on', () => {
    expect(workerNameFor('23erd-rt56')).toBe('task-23erd-rt56-56995c2470267ba6b67f')
    expect(workerNameFor('日本')).toBe('task-cf2abf0c5be326cb922a')
  })

  test('a person recognises the id in it', () => {
    expect(workerNameFor('Nightly Report')).toMatch(/^task-nightly-report-[0-9a-f]{20}$/)
    expect(workerNameFor('---')).toMatch(/^task-[0-9a-f]{20}$/)
  })
})

describe('states', () => {
  test('each is either live or final', () => {
    const expected: Record<TaskStatus, boolean> = {
      ...{ queued: false, provisioning: false, running: false },
      ...{ succeeded: true, failed: true, cancelled: true },
    }
    for (const status of TASK_STATUSES) {
      expect(isFinal(status)).toBe(expected[status])
      expect(LIVE_STATUSES.some((live) => live === status)).toBe(!expected[status])
    }
  })
})
