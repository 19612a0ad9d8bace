/** The machine's troubles and the tasks' own, on local workers. */
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { chmod, cp, mkdir, readdir, readFile, rename, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, type TestContext, test, vi } from 'vitest'
import { UnavailableError } from '../../src/core/errors.ts'
import { WorkerError } from '../../src/core/ports.ts'
import {
  classified,
  FAILURES,
  type FailureKind,
  LocalFailure,
  toCoreError,
} from '../../src/workers/local/failures.ts'
import { LocalBackend } from '../../src/workers/local/local-backend.ts'
import { LocalWorkers } from '../../src/workers/local/local-workers.ts'
import { isAlive } from '../../src/workers/local/processes.ts'
import { removeTree } from '../../src/workers/local/removal.ts'
import { openDisposable } from '../helpers/local.ts'
import { mountSmallDisk } from '../helpers/small-disk.ts'
import { QUIET } from '../helpers/stores.ts'
import { fileThere, logOf, marker, NEVER, spec, touch } from './contract.ts'

const TIMEOUT_MS = 60_000
const HELPER = fileURLToPath(new URL('../helpers/starved-service.ts', import.meta.url))
const NOBODY = 65_534

const withCode = (code: string) => Object.assign(new Error(`${code}: it failed`), { code })

describe('a failure of local workers', () => {
  const kinds = Object.keys(FAILURES) as FailureKind[]
  test.each(kinds.map((kind) => [kind, FAILURES[kind].fault] as const))(
    'of kind %s is %s, also when it comes from the thread, and says why',
    (kind, fault) => {
      const failure = new LocalFailure(kind, { cause: withCode('EODD') })
      // What is left of an error that another thread sent.
      const received = Object.assign(new Error(failure.message), { kind: failure.kind })
      const error = toCoreError(received)
      expect((error as Error).message).toMatch(/^(The|No|Another) /)
      expect((error as Error).message).toContain('(EODD)')
      const expected = {
        ours: () => expect(error).toBeInstanceOf(UnavailableError),
        task: () => expect(error).toMatchObject({ name: 'WorkerError', reason: 'startup_failed' }),
        lost: () => expect(error).toBe(received),
      }
      expected[fault]()
    },
  )

  test.each([
    ...['ENOSPC', 'EDQUOT', 'EROFS', 'EIO', 'ENODEV', 'ESTALE'],
    ...['EMFILE', 'ENFILE', 'EAGAIN', 'ENOMEM'],
  ])('of the system with %s is ours', (code) => {
    expect(toCoreError(classified(withCode(code)))).toBeInstanceOf(UnavailableError)
  })

  test('that nobody thought of is neither', () => {
    const odd = withCode('EODD')
    expect(toCoreError(classified(odd))).toBe(odd)
  })
})

