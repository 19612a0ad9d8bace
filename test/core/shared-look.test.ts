import { expect, test } from 'vitest'
import { SharedLook } from '../../src/core/shared-look.ts'

/** Looks that end when told, in the order they began. */
const looksByHand = () => {
  const begun: PromiseWithResolvers<string>[] = []
  const look = new SharedLook<string>(() => {
    const ended = Promise.withResolvers<string>()
    begun.push(ended)
    return ended.promise
  })
  return { begun, look }
}

test('a crowd that asks during a look shares the next one, which begins after all of them asked', async () => {
  const { begun, look } = looksByHand()
  const first = look.at('a')
  const crowd = Array.from({ length: 100 }, () => look.at('a'))
  expect(begun).toHaveLength(1)

  begun[0]?.resolve('before')
  expect(await first).toBe('before')
  expect(begun).toHaveLength(2)
  begun[1]?.resolve('after')

  expect(new Set(await Promise.all(crowd))).toEqual(new Set(['after']))
  const later = look.at('a')
  begun[2]?.resolve('later')
  expect(await later).toBe('later')
})

test('a look that fails fails for those who share it, and the next one is made all the same', async () => {
  const { begun, look } = looksByHand()
  const first = look.at('a')
  const second = look.at('a')
  begun[0]?.reject(new Error('unreadable'))
  await expect(first).rejects.toThrow('unreadable')

  begun[1]?.resolve('readable again')
  expect(await second).toBe('readable again')
})

test('looks at different things do not wait for each other', async () => {
  const { begun, look } = looksByHand()
  const stuck = look.at('a')
  const other = look.at('b')
  begun[1]?.resolve('b')
  expect(await other).toBe('b')
  begun[0]?.resolve('a')
  expect(await stuck).toBe('a')
})
