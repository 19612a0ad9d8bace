import { execFileSync } from 'node:child_process'
import {
  chmodSync,
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { unpackTar } from 'modern-tar'
import { afterEach, beforeEach, describe, expect, type TestContext, test, vi } from 'vitest'
import { UnavailableError } from '../../src/core/errors.ts'
import { WorkerError, type WorkerSpec } from '../../src/core/ports.ts'
import { TaskFiles } from '../../src/core/task-files.ts'
import {
  leftOutFor,
  leftOutNotes,
  READ_FAULTS,
  taskFileError,
} from '../../src/core/tasks-folder.ts'
import { assertCopied, copyTasks } from '../../src/workers/local/tasks-copy.ts'
import { WorkerFolders } from '../../src/workers/local/worker-folders.ts'
import { sharedTar, workerTar } from '../../src/workers/worker-files.ts'
import { mountSmallDisk, type SmallDisk } from '../helpers/small-disk.ts'
import { INNOCENT, NOBODY, ODDITIES } from '../helpers/tasks-folders.ts'

const isRoot = process.getuid?.() === 0
const HOUR_MS = 3_600_000

let root: string
let tasksDir: string
let to: string

beforeEach(() => {
  root = realpathSync(mkdtempSync(join(tmpdir(), 'tasks-copies-')))
  chmodSync(root, 0o777)
  tasksDir = join(root, 'tasks')
  to = join(root, 'copy')
  mkdirSync(tasksDir, { mode: 0o755 })
  writeFileSync(join(tasksDir, INNOCENT), 'echo innocent\n')
  writeFileSync(join(root, 'outside.sh'), '')
})
afterEach(() => {
  vi.useRealTimers()
  rmSync(root, { recursive: true, force: true })
})

/**
 * Does something as a user who may not read everything, in all threads of this process. Not for what asks access(2), which
 * judges by the real user.
 */
async function asNobody<T>(act: () => T | Promise<T>): Promise<T> {
  if (!isRoot) return act()
  process.seteuid?.(NOBODY)
  try {
    return await act()
  } finally {
    process.seteuid?.(0)
  }
}

function spec(overrides: Partial<WorkerSpec> = {}): WorkerSpec {
  return {
    ...{ name: 'task-1', taskId: '1', taskFileName: INNOCENT, taskFolder: 'tasks' },
    ...{ repositories: [], environment: {}, keepAfterwards: false, notes: ['first'] },
    ...{ maxLogBytes: 1_000_000, timeoutSeconds: 60 },
    ...overrides,
  }
}

/** Paths below a folder; folders end in a slash, links in an at sign. */
function everythingIn(folder: string, inside = ''): string[] {
  return readdirSync(join(folder, inside), { withFileTypes: true })
    .flatMap((entry) => {
      const path = join(inside, entry.name)
      if (entry.isDirectory()) return [`${path}/`, ...everythingIn(folder, path)]
      return [entry.isSymbolicLink() ? `${path}@` : path]
    })
    .toSorted()
}

/** The tasks in a tar, by the same rule, and the notes of the worker. */
async function unpacked(tar: AsyncIterable<Uint8Array>, folder: string) {
  const entries = await unpackTar(await buffer(tar))
  const paths = entries.flatMap(({ header: { name, type } }) => {
    const path = name.startsWith(`${folder}/tasks/`) ? name.slice(folder.length + 7) : ''
    return path === '' ? [] : [path + (type === 'symlink' ? '@' : '')]
  })
  const textOf = (path: string) =>
    new TextDecoder().decode(entries.find(({ header }) => header.name === path)?.data)
  return { paths: paths.toSorted(), textOf, entries }
}

describe.skipIf(!isRoot)('a tasks folder with', () => {
  for (const [name, { make, copied = [], leftOut = [] }] of Object.entries(ODDITIES)) {
    const wanted = [INNOCENT, ...copied].toSorted()
    const notes = leftOut.map((what) => `Left out of the copy of the tasks folder: ${what}`)

    test(`${name} is copied for a local worker as far as it can be read`, async () => {
      make(tasksDir)
      const copy = await asNobody(() => copyTasks(tasksDir, to, [], undefined))
      expect(everythingIn(to)).toEqual(wanted)
      expect(leftOutNotes(copy.leftOut)).toEqual(notes)
      expect(readFileSync(join(to, INNOCENT), 'utf8')).toBe('echo innocent\n')
    })

    test(`${name} goes into the tar of a container as far as it can be read`, async () => {
      make(tasksDir)
      const { paths, textOf } = await asNobody(async () =>
        unpacked(await workerTar(spec(), { tasksDir }), 'worker'),
      )
      expect(paths).toEqual(wanted)
      const lines = ['first', ...notes].map((note) => `[task-runner] ${note}\n`)
      expect(textOf('worker/notes')).toBe(lines.join(''))
      expect(textOf(`worker/tasks/${INNOCENT}`)).toBe('echo innocent\n')
    })

    test(`${name} goes into the tar that workers share, the same bytes each time`, async () => {
      make(tasksDir)
      const pack = () =>
        asNobody(async () => {
          const { tar, leftOut } = await sharedTar(tasksDir)
          return { bytes: await buffer(tar), leftOut }
        })
      const { bytes, leftOut } = await pack()
      // The same files in another order and at another time.
      renameSync(tasksDir, `${tasksDir}.old`)
      mkdirSync(tasksDir)
      for (const name of readdirSync(`${tasksDir}.old`, { encoding: 'buffer' }).reverse()) {
        renameSync(
          Buffer.concat([Buffer.from(`${tasksDir}.old/`), name]),
          Buffer.concat([Buffer.from(`${tasksDir}/`), name]),
        )
      }
      expect((await pack()).bytes.equals(bytes)).toBe(true)
      expect(leftOutNotes(leftOut)).toEqual(notes)
      expect((await unpacked(new Blob([bytes]).stream(), '.')).paths).toEqual(wanted)
    })
  }
})

/** Each way to give tasks to workers, and each look at the folder. */
const USES: Record<string, () => Promise<unknown>> = {
  'the copy of a local worker': async () => copyTasks(tasksDir, to, [], undefined),
  'the tar of a container': async () => buffer(await workerTar(spec(), { tasksDir })),
  'the tar that workers share': async () => buffer((await sharedTar(tasksDir)).tar),
  'the check of the folder': () => files().check(),
  'a look for a task file': () => files().look(INNOCENT),
  'a look for a task file that is not there': () => files().look('nested/nothing.sh'),
  'the list of task files': () => files().list(),
  'the look for warnings': () => files().warnings(),
}

function files(): TaskFiles {
  return new TaskFiles(tasksDir, () => ({}))
}

describe('a tasks folder that cannot be read is a trouble of ours', () => {
  const troubles: Record<string, () => void> = {
    ENOENT: () => renameSync(tasksDir, `${tasksDir}.away`),
    ENOTDIR: () => {
      renameSync(tasksDir, `${tasksDir}.away`)
      writeFileSync(tasksDir, '')
    },
    EACCES: () => chmodSync(tasksDir, 0o700),
  }
  for (const [code, make] of Object.entries(troubles)) {
    for (const [use, act] of Object.entries(USES)) {
      test.skipIf(code === 'EACCES' && !isRoot)(`${code}: ${use} says so`, async () => {
        make()
        const failure = await asNobody(act).catch((err: unknown) => err)
        expect(failure).toBeInstanceOf(UnavailableError)
        expect(String(failure)).toContain(`The tasks folder cannot be read (${code})`)
      })
    }
  }

  test('so is a want of file descriptors: nothing is left out for it', async () => {
    mkdirSync(join(tasksDir, 'sub'))
    writeFileSync(join(tasksDir, 'sub', 'data'), 'data')
    for (const free of [0, 1, 2]) {
      for (const [use, act] of Object.entries(USES)) {
        // A look at an innocent file opens nothing.
        if (use.startsWith('a look for a task file that')) continue
        const failure = await withDescriptors(free, act)
        if (failure === undefined) continue
        expect(String(failure), `${use}, with ${free}`).toMatch(/\((EMFILE)\)|^Error: EMFILE/)
        expect(failure, use).not.toBeInstanceOf(WorkerError)
      }
    }
  })
})

/** Does something with so many descriptors left, and returns its failure. */
async function withDescriptors(free: number, act: () => Promise<unknown>): Promise<unknown> {
  const limit = (soft: number | string) =>
    execFileSync('prlimit', ['--pid', String(process.pid), `--nofile=${soft}:`])
  const before = execFileSync('sh', ['-c', 'ulimit -Sn'], { encoding: 'utf8' }).trim()
  limit(readdirSync('/proc/self/fd').length + 40)
  const taken: number[] = []
  const outcome = Promise.withResolvers<unknown>()
  try {
    try {
      for (;;) taken.push(openSync('/dev/null', 'r'))
    } catch {
      for (const fd of taken.splice(taken.length - free)) closeSync(fd)
    }
    outcome.resolve(
      await act().then(
        () => undefined,
        (err: unknown) => err,
      ),
    )
  } finally {
    for (const fd of taken) closeSync(fd)
    limit(before)
  }
  return outcome.promise
}

describe('what cannot be read', () => {
  const rows: Record<string, 'gone' | 'refused' | 'ours' | 'of the disk'> = {
    ...READ_FAULTS,
    EIO: 'of the disk',
    ESTALE: 'of the disk',
  }
  for (const [code, kind] of Object.entries(rows)) {
    test(`${code} is ${kind}: for other tasks, and for the task whose file it is`, () => {
      const err = Object.assign(new Error(code), { code, syscall: 'open' })
      const asLeftOut = () => leftOutFor('a.py', err)
      const settled = taskFileError('a.py', code, 0)
      const fresh = taskFileError('a.py', code, Date.now())
      if (kind === 'ours') expect(asLeftOut).toThrow(UnavailableError)
      else expect(asLeftOut()).toEqual(kind === 'gone' ? undefined : { path: 'a.py', why: code })
      const isOutcome = kind === 'gone' || kind === 'refused'
      expect(settled instanceof WorkerError).toBe(isOutcome)
      expect(settled instanceof UnavailableError).toBe(kind === 'ours')
      // Git removes a file before it writes the new one: that says nothing yet.
      expect(fresh instanceof WorkerError).toBe(kind === 'refused')
    })
  }

  test('is told of in some lines, however much it is', () => {
    const many = Array.from({ length: 22 }, (_, index) => ({ path: `f\n${index}`, why: 'EACCES' }))
    const notes = leftOutNotes(many)
    expect(notes).toHaveLength(11)
    expect(notes[0]).toBe('Left out of the copy of the tasks folder: f?0 (EACCES)')
    expect(notes[10]).toBe('Left out of the copy of the tasks folder: 12 more')
  })
})

test.skipIf(!isRoot)(
  'each file of a large folder is looked at once a minute, not by every probe',
  async () => {
    for (let index = 0; index < 1_000; index += 1) writeFileSync(join(tasksDir, `f${index}`), '')
    mkdirSync(join(tasksDir, 'locked'), { mode: 0o700 })
    const warned = ['Tasks get no copy of locked (EACCES)']
    vi.useFakeTimers({ toFake: ['performance'] })
    const looking = files()
    expect(await asNobody(() => looking.warnings())).toEqual(warned)
    symlinkSync('locked/inner', join(tasksDir, 'linked'))
    expect(await asNobody(() => looking.warnings())).toEqual(warned)
    vi.advanceTimersByTime(61_000)
    expect(await asNobody(() => looking.warnings())).toEqual([
      ...warned,
      'Tasks get no copy of linked (EACCES)',
    ])
    rmSync(join(tasksDir, 'f0'))
    rmSync(join(tasksDir, 'f1'))
    rmSync(join(tasksDir, 'linked'))
    vi.advanceTimersByTime(61_000)
    expect(await asNobody(() => looking.warnings())).toEqual(warned)
    symlinkSync('locked/inner', join(tasksDir, 'linked'))
    expect(await asNobody(() => looking.warnings())).toHaveLength(2)
  },
)

test('a crowd of probes shares the look at the folder', async () => {
  writeFileSync(join(tasksDir, 'ok_worker.json'), 'broken')
  let parsed = 0
  const looking = new TaskFiles(tasksDir, () => {
    parsed += 1
    throw new Error('is broken')
  })
  const crowd = await Promise.all(Array.from({ length: 100 }, () => looking.warnings()))
  expect(new Set(crowd.flat()).size).toBe(1)
  expect(parsed).toBe(2)
})

describe('a worker of a task whose own file', () => {
  const inTheWay: Record<string, [RegExp, () => void]> = {
    'is for others to read': [
      /"ok.sh" cannot be read \(EACCES\)/,
      () => chmodSync(join(tasksDir, INNOCENT), 0o600),
    ],
    'was removed': [
      /"ok.sh" is no longer in the tasks folder/,
      () => {
        rmSync(join(tasksDir, INNOCENT))
        utimesSync(tasksDir, 1, 1)
      },
    ],
  }
  for (const [what, [message, make]] of Object.entries(inTheWay)) {
    test.skipIf(!isRoot)(`${what} cannot be had, and it says why`, async () => {
      make()
      for (const act of OWN_USES) {
        const failure = await asNobody(act).catch((err: unknown) => err)
        expect(failure).toBeInstanceOf(WorkerError)
        expect(failure).toMatchObject({
          reason: 'startup_failed',
          message: expect.stringMatching(message),
        })
      }
    })
  }

  test('went just now is waited for: it may be about to come back', async () => {
    rmSync(join(tasksDir, INNOCENT))
    for (const act of OWN_USES) {
      const failure = await act().catch((err: unknown) => err)
      expect(String(failure)).toContain('is being replaced or removed')
      expect(failure).not.toBeInstanceOf(WorkerError)
    }
  })
})

const OWN_USES: Array<() => Promise<unknown>> = [
  () => workerTar(spec(), { tasksDir }),
  async () => {
    const { leftOut } = copyTasks(tasksDir, to, [], undefined)
    assertCopied(INNOCENT, { tasksDir, to, leftOut })
  },
]

let folders: WorkerFolders | undefined

/** Prepares a worker's folder, and returns it. */
async function prepared(): Promise<string> {
  const workersDir = join(root, 'workers')
  mkdirSync(workersDir, { recursive: true })
  folders = new WorkerFolders(workersDir)
  return prepare(folders, 'first')
}

function prepare(by: WorkerFolders, name: string): string {
  const folder = join(root, 'workers', name)
  const slot = { pid: 1, startedAt: 'boot 1' }
  const record = { name, taskId: name, size: null, createdAt: 1, maxLogBytes: 1, slot }
  by.prepare(folder, tasksDir, { record, taskFile: INNOCENT, files: [], notes: ['first'] })
  return folder
}

test.skipIf(!isRoot)(
  'a copy that lacks something serves the next task as well, until that can be read',
  async () => {
    writeFileSync(join(tasksDir, 'dump.sql'), 'dump', { mode: 0o600 })
    mkdirSync(join(tasksDir, 'locked'), { mode: 0o700 })
    writeFileSync(Buffer.concat([Buffer.from(`${tasksDir}/caf`), Buffer.from([0xe9])]), '')
    // The tasks have been there for long.
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + HOUR_MS })
    await asNobody(async () => {
      const first = await prepared()
      const log = readFileSync(join(first, 'log'), 'utf8')
      expect(log.match(/Left out/g)).toHaveLength(3)
      // Not its inode, which a new file may get.
      const changedAt = (folder: string) =>
        statSync(join(folder, 'tasks', INNOCENT), { bigint: true }).ctimeNs
      const before = changedAt(first)
      folders?.release(first)
      const second = prepare(folders as WorkerFolders, 'second')
      expect(changedAt(second)).toBe(before)
      expect(readFileSync(join(second, 'log'), 'utf8')).toBe(log)
      folders?.release(second)
    })
    chmodSync(join(tasksDir, 'dump.sql'), 0o644)
    chmodSync(join(tasksDir, 'locked'), 0o755)
    await asNobody(() => {
      const third = prepare(folders as WorkerFolders, 'third')
      expect(readFileSync(join(third, 'tasks', 'dump.sql'), 'utf8')).toBe('dump')
      expect(everythingIn(join(third, 'tasks'))).toEqual(['dump.sql', 'locked/', INNOCENT])
      expect(readFileSync(join(third, 'log'), 'utf8').match(/Left out/g)).toHaveLength(1)
    })
  },
)

