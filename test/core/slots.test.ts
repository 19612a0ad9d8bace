import { expect, test } from 'vitest'
import { Slots } from '../../src/core/slots.ts'

const never = new AbortController().signal

function slotsOf(limit: number, onFree = () => {}) {
  return new Slots(limit, onFree)
}

test('a slot that is released is free for a new task', () => {
  let told = 0
  const slots = slotsOf(1, () => {
    told += 1
  })
  const slot = slots.take()
  expect(slots.free).toBe(0)
  slot.release()
  slot.release()
  expect(slots.free).toBe(1)
  expect(told).toBe(1)
})

test('who comes back gets a slot before any new task', async () => {
  let told = 0
  const slots = slotsOf(1, () => {
    told += 1
  })
  const waiting = slots.take()
  waiting.release()
  const other = slots.take()
  told = 0
  const back = waiting.retake(never)
  other.release()
  await back
  expect(slots.free).toBe(0)
  expect(told).toBe(0)
  waiting.release()
  expect(slots.free).toBe(1)
})

test('who gives up coming back holds no slot', async () => {
  const slots = slotsOf(1)
  const waiting = slots.take()
  waiting.release()
  const other = slots.take()
  const ending = new AbortController()
  const back = waiting.retake(ending.signal)
  ending.abort(new Error('cancelled'))
  await expect(back).rejects.toThrow('cancelled')
  other.release()
  expect(slots.free).toBe(1)
  waiting.release()
  expect(slots.free).toBe(1)
})

test('tasks that run already take slots beyond the limit, and count', () => {
  const slots = slotsOf(1)
  const held = [slots.take(), slots.take(), slots.take()]
  expect(slots.free).toBe(0)
  for (const slot of held.slice(0, 2)) slot.release()
  expect(slots.free).toBe(0)
  held[2]?.release()
  expect(slots.free).toBe(1)
})
