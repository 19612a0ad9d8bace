import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync, utimesSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { identify, type ProcessIdentity } from '../../src/workers/local/processes.ts'
import {
  eventually,
  exitAfter,
  expectNoWorkers,
  finalTask,
  get,
  isAlive,
  killIfThere,
  logOf,
  post,
  type Stage,
  startStage,
} from '../helpers/recovery.ts'
import { processesOf, type Service } from '../helpers/service.ts'

const TIMEOUT_MS = 120_000
const LIMIT_SECONDS = 600
const HOUR_MS = 3_600_000

/** Tasks under way when the service goes, each named for what becomes of it. */
const CODES = {
  seven: 7,
  zero: 0,
  away: 7,
  signalled: 'KILL',
  killed: 0,
  orphaned: 0,
  reused: 0,
  rebooted: 0,
  late: 0,
  'in-time': 0,
  blocker: 0,
}

describe.each(['SIGKILL', 'SIGTERM'] as const)(
  'a service that went by %s and came back',
  (signal) => {
    let stage: Stage
    let service: Service
    let innocents: Array<ReturnType<typeof startInnocent>>
    let pidsBefore: number[]

    beforeAll(async () => {
      stage = await startStage()
      innocents = [startInnocent(), startInnocent()]
      const first = await stage.start({ MAX_CONCURRENT_TASKS: String(Object.keys(CODES).length) })
      for (const [taskId, code] of Object.entries(CODES)) {
        await stage.open(taskId, 'before')
        await stage.submit(first, taskId, 'r-story.sh', {
          env: { CODE: String(code) },
          timeout_seconds: LIMIT_SECONDS,
        })
      }
      await stage.submit(first, 'waits', 'r-story.sh')
      for (const taskId of Object.keys(CODES)) {
        await stage.made(taskId, 'said-before')
        await eventually(async () =>
          expect((await get(first, `/tasks/${taskId}`)).body.status).toBe('running'),
        )
      }
      const workers = (await get(first, '/workers')).body.workers as Array<Record<string, string>>
      const folderOf = (taskId: string) => {
        const name = workers.find((worker) => worker.task_id === taskId)?.name
        return join(stage.dataDir, 'workers', String(name))
      }
      pidsBefore = processesOf(stage.dataDir)
      expect(await exitAfter(first, signal)).toBe(signal === 'SIGTERM' ? 0 : 'SIGKILL')

      await stage.open('seven', 'during')
      await stage.open('zero', 'during')
      await stage.made('seven', 'said-during')
      await stage.made('zero', 'said-during')
      for (const taskId of ['away', 'signalled', 'in-time']) {
        await stage.open(taskId, 'during', 'after')
        await eventually(() =>
          expect(readFileSync(join(folderOf(taskId), 'exit'), 'utf8')).toMatch(/^task \d+\n/),
        )
      }
      for (const taskId of ['killed', 'reused', 'rebooted']) await vanish(folderOf(taskId))
      const [other, otherAfterBoot] = innocents
      if (!other || !otherAfterBoot) throw new Error('unreachable')
      const { startedAt } = slotOf(folderOf('reused'))
      setSlot(folderOf('reused'), { pid: other.pid, startedAt })
      const ticks = otherAfterBoot.startedAt.split(' ')[1]
      setSlot(folderOf('rebooted'), {
        pid: otherAfterBoot.pid,
        startedAt: `00000000-0000-4000-8000-000000000000 ${ticks}`,
      })
      await killShell(folderOf('orphaned'))
      // An hour goes by.
      stage.database((db) =>
        db
          .prepare(
            `update tasks set started_at = started_at - ? where task_id in ('late', 'in-time')`,
          )
          .run(HOUR_MS),
      )
      const anHourAgo = (Date.now() - HOUR_MS) / 1000 + 1
      utimesSync(join(folderOf('in-time'), 'exit'), anHourAgo, anHourAgo)
      noteCancel(stage, 'waits')

      service = await stage.start({ MAX_CONCURRENT_TASKS: '1' })
    }, TIMEOUT_MS)

    afterAll(async () => {
      await stage[Symbol.asyncDispose]()
      for (const innocent of innocents) await innocent.end()
    }, TIMEOUT_MS)

    test('ends a task that was cancelled in the queue, though every slot is taken', async () => {
      expect(await finalTask(service, 'waits')).toMatchObject({
        status: 'cancelled',
        started_at: null,
      })
      expect((await stage.callbackOf('waits')).body.success).toBe(false)
      expect((await get(service, '/tasks/blocker')).body.status).toBe('running')
    })

    test('attaches to running tasks: they keep their processes, their whole log and their true exit codes', async () => {
      for (const taskId of ['seven', 'zero'] as const) {
        expect((await get(service, `/tasks/${taskId}`)).body.status).toBe('running')
        expect(await logOf(service, taskId)).toBe('before\nduring\n')
      }
      const kept = processesOf(stage.dataDir).filter((pid) => pidsBefore.includes(pid))
      expect(kept.length, 'the same processes go on').toBeGreaterThanOrEqual(2)
      for (const taskId of ['seven', 'zero'] as const) {
        await stage.open(taskId, 'after')
        const code = CODES[taskId]
        expect(await finalTask(service, taskId)).toMatchObject({
          status: code === 0 ? 'succeeded' : 'failed',
          reason: code === 0 ? 'completed' : 'exit_code',
          exit_code: code,
        })
        const logs = 'before\nduring\nafter\n'
        const { body } = await stage.callbackOf(taskId)
        expect(body).toEqual({
          task_name: 'r-story.sh',
          task_id: taskId,
          success: code === 0,
          logs,
        })
        expect(await logOf(service, taskId)).toBe(logs)
      }
    })

    test('tells the true exit code and the whole log of a task that ended meanwhile', async () => {
      expect(await finalTask(service, 'away')).toMatchObject({
        status: 'failed',
        reason: 'exit_code',
        exit_code: 7,
      })
      const { body } = await stage.callbackOf('away')
      expect(body).toMatchObject({ success: false, logs: 'before\nduring\nafter\n' })
    })

    test('tells by which signal a task was killed meanwhile', async () => {
      expect(await finalTask(service, 'signalled')).toMatchObject({
        status: 'failed',
        reason: 'signal',
        signal: 'SIGKILL',
        exit_code: 137,
      })
      expect((await stage.callbackOf('signalled')).body.success).toBe(false)
    })

    test.each([
      ['whose worker was killed', 'killed'],
      ['whose slot shell alone was killed', 'orphaned'],
      ['whose process id is in use by another process', 'reused'],
      ['from before the machine was started anew', 'rebooted'],
    ])('calls back success=false and worker_lost for a task %s', async (_, taskId) => {
      expect(await finalTask(service, taskId)).toMatchObject({
        status: 'failed',
        reason: 'worker_lost',
        exit_code: null,
      })
      const { body } = await stage.callbackOf(taskId)
      // What it logged while it lived is not lost with it.
      expect(body).toEqual({
        task_name: 'r-story.sh',
        task_id: taskId,
        success: false,
        // Its own shell may have had time for a word about a child that was killed first.
        logs: expect.stringMatching(/^before\n/),
      })
    })

    test('leaves other processes alone that have the ids of lost ones', async () => {
      for (const taskId of ['reused', 'rebooted']) {
        const { worker_name } = await finalTask(service, taskId)
        await eventually(async () =>
          expect((await get(service, `/workers/${worker_name}`)).status).toBe(404),
        )
      }
      for (const { pid } of innocents) expect(isAlive(pid)).toBe(true)
    })

    test('ends a task soon whose time limit passed meanwhile', async () => {
      expect(await finalTask(service, 'late')).toMatchObject({
        status: 'failed',
        reason: 'timed_out',
      })
      const { body } = await stage.callbackOf('late')
      // Its shell may add that it was terminated.
      expect(body).toMatchObject({ success: false, logs: expect.stringMatching(/^before\n/) })
    })

    test('tells the success of a task that ended before its time limit passed', async () => {
      expect(await finalTask(service, 'in-time')).toMatchObject({
        status: 'succeeded',
        reason: 'completed',
        exit_code: 0,
      })
      expect((await stage.callbackOf('in-time')).body.success).toBe(true)
    })

    test('runs what comes next once there is a slot, and leaves no worker behind', async () => {
      await stage.open('next', 'before', 'during', 'after')
      await stage.submit(service, 'next', 'r-story.sh')
      await stage.open('blocker', 'during', 'after')
      expect(await finalTask(service, 'blocker')).toMatchObject({ status: 'succeeded' })
      expect(await finalTask(service, 'next')).toMatchObject({ status: 'succeeded' })
      await expectNoWorkers(service, stage.dataDir)
    })
  },
)