describe('without', () => {
  test.each([
    ['file descriptors', ['--nofile=256'], 'descriptors', /descriptors left \(EMFILE\)/],
    ['processes', ['--nproc=40'], 'processes', /No process could be started/],
  ])(
    '%s, tasks that run end with their true outcome, others are not started, and then they are',
    async (_, limits, want, words) => {
      await using harness = await openDisposable({})
      // Root has no limit of processes.
      const folder = join(harness.sharedDir, 'other')
      await mkdir(folder)
      for (const path of [folder, harness.sharedDir, join(harness.sharedDir, '..')]) {
        await chmod(path, 0o777)
      }
      // Threads count as processes, and every user has a count: this one has its own.
      const uid = 40_000 + (Number(marker()) % 20_000)
      const settings = { ...harness.settings, workersDir: join(folder, 'workers') }
      const options = JSON.stringify({ settings, want, spec: spec('') })
      const child = spawn('prlimit', [...limits, process.execPath, HELPER, options], {
        stdio: ['ignore', 'pipe', 'pipe'],
        ...(process.getuid?.() === 0 ? { uid, gid: uid } : {}),
      })
      const [said, complaints] = await Promise.all([text(child.stdout), text(child.stderr)])
      expect(complaints).toBe('')
      expect(JSON.parse(said)).toEqual({
        check: ['UnavailableError', expect.stringMatching(words)],
        // One that a process became free for runs when there are more.
        provision: expect.toBeOneOf([
          ['UnavailableError', expect.stringMatching(words)],
          { reason: 'completed', exitCode: 0 },
        ]),
        listed: ['runs'],
        folders: 1,
        status: 'Running',
        ran: { reason: 'exit_code', exitCode: 7 },
        ...(want === 'processes' ? { handed: { reason: 'exit_code', exitCode: 8 } } : {}),
        later: { reason: 'exit_code', exitCode: 9 },
      })
    },
    TIMEOUT_MS,
  )

  test(
    'the tasks folder, nothing is started, and then it is',
    async () => {
      await using harness = await openDisposable({})
      const tasksDir = join(harness.sharedDir, 'tasks')
      await cp(harness.settings.tasksDir, tasksDir, { recursive: true })
      await using other = await openDisposable({ tasksDir })
      await rename(tasksDir, `${tasksDir}-away`)
      const away = new UnavailableError('The tasks folder cannot be read (ENOENT)')
      await expect(other.backend.check()).rejects.toThrow(away)
      await expect(other.backend.provision(spec('exit 6'), NEVER)).rejects.toThrow(UnavailableError)
      expect(await readdir(other.settings.workersDir)).toEqual([])
      await rename(`${tasksDir}-away`, tasksDir)
      await other.backend.check()
      const worker = await other.backend.provision(spec('exit 6'), NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 6 })
    },
    TIMEOUT_MS,
  )

  test(
    'the folder of the workers, nothing is known about their tasks, and then it is',
    async () => {
      await using harness = await openDisposable({})
      const { backend, sharedDir, settings } = harness
      const go = join(sharedDir, marker())
      const worker = await backend.provision(
        spec(`until [ -e ${go} ]; do sleep 0.02; done; exit 6`),
        NEVER,
      )
      const end = worker.completion(NEVER)
      const next = harness.settings.workersDir
      await rename(next, `${next}-away`)
      await touch(go)
      await expect(backend.check()).rejects.toThrow(UnavailableError)
      await expect(backend.list()).rejects.toThrow(UnavailableError)
      // It cannot have written its exit where the service looks: nobody knows, so nobody says.
      const told = vi.fn()
      void end.then(told)
      await expect(backend.check()).rejects.toThrow(UnavailableError)
      expect(told).not.toHaveBeenCalled()
      await rename(`${next}-away`, next)
      expect((await end).reason).toMatch(/^(exit_code|worker_lost)$/)
      await backend.check()
      expect(await readdir(settings.workersDir)).toHaveLength(1)
    },
    TIMEOUT_MS,
  )
})

test('a task file that went away between submit and start is named, whatever its kind', async () => {
  await using harness = await openDisposable({})
  for (const taskFileName of ['gone.sh', 'gone.py', 'sub/gone.js']) {
    const error = await harness.backend.provision(spec('', { taskFileName }), NEVER).then(
      () => undefined,
      (err: unknown) => err,
    )
    expect(error).toBeInstanceOf(WorkerError)
    expect(error).toMatchObject({
      reason: 'startup_failed',
      message: expect.stringContaining(taskFileName),
    })
  }
  expect(await harness.backend.list()).toEqual([])
})

describe('another task of the same worker name', () => {
  test('has no worker: while the first runs, after it ended, and after a restart', async () => {
    await using harness = await openDisposable({})
    const first = spec('exit 0')
    const second = { ...first, taskId: 'another' }
    const making = harness.backend.provision(first, NEVER)
    const refused = {
      reason: 'startup_failed',
      message: /Another task has a worker with this name/,
    }
    const refusal = () => harness.backend.provision(second, NEVER).then(String, (err) => err)
    for (const when of ['being made', 'ended', 'restarted']) {
      if (when === 'restarted') await harness.reopen()
      const { reason, message } = await refusal()
      expect(reason, when).toBe(refused.reason)
      expect(message, when).toMatch(refused.message)
      await (await making).completion(NEVER).catch(() => {})
    }
    expect((await harness.backend.find(first.name))?.taskId).toBe(first.taskId)
  })
})

