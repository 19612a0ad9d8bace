import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { expect, test } from 'vitest'
import { Shared } from '../../src/core/shared.ts'

setFlagsFromString('--expose-gc')
const collectGarbage: () => void = runInNewContext('gc')

test('what somebody holds is shared, each key for itself, until it is forgotten', () => {
  const shared = new Shared<object>()
  const one = shared.get('one', () => ({}))
  expect(shared.get('one', () => ({}))).toBe(one)
  expect(shared.get('other', () => ({}))).not.toBe(one)
  shared.forget('one')
  expect(shared.get('one', () => ({}))).not.toBe(one)
})

test('what nobody holds is made anew', async () => {
  const shared = new Shared<{ made: number }>()
  let made = 0
  const make = () => {
    made += 1
    return { made }
  }
  const madeAnew = () => {
    collectGarbage()
    return shared.get('key', make).made
  }
  await expect.poll(madeAnew).toBe(2)
})