describe('a cancel that had not taken effect when the service was killed', () => {
  test(
    'ends a task that does not heed TERM',
    async () => {
      await using stage = await startStage()
      const first = await stage.start({ TERMINATION_GRACE_SECONDS: '60' })
      await stage.submit(first, 'deaf', 'r-deaf.sh')
      await stage.made('deaf', 'started')
      await eventually(async () =>
        expect((await get(first, '/tasks/deaf')).body.status).toBe('running'),
      )
      const cancelled = await post(first, '/tasks/deaf/cancel')
      expect(cancelled).toMatchObject({ status: 200, body: { status: 'running' } })
      await first.kill()
      expect(processesOf(stage.dataDir), 'it had not taken effect').not.toEqual([])

      const second = await stage.start({ TERMINATION_GRACE_SECONDS: '1' })
      expect(await finalTask(second, 'deaf')).toMatchObject({
        status: 'cancelled',
        reason: 'cancelled',
      })
      const { body } = await stage.callbackOf('deaf')
      expect(body).toMatchObject({
        success: false,
        // What was killed is named, unless the task's shell was quicker to end it.
        logs: expect.stringMatching(
          /^deaf\n(\[task-runner\] Ended .* still running: .*\n)?\[task-runner\] Cancelled on request\n$/,
        ),
      })
      await expectNoWorkers(second, stage.dataDir)
    },
    TIMEOUT_MS,
  )

  test(
    'ends a task whose worker had just been made, and keeps what it logged',
    async () => {
      await using stage = await startStage()
      await stage.open('fresh', 'before')
      const first = await stage.start({ KILL_AT: 'provisioned' })
      await stage.submit(first, 'fresh', 'r-story.sh').catch(() => {})
      expect(await first.ended).toBe('SIGKILL')
      await stage.made('fresh', 'said-before')
      noteCancel(stage, 'fresh')

      const second = await stage.start()
      expect(await finalTask(second, 'fresh')).toMatchObject({ status: 'cancelled' })
      await expectNoWorkers(second, stage.dataDir)
      const { body } = await stage.callbackOf('fresh')
      // Its shell may add that it was terminated.
      expect(body).toMatchObject({ success: false, logs: expect.stringMatching(/^before\n/) })
    },
    TIMEOUT_MS,
  )
})