describe('in a copied data folder', () => {
  test(
    'a running task is lost, and the original one goes on',
    async () => {
      await using harness = await openDisposable({})
      const go = join(harness.sharedDir, marker())
      const wanted = spec(`until [ -e ${go} ]; do sleep 0.02; done; exit 6`)
      const original = await harness.backend.provision(wanted, NEVER)
      const ended = spec('exit 5')
      await (await harness.backend.provision(ended, NEVER)).completion(NEVER)
      const workersDir = join(harness.sharedDir, 'copy', 'workers')
      await cp(harness.settings.workersDir, workersDir, { recursive: true })
      const copy = new LocalBackend({ ...harness.settings, workersDir })
      try {
        const worker = await copy.find(wanted.name)
        expect(await worker?.status()).toBe('Completed')
        expect(await worker?.completion(NEVER)).toMatchObject({
          reason: 'worker_lost',
          message: expect.stringContaining('copied'),
        })
        expect(await (await copy.find(ended.name))?.completion(NEVER)).toMatchObject({
          exitCode: 5,
        })
        for (const each of await copy.list()) {
          await each.stop()
          await each.terminate()
        }
        expect(await readdir(workersDir)).toEqual([])
      } finally {
        await copy.close()
      }
      expect(await original.status()).toBe('Running')
      await touch(go)
      expect(await original.completion(NEVER)).toMatchObject({ exitCode: 6 })
    },
    TIMEOUT_MS,
  )

  test('a record of the release before, which names no folder, counts', async () => {
    await using harness = await openDisposable({})
    const go = join(harness.sharedDir, marker())
    const wanted = spec(`until [ -e ${go} ]; do sleep 0.02; done; exit 6`)
    await harness.backend.provision(wanted, NEVER)
    const path = join(harness.settings.workersDir, wanted.name, 'worker.json')
    const { folder, ...record } = JSON.parse(await readFile(path, 'utf8'))
    expect(folder).toContain(wanted.name)
    expect(isAlive(record.slot)).toBe(true)
    await writeFile(path, JSON.stringify(record))
    const worker = await (await harness.reopen()).find(wanted.name)
    const end = worker?.completion(NEVER)
    await touch(go)
    expect(await end).toMatchObject({ exitCode: 6 })
  })
})

test(
  'a shell that was killed after its task had ended serves no other one',
  async () => {
    await using harness = await openDisposable({ terminationGraceMs: 1 })
    const [stopped, next] = [
      // The shell, being stopped, cannot tell that it has ended.
      spec('echo "task 3" 1<>"$HOME/../exit"; kill -STOP $PPID; kill -KILL $$'),
      spec('exit 6'),
    ]
    // On this thread: between the shell's end and the event that tells of it there is no turn of the loop.
    const workers = new LocalWorkers(harness.settings)
    try {
      await workers.provision(stopped, [])
      const exit = join(harness.settings.workersDir, stopped.name, 'exit')
      await expect.poll(() => readFile(exit, 'utf8')).toContain('task 3')
      await workers.stop(stopped.name)
      await workers.provision(next, [])
      const { completion } = await workers.completion(next.name)
      expect(completion).toMatchObject({ exitCode: 6 })
      for (const { name } of [stopped, next]) await workers.terminate(name)
    } finally {
      workers.close()
    }
  },
  TIMEOUT_MS,
)

