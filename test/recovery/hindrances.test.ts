import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { eventually, get, post, type Stage, startStage } from '../helpers/recovery.ts'
import type { Service } from '../helpers/service.ts'
import { mountSmallDisk } from '../helpers/small-disk.ts'

const TASKS = 500
/** Of a user without rights. */
const UID = 4242
const TIMEOUT_MS = 180_000

/** A folder with a task that is over at once, and one that waits for its gate. */
async function tasksFolder() {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-hindrances-'))
  const tasks = join(folder, 'tasks')
  execFileSync('mkdir', [tasks])
  await writeFile(join(tasks, 'hi.sh'), 'echo hi\n')
  await writeFile(join(tasks, 'blocker.sh'), 'until [ -e "$GATE/open" ]; do sleep 0.05; done\n')
  return { folder, tasks, [Symbol.asyncDispose]: () => rm(folder, { recursive: true }) }
}

const ids = Array.from({ length: TASKS }, (_, index) => `waiting-${index}`)

/** One task runs, and all others wait for it. */
async function queuedBehindBlocker(stage: Stage, service: Service): Promise<void> {
  await stage.submit(service, 'blocker', 'blocker.sh')
  await eventually(async () =>
    expect((await get(service, '/tasks/blocker')).body.status).toBe('running'),
  )
  for (const taskId of ids) {
    const { status } = await post(service, '/task-runner', stage.request(taskId, 'hi.sh'))
    expect(status).toBe(200)
  }
}

function hardLimitOfProcesses(): string {
  const [, hard = ''] =
    /^Max processes +\S+ +(\S+)/m.exec(readFileSync('/proc/self/limits', 'utf8')) ?? []
  return hard
}

async function isWaiting(service: Service, words: RegExp): Promise<void> {
  await eventually(async () => {
    const { body } = await get(service, `/tasks/${ids[0]}`)
    expect(body.waiting_for).toMatch(words)
  })
  const { body } = await get(service, '/tasks?limit=500')
  const tasks = body.tasks as Array<Record<string, unknown>>
  const others = tasks.filter(({ task_id }) => task_id !== 'blocker')
  expect(new Set(others.map(({ status }) => status))).not.toContain('failed')
  for (const task of others) expect(task.waiting_for).toMatch(words)
  const { status, body: ready } = await get(service, '/health/ready')
  expect(`${status} ${JSON.stringify(ready)}`).toMatch(words)
}

async function allSucceed(stage: Stage, service: Service): Promise<void> {
  await eventually(async () => {
    const { body } = await get(service, '/tasks?status=succeeded&limit=500')
    expect(body.tasks).toHaveLength(500)
  }, TIMEOUT_MS / 2)
  for (const status of ['failed', 'cancelled']) {
    expect((await get(service, `/tasks?status=${status}`)).body.tasks).toEqual([])
  }
  await eventually(() => {
    const told = stage.receiver.received.filter(({ body }) => body.success === true)
    expect(new Set(told.map(({ body }) => body.task_id)).size).toBe(TASKS + 1)
  })
  const { body } = await get(service, `/tasks/${ids[0]}`)
  expect(body.waiting_for).toBeNull()
}

describe('500 waiting tasks outlast', () => {
  test(
    'a tasks folder that is away',
    async () => {
      await using files = await tasksFolder()
      const env = { TASKS_DIR: files.tasks, MAX_CONCURRENT_TASKS: '1' }
      await using stage = await startStage({ env })
      const service = await stage.start()
      await queuedBehindBlocker(stage, service)
      await rename(files.tasks, `${files.tasks}.away`)
      await stage.open('blocker', 'open')
      await isWaiting(service, /tasks folder cannot be read/)
      await rename(`${files.tasks}.away`, files.tasks)
      await allSucceed(stage, service)
    },
    TIMEOUT_MS,
  )

  test(
    'a disk without room for files',
    async (context) => {
      await using files = await tasksFolder()
      await using disk = mountSmallDisk(context, 'size=64m,nr_inodes=2000')
      const env = { TASKS_DIR: files.tasks, MAX_CONCURRENT_TASKS: '1' }
      await using stage = await startStage({ dataDir: join(disk.folder, 'data'), env })
      const service = await stage.start()
      await queuedBehindBlocker(stage, service)
      disk.fillInodes(0)
      await stage.open('blocker', 'open')
      await isWaiting(service, /ENOSPC/)
      disk.free()
      await allSucceed(stage, service)
    },
    TIMEOUT_MS,
  )

  test(
    'too few processes, and a restart amid them',
    async (context) => {
      await using files = await tasksFolder()
      const folder = await mkdtemp(join(tmpdir(), 'task-runner-hindrances-'))
      try {
        execFileSync('chown', ['-R', `${UID}`, folder, files.folder])
      } catch (err) {
        if (process.env.CI) throw err
        context.skip('needs root')
      }
      execFileSync('chmod', ['755', folder, files.folder])
      const env = { TASKS_DIR: files.tasks, MAX_CONCURRENT_TASKS: '1' }
      await using stage = await startStage({ dataDir: join(folder, 'data'), env, uid: UID })
      const service = await stage.start()
      await queuedBehindBlocker(stage, service)
      await service.kill()
      const again = await stage.start()
      const limitProcesses = (most: string) => {
        const args = ['--pid', `${again.process.pid}`, `--nproc=${most}:`]
        execFileSync('prlimit', args, { uid: UID, gid: UID })
      }
      // What runs already goes on; what comes is refused.
      limitProcesses('1')
      await stage.open('blocker', 'open')
      await isWaiting(again, /process could be started/)
      limitProcesses(hardLimitOfProcesses())
      await allSucceed(stage, again)
    },
    TIMEOUT_MS,
  )
})
