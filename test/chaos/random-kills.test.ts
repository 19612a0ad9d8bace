import { setTimeout as pause } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { startCrashStory } from '../helpers/crash-story.ts'
import { mulberry32 } from '../helpers/random.ts'

const SECONDS = Number(process.env.CHAOS_SECONDS ?? 60)
const SEED = Number(process.env.CHAOS_SEED ?? Date.now() % 2 ** 31)

test(
  `a service killed at random for ${SECONDS} seconds loses nothing and runs nothing twice (CHAOS_SEED=${SEED})`,
  async () => {
    console.log(`CHAOS_SEED=${SEED}`)
    const random = mulberry32(SEED)
    await using story = await startCrashStory()
    const acknowledged = new Set<string>()
    const asked = new Set<string>()
    const end = Date.now() + SECONDS * 1000
    let kills = 0
    while (Date.now() < end) {
      const service = await story.start()
      const submitting = (async () => {
        for (;;) {
          const taskId = [...asked].find((id) => !acknowledged.has(id)) ?? `chaos-${asked.size}`
          asked.add(taskId)
          if (!(await story.submit(service, taskId))) return
          acknowledged.add(taskId)
        }
      })()
      // This wait is the experiment: the moment of death is drawn, not awaited.
      await pause(50 + random() * 1500)
      await service.kill()
      await submitting
      kills += 1
    }
    const last = await story.start()
    for (const taskId of asked) {
      if (!acknowledged.has(taskId)) expect(await story.submit(last, taskId)).toBe(true)
    }
    console.log(`${asked.size} tasks, ${kills} kills`)
    expect(kills).toBeGreaterThan(3)
    await story.expectAllKept(last, [...asked])
  },
  (SECONDS + 120) * 1000,
)