test(
  'a task that ignores TERM and logs without end stops near its limit',
  async () => {
    const limit = 8 * 1024 * 1024
    await using harness = await openDisposable({ terminationGraceMs: 30_000 })
    const wanted = spec("trap '' TERM; while :; do head -c 65536 /dev/zero; done", {
      maxLogBytes: limit,
    })
    const worker = await harness.backend.provision(wanted, NEVER)
    const end = await worker.completion(NEVER)
    expect(end).toMatchObject({ reason: 'log_limit' })
    const { size } = await stat(join(harness.settings.workersDir, wanted.name, 'log'))
    expect(size).toBeGreaterThan(limit)
    // What it writes between two looks comes on top, on this machine. With the grace it would be tens of gigabytes.
    expect(size).toBeLessThan(1024 ** 3)
  },
  TIMEOUT_MS,
)

describe('freeing space', () => {
  test('leaves the exit, the record, and the last bytes of the log at their place', async () => {
    await using harness = await openDisposable({ logBytesKept: 100_000 })
    const wanted = spec(
      'head -c 3000000 /dev/zero | tr "\\0" x; echo the end; echo big >"$HOME/f"; mkdir ../more; exit 5',
    )
    const worker = await harness.backend.provision(wanted, NEVER)
    await worker.completion(NEVER)
    const before = await worker.logs({ maxBytes: 50_000 })
    const folder = join(harness.settings.workersDir, wanted.name)
    await worker.freeSpace?.()
    await worker.freeSpace?.()
    expect((await readdir(folder)).toSorted()).toEqual(['exit', 'log', 'worker.json'])
    expect(await worker.logs({ maxBytes: 50_000 })).toEqual(before)
    expect((await stat(join(folder, 'log'))).blocks * 512).toBeLessThan(200_000)
    const again = await (await harness.reopen()).find(wanted.name)
    expect(await again?.completion(NEVER)).toMatchObject({ exitCode: 5 })
    expect(await again?.logs({ maxBytes: 50_000 })).toEqual(before)
  })

  test('does nothing to a task that runs', async () => {
    await using harness = await openDisposable({})
    const go = join(harness.sharedDir, marker())
    const wanted = spec(`echo x >"$HOME/f"; until [ -e ${go} ]; do sleep 0.02; done; cat "$HOME/f"`)
    const worker = await harness.backend.provision(wanted, NEVER)
    await fileThere(join(harness.settings.workersDir, wanted.name, 'home', 'f'))
    await worker.freeSpace?.()
    await touch(go)
    await worker.completion(NEVER)
    expect(await logOf(worker)).toBe('x\n')
  })

  test("does not cut a log that has another name: that is somebody's file", async () => {
    await using harness = await openDisposable({ logBytesKept: 10 })
    const kept = join(harness.sharedDir, 'kept')
    const wanted = spec(`echo 0123456789012345678901234567890 >${kept}; ln -f ${kept} ../log`)
    const worker = await harness.backend.provision(wanted, NEVER)
    await worker.completion(NEVER)
    await worker.freeSpace?.()
    expect(await readFile(kept, 'utf8')).toBe('0123456789012345678901234567890\n')
  })
})

/** What root alone can make, and nobody can remove as it is. `precious` is a folder of the test's own, with a file. */
const OBSTACLES: Record<
  string,
  { make: (folder: string, precious: string) => string; undo: (at: string) => string }
> = {
  'an immutable file': {
    make: (folder) => `mkdir ${folder}/home/a; : >${folder}/home/a/f; chattr +i ${folder}/home/a/f`,
    undo: (at) => `chattr -i ${at}/home/a/f`,
  },
  'a mount': {
    make: (folder) => `mkdir ${folder}/tmp/m; mount -t tmpfs none ${folder}/tmp/m`,
    undo: (at) => `umount ${at}/tmp/m`,
  },
  'a mount of a folder elsewhere': {
    make: (folder, precious) => `mkdir ${folder}/tmp/m; mount --bind ${precious} ${folder}/tmp/m`,
    undo: (at) => `umount ${at}/tmp/m`,
  },
}