describe('a copy that cannot be written is a trouble of ours, and nothing is left out for it', () => {
  test('on a full disk', (context) => {
    using disk = smallDisk(context, 'size=1m')
    writeFileSync(join(tasksDir, 'large'), Buffer.alloc(2_000_000))
    expect(() => copyTasks(tasksDir, join(disk.folder, 'copy'), [], undefined)).toThrow('ENOSPC')
  })

  test('on a disk without room for more files', (context) => {
    using disk = smallDisk(context, 'size=1m,nr_inodes=20')
    disk.fillInodes(2)
    for (const name of ['a', 'b', 'c']) writeFileSync(join(tasksDir, name), '')
    expect(() => copyTasks(tasksDir, join(disk.folder, 'copy'), [], undefined)).toThrow('ENOSPC')
  })

  test('on a disk that became read-only', (context) => {
    using disk = smallDisk(context, 'size=1m')
    mkdirSync(join(disk.folder, 'spare'))
    disk.remount('ro')
    expect(() => copyTasks(tasksDir, join(disk.folder, 'spare/copy'), [], undefined)).toThrow(
      'EROFS',
    )
  })

  test('where its paths are too long, and those of the tasks are not', () => {
    const PATH_MAX = 4095
    let long = join(root, 'copies')
    while (long.length < PATH_MAX - 200) long = join(long, 'l'.repeat(100))
    mkdirSync(long, { recursive: true })
    const copy = join(long, 'l'.repeat(PATH_MAX - long.length - 1 - INNOCENT.length))
    expect(() => copyTasks(tasksDir, copy, [], undefined)).toThrow('ENAMETOOLONG')
  })

  test('in a folder that goes away', () => {
    const away = join(root, 'away', 'copy')
    expect(() => copyTasks(tasksDir, away, [], undefined)).toThrow('ENOENT')
  })
})