/** The moment between noting a cancel and heeding it is too short to hit: the note is written here. */
function noteCancel(stage: Stage, taskId: string): void {
  const noted = stage.database((db) =>
    db
      .prepare('update tasks set cancel_requested_at = ? where task_id = ?')
      .run(Date.now(), taskId),
  )
  expect(noted.changes).toBe(1)
}

function slotOf(folder: string): ProcessIdentity {
  return JSON.parse(readFileSync(join(folder, 'worker.json'), 'utf8')).slot
}

function setSlot(folder: string, slot: ProcessIdentity): void {
  const path = join(folder, 'worker.json')
  writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, 'utf8')), slot }))
}

async function killShell(folder: string): Promise<void> {
  const { pid } = slotOf(folder)
  process.kill(pid, 'SIGKILL')
  await eventually(() => expect(isAlive(pid)).toBe(false))
}

/** Ends the slot shell and everything of the task, as a crash of the machine would. */
async function vanish(folder: string): Promise<void> {
  await killShell(folder)
  await eventually(() => {
    const left = processesOf(folder.replace(/\/workers\/[^/]+$/, '')).filter((pid) =>
      readFileSync(`/proc/${pid}/environ`, 'latin1').includes(`HOME=${folder}/`),
    )
    for (const pid of left) killIfThere(pid)
    expect(left).toEqual([])
  })
}

/** A process that has nothing to do with us, in a group of its own as slot shells are. */
function startInnocent() {
  const child = spawn('sleep', ['300'], { detached: true, stdio: 'ignore' })
  const identity = identify(Number(child.pid))
  if (!identity) throw new Error('sleep did not start')
  return {
    ...identity,
    async end() {
      if (child.exitCode !== null || child.signalCode !== null) return
      const ended = once(child, 'exit')
      child.kill('SIGKILL')
      await ended
    },
  }
}
