import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { Deadline } from '../../src/core/deadline.ts'

describe('Deadline', () => {
  beforeEach(() => {
    vi.useFakeTimers()
  })

  afterEach(() => {
    vi.useRealTimers()
  })

  test('aborts when its time is up, as AbortSignal.timeout does', () => {
    using deadline = new Deadline(100, [new AbortController().signal])
    vi.advanceTimersByTime(99)
    expect(deadline.signal.aborted).toBe(false)
    vi.advanceTimersByTime(1)
    expect(deadline.signal.reason).toMatchObject({ name: 'TimeoutError' })
    expect(deadline.signal.reason).toBeInstanceOf(DOMException)
  })

  test('aborts with the first of the others, and with its reason', () => {
    const others = [new AbortController(), new AbortController()] as const
    using deadline = new Deadline(
      100,
      others.map(({ signal }) => signal),
    )
    others[1].abort('second')
    others[0].abort('first')
    vi.advanceTimersByTime(100)
    expect(deadline.signal.reason).toBe('second')
  })

  test('is aborted from the start when one of the others is', () => {
    using deadline = new Deadline(100, [new AbortController().signal, AbortSignal.abort('before')])
    expect(deadline.signal.reason).toBe('before')
  })

  test('leaves neither a timer nor a listener behind', () => {
    const other = new AbortController()
    const remove = vi.spyOn(other.signal, 'removeEventListener')
    const deadline = new Deadline(100, [other.signal])
    deadline[Symbol.dispose]()
    expect(vi.getTimerCount()).toBe(0)
    expect(remove).toHaveBeenCalledOnce()
    other.abort()
    expect(deadline.signal.aborted).toBe(false)
  })
})