function smallDisk(context: TestContext, options: string): SmallDisk & Disposable {
  const disk = mountSmallDisk(context, options)
  return Object.assign(disk, { [Symbol.dispose]: () => void disk[Symbol.asyncDispose]() })
}

describe('a tar', () => {
  test('of a file that becomes shorter while it is packed is whole, and so are the others', async () => {
    const large = join(tasksDir, 'large')
    writeFileSync(large, Buffer.alloc(20_000_000, 'x'))
    const { tar } = await sharedTar(tasksDir)
    const chunks: Uint8Array[] = []
    let bytes = 0
    for await (const chunk of tar) {
      chunks.push(chunk)
      bytes += chunk.length
      // By then it is being packed, and not to its end: that much is not held in memory.
      if (bytes > 1_000_000) truncateSync(large, 100_000)
    }
    const { entries, textOf } = await unpacked(new Blob(chunks as BlobPart[]).stream(), '.')
    const { data } = entries.find(({ header }) => header.name === './tasks/large') ?? {}
    expect(data).toHaveLength(20_000_000)
    expect(data?.at(-1)).toBe(0)
    expect(textOf(`./tasks/${INNOCENT}`)).toBe('echo innocent\n')
  })

  test('puts a home elsewhere into its place, and a link to it into the folder of the worker', async () => {
    const tar = await workerTar(spec(), { tasksDir, home: '/home/ubuntu' })
    const { entries, textOf } = await unpacked(tar, 'worker')
    const header = (wanted: string) =>
      entries.find(({ header: { name } }) => name === wanted)?.header
    expect(header('home/ubuntu/')).toMatchObject({ type: 'directory', uid: 10_001, mode: 0o700 })
    expect(header('worker/home')).toMatchObject({ type: 'symlink', linkname: '/home/ubuntu' })
    expect(textOf('worker/environment.sh')).toContain("export HOME='/home/ubuntu' TMPDIR=")
  })

  test('that nobody reads to its end leaves no file open', async () => {
    for (let index = 0; index < 10; index += 1) {
      writeFileSync(join(tasksDir, `large-${index}`), Buffer.alloc(3_000_000))
    }
    let bytes = 0
    for await (const chunk of await workerTar(spec(), { tasksDir })) {
      bytes += chunk.length
      if (bytes > 5_000_000) break
    }
    const open = () =>
      readdirSync('/proc/self/fd').flatMap((fd) => {
        try {
          return [readlinkSync(`/proc/self/fd/${fd}`)]
        } catch {
          return []
        }
      })
    await expect.poll(() => open().filter((path) => path.startsWith(tasksDir))).toEqual([])
  })
})
