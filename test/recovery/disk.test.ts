import { cpSync, existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { describe, expect, test } from 'vitest'
import {
  eventually,
  exitAfter,
  expectNoWorkers,
  finalTask,
  get,
  post,
  type Stage,
  startStage,
} from '../helpers/recovery.ts'
import type { Service } from '../helpers/service.ts'
import { mountSmallDisk } from '../helpers/small-disk.ts'

const TIMEOUT_MS = 90_000

/** A service that is not to start: it ends with 1, and says why where a person looks. */
async function expectRefusal(stage: Stage, message: RegExp): Promise<void> {
  const service = await stage.start()
  expect(service.url, 'it listens').toBe('')
  expect(await service.ended).toBe(1)
  await eventually(() => expect(service.log.join('\n')).toMatch(message))
  const text = service.log.join('\n')
  expect(text).toMatch(/^The service cannot start: /m)
  expect(text, 'a message, not a stack').not.toMatch(/^\s+at /m)
}

describe.concurrent('on a full disk', () => {
  test(
    'a task is refused with 503 or is on disk, and with space again the same process takes and runs tasks',
    async (context) => {
      await using disk = mountSmallDisk(context, 'size=12m')
      const dataDir = join(disk.folder, 'data')
      await using stage = await startStage({ dataDir, env: { MAX_CONCURRENT_TASKS: '1' } })
      const service = await stage.start()
      await stage.open('blocker', 'before')
      await stage.submit(service, 'blocker', 'r-story.sh')
      await stage.made('blocker', 'said-before')
      await eventually(async () =>
        expect((await get(service, '/tasks/blocker')).body.status).toBe('running'),
      )

      disk.fill()
      const accepted: string[] = []
      const refused: string[] = []
      // What the log file has room for is taken; 100 KB each soon use it up.
      for (let index = 0; refused.length < 5; index += 1) {
        expect(index, 'tasks taken on a full disk').toBeLessThan(500)
        const taskId = `full-${index}`
        await stage.open(taskId, 'before', 'during', 'after')
        const request = stage.request(taskId, 'r-story.sh', { env: { PAD: 'x'.repeat(100_000) } })
        const { status, body } = await post(service, '/task-runner', request)
        expect([200, 503]).toContain(status)
        if (status === 200) accepted.push(taskId)
        else {
          expect(body).toEqual({
            success: false,
            code: expect.stringMatching(/^[a-z_]+$/),
            message: expect.any(String),
          })
          refused.push(taskId)
        }
      }
      for (const taskId of refused) {
        expect((await get(service, `/tasks/${taskId}`)).status).toBe(404)
      }
      // The files as a crash would leave them now.
      const copy = join(stage.gateOf('blocker'), '..', 'copy')
      cpSync(dataDir, copy, { recursive: true, filter: (path) => !path.includes('/workers') })
      const db = new DatabaseSync(join(copy, 'task-runner.db'))
      const stored = db.prepare('select task_id from tasks order by seq').all()
      db.close()
      expect(stored.map((row) => row.task_id)).toEqual(['blocker', ...accepted])

      disk.free()
      for (const taskId of refused) await stage.submit(service, taskId, 'r-story.sh')
      await stage.open('blocker', 'during', 'after')
      for (const taskId of ['blocker', ...accepted, ...refused]) {
        expect(await finalTask(service, taskId)).toMatchObject({ status: 'succeeded' })
        expect((await stage.callbackOf(taskId)).body.success).toBe(true)
      }
      await expectNoWorkers(service, dataDir)
      expect(await exitAfter(service, 'SIGTERM')).toBe(0)
    },
    TIMEOUT_MS,
  )

  test(
    'a task that ends keeps its outcome: it is committed and called back once there is space again',
    async (context) => {
      await using disk = mountSmallDisk(context, 'size=24m')
      const dataDir = join(disk.folder, 'data')
      await using stage = await startStage({ dataDir })
      const service = await stage.start()
      await stage.submit(service, 'noise', 'r-noise.sh')
      await stage.made('noise', 'started')
      await eventually(async () =>
        expect((await get(service, '/tasks/noise')).body.status).toBe('running'),
      )
      disk.fill()
      await stage.open('noise', 'open')
      await eventually(() =>
        expect(service.log.join('\n')).toContain('committing an outcome failed'),
      )
      expect((await get(service, '/tasks/noise')).body.status).toBe('running')
      expect(stage.receiver.received).toEqual([])

      disk.free()
      const { body } = await stage.callbackOf('noise')
      expect(body.logs.length).toBeGreaterThan(4_000_000)
      expect(await finalTask(service, 'noise')).toMatchObject({
        status: 'succeeded',
        reason: 'completed',
        exit_code: 0,
      })
      expect(body.success).toBe(true)
      await expectNoWorkers(service, dataDir)
    },
    TIMEOUT_MS,
  )

  test.for(['file', 'other', 'log'])(
    'a task that filled it (by a %s) ends with its true outcome by itself, and the next one runs',
    { timeout: TIMEOUT_MS },
    async (fill, context) => {
      await using disk = mountSmallDisk(context, 'size=24m')
      const dataDir = join(disk.folder, 'data')
      await using stage = await startStage({ dataDir, env: { MAX_LOG_MB: '64' } })
      const service = await stage.start()
      await stage.submit(service, 'fill', 'r-fill.sh', { env: { FILL: fill } })
      expect(await finalTask(service, 'fill')).toMatchObject(
        // Its log does not fail for want of space: what there is none for counts, and is thrown away.
        fill === 'log' ? { reason: 'log_limit' } : { reason: 'exit_code', exit_code: 4 },
      )
      const { body } = await stage.callbackOf('fill')
      if (fill === 'log') expect(body.logs.length).toBeGreaterThan(4_000_000)
      await stage.open('next', 'before', 'during', 'after')
      await eventually(() => stage.submit(service, 'next', 'r-story.sh'))
      expect(await finalTask(service, 'next')).toMatchObject({ status: 'succeeded' })
      await expectNoWorkers(service, dataDir)
    },
  )

  test(
    'a task that filled it before the service was killed ends with its true outcome after the restart',
    async (context) => {
      await using disk = mountSmallDisk(context, 'size=24m')
      const dataDir = join(disk.folder, 'data')
      await using stage = await startStage({ dataDir })
      const service = await stage.start()
      await stage.submit(service, 'fill', 'r-fill-late.sh')
      await stage.made('fill', 'started')
      await eventually(async () =>
        expect((await get(service, '/tasks/fill')).body.status).toBe('running'),
      )
      await service.kill()
      await stage.open('fill', 'go')
      await stage.made('fill', 'filled')
      const next = await stage.start()
      expect(await finalTask(next, 'fill')).toMatchObject({ reason: 'exit_code', exit_code: 4 })
      await expectNoWorkers(next, dataDir)
    },
    TIMEOUT_MS,
  )

  test.for([
    // Enough to begin with a worker's folder, not to finish it.
    {
      folder: 'a new folder',
      warmUps: [],
      inodesLeft: 3,
      taskIds: ['no-room-1', 'no-room-2', 'no-room-3'],
    },
    // What is thrown away then makes room for the next one.
    { folder: 'a used folder', warmUps: ['warm-up'], inodesLeft: 0, taskIds: ['no-room-1'] },
  ])(
    'tasks whose worker cannot be made in $folder wait, and run once there is room',
    { timeout: TIMEOUT_MS },
    async ({ warmUps, inodesLeft, taskIds }, context) => {
      await using disk = mountSmallDisk(context, 'size=32m,nr_inodes=400')
      const dataDir = join(disk.folder, 'data')
      await using stage = await startStage({ dataDir, env: { MAX_CONCURRENT_TASKS: '2' } })
      const service = await stage.start()
      for (const taskId of warmUps) {
        await stage.open(taskId, 'before', 'during', 'after')
        await stage.submit(service, taskId, 'r-story.sh')
        await finalTask(service, taskId)
      }
      await expectNoWorkers(service, dataDir)

      disk.fillInodes(inodesLeft)
      for (const taskId of taskIds) {
        await stage.open(taskId, 'before', 'during', 'after')
        await stage.submit(service, taskId, 'r-story.sh')
      }
      await eventually(() =>
        expect(service.log.join('\n')).toMatch(/The workers' disk is full \(ENOSPC\)/),
      )
      for (const taskId of taskIds) {
        const { body } = await get(service, `/tasks/${taskId}`)
        expect(['queued', 'provisioning']).toContain(body.status)
      }
      await expectNoWorkers(service, dataDir)

      disk.free()
      for (const taskId of taskIds) {
        expect(await finalTask(service, taskId)).toMatchObject({ status: 'succeeded' })
        expect((await stage.callbackOf(taskId)).body.success).toBe(true)
      }
      await expectNoWorkers(service, dataDir)
    },
  )
})

describe.concurrent('a service does not start, and says why,', () => {
  test(
    'on a new data folder that is read-only',
    async (context) => {
      await using disk = mountSmallDisk(context, 'size=4m')
      await using stage = await startStage({ dataDir: disk.folder })
      disk.remount('ro')
      await expectRefusal(stage, /read-only/)
    },
    TIMEOUT_MS,
  )

  test(
    'on a used data folder that became read-only',
    async (context) => {
      await using disk = mountSmallDisk(context, 'size=16m')
      await using stage = await startStage({ dataDir: disk.folder })
      expect(await exitAfter(await stage.start(), 'SIGTERM')).toBe(0)
      disk.remount('ro')
      await expectRefusal(stage, /read-?only/)
    },
    TIMEOUT_MS,
  )

  test(
    'where DATA_DIR is a file, which stays as it is',
    async () => {
      await using home = await startStage()
      await mkdir(home.dataDir)
      const dataDir = join(home.dataDir, 'file')
      await writeFile(dataDir, 'not a folder')
      await using stage = await startStage({ dataDir })
      await expectRefusal(stage, new RegExp(dataDir))
      expect(readFileSync(dataDir, 'utf8')).toBe('not a folder')
    },
    TIMEOUT_MS,
  )

  test(
    'on a data folder that another service uses, which goes on unharmed',
    async () => {
      await using stage = await startStage()
      const first = await stage.start()
      await stage.open('under-way', 'before')
      await stage.submit(first, 'under-way', 'r-story.sh')
      await stage.made('under-way', 'said-before')
      await expectRefusal(stage, /database is locked|in use|another (service|process)/)
      expect(readdirSync(join(stage.dataDir, 'workers')).length).toBe(1)
      await stage.open('under-way', 'during', 'after')
      expect(await finalTask(first, 'under-way')).toMatchObject({ status: 'succeeded' })
      await stage.open('next', 'before', 'during', 'after')
      await stage.submit(first, 'next', 'r-story.sh')
      expect(await finalTask(first, 'next')).toMatchObject({ status: 'succeeded' })
    },
    TIMEOUT_MS,
  )

  test(
    'on a database whose header is garbage, and never replaces it',
    async () => {
      await using stage = await startStage()
      const path = await madeDatabase(stage)
      const bytes = readFileSync(path)
      bytes.fill('garbage!', 0, 512)
      writeFileSync(path, bytes)
      await expectRefusal(stage, /not a database|malformed|damaged/)
      expect(readFileSync(path).equals(bytes)).toBe(true)
    },
    TIMEOUT_MS,
  )
})

test(
  'a database with garbage in its middle is a refusal to start or a 503, never a wrong answer, and is never replaced',
  async () => {
    await using stage = await startStage()
    const path = await madeDatabase(stage)
    const bytes = readFileSync(path)
    const pageBytes = 4096
    expect(bytes.length).toBeGreaterThan(10 * pageBytes)
    // All but the first page, which holds the schema.
    bytes.fill('garbage!', pageBytes)
    writeFileSync(path, bytes)
    const { ino } = statSync(path)
    const service = await stage.start()
    if (service.url === '') {
      expect(await service.ended).toBe(1)
      await eventually(() => expect(service.log.join('\n')).toMatch(/malformed|damaged/))
    } else {
      await expectHonest(service, stage)
      await service.kill()
    }
    expect(statSync(path).ino).toBe(ino)
    expect(readFileSync(path).equals(bytes)).toBe(true)
  },
  TIMEOUT_MS,
)

async function expectHonest(service: Service, stage: Stage): Promise<void> {
  for (const request of [
    get(service, '/tasks'),
    get(service, '/tasks/task-0'),
    get(service, '/health/ready'),
    post(service, '/task-runner', stage.request('new', 'r-story.sh')),
  ]) {
    const { status, body } = await request
    expect(status).toBe(503)
    expect(body).toMatchObject({ success: false })
  }
  expect((await get(service, '/health/live')).status).toBe(200)
}

/** The database of a service that has run and ended. */
async function madeDatabase(stage: Stage): Promise<string> {
  const service = await stage.start({ MAX_CONCURRENT_TASKS: '8' })
  const taskIds = Array.from({ length: 8 }, (_, index) => `task-${index}`)
  for (const taskId of taskIds) {
    await stage.open(taskId, 'before', 'during', 'after')
    await stage.submit(service, taskId, 'r-story.sh', { env: { PAD: 'x'.repeat(20_000) } })
  }
  for (const taskId of taskIds) await finalTask(service, taskId)
  expect(await exitAfter(service, 'SIGTERM')).toBe(0)
  const path = join(stage.dataDir, 'task-runner.db')
  expect(existsSync(`${path}-wal`), 'all of it is in the one file').toBe(false)
  return path
}