describe.each(Object.entries(OBSTACLES))('with %s in its folder', (_, { make, undo }) => {
  test(
    'a worker is terminated: what is left is told, counted, and removed once it can be',
    async (context) => {
      const log = { ...QUIET, error: vi.fn() }
      await using harness = await openDisposable({})
      const { settings } = harness
      const precious = join(harness.sharedDir, 'precious')
      await mkdir(join(precious, 'folder'), { recursive: true })
      await writeFile(join(precious, 'folder', 'file'), 'precious')
      const workersDir = join(harness.sharedDir, 'obstructed', 'workers')
      let backend = new LocalBackend({ ...settings, workersDir }, { log })
      const sh = (script: string) => spawnSync('/bin/sh', ['-ec', script])
      let aside = ''
      try {
        const worker = await backend.provision(spec('exit 5'), NEVER)
        await worker.completion(NEVER)
        const made = sh(make(join(workersDir, worker.name), precious))
        if (made.status !== 0) skipFor(context, made.stderr.toString())
        await worker.terminate()
        expect(await backend.list()).toEqual([])
        expect(await readdir(workersDir)).toEqual([])
        await expect.poll(() => backend.leftBehind()).toBe(1)
        expect(log.error.mock.calls).toEqual([
          [
            { path: expect.stringContaining('unremovable-'), cause: expect.stringMatching(/^E/) },
            "a worker's folder could not be removed",
          ],
        ])
        aside = log.error.mock.calls[0]?.[0].path
        expect(existsSync(aside)).toBe(true)
        expect(await readFile(join(precious, 'folder', 'file'), 'utf8')).toBe('precious')

        await backend.close()
        backend = new LocalBackend({ ...settings, workersDir }, { log })
        await backend.check()
        await expect.poll(() => backend.leftBehind()).toBe(1)
        expect(log.error).toHaveBeenCalledTimes(2)
        const next = await backend.provision(spec('exit 6'), NEVER)
        expect(await next.completion(NEVER)).toMatchObject({ exitCode: 6 })
        await next.terminate()
        await backend.close()

        execFileSync('/bin/sh', ['-ec', undo(aside)])
        backend = new LocalBackend({ ...settings, workersDir }, { log })
        await backend.check()
        expect(backend.leftBehind()).toBe(0)
        expect(existsSync(aside)).toBe(false)
      } finally {
        // Also what a failed test leaves: whatever is removed next must not reach through a mount.
        for (const place of [workersDir, `${workersDir}-spare`]) {
          const left = existsSync(place) ? await readdir(place) : []
          for (const name of left) sh(undo(join(place, name)))
        }
        await backend.close()
      }
    },
    TIMEOUT_MS,
  )
})

test('a tree is removed without what is mounted in it, however deep that lies', async (context) => {
  await using harness = await openDisposable({})
  const [tree, precious] = [join(harness.sharedDir, 'tree'), join(harness.sharedDir, 'precious')]
  const deep = join(tree, ...Array.from({ length: 8 }, () => 'n'.repeat(100)))
  for (const folder of [deep, precious]) await mkdir(folder, { recursive: true })
  await writeFile(join(precious, 'file'), 'precious')
  const mounted = spawnSync('mount', ['--bind', precious, deep])
  if (mounted.status !== 0) skipFor(context, mounted.stderr.toString())
  try {
    await expect(removeTree(tree)).rejects.toThrow('EBUSY')
    expect(await readFile(join(precious, 'file'), 'utf8')).toBe('precious')
  } finally {
    // Where it is by now: deep ones are moved up.
    for (const line of (await readFile('/proc/self/mountinfo', 'utf8')).split('\n')) {
      const path = line.split(' ')[4] ?? ''
      if (path.startsWith(`${tree}/`)) spawnSync('umount', [path])
    }
  }
  await removeTree(tree)
  expect(existsSync(tree)).toBe(false)
})

