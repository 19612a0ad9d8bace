import { expect, test } from 'vitest'
import { Availability } from '../../src/core/availability.ts'
import { UnavailableError } from '../../src/core/errors.ts'

const SILENT = { debug() {}, info() {}, warn() {}, error() {} }
const never = new AbortController().signal

function scene() {
  const changes: boolean[] = []
  const world = { problem: undefined as string | undefined, checks: 0 }
  const availability = new Availability({
    ...{ retryMs: 1, retryMaxMs: 4, log: SILENT },
    check: async () => {
      world.checks += 1
      if (world.problem !== undefined) throw new UnavailableError(world.problem)
    },
    onChange: (isAvailable) => changes.push(isAvailable),
  })
  return { availability, changes, world }
}

test('nothing is asked while nothing fails', async () => {
  const { availability, changes, world } = scene()
  await availability.available(never)
  expect(availability.problem).toBeUndefined()
  expect(changes).toEqual([])
  expect(world.checks).toBe(0)
})

test('the door closes with the first failure, and opens once the check passes', async () => {
  const { availability, changes, world } = scene()
  world.problem = 'The engine is away'
  availability.failed(new UnavailableError('No process could be started'))
  availability.failed(new UnavailableError('No process could be started'))
  expect(availability.problem).toBe('No process could be started')
  expect(changes).toEqual([false])
  await expect.poll(() => availability.problem).toBe('The engine is away')
  await expect.poll(() => world.checks).toBeGreaterThan(3)
  expect(changes).toEqual([false])
  world.problem = undefined
  await availability.available(never)
  expect(availability.problem).toBeUndefined()
  expect(changes).toEqual([false, true])
})

test('who waits can give up', async () => {
  const { availability, world } = scene()
  world.problem = 'The engine is away'
  availability.failed(new UnavailableError('The engine is away'))
  const ending = new AbortController()
  const waiting = availability.available(ending.signal)
  ending.abort(new Error('cancelled'))
  await expect(waiting).rejects.toThrow('cancelled')
  availability.close()
})

test('nothing is checked any more once it is closed', async () => {
  const { availability, changes, world } = scene()
  world.problem = 'The engine is away'
  availability.failed(new UnavailableError('The engine is away'))
  await expect.poll(() => world.checks).toBeGreaterThan(0)
  availability.close()
  await new Promise(setImmediate)
  const { checks } = world
  world.problem = undefined
  for (let turn = 0; turn < 20; turn += 1) await new Promise(setImmediate)
  expect(world.checks - checks).toBeLessThanOrEqual(1)
  expect(changes).toEqual([false])
})
