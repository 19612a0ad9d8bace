/** What every WorkerBackend must do. Each adapter's test calls this with a way to open it. */
import { randomBytes } from 'node:crypto'
import { readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import {
  type Completion,
  type Worker,
  type WorkerBackend,
  WorkerError,
  type WorkerSpec,
} from '../../src/core/ports.ts'
import { workerNameFor } from '../../src/core/task.ts'
import { taskEnvironment } from '../../src/core/worker-config.ts'

export interface BackendHarness {
  readonly backend: WorkerBackend
  /** The grace period between TERM and KILL that the backend was opened with. */
  readonly graceMs: number
  /** A folder that test and tasks both see, under the same path. */
  readonly sharedDir: string
  /** Lets go of the backend, as a restart of the service does, and opens it anew. */
  reopen(): Promise<WorkerBackend>
  /** Live processes whose command line or environment holds `marker`. */
  processes(marker: string): Promise<string[]>
  /** Terminates all workers. Throws when a process or a file of one is left behind. */
  clean(): Promise<void>
  /** Lets go of everything, after `clean`. Throws when a process or a file of a worker is left behind. */
  dispose(): Promise<void>
}

export const NEVER = new AbortController().signal
const SLOW_MS = 15_000

/** A string that nothing else on this machine holds; as a number it is a long time to sleep, too. */
export function marker(): string {
  return String(10_000_000 + (randomBytes(4).readUInt32BE() % 80_000_000))
}

/** A megabyte: a worker that is given it takes a moment to start. */
export const LARGE_ENVIRONMENT = Object.fromEntries(
  Array.from({ length: 10 }, (_, index) => [`LARGE_${index}`, 'x'.repeat(100_000)]),
)

let specs = 0

/** A worker of its own that runs the shell script. */
export function spec(script: string, overrides: Partial<WorkerSpec> = {}): WorkerSpec {
  specs += 1
  const taskId = `contract ${process.pid}.${specs}`
  const name = workerNameFor(taskId)
  const taskFileName = overrides.taskFileName ?? 'w-eval.sh'
  return {
    name,
    taskId,
    taskFileName,
    taskFolder: 'tasks',
    repositories: [],
    keepAfterwards: false,
    timeoutSeconds: 3600,
    maxLogBytes: 50 * 1024 * 1024,
    notes: [],
    ...overrides,
    environment: {
      SCRIPT: script,
      ...taskEnvironment({ taskId, taskFileName, workerName: name, workerConfig: {} }),
      ...overrides.environment,
    },
  }
}

export async function logOf(worker: Worker, maxBytes = 1024 * 1024): Promise<string> {
  return (await worker.logs({ maxBytes })).content.toString()
}

export async function fileThere(path: string): Promise<void> {
  await expect
    .poll(
      () =>
        stat(path).then(
          () => true,
          () => false,
        ),
      { timeout: SLOW_MS, interval: 10 },
    )
    .toBe(true)
}

export async function touch(path: string): Promise<void> {
  await writeFile(path, '')
}

export async function text(path: string): Promise<string> {
  return readFile(path, 'utf8')
}

export function describeWorkerBackend(name: string, open: () => Promise<BackendHarness>): void {
  describe(`${name}, as a WorkerBackend`, () => {
    let harness: BackendHarness
    let backend: WorkerBackend

    beforeAll(async () => {
      harness = await open()
    })
    beforeEach(() => {
      backend = harness.backend
    })
    afterEach(() => harness.clean())
    afterAll(() => harness.dispose())

    const provision = (wanted: WorkerSpec) => backend.provision(wanted, NEVER)

    async function run(wanted: WorkerSpec): Promise<{ end: Completion; worker: Worker }> {
      const worker = await provision(wanted)
      return { end: await worker.completion(NEVER), worker }
    }

    describe('the outcome', () => {
      test('exit code 0 completes the task', async () => {
        const { end } = await run(spec('exit 0'))
        expect(end).toEqual({ reason: 'completed', exitCode: 0, signal: null, message: null })
      })

      test.each([1, 2, 42, 126, 127, 128, 255])('exit code %i is told as it is', async (code) => {
        const { end } = await run(spec(`exit ${code}`))
        expect(end).toMatchObject({ reason: 'exit_code', exitCode: code, signal: null })
        expect(end.message).toContain(String(code))
      })

      test.each(['KILL', 'TERM', 'SEGV', 'INT'])(
        'a task ended by SIG%s says so',
        async (signal) => {
          const { end } = await run(spec(`kill -${signal} $$; exec sleep 1000`))
          expect(end).toMatchObject({ reason: 'signal', signal: `SIG${signal}` })
        },
      )

      test('a task that sends TERM to its whole process group ends by that signal alone', async () => {
        const { end } = await run(spec('kill 0; sleep 1000'))
        expect(end).toMatchObject({ reason: 'signal', signal: 'SIGTERM' })
        expect((await run(spec('echo next'))).end.reason).toBe('completed')
      })

      test('completion is told again to whoever asks again', async () => {
        const { worker, end } = await run(spec('exit 3'))
        expect(await worker.completion(NEVER)).toEqual(end)
        expect(await (await backend.find(worker.name))?.completion(NEVER)).toEqual(end)
      })

      test('completion rejects with the reason of its signal, and the task goes on', async () => {
        const go = join(harness.sharedDir, marker())
        const worker = await provision(spec(`until [ -e ${go} ]; do sleep 0.02; done; exit 5`))
        const impatient = new AbortController()
        const waiting = worker.completion(impatient.signal)
        impatient.abort(new Error('enough'))
        await expect(waiting).rejects.toThrow('enough')
        await touch(go)
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
      })

      test('a file with an environment value of 1 MB never hangs: it runs, or fails with a reason', async () => {
        const big = run(spec('exit 0', { environment: { BIG: 'x'.repeat(1024 * 1024) } }))
        const reason = await big.then(
          ({ end }) => end.reason,
          (err: unknown) => (err instanceof WorkerError ? err.reason : err),
        )
        expect(['completed', 'exit_code', 'startup_failed']).toContain(reason)
      })
    })

    describe('the first line of a script', () => {
      test('its options count: a task that failed is not told as succeeded', async () => {
        const { end, worker } = await run(spec('unused', { taskFileName: 'w-strict.sh' }))
        expect(end).toMatchObject({ reason: 'exit_code', exitCode: 1 })
        expect(await logOf(worker)).toBe('begun\n')
      })

      test('they count for a startup script as well', async () => {
        const { end, worker } = await run(
          spec('echo the task ran', { startupScript: '#!/bin/sh -e\nfalse\necho went on\n' }),
        )
        expect(end).toMatchObject({ reason: 'startup_failed', exitCode: 1 })
        expect(await logOf(worker)).not.toMatch(/went on|the task ran/)
      })

      test('a startup script with Windows line ends is told of in the log', async () => {
        const { worker } = await run(spec('echo task', { startupScript: 'true \r\n' }))
        expect(await logOf(worker)).toMatch(/^\[task-runner\] the startup script .*CRLF/)
      })
    })

    describe('the startup script', () => {
      test('it runs before the task, in its home, and both write to the log', async () => {
        const { end, worker } = await run(
          spec('echo task; cat ~/made', {
            startupScript: 'echo startup\necho from-startup >made\n',
          }),
        )
        expect(end.reason).toBe('completed')
        expect(await logOf(worker)).toBe('startup\ntask\nfrom-startup\n')
      })

      test('its failure fails the task, which does not run', async () => {
        const { end, worker } = await run(
          spec('echo the task ran', { startupScript: 'echo before; exit 9; echo after' }),
        )
        expect(end).toMatchObject({ reason: 'startup_failed', exitCode: 9 })
        const log = await logOf(worker)
        expect(log).toContain('before\n')
        expect(log).not.toContain('the task ran')
      })

      test('a task that fails after a good startup script has its own reason', async () => {
        const { end } = await run(spec('exit 9', { startupScript: 'true' }))
        expect(end).toMatchObject({ reason: 'exit_code', exitCode: 9 })
      })

      test.each(['code', 'option', 'interpreter', 'PHASE', 'x'])(
        'a variable named %s reaches the task as it was set, with a startup script and without',
        async (variable) => {
          const environment = { [variable]: 'as it was set' }
          const script = `printf '%s' "$${variable}"`
          for (const startup of [{}, { startupScript: 'true' }]) {
            const { worker } = await run(spec(script, { environment, ...startup }))
            expect(await logOf(worker)).toBe('as it was set')
          }
        },
      )
    })

    describe('the environment', () => {
      const ALLOWED = [
        ...['PATH', 'HOME', 'LANG', 'TZ', 'TMPDIR', 'TASK_ID', 'TASK_FILE_NAME', 'WORKER_NAME'],
        // What Python and its pip do in a task; pip's on local workers alone.
        ...['PYTHONUNBUFFERED', 'PIP_USER', 'PIP_BREAK_SYSTEM_PACKAGES', 'TASK_RUNNER_FOLDER'],
        // What shells add themselves.
        ...['PWD', 'OLDPWD', 'SHLVL', '_'],
        // What containers add.
        'HOSTNAME',
      ]

      test("a task has the variables of its worker and its own, and none of the service's", async () => {
        const wanted = spec('unused', {
          taskFileName: 'w-environment.js',
          environment: { MINE: 'a value' },
        })
        const { worker } = await run(wanted)
        const environment = JSON.parse(await logOf(worker)) as Record<string, string>
        const surplus = Object.keys(environment).filter(
          (variable) => ![...ALLOWED, 'SCRIPT', 'MINE'].includes(variable),
        )
        expect(surplus).toEqual([])
        expect(environment).toMatchObject({
          MINE: 'a value',
          TASK_ID: wanted.taskId,
          TASK_FILE_NAME: 'w-environment.js',
          WORKER_NAME: wanted.name,
        })
        for (const variable of ['PATH', 'HOME', 'LANG', 'TMPDIR']) {
          expect(environment[variable]).not.toBe('')
        }
        expect(environment.HOME).not.toBe(process.env.HOME)
      })

      test('nothing of one task reaches the next on the same slot', async () => {
        await run(
          spec('export LATER=1; umask 0; cd /; echo >~/kept; : >$TMPDIR/kept', {
            environment: { SECRET_OF_ONE: 'hunter2' },
            startupScript: 'export FROM_STARTUP=1',
          }),
        )
        const { worker } = await run(
          spec('unused', { taskFileName: 'w-environment.js', environment: { SCRIPT: '' } }),
        )
        const log = await logOf(worker)
        const surplus = Object.keys(JSON.parse(log) as object).filter(
          (variable) => ![...ALLOWED, 'SCRIPT'].includes(variable),
        )
        expect(surplus).toEqual([])
        expect(log).not.toContain('hunter2')
        const second = await run(spec('ls -A ~ $TMPDIR | grep kept; basename "$PWD"; umask'))
        expect(await logOf(second.worker)).toBe('tasks\n0022\n')
      })

      test('Python holds no output back, also when a script starts it; a request may set that otherwise', async () => {
        const { worker } = await run(spec('echo "$PYTHONUNBUFFERED"'))
        expect(await logOf(worker)).toBe('1\n')
        const other = await run(
          spec('echo "<$PYTHONUNBUFFERED>"', { environment: { PYTHONUNBUFFERED: '' } }),
        )
        expect(await logOf(other.worker)).toBe('<>\n')
      })

      test('values arrive byte for byte', async () => {
        const value = `'"\`$(exit 1)\\ \n\t*!~#&;|<>é 😀 \x7f\x01 end `
        const { worker } = await run(
          spec('printf "%s" "$VALUE"', { environment: { VALUE: value, EMPTY: '' } }),
        )
        expect(await logOf(worker)).toBe(value)
      })

      test('a task reads nothing from its standard input', async () => {
        const { worker, end } = await run(spec('cat; echo end'))
        expect(end.reason).toBe('completed')
        expect(await logOf(worker)).toBe('end\n')
      })
    })

    test('the places that people know from Practicus AI are there', async () => {
      const script = 'cd ~/practicus/task && ls w-eval.sh; cd ~/my/projects && pwd -P; cd ~; pwd -P'
      const { worker } = await run(spec(script))
      expect(await logOf(worker)).toMatch(/^w-eval\.sh\n(.+)\/projects\n\1\n$/)
    })

    describe('the log', () => {
      test('stdout and stderr come in the order they were written', async () => {
        const script = 'for i in 1 2 3 4 5 6 7 8 9; do echo out $i; echo err $i >&2; done'
        const { worker } = await run(spec(script))
        const lines = [1, 2, 3, 4, 5, 6, 7, 8, 9].map((i) => `out ${i}\nerr ${i}\n`)
        expect(await logOf(worker)).toBe(lines.join(''))
      })

      test('notes stand at its top', async () => {
        const { worker } = await run(spec('echo task', { notes: ['one', 'two'], size: 'Small' }))
        const log = await logOf(worker)
        expect(log).toMatch(/^\[task-runner\] one\n\[task-runner\] two\n/)
        expect(log).toMatch(/\ntask\n$/)
      })

      test('its last bytes are to be had, with the number of all', async () => {
        const { worker } = await run(spec('printf 0123456789'))
        expect(await worker.logs({ maxBytes: 4 })).toEqual({
          content: Buffer.from('6789'),
          totalBytes: 10,
        })
        expect(await worker.logs({ maxBytes: 100 })).toEqual({
          content: Buffer.from('0123456789'),
          totalBytes: 10,
        })
        expect((await worker.logs({ maxBytes: 0 })).totalBytes).toBe(10)
      })

      test('a task that logs nothing has an empty log', async () => {
        const { worker } = await run(spec('true'))
        expect(await worker.logs({ maxBytes: 10 })).toEqual({
          content: Buffer.alloc(0),
          totalBytes: 0,
        })
      })

      test('50 MB on stderr neither block the task nor are lost', async () => {
        const { worker, end } = await run(
          spec('head -c 50000000 /dev/zero >&2', { maxLogBytes: 60_000_000 }),
        )
        expect(end.reason).toBe('completed')
        expect((await worker.logs({ maxBytes: 10 })).totalBytes).toBe(50_000_000)
      })

      test('a task that logs more than its limit is ended', async () => {
        const { worker, end } = await run(
          spec('while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done', {
            maxLogBytes: 100_000,
          }),
        )
        expect(end).toMatchObject({ reason: 'log_limit', exitCode: null })
        expect((await worker.logs({ maxBytes: 10 })).totalBytes).toBeGreaterThan(100_000)
      })
    })

    describe('following the log', () => {
      async function followed(worker: Worker, from: number): Promise<string> {
        const chunks: Buffer[] = []
        for await (const chunk of worker.follow({ from, signal: NEVER })) chunks.push(chunk)
        return Buffer.concat(chunks).toString()
      }

      test('what is logged comes while the task runs, and the end with the end of the task', async () => {
        const go = join(harness.sharedDir, marker())
        const worker = await provision(
          spec(`echo first; until [ -e ${go} ]; do sleep 0.02; done; echo last`),
        )
        let seen = ''
        for await (const chunk of worker.follow({ from: 0, signal: NEVER })) {
          seen += chunk
          if (seen === 'first\n') await touch(go)
        }
        expect(seen).toBe('first\nlast\n')
      })

      test('it resumes at an offset, without a byte twice or missing', async () => {
        const { worker } = await run(spec('printf 0123456789'))
        expect(await followed(worker, 0)).toBe('0123456789')
        expect(await followed(worker, 6)).toBe('6789')
        expect(await followed(worker, 10)).toBe('')
        expect(await followed(worker, 99)).toBe('')
      })

      test('a log longer than one read comes whole', async () => {
        const { worker } = await run(spec('seq 1 60000'))
        const whole = await logOf(worker)
        expect(whole.length).toBeGreaterThan(300_000)
        expect(await followed(worker, 0)).toBe(whole)
      })

      test('it ends when its signal aborts, and leaves the task alone', async () => {
        const go = join(harness.sharedDir, marker())
        const worker = await provision(
          spec(`echo first; until [ -e ${go} ]; do sleep 0.02; done; exit 4`),
        )
        const leave = new AbortController()
        let seen = ''
        for await (const chunk of worker.follow({ from: 0, signal: leave.signal })) {
          seen += chunk
          leave.abort()
        }
        expect(seen).toBe('first\n')
        await touch(go)
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 4 })
      })
    })

    describe('finding workers', () => {
      test('provisioning twice finds the first worker: the script runs once', async () => {
        const runs = join(harness.sharedDir, marker())
        const wanted = spec(`echo ran >>${runs}; echo done`)
        const { worker } = await run(wanted)
        const again = await provision(wanted)
        expect(again.name).toBe(worker.name)
        expect(await again.completion(NEVER)).toMatchObject({ reason: 'completed' })
        expect(await text(runs)).toBe('ran\n')
        expect(await logOf(again)).toBe('done\n')
      })

      test('provisioning twice at the same time makes one worker: the script runs once', async () => {
        const runs = join(harness.sharedDir, marker())
        const wanted = spec(`echo ran >>${runs}`, { environment: LARGE_ENVIRONMENT })
        const workers = await Promise.all([provision(wanted), provision(wanted), provision(wanted)])
        for (const worker of workers) {
          expect(await worker.completion(NEVER)).toMatchObject({ reason: 'completed' })
        }
        expect(await text(runs)).toBe('ran\n')
      })

      test('a worker is found by its name, with what it is', async () => {
        const before = Date.now()
        const wanted = spec('echo found', { size: 'Small' })
        const { worker } = await run(wanted)
        const found = await backend.find(wanted.name)
        expect(found).toMatchObject({
          name: wanted.name,
          taskId: wanted.taskId,
          backend: backend.name,
          size: 'Small',
        })
        expect(found?.createdAt).toBeGreaterThanOrEqual(before)
        expect(found?.createdAt).toBeLessThanOrEqual(Date.now())
        expect(await found?.status()).toBe('Completed')
        expect(await logOf(worker)).toContain('found\n')
      })

      test('a worker that there is not is not found', async () => {
        expect(await backend.find('task-none-000000000000')).toBeUndefined()
      })

      test('the list is of what exists', async () => {
        expect(await backend.list()).toEqual([])
        const go = join(harness.sharedDir, marker())
        const running = await provision(spec(`until [ -e ${go} ]; do sleep 0.02; done`))
        const { worker: ended } = await run(spec('true'))
        const listed = await backend.list()
        expect(listed.map((worker) => worker.name).toSorted()).toEqual(
          [running.name, ended.name].toSorted(),
        )
        expect(await running.status()).toBe('Running')
        expect(await ended.status()).toBe('Completed')
        await touch(go)
        await running.completion(NEVER)
        await ended.terminate()
        expect((await backend.list()).map((worker) => worker.name)).toEqual([running.name])
      })

      test('a cancelled provisioning makes no worker', async () => {
        const wanted = spec('true')
        await expect(
          backend.provision(wanted, AbortSignal.abort(new Error('cancelled'))),
        ).rejects.toThrow('cancelled')
        expect(await backend.list()).toEqual([])
      })

      test('twenty workers at once each run their own task', async () => {
        const wanted = Array.from({ length: 20 }, (_, index) =>
          spec(`echo "$WORKER_NAME"; exit ${index}`),
        )
        const ends = await Promise.all(wanted.map(run))
        expect(ends.map(({ end }) => end.exitCode)).toEqual(wanted.map((_, index) => index))
        const logs = await Promise.all(ends.map(({ worker }) => logOf(worker)))
        expect(logs).toEqual(wanted.map(({ name }) => `${name}\n`))
      })

      test('check resolves while workers can be had', async () => {
        await expect(backend.check()).resolves.toBeUndefined()
      })
    })

    describe('stopping', () => {
      test('a task that honours TERM ends by itself, and its log stays readable', async () => {
        const ready = join(harness.sharedDir, marker())
        const worker = await provision(
          spec(`trap 'echo tidy; exit 7' TERM; : >${ready}; while :; do sleep 0.02; done`),
        )
        await fileThere(ready)
        await worker.stop()
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 7 })
        expect(await logOf(worker)).toContain('tidy\n')
        expect(await worker.status()).toBe('Completed')
      })

      test('a task that ignores TERM is killed after the grace period', async () => {
        const ready = join(harness.sharedDir, marker())
        const mark = marker()
        const worker = await provision(
          spec(`trap '' TERM; : >${ready}; while :; do sleep ${mark}; done`),
        )
        await fileThere(ready)
        const began = performance.now()
        await worker.stop()
        const tookMs = performance.now() - began
        expect(tookMs).toBeGreaterThanOrEqual(harness.graceMs - 20)
        expect(tookMs).toBeLessThan(harness.graceMs + 3_000)
        expect(await harness.processes(mark)).toEqual([])
        expect((await worker.completion(NEVER)).reason).not.toBe('completed')
      })

      test('stopping is idempotent, also when a task has ended long ago', async () => {
        const { worker, end } = await run(spec('exit 3'))
        await worker.stop()
        await Promise.all([worker.stop(), worker.stop()])
        expect(await worker.completion(NEVER)).toEqual(end)
      })

      test('two stops at once both resolve when the task has ended', async () => {
        const ready = join(harness.sharedDir, marker())
        const mark = marker()
        const worker = await provision(spec(`: >${ready}; exec sleep ${mark}`))
        await fileThere(ready)
        await Promise.all([worker.stop(), worker.stop()])
        expect(await harness.processes(mark)).toEqual([])
        expect(await worker.completion(NEVER)).toMatchObject({ signal: 'SIGTERM' })
      })

      test('a task stopped in the moment it was provisioned ends in bounded time', async () => {
        const mark = marker()
        const worker = await provision(spec(`exec sleep ${mark}`))
        const began = performance.now()
        await worker.stop()
        expect(performance.now() - began).toBeLessThan(harness.graceMs + 3_000)
        expect(await harness.processes(mark)).toEqual([])
        expect((await worker.completion(NEVER)).reason).not.toBe('completed')
      })

      test('a startup script is stopped like a task, which then does not run', async () => {
        const ready = join(harness.sharedDir, marker())
        const mark = marker()
        const worker = await provision(
          spec('echo the task ran', { startupScript: `: >${ready}\nsleep ${mark}\n` }),
        )
        await fileThere(ready)
        await worker.stop()
        expect((await worker.completion(NEVER)).reason).not.toBe('completed')
        expect(await logOf(worker)).not.toContain('the task ran')
        expect(await harness.processes(mark)).toEqual([])
      })
    })

    describe('terminating', () => {
      test('it ends a running task and leaves nothing; again and again', async () => {
        const ready = join(harness.sharedDir, marker())
        const mark = marker()
        const wanted = spec(`: >${ready}; exec sleep ${mark}`)
        const worker = await provision(wanted)
        await fileThere(ready)
        await worker.terminate()
        expect(await harness.processes(mark)).toEqual([])
        expect(await backend.find(wanted.name)).toBeUndefined()
        expect(await backend.list()).toEqual([])
        await worker.terminate()
        await Promise.all([worker.terminate(), worker.terminate()])
        expect(await worker.status()).toBe('Terminating')
      })

      test('two terminations at once both resolve, and leave nothing', async () => {
        const ready = join(harness.sharedDir, marker())
        const mark = marker()
        const worker = await provision(spec(`: >${ready}; exec sleep ${mark}`))
        await fileThere(ready)
        await Promise.all([worker.terminate(), worker.terminate()])
        expect(await harness.processes(mark)).toEqual([])
        expect(await backend.list()).toEqual([])
      })

      test('a name may be used again after it', async () => {
        const wanted = spec('echo "$TURN"', { environment: { TURN: 'one' } })
        const first = await run(wanted)
        expect(await logOf(first.worker)).toBe('one\n')
        await first.worker.terminate()
        wanted.environment.TURN = 'two'
        const second = await run(wanted)
        expect(await logOf(second.worker)).toBe('two\n')
      })
    })

    describe('what a task leaves behind', () => {
      const LEFT = {
        'a child in the background that holds stdout': (mark: string) => `sleep ${mark} & true`,
        'a child that ignores TERM and HUP': (mark: string) =>
          `(trap '' TERM HUP; exec sleep ${mark}) & true`,
        'a child in a session of its own': (mark: string) => `setsid sleep ${mark} & sleep 0.05`,
        'a grandchild in a session of its own, its parents gone': (mark: string) =>
          `setsid sh -c 'sh -c "exec sleep ${mark}" & exit 0'; sleep 0.05`,
        'a child in a session of its own, at another place and home': (mark: string) =>
          `cd /; HOME=/ PATH=/usr/bin:/bin setsid env -u PWD -u OLDPWD sleep ${mark} & sleep 0.05`,
        "a child in the task's group with an empty environment": (mark: string) =>
          `env -i /bin/sleep ${mark} & sleep 0.05`,
        'a child that the task stopped': (mark: string) => `sleep ${mark} & kill -STOP $!`,
        'twenty children': (mark: string) =>
          `for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep ${mark} & done`,
      }

      test.each(Object.entries(LEFT))(
        '%s ends with the task, whose slot then takes the next one',
        async (_, leave) => {
          const mark = marker()
          const { end, worker } = await run(spec(`echo one; ${leave(mark)}; exit 6`))
          expect(end).toMatchObject({ reason: 'exit_code', exitCode: 6 })
          expect(await harness.processes(mark)).toEqual([])
          expect(await logOf(worker)).toMatch(
            /^one\n(\[task-runner\] Ended \d+ process(es)? .*\n)?$/,
          )
          expect((await run(spec('echo two'))).end.reason).toBe('completed')
        },
      )

      test('the child of a killed task ends with it', async () => {
        const mark = marker()
        const ready = join(harness.sharedDir, marker())
        const worker = await provision(
          spec(`setsid sleep ${mark} & sleep ${mark} & : >${ready}; wait`),
        )
        await fileThere(ready)
        await worker.stop()
        expect(await harness.processes(mark)).toEqual([])
      })
    })

    describe('after a restart of the service', () => {
      test('a task that ran on is attached to: its true exit code and its whole log are there', async () => {
        const go = join(harness.sharedDir, marker())
        const wanted = spec(
          `echo before; until [ -e ${go} ]; do sleep 0.02; done; echo after; exit 11`,
        )
        await provision(wanted)
        backend = await harness.reopen()
        const found = await backend.find(wanted.name)
        expect(found).toMatchObject({ name: wanted.name, taskId: wanted.taskId })
        expect(await found?.status()).toBe('Running')
        const end = found?.completion(NEVER)
        await touch(go)
        expect(await end).toMatchObject({ reason: 'exit_code', exitCode: 11 })
        expect(found && (await logOf(found))).toBe('before\nafter\n')
        expect(await found?.status()).toBe('Completed')
      })

      test('a task that ended meanwhile has its true exit code', async () => {
        const wanted = spec('echo whole; exit 12')
        await run(wanted)
        backend = await harness.reopen()
        const found = await backend.find(wanted.name)
        expect(await found?.completion(NEVER)).toMatchObject({ exitCode: 12 })
        expect(found && (await logOf(found))).toBe('whole\n')
      })

      test('provisioning again finds the worker: the script runs once', async () => {
        const runs = join(harness.sharedDir, marker())
        const wanted = spec(`echo ran >>${runs}`)
        await run(wanted)
        backend = await harness.reopen()
        const again = await run(wanted)
        expect(again.end.reason).toBe('completed')
        expect(await text(runs)).toBe('ran\n')
      })

      test('a worker of before can be stopped and terminated', async () => {
        const ready = join(harness.sharedDir, marker())
        const mark = marker()
        const wanted = spec(`: >${ready}; setsid sleep ${mark} & exec sleep ${mark}`)
        await provision(wanted)
        await fileThere(ready)
        backend = await harness.reopen()
        const found = await backend.find(wanted.name)
        await found?.stop()
        expect(await harness.processes(mark)).toEqual([])
        expect(await found?.completion(NEVER)).toMatchObject({ signal: 'SIGTERM' })
        await found?.terminate()
        expect(await backend.list()).toEqual([])
      })

      test('the log of a task of before can be followed to its end', async () => {
        const go = join(harness.sharedDir, marker())
        const wanted = spec(`echo one; until [ -e ${go} ]; do sleep 0.02; done; echo two`)
        await provision(wanted)
        backend = await harness.reopen()
        const found = await backend.find(wanted.name)
        if (!found) throw new Error('the worker is gone')
        let seen = ''
        for await (const chunk of found.follow({ from: 0, signal: NEVER })) {
          seen += chunk
          if (seen === 'one\n') await touch(go)
        }
        expect(seen).toBe('one\ntwo\n')
      })

      test('a log limit still holds', async () => {
        const go = join(harness.sharedDir, marker())
        const wanted = spec(
          `until [ -e ${go} ]; do sleep 0.02; done; while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxx; done`,
          { maxLogBytes: 100_000 },
        )
        await provision(wanted)
        backend = await harness.reopen()
        const found = await backend.find(wanted.name)
        const end = found?.completion(NEVER)
        await touch(go)
        expect((await end)?.reason).toBe('log_limit')
      })
    })
  })
}
