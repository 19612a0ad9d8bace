import { spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  chmodSync,
  chownSync,
  mkdirSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { eventually, finalTask, get, post } from '../helpers/recovery.ts'
import { type Service, startService } from '../helpers/service.ts'
import { INNOCENT, NOBODY, ODDITIES } from '../helpers/tasks-folders.ts'

const isRoot = process.getuid?.() === 0

let folder: string
let tasksDir: string
let service: Service
let count = 0

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-runner-tasks-'))
  chmodSync(folder, 0o755)
  tasksDir = join(folder, 'tasks')
  const dataDir = join(folder, 'data')
  mkdirSync(dataDir)
  if (isRoot) chownSync(dataDir, NOBODY, NOBODY)
  writeFileSync(join(folder, 'outside.sh'), '')
  mkdirSync(tasksDir)
  // Root may read everything: then the service is another user's.
  const env = { DATA_DIR: dataDir, TASKS_DIR: tasksDir }
  service = await startService(env, isRoot ? NOBODY : undefined)
})
beforeEach(() => {
  rmSync(tasksDir, { recursive: true, force: true })
  mkdirSync(tasksDir, { mode: 0o755 })
  writeFileSync(join(tasksDir, INNOCENT), 'echo innocent\n')
})
afterAll(async () => {
  await service.kill()
  await rm(folder, { recursive: true })
})

async function submit(file: string): Promise<{ id: string; status: number; message: unknown }> {
  count += 1
  const id = `task-${count}`
  const request = { task_id: id, task_file_name: file, worker_config: {} }
  const { status, body } = await post(service, '/task-runner', request)
  return { id, status, message: body.message }
}

async function logOf(id: string): Promise<string> {
  return (await fetch(`${service.url}/tasks/${id}/logs`)).text()
}

describe.skipIf(!isRoot)('a tasks folder with', () => {
  for (const [name, oddity] of Object.entries(ODDITIES)) {
    const { make, file, leftOut = [], listed = [], warned = [], outcome } = oddity
    const notes = leftOut.map(
      (what) => `[task-runner] Left out of the copy of the tasks folder: ${what}\n`,
    )
    test(`${name} runs other tasks, and says what is left out`, async () => {
      make(tasksDir)
      const { id, status } = await submit(INNOCENT)
      expect(status).toBe(200)
      expect(await finalTask(service, id)).toMatchObject({ status: 'succeeded', message: null })
      expect(await logOf(id)).toBe(`${notes.join('')}innocent\n`)

      const { body } = await get(service, '/task-files')
      expect(body).toEqual({ task_files: [INNOCENT, ...listed].toSorted() })

      const ready = await get(service, '/health/ready')
      const warnings = leftOut.map((what) => `Tasks get no copy of ${what}`)
      expect(ready).toMatchObject({ status: 200, body: { warnings: [...warned, ...warnings] } })
    })

    test(`${name}: a request for ${file} gets a clear answer`, async () => {
      make(tasksDir)
      const { id, status, message } = await submit(file)
      if (typeof outcome === 'object' && 'status' in outcome) {
        expect({ status, message }).toEqual(outcome)
        return
      }
      expect(status).toBe(200)
      expect(await finalTask(service, id)).toMatchObject(
        outcome === 'runs'
          ? { status: 'succeeded', reason: 'completed' }
          : { status: 'failed', reason: 'startup_failed', message: outcome.fails },
      )
    })
  }
})

test.skipIf(!isRoot)(
  'what nobody but root may read is told of up to a number of warnings',
  async () => {
    for (let index = 0; index < 30; index += 1) {
      writeFileSync(join(tasksDir, `secret-${index}`), '', { mode: 0o600 })
    }
    const { body } = await get(service, '/health/ready')
    expect(body.warnings).toHaveLength(21)
    expect(Object(body.warnings).at(-1)).toBe('Tasks get no copy of 10 more')
  },
)

