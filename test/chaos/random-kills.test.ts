import { setTimeout as pause } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { startCrashStory } from '../helpers/crash-story.ts'
import { whyNoDocker } from '../helpers/docker.ts'
import { mulberry32 } from '../helpers/random.ts'

const SECONDS = Number(process.env.CHAOS_SECONDS ?? 60)
const SEED = Number(process.env.CHAOS_SEED ?? Date.now() % 2 ** 31)

/** How long a service lives, in ms: long enough for some tasks to come through. */
const LIVES = { local: 1_500, docker: 4_000, cluster: 12_000 } as const
const INSTANCES = { local: 1, docker: 1, cluster: 3 } as const
/** As many as can come through in about the time: a container takes a while. */
const TASKS_MAX = { local: SECONDS * 30, docker: SECONDS * 2, cluster: SECONDS * 2 }
const withoutDocker = await whyNoDocker()

test.for(['local', 'docker', 'cluster'] as const)(
  `%s: what is killed at random for ${SECONDS} seconds loses nothing and runs nothing twice (CHAOS_SEED=${SEED})`,
  { timeout: (SECONDS + 300) * 1000 },
  async (cast, { skip }) => {
    if (cast !== 'local' && withoutDocker) skip(withoutDocker)
    console.log(`CHAOS_SEED=${SEED}`)
    const random = mulberry32(SEED)
    await using story = await startCrashStory(cast)
    const acknowledged = new Set<string>()
    const asked = new Set<string>()
    const end = Date.now() + SECONDS * 1000
    let kills = 0
    const livesOfOne = async () => {
      while (Date.now() < end) {
        const service = await story.start()
        const submitting = (async () => {
          for (;;) {
            const taskId =
              [...asked].find((id) => !acknowledged.has(id)) ?? `chaos-${cast}-${asked.size}`
            if (asked.size >= TASKS_MAX[cast] && !asked.has(taskId)) return
            asked.add(taskId)
            if (!(await story.submit(service, taskId))) return
            acknowledged.add(taskId)
          }
        })()
        // This wait is the experiment: the moment of death is drawn, not awaited.
        await pause(50 + random() * LIVES[cast])
        await service.kill()
        await submitting
        kills += 1
      }
    }
    await Promise.all(Array.from({ length: INSTANCES[cast] }, livesOfOne))
    const last = await story.start()
    for (const taskId of asked) {
      if (!acknowledged.has(taskId)) expect(await story.submit(last, taskId)).toBe(true)
    }
    console.log(`${asked.size} tasks, ${kills} kills`)
    expect(kills).toBeGreaterThan(3)
    await story.expectAllKept(last, [...asked])
  },
)
