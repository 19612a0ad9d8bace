import { describe, expect, test } from 'vitest'
import { startCrashStory } from '../helpers/crash-story.ts'
import { FAILPOINTS } from '../helpers/service-with-failpoint.ts'

const TASKS = 5

describe('a service killed with SIGKILL loses nothing and runs nothing twice', () => {
  test.each(FAILPOINTS)('killed when: %s', async (failpoint) => {
    await using story = await startCrashStory()
    const doomed = await story.start({ KILL_AT: failpoint, KILL_ON: '2' })
    const taskIds = Array.from({ length: TASKS }, (_, index) => `crash-${index}`)
    const answers = await Promise.all(taskIds.map((taskId) => story.submit(doomed, taskId)))
    expect(await doomed.ended).toBe('SIGKILL')

    const next = await story.start()
    // A client that got no answer asks again; one that got 200 need not.
    for (const [index, taskId] of taskIds.entries()) {
      if (!answers[index]) expect(await story.submit(next, taskId)).toBe(true)
    }
    await story.expectAllKept(next, taskIds)
  })

  test('killed right after the 200', async () => {
    await using story = await startCrashStory()
    const doomed = await story.start()
    expect(await story.submit(doomed, 'just-accepted')).toBe(true)
    await doomed.kill()

    await story.expectAllKept(await story.start(), ['just-accepted'])
  })
})