test.skipIf(!isRoot)(
  'a tasks folder that may be listed but not entered is one that cannot be read',
  async () => {
    chmodSync(tasksDir, 0o744)
    const message = 'The tasks folder cannot be read (EACCES)'
    expect(await submit(INNOCENT)).toMatchObject({ status: 503, message })
    const ready = await get(service, '/health/ready')
    expect(ready).toMatchObject({ status: 503, body: { parts: { tasks_folder: message } } })
  },
)

test('a task file that is removed after its task was accepted fails it, in clear words', async () => {
  writeFileSync(join(tasksDir, 'wait.sh'), `while [ -e ${folder}/wait ]; do sleep 0.02; done\n`)
  writeFileSync(join(folder, 'wait'), '')
  for (const name of ['gone.sh', 'gone.py']) writeFileSync(join(tasksDir, name), '')
  // All that run at a time, so that what comes next waits.
  for (let index = 0; index < 64; index += 1) await submit('wait.sh')
  const ids = [(await submit('gone.sh')).id, (await submit('gone.py')).id]
  for (const name of ['gone.sh', 'gone.py']) rmSync(join(tasksDir, name))
  // One that went just now could be about to come back.
  utimesSync(tasksDir, 1, 1)
  rmSync(join(folder, 'wait'))
  for (const [index, name] of ['gone.sh', 'gone.py'].entries()) {
    expect(await finalTask(service, ids[index] ?? '')).toMatchObject({
      status: 'failed',
      reason: 'startup_failed',
      message: `The task file "${name}" is no longer in the tasks folder`,
    })
  }
})

test('while the tasks folder is away, a request is refused with 503, and with its folder back taken', async () => {
  renameSync(tasksDir, `${tasksDir}.away`)
  const refusals = [INNOCENT, 'sub/inner.sh', 'nothing.sh'].map((file) => submit(file))
  for (const { status, message } of await Promise.all(refusals)) {
    expect({ status, message }).toEqual({
      status: 503,
      message: 'The tasks folder cannot be read (ENOENT)',
    })
  }
  expect(await get(service, '/task-files')).toMatchObject({ status: 503 })
  expect(await get(service, '/health/ready')).toMatchObject({
    status: 503,
    body: { parts: { tasks_folder: 'The tasks folder cannot be read (ENOENT)' } },
  })
  renameSync(`${tasksDir}.away`, tasksDir)
  const { id, status } = await submit(INNOCENT)
  expect(status).toBe(200)
  expect(await finalTask(service, id)).toMatchObject({ status: 'succeeded' })
})

test('100 tasks succeed while others work in the tasks folder with sed and git', async () => {
  const script = `
    set -e; cd "$1"; umask 022
    git init -q . ; git config user.email a@localhost; git config user.name a
    mkdir -p lib; for n in $(seq 60); do echo one >lib/f$n; done; git add lib; git commit -qm one
    git checkout -qb two; for n in $(seq 60); do echo two >lib/f$n; echo >lib/g$n; done
    git add lib; git commit -qm two; echo begun
    while [ ! -e "$2" ]; do
      sed -i 's/a/a/' lib/f*; git checkout -qf -; rm -rf lib.new; cp -r lib lib.new; rm -rf lib.old
      mv lib.new lib.old
    done`
  const stop = join(folder, 'stop')
  const working = spawn('sh', ['-c', script, 'sh', tasksDir, stop], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = once(working, 'exit')
  await once(working.stdout, 'data')
  try {
    const ids = await Promise.all(
      Array.from({ length: 100 }, async () => (await submit(INNOCENT)).id),
    )
    for (const id of ids) {
      await eventually(async () =>
        expect((await get(service, `/tasks/${id}`)).body).toMatchObject({ status: 'succeeded' }),
      )
      // What goes away while somebody works in the folder is nothing to tell of.
      expect(await logOf(id)).toBe('innocent\n')
    }
  } finally {
    writeFileSync(stop, '')
    await ended
  }
  expect(await ended).toEqual([0, null])
}, 90_000)
