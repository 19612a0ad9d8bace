import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { cpSync, renameSync } from 'node:fs'
import { chmod, cp, mkdir, readdir, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { UnavailableError } from '../../src/core/errors.ts'
import type { Worker, WorkerSpec } from '../../src/core/ports.ts'
import { workerNameFor } from '../../src/core/task.ts'
import { localEnvironment } from '../../src/workers/local/environment.ts'
import {
  type Contents,
  fill,
  makeDirectories,
  type WorkerRecord,
} from '../../src/workers/local/folders.ts'
import { identify, type ProcessIdentity } from '../../src/workers/local/processes.ts'
import { FIXTURE_TASKS } from '../helpers/app.ts'
import { kill, type LocalHarness, openDisposable, openLocal, slotShells } from '../helpers/local.ts'
import { needs } from '../helpers/needs.ts'
import { processesWith } from '../helpers/processes.ts'
import {
  describeWorkerBackend,
  fileThere,
  LARGE_ENVIRONMENT,
  logOf,
  marker,
  NEVER,
  spec,
  text,
  touch,
} from './contract.ts'

/** Makes a worker's folder as a service made it before, which was killed then. */
function prepare(folder: string, contents: Contents): void {
  const draft = `${dirname(folder)}-draft`
  makeDirectories(draft)
  cpSync(FIXTURE_TASKS, join(draft, 'tasks'), { recursive: true })
  fill(draft, contents)
  renameSync(draft, folder)
}

describeWorkerBackend('LocalBackend', openLocal)

describe('local workers', () => {
  let harness: LocalHarness

  beforeAll(async () => {
    harness = await openLocal()
  })
  afterEach(() => harness.clean())
  afterAll(() => harness.dispose())

  const folderOf = (name: string) => join(harness.settings.workersDir, name)

  function recordOf(wanted: WorkerSpec, slot: ProcessIdentity): WorkerRecord {
    const { name, taskId, maxLogBytes } = wanted
    return { name, taskId, size: null, createdAt: Date.now(), maxLogBytes, slot }
  }

  function contentsOf(wanted: WorkerSpec, slot: ProcessIdentity): Contents {
    return {
      record: recordOf(wanted, slot),
      taskFile: wanted.taskFileName,
      files: [],
      notes: [],
    }
  }

  async function slotOf(name: string): Promise<ProcessIdentity> {
    const record = JSON.parse(await text(join(folderOf(name), 'worker.json'))) as WorkerRecord
    return record.slot
  }

  async function run(wanted: WorkerSpec): Promise<Worker> {
    const worker = await harness.backend.provision(wanted, NEVER)
    await worker.completion(NEVER)
    return worker
  }

  test('close lets go at once while a task runs, and the task goes on', async () => {
    const go = join(harness.sharedDir, marker())
    const done = join(harness.sharedDir, marker())
    await harness.backend.provision(
      spec(`until [ -e ${go} ]; do sleep 0.02; done; : >${done}`),
      NEVER,
    )
    try {
      await harness.reopen()
    } finally {
      await touch(go)
      await fileThere(done)
    }
  })

  describe('a service that is killed', () => {
    test('a task goes on, and the next service has its true exit code and whole log', async () => {
      const go = join(harness.sharedDir, marker())
      const wanted = spec(
        `echo before; until [ -e ${go} ]; do sleep 0.02; done; echo after; exit 11`,
      )
      await kill(await harness.service(wanted))
      const worker = await harness.backend.find(wanted.name)
      expect(await worker?.status()).toBe('Running')
      const end = worker?.completion(NEVER)
      await touch(go)
      expect(await end).toMatchObject({ reason: 'exit_code', exitCode: 11 })
      expect(worker && (await logOf(worker))).toBe('before\nafter\n')
    })

    test.each(['SEGV', 'KILL', 'TERM'])(
      'a task that SIG%s ends afterwards has that signal for its outcome',
      async (signal) => {
        const go = join(harness.sharedDir, marker())
        const wanted = spec(
          `until [ -e ${go} ]; do sleep 0.02; done; kill -${signal} $$; exec sleep 1000`,
        )
        await kill(await harness.service(wanted))
        const worker = await harness.backend.find(wanted.name)
        const end = worker?.completion(NEVER)
        await touch(go)
        expect(await end).toMatchObject({ reason: 'signal', signal: `SIG${signal}` })
      },
    )

    test.each([
      ['in a session of its own', (mark: string) => `setsid sleep ${mark}`],
      ['in its group, with an empty environment', (mark: string) => `env -i /bin/sleep ${mark}`],
    ])('what a task left %s while nobody looked is ended with its worker', async (_, leave) => {
      const go = join(harness.sharedDir, marker())
      const mark = marker()
      const wanted = spec(`until [ -e ${go} ]; do sleep 0.02; done; ${leave(mark)} & sleep 0.05`)
      await kill(await harness.service(wanted))
      const slot = await slotOf(wanted.name)
      await touch(go)
      await expect.poll(() => identify(slot.pid), { timeout: 10_000, interval: 10 }).toBeUndefined()
      try {
        const worker = await harness.backend.find(wanted.name)
        expect(await worker?.completion(NEVER)).toMatchObject({ reason: 'completed' })
        await worker?.terminate()
        expect(await processesWith(mark)).toEqual([])
      } finally {
        await killAll(mark)
      }
    })

    test.each([
      ['with its name', (mark: string) => `exec sleep ${mark}`],
      ['with an empty environment', (mark: string) => `exec env -i /bin/sleep ${mark}`],
    ])(
      'a worker whose slot was killed meanwhile is lost, and its task (%s) ends with it',
      async (_, task) => {
        const ready = join(harness.sharedDir, marker())
        const mark = marker()
        const wanted = spec(`: >${ready}; ${task(mark)}`)
        await kill(await harness.service(wanted))
        await fileThere(ready)
        await expect.poll(() => processesWith(mark), { timeout: 10_000 }).not.toEqual([])
        const slot = await slotOf(wanted.name)
        process.kill(slot.pid, 'SIGKILL')
        await expect.poll(() => identify(slot.pid), { timeout: 10_000 }).toBeUndefined()
        try {
          const worker = await harness.backend.find(wanted.name)
          expect(await worker?.completion(NEVER)).toMatchObject({
            reason: 'worker_lost',
            exitCode: null,
          })
          await worker?.stop()
          expect(await processesWith(mark)).toEqual([])
        } finally {
          await killAll(mark)
        }
      },
    )
  })

  test('a worker whose slot is killed from outside is lost; no process is left, and others go on', async () => {
    const ready = join(harness.sharedDir, marker())
    const go = join(harness.sharedDir, marker())
    const mark = marker()
    const wanted = spec(`env -i /bin/sleep ${mark} & setsid sleep ${mark} & : >${ready}; wait`)
    const other = await harness.backend.provision(
      spec(`until [ -e ${go} ]; do sleep 0.02; done; exit 3`),
      NEVER,
    )
    const worker = await harness.backend.provision(wanted, NEVER)
    await fileThere(ready)
    process.kill((await slotOf(wanted.name)).pid, 'SIGKILL')
    expect(await worker.completion(NEVER)).toMatchObject({ reason: 'worker_lost', exitCode: null })
    expect(await processesWith(mark)).toEqual([])
    await touch(go)
    expect(await other.completion(NEVER)).toMatchObject({ exitCode: 3 })
    await run(spec('true'))
  })

  test('a task that kills its whole process group is lost, and the next task runs', async () => {
    const worker = await harness.backend.provision(spec('kill -9 0; sleep 1000'), NEVER)
    expect(await worker.completion(NEVER)).toMatchObject({ reason: 'worker_lost' })
    const next = await harness.backend.provision(spec('exit 8'), NEVER)
    expect(await next.completion(NEVER)).toMatchObject({ exitCode: 8 })
  })

  test('the next task takes the slot of one that has ended', async () => {
    const [one, two, three] = [spec('true'), spec('sleep 1000 & exit 1'), spec('true')]
    for (const wanted of [one, two, three]) await run(wanted)
    expect(await slotOf(two.name)).toEqual(await slotOf(one.name))
    expect(await slotOf(three.name)).toEqual(await slotOf(one.name))
  })

  test('provisioning one name three times at once takes one slot', async () => {
    await using other = await openDisposable({})
    const before = (await slotShells()).length
    const wanted = spec('true', { environment: LARGE_ENVIRONMENT })
    const workers = await Promise.all([1, 2, 3].map(() => other.backend.provision(wanted, NEVER)))
    for (const worker of workers) await worker.completion(NEVER)
    expect((await slotShells()).length - before).toBe(1)
  })

  test('ending what a task left behind costs little, however late its zombies are reaped', async () => {
    await run(spec('true'))
    const worker = await harness.backend.provision(
      spec('sleep 1000 >/dev/null 2>&1 & setsid sleep 1000 >/dev/null 2>&1 & date +%s%3N'),
      NEVER,
    )
    await worker.completion(NEVER)
    const [time, ended] = (await logOf(worker)).split('\n')
    expect(Date.now() - Number(time)).toBeLessThan(1_000)
    // One may have the name of what started it yet.
    expect(ended).toMatch(/^\[task-runner\] Ended 2 processes that were still running: \w/)
  })

  test('a file whose interpreter is missing fails with a log that names it', async () => {
    const worker = await harness.backend.provision(
      spec('pass', { taskFileName: 'w-eval.py' }),
      NEVER,
    )
    const end = await worker.completion(NEVER)
    expect(end).toMatchObject({ reason: 'exit_code', exitCode: 127 })
    expect(end.message).toContain('interpreter')
    expect(await logOf(worker)).toContain('missing-python')
  })

  test('a task that changes its log file for a folder still ends', async () => {
    const worker = await harness.backend.provision(
      spec('cd ../; rm log; mkdir log; exit 2', { maxLogBytes: 1_000_000 }),
      NEVER,
    )
    expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 2 })
  })

  test('the log of a task that ended without us is whole, though its reader still writes', async () => {
    const wanted = spec('true')
    const folder = folderOf(wanted.name)
    const gate = join(harness.sharedDir, marker())
    const slot = { pid: 2 ** 22 + 1, startedAt: 'never' }
    const script = `until [ -e ${gate} ]; do sleep 0.02; done; echo the end >>${folder}/log`
    const reader = spawn('sh', ['-c', script], { stdio: 'ignore' })
    const identity = identify(reader.pid ?? 0)
    if (!identity) throw new Error('no process')
    const contents = contentsOf(wanted, slot)
    prepare(folder, { ...contents, record: { ...contents.record, reader: identity } })
    await writeFile(join(folder, 'exit'), 'task 0\n')
    const worker = await harness.backend.find(wanted.name)
    const log = worker?.completion(NEVER).then(() => logOf(worker))
    // Answered after a turn of the thread that waits for the reader.
    await harness.backend.list()
    await touch(gate)
    expect(await log).toBe('the end\n')
  })

  describe('a worker that was made, but whose task was not started', () => {
    test('is provisioned anew when its slot is gone: the script runs once', async () => {
      const runs = join(harness.sharedDir, marker())
      const wanted = spec(`echo ran >>${runs}`)
      prepare(folderOf(wanted.name), contentsOf(wanted, { pid: 2 ** 22 + 1, startedAt: 'never' }))
      const worker = await run(wanted)
      expect(await worker.completion(NEVER)).toMatchObject({ reason: 'completed' })
      await run(wanted)
      expect(await text(runs)).toBe('ran\n')
    })

    test('is provisioned anew, once its slot has gone without starting it', async () => {
      const runs = join(harness.sharedDir, marker())
      const wanted = spec(`echo ran >>${runs}`)
      const slot = spawn('sleep', ['1000'])
      const identity = identify(slot.pid ?? 0)
      if (!identity) throw new Error('no process')
      prepare(folderOf(wanted.name), contentsOf(wanted, identity))
      const provisioning = harness.backend.provision(wanted, NEVER)
      // Answered after a turn of the thread that `provision` waits on.
      await harness.backend.list()
      await expect(stat(runs)).rejects.toThrow('ENOENT')
      slot.kill('SIGKILL')
      const worker = await provisioning
      expect(await worker.completion(NEVER)).toMatchObject({ reason: 'completed' })
      expect(await text(runs)).toBe('ran\n')
    })

    test('is attached to when its slot starts it after all', async () => {
      const runs = join(harness.sharedDir, marker())
      const wanted = spec(`echo ran >>${runs}`)
      const slot = spawn('sleep', ['1000'])
      const identity = identify(slot.pid ?? 0)
      if (!identity) throw new Error('no process')
      try {
        prepare(folderOf(wanted.name), contentsOf(wanted, identity))
        const provisioning = harness.backend.provision(wanted, NEVER)
        await harness.backend.list()
        await writeFile(join(folderOf(wanted.name), 'exit'), 'begun\n')
        const worker = await provisioning
        await writeFile(join(folderOf(wanted.name), 'exit'), 'task 21\n')
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 21 })
        await expect(stat(runs)).rejects.toThrow('ENOENT')
      } finally {
        slot.kill('SIGKILL')
      }
    })

    test('is given up at once when the time for it is over, and never runs later', async () => {
      const runs = join(harness.sharedDir, marker())
      const wanted = spec(`echo ran >>${runs}`)
      const slot = spawn('sleep', ['1000'], { detached: true })
      const identity = identify(slot.pid ?? 0)
      if (!identity) throw new Error('no process')
      prepare(folderOf(wanted.name), contentsOf(wanted, identity))
      const over = new AbortController()
      const provisioning = harness.backend.provision(wanted, over.signal)
      await harness.backend.list()
      over.abort(new Error('over'))
      await expect(provisioning).rejects.toThrow('over')
      await (await harness.backend.find(wanted.name))?.terminate()
      // Whatever the thread still had in hand for it has had its turns when another task has run.
      const other = await run(spec('true'))
      expect(await other.completion(NEVER)).toMatchObject({ reason: 'completed' })
      await other.terminate()
      expect(await harness.backend.list()).toEqual([])
      await expect(stat(runs)).rejects.toThrow('ENOENT')
    })

    test('a folder that was half made is gone after a restart, and its name can be used', async () => {
      const wanted = spec('exit 5')
      await mkdir(folderOf(wanted.name))
      await writeFile(join(folderOf(wanted.name), 'log'), 'half')
      expect(await harness.backend.list()).toEqual([])
      await harness.reopen()
      expect(await harness.backend.list()).toEqual([])
      expect(await readdir(harness.settings.workersDir)).toEqual([])
      const worker = await harness.backend.provision(wanted, NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
    })
  })

  test("a worker's folder and files are for its owner alone", async () => {
    const wanted = spec('true', { startupScript: 'true' })
    await run(wanted)
    const modes: Record<string, string> = {}
    const folder = folderOf(wanted.name)
    for (const path of [harness.settings.workersDir, folder]) {
      expect(((await stat(path)).mode & 0o777).toString(8)).toBe('700')
    }
    for (const name of await readdir(folder)) {
      modes[name] = ((await stat(join(folder, name))).mode & 0o777).toString(8)
    }
    expect(modes).toEqual({
      ...{ home: '700', tmp: '700', tasks: '700' },
      ...{ 'worker.json': '600', log: '600', exit: '600', 'startup.sh': '600' },
      'package.json': '600',
    })
  })

  test('no secret of a task is in a file of its worker', async () => {
    const secret = `secret-${marker()}`
    const wanted = spec('true', { environment: { SECRET: secret } })
    await run(wanted)
    const folder = folderOf(wanted.name)
    for (const name of ['worker.json', 'log', 'exit']) {
      expect(await text(join(folder, name))).not.toContain(secret)
    }
  })

  test('no secret of a task is in the arguments of a process', async () => {
    const secret = `secret-${marker()}`
    const go = join(harness.sharedDir, marker())
    const ready = join(harness.sharedDir, marker())
    for (const startup of [{}, { startupScript: 'true' }]) {
      await rm(go, { force: true })
      await rm(ready, { force: true })
      const wanted = spec(`: >${ready}; until [ -e ${go} ]; do sleep 0.02; done`, {
        ...startup,
        environment: { SECRET: secret },
      })
      const worker = await harness.backend.provision(wanted, NEVER)
      await fileThere(ready)
      const found = await processesWith(secret)
      expect(found.length).toBeGreaterThan(0)
      expect(found.filter((line) => line.includes(secret))).toEqual([])
      await touch(go)
      await worker.completion(NEVER)
    }
  })

  test('the log tells which wishes have no effect here', async () => {
    const worker = await run(spec('true', { image: 'practicus', size: 'Large', notes: ['first'] }))
    expect(await logOf(worker)).toBe(
      '[task-runner] first\n' +
        '[task-runner] worker_image "practicus" is not used by local workers\n' +
        '[task-runner] worker_size "Large" is not enforced on local workers\n',
    )
  })

  test('a worker that lost its log rejects when asked for it', async () => {
    const wanted = spec('rm ../log')
    const worker = await run(wanted)
    await expect(worker.logs({ maxBytes: 10 })).rejects.toThrow('ENOENT')
  })

  test('the path of TMPDIR is short, however long those of the data folder and the task id are', async () => {
    const workersDir = join(harness.sharedDir, marker(), 'a'.repeat(80), 'workers')
    await using other = await openDisposable({ workersDir })
    const wanted = spec('', {
      taskFileName: 'w-tmpdir.sh',
      name: workerNameFor(`a-task-${'0123456789'.repeat(5)}`),
    })
    const worker = await other.backend.provision(wanted, NEVER)
    const end = await worker.completion(NEVER)
    const log = await logOf(worker)
    expect({ end, log }).toMatchObject({ end: { reason: 'completed' } })
    const [path = '', kind, real, socket] = log.split('\n')
    expect(path.length).toBeLessThanOrEqual(40)
    expect([kind, real]).toEqual(['directory', join(workersDir, wanted.name, 'tmp')])
    expect(socket).toBe('a socket works')
    const root = dirname(dirname(path))
    await worker.terminate()
    expect(await readdir(root)).toEqual([])
    await other.backend.close()
    expect(await stat(root).catch((err) => err.code)).toBe('ENOENT')
  })

  test('how JavaScript runs is decided by the tasks folder, not by what lies above the data folder', async () => {
    const root = join(harness.sharedDir, marker())
    const tasksDir = join(root, 'tasks')
    await mkdir(tasksDir, { recursive: true })
    const write = (name: string, content: string) => writeFile(join(root, name), content)
    await write('package.json', '{"type":"module"}')
    const common = "const fs = require('fs'); console.log(typeof fs, require.main === module)\n"
    const module = "import fs from 'node:fs'; console.log(typeof fs, typeof require)\n"
    await write('tasks/common.js', common)
    await write('tasks/common.cjs', common)
    await write('tasks/module.js', module)
    await write('tasks/module.ts', module)
    await write('tasks/breaks.sh', 'echo "{\\"type\\":\\"module\\"}" >../package.json')
    await using other = await openDisposable({ tasksDir, workersDir: join(root, 'data/workers') })
    const log = async (taskFileName: string, more: Partial<WorkerSpec> = {}) => {
      const worker = await other.backend.provision(spec('', { taskFileName, ...more }), NEVER)
      await worker.completion(NEVER)
      const log = await logOf(worker)
      await worker.terminate()
      return log
    }
    for (const more of [{}, { startupScript: 'true' }]) {
      expect(await log('common.js', more)).toBe('object true\n')
      expect(await log('common.cjs', more)).toBe('object true\n')
      // And no warning that a "type" is missing.
      expect(await log('module.js', more)).toBe('object undefined\n')
      expect(await log('module.ts', more)).toBe('object undefined\n')
      await log('breaks.sh', more)
    }
    await write('tasks/package.json', '{"type":"module"}')
    expect(await log('common.js')).toContain('require is not defined')
  })

  describe('pip', () => {
    const PROBE = 'task-runner-probe'
    /** Makes a wheel with a module and a program: nothing is fetched, nothing built. */
    const makeWheel = `import sys, zipfile
info = 'task_runner_probe-1.0.dist-info/'
with zipfile.ZipFile('task_runner_probe-1.0-py3-none-any.whl', 'w') as wheel:
    wheel.writestr('task_runner_probe.py', 'def main(): print(__file__)')
    wheel.writestr(info + 'METADATA', 'Metadata-Version: 2.1\\nName: ${PROBE}\\nVersion: 1.0\\n')
    wheel.writestr(info + 'WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')
    wheel.writestr(info + 'entry_points.txt', '[console_scripts]\\n${PROBE} = task_runner_probe:main\\n')
    wheel.writestr(info + 'RECORD', '')
`

    needs('python3-pip')(
      'what a startup script installs lands in the home of its worker alone, and the task finds it',
      async () => {
        const install = `set -e\n/usr/bin/python3 - <<'END'\n${makeWheel}END\n/usr/bin/python3 -m pip install -q --no-index --disable-pip-version-check ./*.whl\n`
        const wanted = spec(
          `${PROBE}; /usr/bin/python3 -c 'import task_runner_probe as p; p.main()'`,
          {
            startupScript: install,
          },
        )
        const worker = await run(wanted)
        const end = await worker.completion(NEVER)
        const log = await logOf(worker)
        expect({ end, log }).toMatchObject({ end: { reason: 'completed' } })
        const home = join(harness.settings.workersDir, wanted.name, 'home')
        const lines = log.trim().split('\n').slice(-2)
        for (const line of lines) {
          expect(line.startsWith(join(home, '.local/lib/python'))).toBe(true)
        }
        const next = await run(spec(`! command -v ${PROBE}`))
        expect(await next.completion(NEVER)).toMatchObject({ reason: 'completed' })
        const other = await run(
          spec('echo "$PIP_USER|$PIP_BREAK_SYSTEM_PACKAGES"', {
            environment: { PIP_USER: '0', PIP_BREAK_SYSTEM_PACKAGES: '0' },
          }),
        )
        expect(await logOf(other)).toBe('0|0\n')
      },
    )

    test('only root is made to install there: with PIP_USER pip refuses to install into a venv', () => {
      const base = { PATH: '/usr/bin:/bin', PIP_BREAK_SYSTEM_PACKAGES: '0' }
      const places = { home: '/w/home', tmp: '/w/tmp' }
      const common = {
        PYTHONUNBUFFERED: '1',
        PIP_BREAK_SYSTEM_PACKAGES: '0',
        PATH: '/w/home/.local/bin:/usr/bin:/bin',
        HOME: '/w/home',
        TMPDIR: '/w/tmp',
      }
      expect(localEnvironment(base, places, false)).toEqual(common)
      expect(localEnvironment(base, places, true)).toEqual({ ...common, PIP_USER: '1' })
    })
  })

  describe('the copy of the tasks folder', () => {
    test('links inside it lead to the copy, links out of it are not there, nor is .git; packages are linked', async () => {
      const folder = join(harness.sharedDir, marker(), 'tasks')
      await mkdir(join(folder, 'sub'), { recursive: true })
      await mkdir(join(folder, '.git'))
      await mkdir(join(folder, 'node_modules'))
      await writeFile(join(folder, '.git', 'config'), 'a token')
      await writeFile(join(folder, 'node_modules', 'large'), '')
      await writeFile(join(folder, 'sub', 'data.txt'), 'the data')
      await writeFile(join(folder, '..', 'outside'), 'outside')
      await symlink('sub/data.txt', join(folder, 'inside'))
      await symlink('../outside', join(folder, 'out'))
      await symlink('/etc/passwd', join(folder, 'absolute'))
      await symlink('.', join(folder, 'self'))
      await symlink('nowhere', join(folder, 'dangling'))
      await cp(join(FIXTURE_TASKS, 'w-eval.sh'), join(folder, 'sub', 'w-eval.sh'))
      const link = join(folder, '..', 'link-to-tasks')
      await symlink('tasks', link)

      await using other = await openDisposable({ tasksDir: link })
      const wanted = spec('pwd; ls -A .; cat inside; rm inside; echo changed >sub/data.txt', {
        taskFileName: 'sub/w-eval.sh',
      })
      const worker = await other.backend.provision(wanted, NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ reason: 'completed' })
      const copy = join(other.settings.workersDir, wanted.name, 'tasks')
      expect(await logOf(worker)).toBe(`${copy}\ninside\nnode_modules\nself\nsub\nthe data`)
      expect(await text(join(folder, 'sub', 'data.txt'))).toBe('the data')
      expect(await text(join(folder, 'inside'))).toBe('the data')
    })

    test('a tasks folder that is missing leaves no folder, no worker and no slot behind', async () => {
      await using other = await openDisposable({ tasksDir: join(harness.sharedDir, 'missing') })
      const before = (await slotShells()).length
      for (let turn = 0; turn < 3; turn += 1) {
        await expect(other.backend.provision(spec('true'), NEVER)).rejects.toThrow(
          new UnavailableError('The tasks folder cannot be read (ENOENT)'),
        )
      }
      expect((await slotShells()).length - before).toBeLessThanOrEqual(1)
      expect(await other.backend.list()).toEqual([])
      expect(await readdir(other.settings.workersDir)).toEqual([])
    })

    test('a script with Windows line ends is told of in the log', async () => {
      const folder = join(harness.sharedDir, marker(), 'tasks')
      await mkdir(folder, { recursive: true })
      await writeFile(join(folder, 'windows.sh'), 'echo hi\r\n')
      await using other = await openDisposable({ tasksDir: folder })
      const worker = await other.backend.provision(spec('', { taskFileName: 'windows.sh' }), NEVER)
      await worker.completion(NEVER)
      expect(await logOf(worker)).toContain('CRLF')
    })
  })

  test('a folder with directories that nobody may enter is removed all the same', async () => {
    const folder = join(harness.sharedDir, 'closed')
    await mkdir(join(folder, 'a', 'b', 'c'), { recursive: true })
    await writeFile(join(folder, 'a', 'b', 'c', 'file'), '')
    await symlink('/', join(folder, 'a', 'b', 'root'))
    for (const path of ['a/b/c', 'a/b', 'a']) await chmod(join(folder, path), 0o000)
    const module = fileURLToPath(new URL('../../src/workers/local/removal.ts', import.meta.url))
    // Root may enter everything: then it is another user who has to manage.
    const uid = process.getuid?.() === 0 ? 65_534 : undefined
    if (uid !== undefined) {
      const owned = spawn('chown', ['-hR', String(uid), folder])
      expect(await once(owned, 'exit')).toEqual([0, null])
      for (const path of [harness.sharedDir, join(harness.sharedDir, '..')]) {
        await chmod(path, 0o777)
      }
    }
    const script = `
      const { removeIfSmall } = await import(${JSON.stringify(module)})
      if (!removeIfSmall(${JSON.stringify(folder)})) throw new Error('something is left')`
    const removing = spawn(process.execPath, ['--input-type=module', '-e', script], {
      stdio: ['ignore', 'ignore', 'pipe'],
      ...(uid === undefined ? {} : { uid, gid: uid }),
    })
    let complaints = ''
    removing.stderr.on('data', (chunk) => {
      complaints += chunk
    })
    expect(await once(removing, 'close'), complaints).toEqual([0, null])
    await expect(stat(folder)).rejects.toThrow('ENOENT')
    expect(await stat('/etc/passwd')).toBeDefined()
  })
})

async function killAll(mark: string): Promise<void> {
  for (const left of await processesWith(mark)) process.kill(Number.parseInt(left, 10), 9)
}
