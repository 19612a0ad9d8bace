import { setTimeout as pause } from 'node:timers/promises'
import { describe, expect, test, vi } from 'vitest'
import { ServiceThread } from '../../src/threads/service-thread.ts'

function open(workerData = '') {
  const onDeath = vi.fn<(err: Error) => void>()
  const onNotice = vi.fn<(notice: unknown) => void>()
  const options = { name: 'echo', workerData, onDeath, onNotice }
  return {
    ...{ onDeath, onNotice },
    thread: new ServiceThread<string>('./echo-thread', import.meta.url, options),
  }
}

test('what is asked in one turn goes over together, and each gets its own answer', async () => {
  const { thread } = open()
  expect(await Promise.all(['a', 'b', 'c'].map((word) => thread.call(word)))).toEqual([
    ...['a 1', 'b 1', 'c 1'],
  ])
  expect(await thread.call('d')).toBe('d 2')
  await thread.close()
})

test('a call that fails rejects with the error and its code, and others go on', async () => {
  const { thread } = open()
  const answers = await Promise.allSettled([thread.call('fail'), thread.call('a')])
  expect(answers).toMatchObject([
    { reason: { message: 'no', code: 'ENO' } },
    { status: 'fulfilled', value: 'a 1' },
  ])
  await thread.close()
})

test('a notice is heard', async () => {
  const { thread, onNotice } = open()
  await thread.call('notify')
  await expect.poll(() => onNotice.mock.calls).toEqual([['a notice']])
  await thread.close()
})

describe('a thread that', () => {
  test.each([
    ['throws', 'throw', 'the echo thread ended: a bug'],
    ['exits', 'exit', 'the echo thread ended: it ended with code 3'],
  ])(
    '%s is told as dead once, with all that waits and comes rejected',
    async (_, word, message) => {
      const { thread, onDeath } = open()
      await thread.ready
      // What is asked along with an exit is never answered.
      const calls = Promise.allSettled([thread.call(word), thread.call('a')])
      await expect.poll(() => onDeath.mock.calls).toMatchObject([[{ message }]])
      await calls
      await expect(thread.call('b')).rejects.toThrow(message)
      await thread.close()
      await pause(0)
      expect(onDeath).toHaveBeenCalledTimes(1)
    },
  )

  test('cannot start tells why, and is not told as dead', async () => {
    const { thread, onDeath } = open('broken')
    const call = thread.call('a')
    await expect(thread.ready).rejects.toMatchObject({
      message: 'it cannot start',
      code: 'E_START',
    })
    await expect(call).rejects.toThrow('it cannot start')
    await thread.close()
    expect(onDeath).not.toHaveBeenCalled()
  })

  test('is closed answers what it was asked before, and is not told as dead', async () => {
    const { thread, onDeath } = open()
    const call = thread.call('a')
    await Promise.all([thread.close(), thread.close()])
    expect(await call).toBe('a 1')
    await expect(thread.call('b')).rejects.toThrow('ended')
    expect(onDeath).not.toHaveBeenCalled()
  })
})
