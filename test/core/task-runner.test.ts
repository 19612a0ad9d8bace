import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { CallbackDispatcher } from '../../src/core/callbacks.ts'
import { StoreFullError, UnavailableError } from '../../src/core/errors.ts'
import { Masker } from '../../src/core/masking.ts'
import {
  type AttemptResult,
  type CallbackSender,
  type Cluster,
  type Completion,
  type Logger,
  type NewTask,
  type TaskStore,
  type Worker,
  type WorkerBackend,
  WorkerError,
  type WorkerSpec,
} from '../../src/core/ports.ts'
import { isFinal, type Task } from '../../src/core/task.ts'
import { TaskQueue } from '../../src/core/task-queue.ts'
import { LOG_BYTES_KEPT, TaskRunner } from '../../src/core/task-runner.ts'
import { WorkerSetup } from '../../src/core/worker-setup.ts'
import { DEFAULT_WORKER_SIZES } from '../../src/core/worker-sizes.ts'
import { Sealer } from '../../src/secrets/sealing.ts'
import type { Connection } from '../../src/store/connection.ts'
import { SqlDeliveryStore } from '../../src/store/delivery-store.ts'
import { openSqlite } from '../../src/store/sqlite.ts'
import { SqlTaskStore } from '../../src/store/task-store.ts'

const SILENT: Logger = { debug() {}, info() {}, warn() {}, error() {} }
const DONE: Completion = { reason: 'completed', exitCode: 0, signal: null, message: null }
const FAILED: Completion = { ...DONE, reason: 'exit_code', exitCode: 3, message: 'Exit code 3' }
const CALLBACK = 'https://receiver.example/hook'
const PROVISIONING_MS = 150
const WAIT = { timeout: 10_000, interval: 5 }

/** What happened, in order, as the ports saw it. */
let events: string[]

/** A worker whose task the test ends. Outlives the runner, as a real one does. */
class ScriptedWorker implements Worker {
  readonly backend = 'scripted'
  readonly image = null
  readonly size = null
  readonly createdAt = 1
  readonly name: string
  readonly taskId: string
  readonly ended = Promise.withResolvers<Completion>()
  log = 'a log\n'
  terminateFailures = 0
  stops = 0
  readonly #gone: () => void

  constructor(spec: WorkerSpec, gone: () => void) {
    this.name = spec.name
    this.taskId = spec.taskId
    this.#gone = gone
  }

  async status() {
    return 'Running' as const
  }

  /** What it left may still write into its log. */
  hasEndedItself = false
  async hasEnded() {
    // Asked at the limit: soon after it nothing is left.
    if (this.hasEndedItself) this.ended.resolve({ ...DONE, reason: 'exit_code', exitCode: 3 })
    return this.hasEndedItself
  }

  /** Fails what waits for the completion at the moment. */
  interrupt: () => void = () => {}

  completion(signal: AbortSignal): Promise<Completion> {
    return new Promise((resolve, reject) => {
      this.interrupt = () => reject(new Error('interrupted'))
      void this.ended.promise.then(resolve)
      if (signal.aborted) reject(signal.reason)
      signal.addEventListener('abort', () => reject(signal.reason))
    })
  }

  async stop(): Promise<void> {
    this.stops += 1
    events.push('stop')
    this.ended.resolve({ ...DONE, reason: 'signal', exitCode: 143, signal: 'SIGTERM' })
  }

  async logs() {
    events.push('log')
    const content = Buffer.from(this.log)
    return { content, totalBytes: content.length }
  }

  async *follow(): AsyncIterable<Buffer> {}

  async terminate(): Promise<void> {
    events.push('terminate')
    if (this.terminateFailures > 0) {
      this.terminateFailures -= 1
      throw new Error('cannot be ended')
    }
    this.#gone()
  }
}

class ScriptedBackend implements WorkerBackend {
  readonly name = 'scripted'
  readonly workers = new Map<string, ScriptedWorker>()
  readonly specs: WorkerSpec[] = []
  /** Stands in front of each provisioning. */
  before: (signal: AbortSignal, spec: WorkerSpec) => Promise<void> = async () => {}
  /** Hinders all workers. */
  problem: UnavailableError | undefined
  checks = 0
  /** How new workers' tasks end at once; undefined: the test ends them. */
  ending: Completion | undefined

  async provision(spec: WorkerSpec, signal: AbortSignal): Promise<Worker> {
    this.specs.push(spec)
    await this.before(signal, spec)
    if (this.problem) throw this.problem
    const worker = this.workers.get(spec.name) ?? this.make(spec)
    if (this.ending) worker.ended.resolve(this.ending)
    return worker
  }

  make(spec: WorkerSpec): ScriptedWorker {
    const worker = new ScriptedWorker(spec, () => this.workers.delete(spec.name))
    this.workers.set(spec.name, worker)
    return worker
  }

  async find(name: string): Promise<Worker | undefined> {
    return this.workers.get(name)
  }

  async list(): Promise<Worker[]> {
    return [...this.workers.values()]
  }

  async check(): Promise<void> {
    this.checks += 1
    if (this.problem) throw this.problem
  }

  async close(): Promise<void> {}
}

/** Rejects when the signal aborts, as a backend does that takes its time. */
const untilAborted = (signal: AbortSignal) =>
  new Promise<never>((_, reject) => {
    if (signal.aborted) reject(signal.reason)
    signal.addEventListener('abort', () => reject(signal.reason))
  })

class FakeSender implements CallbackSender {
  readonly sent: Array<Parameters<CallbackSender['send']>[0]> = []
  answer: () => Promise<AttemptResult> = async () => ({
    ...{ statusCode: 200, error: null, retryAfterMs: null },
  })

  send(request: Parameters<CallbackSender['send']>[0]): Promise<AttemptResult> {
    events.push('attempt')
    this.sent.push(request)
    return this.answer()
  }