test(
  'a folder of another user in its folder does not keep a worker from being terminated, nor the next start',
  async (context) => {
    if (process.getuid?.() !== 0) skipFor(context, 'needs root')
    await using harness = await openDisposable({})
    const folder = join(harness.sharedDir, 'other')
    await mkdir(folder)
    for (const path of [folder, harness.sharedDir, join(harness.sharedDir, '..')]) {
      await chmod(path, 0o777)
    }
    const settings = { ...harness.settings, workersDir: join(folder, 'workers') }
    const [ready, go] = [join(folder, 'ready'), join(folder, 'go')]
    const options = JSON.stringify({ settings, want: 'foreign', spec: spec(''), ready, go })
    const child = spawn(process.execPath, [HELPER, options], {
      stdio: ['ignore', 'pipe', 'pipe'],
      ...{ uid: NOBODY, gid: NOBODY },
    })
    const output = Promise.all([text(child.stdout), text(child.stderr)])
    await fileThere(ready)
    const home = join(settings.workersDir, await readFile(ready, 'utf8'), 'home', 'sub')
    await mkdir(join(home, 'roots'))
    await writeFile(join(home, 'roots', 'f'), '')
    await touch(go)
    const [said, complaints] = await output
    expect(complaints).toBe('')
    expect(JSON.parse(said)).toEqual({
      listed: [],
      left: [1, 1],
      next: { reason: 'exit_code', exitCode: 9 },
    })
  },
  TIMEOUT_MS,
)

test(
  'twenty thousand folders in each other are removed, and nobody waits for it',
  async (context) => {
    await using disk = mountSmallDisk(context, 'size=64m')
    await using harness = await openDisposable({})
    const workersDir = join(disk.folder, 'workers')
    const backend = new LocalBackend({ ...harness.settings, workersDir })
    try {
      const worker = await backend.provision(
        spec('cd "$HOME"; exec perl -e \'for (1..20000) { mkdir "d" or die; chdir "d" or die }\''),
        NEVER,
      )
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 0 })
      await worker.terminate()
      expect(await readdir(workersDir)).toEqual([])
      const next = await backend.provision(spec('exit 6'), NEVER)
      expect(await next.completion(NEVER)).toMatchObject({ exitCode: 6 })
      await next.terminate()
      const spares = `${workersDir}-spare`
      await expect
        .poll(async () => (await readdir(spares)).length, { timeout: 40_000 })
        .toBeLessThanOrEqual(1)
      expect(backend.leftBehind()).toBe(0)
    } finally {
      await backend.close()
    }
  },
  TIMEOUT_MS,
)

describe('the check', () => {
  test('is shared, and leaves nothing', async () => {
    await using harness = await openDisposable({})
    const { workersDir } = harness.settings
    await Promise.all(Array.from({ length: 200 }, () => harness.backend.check()))
    expect(await readdir(workersDir)).toEqual([])
    expect(await readdir(`${workersDir}-spare`)).toEqual([])
  })

  test('fails on a full disk, and on one that is read-only', async (context) => {
    await using disk = mountSmallDisk(context, 'size=4m')
    await using harness = await openDisposable({})
    const workersDir = join(disk.folder, 'workers')
    const backend = new LocalBackend({ ...harness.settings, workersDir })
    try {
      await backend.check()
      disk.fill()
      await expect(backend.check()).rejects.toThrow(
        new UnavailableError("The workers' disk is full (ENOSPC)"),
      )
      await expect(backend.provision(spec('exit 0'), NEVER)).rejects.toThrow(UnavailableError)
      disk.free()
      await backend.check()
      disk.remount('ro')
      await expect(backend.check()).rejects.toThrow(
        new UnavailableError("The workers' disk is read-only (EROFS)"),
      )
      disk.remount('rw')
      await backend.check()
    } finally {
      await backend.close()
    }
  })
})

async function text(stream: NodeJS.ReadableStream): Promise<string> {
  let all = ''
  stream.on('data', (chunk) => {
    all += chunk
  })
  await once(stream, 'close')
  return all
}

function skipFor(context: TestContext, reason: string): void {
  if (process.env.CI) throw new Error(reason)
  context.skip(reason)
}
