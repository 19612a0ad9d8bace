import { expect, test } from 'vitest'
import { retrying } from '../../src/core/retrying.ts'

class Passing extends Error {}
const isPassing = (err: unknown) => err instanceof Passing
const NEVER = new AbortController().signal
const PAUSES = { fromMs: 10, toMs: 20 }

/** A step that fails with each of the errors, and then succeeds. */
function failing(...errors: Error[]) {
  const left = [...errors]
  return async () => {
    const err = left.shift()
    if (err) throw err
    return 'done'
  }
}

test('a step is repeated until it succeeds, with pauses that double up to a maximum', async () => {
  const errors = [new Passing('1'), new Passing('2'), new Passing('3')]
  const heard: Error[] = []
  const began = performance.now()
  const onRetry = (err: Error) => heard.push(err)
  const retries = { signal: NEVER, ...PAUSES, isWorthIt: isPassing, onRetry }
  expect(await retrying(failing(...errors), retries)).toBe('done')
  expect(heard).toEqual(errors)
  // 10, 20 and 20 ms, each of which a timer may take for one less.
  expect(performance.now() - began).toBeGreaterThanOrEqual(47)
})

test('a failure that is not worth a retry is thrown at once', async () => {
  const retries = { signal: NEVER, fromMs: 1e6, toMs: 1e6, isWorthIt: isPassing }
  await expect(retrying(failing(new Error('for good')), retries)).rejects.toThrow('for good')
})

test('an abort ends a pause, and no step follows it: its reason is thrown', async () => {
  const abort = new AbortController()
  let steps = 0
  const step = async () => {
    steps += 1
    throw new Passing()
  }
  const retries = { signal: abort.signal, fromMs: 1e6, toMs: 1e6, isWorthIt: isPassing }
  const onRetry = () => void setImmediate(() => abort.abort(new Error('enough')))
  await expect(retrying(step, { ...retries, onRetry })).rejects.toThrow('enough')
  await expect(retrying(step, retries)).rejects.toThrow('enough')
  expect(steps).toBe(2)
})
