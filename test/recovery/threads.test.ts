import { renameSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { eventually, expectNoWorkers, finalTask, get, startStage } from '../helpers/recovery.ts'

const PRELOADED = new URL('../helpers/dying-thread.ts', import.meta.url).pathname
const TIMEOUT_MS = 60_000
/** sysexits.h: EX_SOFTWARE. */
const EXIT_CODE = 70

describe.concurrent.each(['local-workers', 'sqlite'])('when the %s thread dies', (name) => {
  test(
    'the service ends with one line, and the next one finds every task again',
    async () => {
      await using stage = await startStage()
      const flag = join(stage.gateOf('runs'), '..', 'die')
      const env = {
        NODE_OPTIONS: `--import=${PRELOADED}`,
        DYING_THREAD: `${name}:${flag}`,
        MAX_CONCURRENT_TASKS: '1',
      }
      const service = await stage.start(env)
      await stage.open('runs', 'before')
      await stage.submit(service, 'runs', 'r-story.sh')
      await stage.submit(service, 'waits', 'r-story.sh')
      await stage.made('runs', 'said-before')
      const errors: string[] = []
      service.process.stderr?.on('data', (chunk) => errors.push(String(chunk)))
      writeFileSync(flag, '')
      expect(await service.ended).toBe(EXIT_CODE)
      expect(errors.join('')).toBe(
        `The service ends: the ${name} thread ended: it was told to die\n`,
      )
      rmSync(flag)

      const next = await stage.start(env)
      await stage.open('runs', 'during', 'after')
      await stage.open('waits', 'before', 'during', 'after')
      for (const taskId of ['runs', 'waits']) {
        expect(await finalTask(next, taskId)).toMatchObject({ status: 'succeeded' })
        expect((await stage.callbackOf(taskId)).body.success).toBe(true)
      }
      await expectNoWorkers(next, stage.dataDir)
    },
    TIMEOUT_MS,
  )
})

test(
  'while the thread of local workers hangs, the service is not ready and says so, and then it is',
  async () => {
    await using stage = await startStage()
    const flag = join(stage.gateOf('next'), '..', 'hang')
    const service = await stage.start({
      NODE_OPTIONS: `--import=${PRELOADED}`,
      DYING_THREAD: `local-workers:${flag}`,
    })
    await stage.open('next', 'before', 'during', 'after')
    writeFileSync(`${flag}.part`, 'hang')
    renameSync(`${flag}.part`, flag)
    await eventually(async () => {
      const { status, body } = await get(service, '/health/ready')
      expect([status, body.parts]).toEqual([
        503,
        expect.objectContaining({
          workers: expect.stringContaining('The local workers do not answer'),
        }),
      ])
    })
    rmSync(flag)
    await eventually(async () => expect((await get(service, '/health/ready')).status).toBe(200))
    await stage.submit(service, 'next', 'r-story.sh')
    expect(await finalTask(service, 'next')).toMatchObject({ status: 'succeeded' })
    await expectNoWorkers(service, stage.dataDir)
  },
  TIMEOUT_MS,
)