  async close(): Promise<void> {}
}

describe('TaskRunner', () => {
  let folder: string
  let connection: Connection
  let store: SqlTaskStore
  let deliveries: SqlDeliveryStore
  let backend: ScriptedBackend
  let sender: FakeSender
  const opened: Array<{ close: () => Promise<void> }> = []

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'task-runner-unit-'))
    connection = await openSqlite(join(folder, 'test.db'))
    store = new SqlTaskStore(connection, new Sealer(Buffer.alloc(32)), { instance: 'here' })
    deliveries = new SqlDeliveryStore(connection, store)
  })
  beforeEach(async () => {
    events = []
    backend = new ScriptedBackend()
    sender = new FakeSender()
    for (const table of ['delivery_attempts', 'deliveries', 'task_logs', 'tasks'] as const) {
      await connection.db.deleteFrom(table).execute()
    }
  })
  afterEach(async () => {
    for (const each of opened.splice(0)) await each.close()
  })
  afterAll(async () => {
    await connection.close()
    await rm(folder, { recursive: true, force: true })
  })

  function open(
    overrides: Partial<TaskStore> = {},
    concurrency = 4,
    cluster?: Cluster,
    { hopelessMs, length = 0 }: { hopelessMs?: number; length?: number } = {},
  ) {
    // Methods of the store, each replaceable by the test.
    const tasks = new Proxy<TaskStore>(store, {
      get(target, name) {
        const method = overrides[name as keyof TaskStore] ?? target[name as keyof TaskStore]
        return async (...args: never[]) => {
          const answer = await (method as (...args: never[]) => unknown).apply(target, args)
          if (name === 'finish') events.push(answer ? 'commit' : 'second')
          return answer
        }
      },
    })
    const queue = new TaskQueue({
      ...{ store: tasks, concurrency, length, queuedMax: 1_000, now: Date.now, log: SILENT },
    })
    const callbacks = new CallbackDispatcher({
      store: deliveries,
      sender,
      schedule: { delaysMs: [60_000], random: () => 0.5 },
      attemptTimeoutMs: 1_000,
      now: Date.now,
      log: SILENT,
    })
    const runner = new TaskRunner({
      store: tasks,
      queue,
      backend,
      callbacks,
      cluster,
      provisioningTimeoutMs: PROVISIONING_MS,
      ...(hopelessMs === undefined ? {} : { hopelessMs }),
      setup: new WorkerSetup({
        secrets: { read: async () => undefined },
        gitHosts: { refusal: () => undefined, addresses: async () => [] },
        files: { has: async () => true },
        sizes: DEFAULT_WORKER_SIZES,
        maxLogBytes: 1_000_000,
      }),
      onProvisioningFailed: async () => void events.push('clean up'),
      maskerFor: (task) => new Masker([task.callbackUrlToken]),
      now: Date.now,
      log: SILENT,
    })
    let isClosed = false
    const close = async () => {
      if (isClosed) return
      isClosed = true
      await Promise.all([runner.close(), callbacks.close(0)])
    }
    opened.push({ close })
    return { runner, queue, close }
  }

  let ids = 0

  async function stored(overrides: Partial<NewTask> = {}): Promise<NewTask> {
    ids += 1
    const task: NewTask = {
      ...{ taskId: `task ${ids}`, taskFileName: 'a.sh', workerConfig: {}, callbackUrl: CALLBACK },
      ...{ callbackUrlToken: null, terminateOnCompletion: true, timeoutSeconds: 1_000 },
      ...{ digest: '', workerName: `worker-${ids}`, createdAt: 1, priority: 0, traceparent: null },
      ...overrides,
    }
    expect(await store.insert(task)).toBe(true)
    return task
  }

  async function started(
    overrides: Partial<NewTask> = {},
    storeOverrides: Partial<TaskStore> = {},
  ) {
    const task = await stored(overrides)
    const service = open(storeOverrides)
    await service.runner.start()
    return { task, ...service }
  }

  async function workerOf(task: { workerName: string }): Promise<ScriptedWorker> {
    await expect.poll(() => backend.workers.get(task.workerName), WAIT).toBeDefined()
    // Holds: it was just seen.
    return backend.workers.get(task.workerName) as ScriptedWorker
  }

  async function isIn(task: { taskId: string }, status: string): Promise<Task> {
    await expect.poll(async () => (await store.get(task.taskId))?.status, WAIT).toBe(status)
    // Holds: it was just seen.
    return (await store.get(task.taskId)) as Task
  }

  async function finalOf(task: { taskId: string }): Promise<Task> {
    await expect
      .poll(async () => isFinal((await store.get(task.taskId))?.status ?? 'queued'), WAIT)
      .toBe(true)
    // Holds: it was just seen.
    return (await store.get(task.taskId)) as Task
  }

  const keptLog = async (task: { taskId: string }) =>
    (await store.log(task.taskId))?.content.toString()
  const workerGone = (task: { workerName: string }) =>
    expect.poll(() => backend.workers.has(task.workerName), WAIT).toBe(false)
  const delivered = (task: { taskId: string }) =>
    expect.poll(async () => (await deliveries.state(task.taskId))?.status, WAIT).toBe('delivered')

  describe('the story of a run', () => {
    test('the worker gets what the task asked for', async () => {
      const { task } = await started({
        taskFileName: 'b.py',
        workerConfig: {
          ...{ envVariables: { MINE: '1', TASK_ID: 'forged' }, startupScript: 'echo' },
          ...{ workerImage: 'image', workerSize: 'Small', withoutEffect: ['email'] },
        },
      })
      await workerOf(task)
      expect(backend.specs).toEqual([
        {
          ...{ name: task.workerName, taskId: task.taskId, taskFileName: 'b.py' },
          environment: {
            MINE: '1',
            TASK_ID: task.taskId,
            TASK_FILE_NAME: 'b.py',
            WORKER_NAME: task.workerName,
          },
          ...{ taskFolder: 'tasks', repositories: [] },
          ...{ startupScript: 'echo', image: 'image', size: 'Small', maxLogBytes: 1_000_000 },
          ...{ resources: DEFAULT_WORKER_SIZES.Small, keepAfterwards: false },
          ...{ imageConfig: undefined, timeoutSeconds: task.timeoutSeconds },
          notes: ['email has no effect here'],
        },
      ])
    })

    test('its end has an order: log, commit, first attempt, termination', async () => {
      const { task } = await started()
      const worker = await workerOf(task)
      await isIn(task, 'running')
      worker.ended.resolve(DONE)
      await workerGone(task)
      expect(events).toEqual(['log', 'commit', 'attempt', 'terminate'])
      expect(await store.get(task.taskId)).toMatchObject({
        ...{ status: 'succeeded', reason: 'completed', exitCode: 0, claim: 1 },
        ...{ startedAt: expect.any(Number), finishedAt: expect.any(Number), logBytes: 6 },
      })
      expect((await store.log(task.taskId))?.content.toString()).toBe('a log\n')
      expect(sender.sent).toMatchObject([
        {
          url: CALLBACK,
          payload: { taskName: 'a.sh', taskId: task.taskId, success: true },
        },
      ])
      await expect.poll(() => store.workersToTerminate(), WAIT).toEqual([])
    })

    test('a slow receiver holds neither a slot nor the outcome', async () => {
      const answer = Promise.withResolvers<AttemptResult>()
      sender.answer = () => answer.promise
      const [one, two] = [await stored(), await stored()]
      const service = open({}, 1)
      await service.runner.start()
      ;(await workerOf(one)).ended.resolve(DONE)
      await isIn(one, 'succeeded')
      await workerOf(two)
      expect(events).toEqual(['log', 'commit', 'attempt'])
      answer.resolve({ statusCode: 500, error: 'answered 500', retryAfterMs: null })
      await workerGone(one)
    })

    test('a failed attempt does not keep the worker', async () => {
      sender.answer = async () => ({ statusCode: 500, error: 'answered 500', retryAfterMs: null })
      const { task } = await started()
      ;(await workerOf(task)).ended.resolve(DONE)
      await workerGone(task)
      expect(await deliveries.state(task.taskId)).toMatchObject({ status: 'pending' })
    })

    test('without a callback nothing is sent, and the worker still ends', async () => {
      const { task } = await started({ callbackUrl: null })
      ;(await workerOf(task)).ended.resolve(DONE)
      await workerGone(task)
      expect(events).toEqual(['log', 'commit', 'terminate'])
    })

    test.each<[Completion, object]>([
      [{ ...DONE, exitCode: null }, { status: 'failed' }],
      [{ ...DONE, reason: 'exit_code', exitCode: 0 }, { status: 'failed' }],
      [
        { reason: 'exit_code', exitCode: 3, signal: null, message: 'Exit code 3' },
        { status: 'failed', reason: 'exit_code', exitCode: 3, message: 'Exit code 3' },
      ],
      [
        { reason: 'oom_killed', exitCode: 137, signal: 'SIGKILL', message: 'x' },
        { status: 'failed', reason: 'oom_killed', exitCode: 137, signal: 'SIGKILL' },
      ],
      [
        { reason: 'worker_lost', exitCode: null, signal: null, message: 'x' },
        { status: 'failed', reason: 'worker_lost', exitCode: null },
      ],
    ])('only an observed exit code 0 is success: %j', async (completion, expected) => {
      const { task } = await started()
      ;(await workerOf(task)).ended.resolve(completion)
      expect(await finalOf(task)).toMatchObject(expected)
      await delivered(task)
      expect(sender.sent[0]?.payload.success).toBe(false)
    })

    test('secrets that the task printed are masked in the log that is kept and sent', async () => {
      const { task } = await started({ callbackUrlToken: 'the-token' })
      const worker = await workerOf(task)
      worker.log = 'it is the-token.\n'
      worker.ended.resolve(DONE)
      await delivered(task)
      const sent = await sender.sent[0]?.payload.logs.read()
      expect(sent?.content.toString()).toBe('it is ***.\n')
      expect((await store.log(task.taskId))?.content.toString()).toBe('it is ***.\n')
      expect((await store.get(task.taskId))?.logBytes).toBe(worker.log.length)
    })

    test('a log that cannot be read costs the log, not the outcome', async () => {
      const { task } = await started()
      const worker = await workerOf(task)
      worker.logs = () => Promise.reject(new Error('ENOENT'))
      worker.ended.resolve({ ...DONE, reason: 'exit_code', exitCode: 4 })
      expect(await finalOf(task)).toMatchObject({ reason: 'exit_code', exitCode: 4 })
      expect((await store.log(task.taskId))?.content.toString()).toContain('could not be read')
    })

    test('a log that cannot be read says nothing of what the task printed', async () => {
      const { task } = await started()
      const worker = await workerOf(task)
      worker.logs = () => Promise.reject(new Error('ENOENT'))
      worker.ended.resolve({ ...FAILED, exitCode: 4, message: 'Exit code 4' })
      await finalOf(task)
      expect(await keptLog(task)).toBe(
        '[task-runner] The log could not be read\n[task-runner] Failed with exit code 4\n',
      )
    })

    test('no more tasks run at once than may', async () => {
      const tasks = [await stored(), await stored(), await stored()]
      const service = open({}, 2)
      await service.runner.start()
      await workerOf(tasks[1] as NewTask)
      await isIn(tasks[0] as NewTask, 'running')
      await isIn(tasks[1] as NewTask, 'running')
      expect(backend.specs).toHaveLength(2)
      expect(await store.countQueued(10)).toBe(1)
      ;(await workerOf(tasks[0] as NewTask)).ended.resolve(DONE)
      await workerOf(tasks[2] as NewTask)
    })

    test('a worker that is wanted for a look inside is kept', async () => {
      const { task } = await started({ terminateOnCompletion: false })
      ;(await workerOf(task)).ended.resolve(DONE)
      await delivered(task)
      expect(await store.workerOwner(task.taskId)).toMatchObject({ kept: true })
      expect(await store.workersToTerminate()).toEqual([])
      expect(events).not.toContain('terminate')
    })
  })

  describe('the last line of the log', () => {
    const WHY = 'Ran out of memory: the limit was reached'
    const ENDED: Completion = { reason: 'oom_killed', exitCode: 137, signal: null, message: WHY }

    /** The kept log of a task that has printed `log`. Sent and counted the same. */
    async function logOf(completion: Completion, log: string, token: string | null = null) {
      const { task } = await started({ callbackUrlToken: token })
      const worker = await workerOf(task)
      worker.log = log
      worker.ended.resolve(completion)
      await delivered(task)
      const kept = await store.log(task.taskId)
      const ofTask = sender.sent.find(({ payload }) => payload.taskId === task.taskId)
      const sent = await ofTask?.payload.logs.read()
      expect(sent?.content.equals(kept?.content ?? Buffer.alloc(0))).toBe(true)
      expect(sent?.totalBytes).toBe(kept?.totalBytes)
      return { text: kept?.content.toString(), kept, task: await finalOf(task) }
    }

    test.each<Completion['reason']>([
      ...(['timed_out', 'oom_killed', 'signal', 'evicted', 'startup_failed'] as const),
      ...(['worker_lost', 'log_limit', 'image_pull_failed', 'unschedulable'] as const),
    ])('says why a task ended that did not end by its own exit code: %s', async (reason) => {
      const { text, kept, task } = await logOf({ ...ENDED, reason }, 'before\n')
      expect(text).toBe(`before\n[task-runner] ${WHY}\n`)
      expect([kept?.totalBytes, task.logBytes]).toEqual([text?.length, text?.length])
    })

    test('is not there for a task that ended by its own exit code and printed something', async () => {
      expect((await logOf(FAILED, 'oh no\n')).text).toBe('oh no\n')
      expect((await logOf(FAILED, '[task-runner] cloned\noh no')).text).toMatch(/oh no$/)
    })

    test('is not there for a task that succeeded', async () => {
      expect((await logOf(DONE, '')).text).toBe('')
    })

    test('tells that a task failed without any output', async () => {
      const { text, task } = await logOf(FAILED, '')
      expect(text).toBe('[task-runner] Failed with exit code 3, without any output\n')
      expect(task.logBytes).toBe(text?.length)
    })

    test('tells the exit code of a task whose log has only lines of ours', async () => {
      const log = '[task-runner] email has no effect here\n[task-runner] cloning a into ~/b\n'
      expect((await logOf(FAILED, log)).text).toBe(`${log}[task-runner] Failed with exit code 3\n`)
    })

    test('is a line of its own, also where the log does not end in one', async () => {
      expect((await logOf(ENDED, '50 %')).text).toBe(`50 %\n[task-runner] ${WHY}\n`)
    })

    test('is one line, whatever the message holds', async () => {
      const { text } = await logOf({ ...ENDED, message: 'no\r\nroom \n left\n' }, '')
      expect(text).toBe('[task-runner] no room left\n')
    })

    test('is not said twice where the worker has said it', async () => {
      const said = `cloning\n[task-runner] ${WHY}\n`
      expect((await logOf({ ...ENDED, reason: 'startup_failed' }, said)).text).toBe(said)
      const printed = `the words [task-runner] ${WHY}\n`
      const { text } = await logOf(ENDED, printed)
      expect(text).toBe(`${printed}[task-runner] ${WHY}\n`)
    })

    test('is masked, and counted as it is shown', async () => {
      const message = 'a-secret was refused'
      const { text, kept, task } = await logOf({ ...ENDED, message }, 'a-secret\n', 'a-secret')
      expect(text).toBe('***\n[task-runner] *** was refused\n')
      expect(kept?.totalBytes).toBe(text?.length)
      expect(task.logBytes).toBe((text?.length ?? 0) + 'a-secret'.length - '***'.length)
    })

    test('keeps the log within what is kept', async () => {
      const { text, kept } = await logOf(ENDED, `first\n${'x'.repeat(LOG_BYTES_KEPT)}\n`)
      expect(kept?.content.length).toBe(LOG_BYTES_KEPT)
      expect(kept?.totalBytes).toBe(
        'first\n'.length + LOG_BYTES_KEPT + `\n[task-runner] ${WHY}\n`.length,
      )
      expect(text?.slice(-60)).toBe(`${'x'.repeat(100)}\n[task-runner] ${WHY}\n`.slice(-60))
    })

    test('tells a time limit from a cancel', async () => {
      const late = await started({ timeoutSeconds: 0.1 })
      await finalOf(late.task)
      expect(await keptLog(late.task)).toBe(
        'a log\n[task-runner] Ran longer than its limit of 0.1 seconds\n',
      )
      await late.close()
      const { task, runner } = await started()
      await isIn(task, 'running')
      await runner.cancel(task.taskId)
      await finalOf(task)
      expect(await keptLog(task)).toBe('a log\n[task-runner] Cancelled on request\n')
    })

    test('is all there is of a task without a worker', async () => {
      backend.before = async () => {
        throw new WorkerError('image_pull_failed', 'no such image')
      }
      const { task } = await started()
      await finalOf(task)
      expect(await keptLog(task)).toBe('[task-runner] no such image\n')
    })
  })

  describe('a worker that cannot be had', () => {
    test('in time fails the task, which calls back; what was begun is ended', async () => {
      backend.before = async (signal, spec) => {
        backend.make(spec)
        await untilAborted(signal)
      }
      const { task } = await started()
      expect(await finalOf(task)).toMatchObject({
        ...{ status: 'failed', reason: 'provisioning_timeout', exitCode: null, startedAt: null },
      })
      await workerGone(task)
      expect(sender.sent).toMatchObject([{ payload: { success: false } }])
      expect(events, 'others that are stuck are cleaned up').toContain('clean up')
    })

    test('for a reason of its own passes that on', async () => {
      backend.before = async () => {
        throw new WorkerError('image_pull_failed', 'There is no image "x"')
      }
      const { task } = await started()
      expect(await finalOf(task)).toMatchObject({
        ...{ status: 'failed', reason: 'image_pull_failed', message: 'There is no image "x"' },
      })
      await delivered(task)
    })
  })

  describe('a trouble of ours', () => {
    const unavailable = new UnavailableError('The engine does not answer')

    test('hinders all tasks alike: none is burnt, nothing new is claimed, all succeed once it has passed', async () => {
      backend.problem = unavailable
      const tasks: NewTask[] = []
      for (let count = 0; count < 500; count += 1) tasks.push(await stored())
      const { runner, queue } = open({}, 4, undefined, { length: 500 })
      await runner.start()
      await expect.poll(() => backend.checks, WAIT).toBeGreaterThan(1)
      expect(await store.countLive()).toMatchObject([
        { status: 'provisioning', count: 4 },
        { status: 'queued', count: 496 },
      ])
      expect(queue.length).toBe(496)
      for (const task of [tasks[0], tasks[499]]) {
        const seen = await store.get(task?.taskId ?? '')
        expect(seen && runner.waitingFor(seen)).toBe('The engine does not answer')
      }
      expect(runner.hindrances()).toEqual(['The engine does not answer'])
      backend.ending = DONE
      backend.problem = undefined
      for (const task of tasks) {
        expect(await finalOf(task)).toMatchObject({ status: 'succeeded', reason: 'completed' })
      }
      expect(runner.hindrances()).toEqual([])
    }, 60_000)

    test('that only one task has lets others pass, in its slot', async () => {
      const [hindered, other] = [await stored(), await stored()]
      backend.before = async (_, spec) => {
        if (spec.taskId === hindered.taskId) throw new Error('EMFILE: too many open files')
      }
      const { runner } = open({}, 1)
      await runner.start()
      ;(await workerOf(other)).ended.resolve(DONE)
      expect(await finalOf(other)).toMatchObject({ status: 'succeeded' })
      const seen = await isIn(hindered, 'provisioning')
      expect(runner.waitingFor(seen)).toContain('EMFILE')
      await expect
        .poll(async () => (await store.get(hindered.taskId))?.waitingFor, WAIT)
        .toContain('EMFILE')
      backend.before = async () => {}
      ;(await workerOf(hindered)).ended.resolve(DONE)
      const end = await finalOf(hindered)
      expect(end).toMatchObject({ status: 'succeeded', waitingFor: null })
      expect(runner.waitingFor(end)).toBeUndefined()
    })

    test('ends a task as internal_error, with its words, when others pass for too long', async () => {
      const hindered = await stored({ callbackUrlToken: 'the-token' })
      backend.ending = DONE
      backend.before = async (_, spec) => {
        if (spec.taskId === hindered.taskId) throw new Error('cannot be, said the-token')
      }
      const { runner, queue } = open({}, 1, undefined, { hopelessMs: 1_000 })
      await runner.start()
      await expect
        .poll(() => runner.waitingFor({ taskId: hindered.taskId, status: 'provisioning' }), WAIT)
        .toBeDefined()
      // Alone it would wait for ever: perhaps nobody could pass.
      const other = await stored()
      queue.added()
      await finalOf(other)
      expect(await finalOf(hindered)).toMatchObject({
        ...{ status: 'failed', reason: 'internal_error' },
        message: expect.stringContaining('cannot be, said ***'),
      })
      await delivered(hindered)
    })

    test('amid provisioning stops its clock', async () => {
      backend.before = async (signal) => {
        backend.problem = unavailable
        await untilAborted(signal)
      }
      const { task, runner } = await started()
      const seen = await isIn(task, 'provisioning')
      await expect.poll(() => runner.waitingFor(seen), WAIT).toBe('The engine does not answer')
      backend.before = async () => {}
      backend.problem = undefined
      ;(await workerOf(task)).ended.resolve(DONE)
      expect(await finalOf(task)).toMatchObject({ status: 'succeeded' })
    })

    test('lets a waiting task be cancelled, and leaves no worker', async () => {
      backend.before = async (_, spec) => {
        backend.make(spec)
        throw unavailable
      }
      backend.problem = unavailable
      const { task, runner } = await started()
      const seen = await isIn(task, 'provisioning')
      await expect.poll(() => runner.waitingFor(seen), WAIT).toBeDefined()
      await runner.cancel(task.taskId)
      expect(await finalOf(task)).toMatchObject({ status: 'cancelled' })
      await workerGone(task)
    })

    test('is left to the next start, which goes on', async () => {
      backend.problem = unavailable
      const { task, close } = await started()
      await isIn(task, 'provisioning')
      await close()
      backend.problem = undefined
      await open().runner.start()
      ;(await workerOf(task)).ended.resolve(DONE)
      expect(await finalOf(task)).toMatchObject({ status: 'succeeded' })
    })

    test('while a task runs is no outcome: its end is asked for again', async () => {
      const { task, runner } = await started()
      const worker = await workerOf(task)
      const seen = await isIn(task, 'running')
      const completion = worker.completion.bind(worker)
      let failures = 0
      worker.completion = async () => {
        failures += 1
        throw new Error('garbage from the engine')
      }
      worker.interrupt()
      await expect.poll(() => failures, WAIT).toBeGreaterThan(1)
      expect(runner.waitingFor(seen)).toContain('garbage')
      worker.completion = completion
      worker.ended.resolve({ ...DONE, reason: 'exit_code', exitCode: 3 })
      expect(await finalOf(task)).toMatchObject({ reason: 'exit_code', exitCode: 3 })
    })

    test('lets a running task be cancelled whose worker cannot be asked for', async () => {
      const { task, close } = await started()
      await isIn(task, 'running')
      await close()
      const find = backend.find.bind(backend)
      backend.find = async () => {
        throw unavailable
      }
      const { runner } = open()
      await runner.start()
      const seen = await isIn(task, 'running')
      await expect.poll(() => runner.waitingFor(seen), WAIT).toBe('The engine does not answer')
      await runner.cancel(task.taskId)
      expect(await finalOf(task)).toMatchObject({ status: 'cancelled' })
      backend.find = find
      await workerGone(task)
    })

    test("another task's worker is no worker of this one", async () => {
      const task = await stored()
      await store.claim(task.taskId, 1)
      await store.markRunning({ ...(await store.get(task.taskId)) } as Task, 1)
      backend.make({ name: task.workerName, taskId: 'another' } as WorkerSpec)
      await open().runner.start()
      expect(await finalOf(task)).toMatchObject({ status: 'failed', reason: 'worker_lost' })
    })

    test('with the stored parameters of a task ends that task, and no other', async () => {
      const [damaged, cancelled, sound] = [await stored(), await stored(), await stored()]
      for (const { taskId } of [damaged, cancelled]) {
        await connection.db
          .updateTable('tasks')
          .set({ sealed: Buffer.from('damaged') })
          .where('task_id', '=', taskId)
          .execute()
      }
      const { runner } = open()
      await runner.cancel(cancelled.taskId)
      await runner.start()
      ;(await workerOf(sound)).ended.resolve(DONE)
      expect(await finalOf(sound)).toMatchObject({ status: 'succeeded' })
      const ends = async () =>
        Object.fromEntries((await store.list({ limit: 9 })).map((task) => [task.taskId, task]))
      await expect
        .poll(async () => (await ends())[damaged.taskId], WAIT)
        .toMatchObject({
          ...{ status: 'failed', reason: 'internal_error' },
          message: expect.stringContaining('are damaged'),
        })
      expect((await ends())[cancelled.taskId]).toMatchObject({ status: 'cancelled' })
    })

    test('a store that is full lets the worker free its space', async () => {
      let isFull = true
      let failures = 0
      const finish: TaskStore['finish'] = async (...args) => {
        failures += 1
        if (failures === 1) throw new Error('the database does not answer')
        if (isFull) throw new StoreFullError(new Error('database or disk is full'))
        return store.finish(...args)
      }
      const { task } = await started({}, { finish })
      const worker = await workerOf(task)
      Object.assign(worker, {
        freeSpace: async () => {
          expect(failures, 'only where that helps').toBeGreaterThan(1)
          isFull = false
        },
      })
      worker.ended.resolve(DONE)
      expect(await finalOf(task)).toMatchObject({ status: 'succeeded' })
    })

    test('a clock set back does not lengthen a limit', async () => {
      const task = await stored({ timeoutSeconds: 0.2 })
      await store.claim(task.taskId, 1)
      const claimed = (await store.get(task.taskId)) as Task
      await store.markRunning(claimed, Date.now() + 3_600_000)
      backend.make({ name: task.workerName, taskId: task.taskId } as WorkerSpec)
      await open().runner.start()
      expect(await finalOf(task)).toMatchObject({ reason: 'timed_out' })
    })
  })

  describe('cancelling', () => {
    test('a queued task ends without a worker, and calls back', async () => {
      const [running, task] = [await stored(), await stored()]
      const { runner } = open({}, 1)
      await runner.start()
      await isIn(running, 'running')
      expect(await runner.cancel(task.taskId)).toMatchObject({
        ...{ status: 'cancelled', reason: 'cancelled' },
      })
      await delivered(task)
      ;(await workerOf(running)).ended.resolve(DONE)
      await workerGone(running)
      expect(backend.specs).toHaveLength(1)
      expect(await store.workersToTerminate()).toEqual([])
    })

    test('a provisioning task ends at once, and what was begun is ended', async () => {
      const began = Promise.withResolvers<void>()
      backend.before = async (signal, spec) => {
        backend.make(spec)
        began.resolve()
        await untilAborted(signal)
      }
      const { task, runner } = await started()
      await began.promise
      await runner.cancel(task.taskId)
      expect(await finalOf(task)).toMatchObject({ status: 'cancelled', reason: 'cancelled' })
      await workerGone(task)
      await delivered(task)
    })

    test('a running task is stopped, keeps its log, and calls back', async () => {
      const { task, runner } = await started()
      const worker = await workerOf(task)
      await isIn(task, 'running')
      await runner.cancel(task.taskId)
      expect(await finalOf(task)).toMatchObject({ status: 'cancelled', reason: 'cancelled' })
      await workerGone(task)
      expect(worker.stops).toBe(1)
      expect(events).toEqual(['stop', 'log', 'commit', 'attempt', 'terminate'])
      expect(await keptLog(task)).toMatch(/^a log\n/)
    })

    test('twice, or after the end, changes nothing', async () => {
      const { task, runner } = await started()
      await isIn(task, 'running')
      await Promise.all([runner.cancel(task.taskId), runner.cancel(task.taskId)])
      const end = await finalOf(task)
      await workerGone(task)
      expect(await runner.cancel(task.taskId)).toMatchObject({
        ...{ status: 'cancelled', finishedAt: end.finishedAt },
      })
      expect(events.filter((event) => event === 'commit')).toHaveLength(1)
      expect(sender.sent).toHaveLength(1)
    })

    test('a task that is over leaves its outcome', async () => {
      const { task, runner } = await started()
      ;(await workerOf(task)).ended.resolve(DONE)
      await finalOf(task)
      expect(await runner.cancel(task.taskId)).toMatchObject({ status: 'succeeded' })
    })

    test('an unknown task says so', async () => {
      const { runner } = open()
      await expect(runner.cancel('unknown')).rejects.toMatchObject({ code: 'task_not_found' })
    })

    test('in the moment of the exit gives one outcome and one callback, whichever it is', async () => {
      const { runner, queue } = open()
      await runner.start()
      for (let turn = 0; turn < 20; turn += 1) {
        const task = await stored()
        queue.added()
        const worker = await workerOf(task)
        await isIn(task, 'running')
        const cancelling = runner.cancel(task.taskId)
        if (turn % 2 === 0) worker.ended.resolve(DONE)
        else void cancelling.then(() => worker.ended.resolve(DONE))
        await cancelling
        const end = await finalOf(task)
        expect(['succeeded/completed', 'cancelled/cancelled']).toContain(
          `${end.status}/${end.reason}`,
        )
        await delivered(task)
        const sent = sender.sent.filter(({ payload }) => payload.taskId === task.taskId)
        expect(sent.map(({ payload }) => payload.success)).toEqual([end.status === 'succeeded'])
      }
    })

    test('a worker that would be kept is ended all the same', async () => {
      const { task, runner } = await started({ terminateOnCompletion: false })
      await isIn(task, 'running')
      await runner.cancel(task.taskId)
      await workerGone(task)
    })

    test('a request that a crash overtook is honoured at the next start', async () => {
      const task = await stored()
      await store.requestCancel(task.taskId, 1)
      const { runner } = open()
      await runner.start()
      expect(await finalOf(task)).toMatchObject({ status: 'cancelled' })
      await delivered(task)
    })

    test('a worker that cannot be stopped does not keep the task from its end', async () => {
      const { task, runner } = await started()
      const worker = await workerOf(task)
      worker.stop = () => Promise.reject(new Error('cannot be stopped'))
      await isIn(task, 'running')
      await runner.cancel(task.taskId)
      expect(await finalOf(task)).toMatchObject({ status: 'cancelled' })
      await workerGone(task)
    })
  })

  describe('the time limit', () => {
    test('a task that runs longer is stopped, keeps its log, and calls back', async () => {
      const { task } = await started({ timeoutSeconds: 0.1 })
      const worker = await workerOf(task)
      expect(await finalOf(task)).toMatchObject({ status: 'failed', reason: 'timed_out' })
      await workerGone(task)
      expect(worker.stops).toBe(1)
      expect(events).toEqual(['stop', 'log', 'commit', 'attempt', 'terminate'])
    })

    test('is not what ended a task that ended in time, while its log is still being written', async () => {
      const { task } = await started({ timeoutSeconds: 1 })
      const worker = await workerOf(task)
      worker.hasEndedItself = true
      expect(await finalOf(task)).toMatchObject({ reason: 'exit_code', exitCode: 3 })
      expect(worker.stops).toBe(0)
    })

    test('counts from the start of the task, not of the service', async () => {
      const task = await stored({ timeoutSeconds: 60 })
      const claimed = await store.claim(task.taskId, 0)
      if (!claimed) throw new Error('not claimed')
      await store.markRunning(claimed, Date.now() - 61_000)
      backend.make({ name: task.workerName, taskId: task.taskId } as WorkerSpec)
      const { runner } = open()
      await runner.start()
      expect(await finalOf(task)).toMatchObject({ reason: 'timed_out' })
    })
  })

  describe('shutdown and the next start', () => {
    test('a running task stays live, and the next runner attaches to its worker', async () => {
      const { task, close } = await started()
      const worker = await workerOf(task)
      const { startedAt } = await isIn(task, 'running')
      await close()
      expect(await store.get(task.taskId)).toMatchObject({ status: 'running' })
      expect(events).toEqual([])

      const { runner } = open()
      await runner.start()
      worker.ended.resolve({ ...DONE, reason: 'exit_code', exitCode: 7 })
      expect(await finalOf(task)).toMatchObject({ exitCode: 7, startedAt, claim: 2 })
      await workerGone(task)
      expect(backend.specs).toHaveLength(1)
      expect(sender.sent).toHaveLength(1)
    })

    test('a worker that was begun before is taken up although what it was given is gone by now', async () => {
      const task = await stored({ workerConfig: { personalSecrets: ['gone'] } })
      await store.claim(task.taskId, 0)
      backend.make({ name: task.workerName, taskId: task.taskId } as WorkerSpec)
      await open().runner.start()
      const worker = await workerOf(task)
      await isIn(task, 'running')
      worker.ended.resolve(DONE)
      expect(await finalOf(task)).toMatchObject({ status: 'succeeded' })
    })

    test('a task in provisioning stays so, and the next runner provisions it', async () => {
      const began = Promise.withResolvers<void>()
      backend.before = (signal) => {
        began.resolve()
        return untilAborted(signal)
      }
      const { task, close } = await started()
      await began.promise
      await close()
      expect(await store.get(task.taskId)).toMatchObject({ status: 'provisioning' })
      backend.before = async () => {}
      const { runner } = open()
      await runner.start()
      ;(await workerOf(task)).ended.resolve(DONE)
      expect(await finalOf(task)).toMatchObject({ status: 'succeeded' })
    })

    test('a queued task is run by the next runner', async () => {
      const [running, waiting] = [await stored(), await stored()]
      const first = open({}, 1)
      await first.runner.start()
      await isIn(running, 'running')
      await first.close()
      expect(await store.get(waiting.taskId)).toMatchObject({ status: 'queued' })
      const { runner } = open()
      await runner.start()
      await workerOf(waiting)
    })

    test('a running task whose worker is gone is lost, and calls back', async () => {
      const task = await stored()
      const claimed = await store.claim(task.taskId, 0)
      if (!claimed) throw new Error('not claimed')
      await store.markRunning(claimed, Date.now())
      const { runner } = open()
      await runner.start()
      expect(await finalOf(task)).toMatchObject({ status: 'failed', reason: 'worker_lost' })
      await delivered(task)
      expect(sender.sent[0]?.payload.success).toBe(false)
      expect(backend.specs).toEqual([])
    })

    test('a worker that a crash kept from its termination is terminated', async () => {
      const task = await stored({ callbackUrl: null })
      const claimed = await store.claim(task.taskId, 0)
      if (!claimed) throw new Error('not claimed')
      await store.finish(claimed, {
        outcome: { ...DONE, status: 'succeeded' },
        log: { content: Buffer.alloc(0), totalBytes: 0 },
        ...{ logBytes: 0, delivery: undefined, finishedAt: 1, keepWorker: false },
      })
      backend.make({ name: task.workerName, taskId: task.taskId } as WorkerSpec)
      const { runner } = open()
      await runner.start()
      await workerGone(task)
      await expect.poll(() => store.workersToTerminate(), WAIT).toEqual([])
    })

    test('close waits for the commit of a run that has ended', async () => {
      const gate = Promise.withResolvers<void>()
      const reached = Promise.withResolvers<void>()
      const { task, close } = await started(
        {},
        {
          finish: async (...args) => {
            reached.resolve()
            await gate.promise
            return store.finish(...args)
          },
        },
      )
      ;(await workerOf(task)).ended.resolve(DONE)
      await reached.promise
      const closing = close()
      gate.resolve()
      await closing
      expect(await store.get(task.taskId)).toMatchObject({ status: 'succeeded' })
    })
  })

  test('a task that is given up holds up no beat, and nobody takes it for one to resume', async () => {
    const task = await stored()
    await new SqlTaskStore(connection, new Sealer(Buffer.alloc(32)), { instance: 'dead' }).claim(
      task.taskId,
      0,
    )
    const orphan = { taskId: task.taskId, claim: 1, instance: 'dead', isLost: true }
    let beats = 0
    const cluster: Cluster = {
      isMember: () => true,
      async beat() {
        beats += 1
        return true
      },
      async ours() {
        const { instance, claim, status } = (await store.get(task.taskId)) as Task
        return instance === 'here' && !isFinal(status) ? [{ taskId: task.taskId, claim }] : []
      },
      // As one that another beat has just seen: it says so once more.
      orphans: async () => (beats < 5 ? [orphan] : []),
      cancelRequests: async () => [],
      async leave() {},
    }
    const released = Promise.withResolvers<void>()
    const finish: TaskStore['finish'] = async (...args) => {
      await released.promise
      return store.finish(...args)
    }
    const { runner } = open({ finish, live: async () => [] }, 4, cluster)
    await runner.start()
    await expect.poll(() => beats, WAIT).toBe(4)
    released.resolve()
    expect(await finalOf(task)).toMatchObject({
      ...{ reason: 'worker_lost', message: expect.stringContaining('dead'), claim: 2 },
    })
    await delivered(task)
    expect(events).toEqual(['commit', 'attempt'])
  })

  describe('what fails is tried again', () => {
    const failing = <T extends unknown[], R>(times: number, then: (...args: T) => Promise<R>) => {
      let left = times
      return (...args: T): Promise<R> => {
        left -= 1
        return left >= 0 ? Promise.reject(new Error('store down')) : then(...args)
      }
    }

    test('claiming, marking running, and committing', async () => {
      const { task } = await started(
        {},
        {
          claimNext: failing(1, (options: Parameters<TaskStore['claimNext']>[0]) =>
            store.claimNext(options),
          ),
          markRunning: failing(1, (...args: Parameters<TaskStore['markRunning']>) =>
            store.markRunning(...args),
          ),
          finish: failing(1, (...args: Parameters<TaskStore['finish']>) => store.finish(...args)),
        },
      )
      ;(await workerOf(task)).ended.resolve(DONE)
      expect(await finalOf(task)).toMatchObject({ status: 'succeeded', claim: 1 })
      await delivered(task)
      await workerGone(task)
      expect(sender.sent).toHaveLength(1)
    })

    test('terminating, until it is done', async () => {
      const { task } = await started()
      const worker = await workerOf(task)
      worker.terminateFailures = 2
      worker.ended.resolve(DONE)
      await workerGone(task)
      expect(events.filter((event) => event === 'terminate')).toHaveLength(3)
      await expect.poll(() => store.workersToTerminate(), WAIT).toEqual([])
    })

    test('a termination that a shutdown cuts short is remembered', async () => {
      const { task, close } = await started()
      const worker = await workerOf(task)
      worker.terminateFailures = 1
      worker.ended.resolve(DONE)
      await expect.poll(() => events, WAIT).toContain('terminate')
      await close()
      const { taskId, workerName } = task
      expect(await store.workersToTerminate()).toEqual([{ taskId, workerName }])
    })

    test('a task that someone else took over is left alone', async () => {
      const { task } = await started()
      const worker = await workerOf(task)
      await isIn(task, 'running')
      await store.claim(task.taskId, 0, 1)
      worker.ended.resolve(DONE)
      await expect.poll(() => events, WAIT).toContain('second')
      expect(await store.get(task.taskId)).toMatchObject({ status: 'running', claim: 2 })
      expect(sender.sent).toEqual([])
      expect(events).not.toContain('terminate')
    })
  })
})
