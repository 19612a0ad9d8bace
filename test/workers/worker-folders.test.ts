import {
  chmodSync,
  linkSync,
  lstatSync,
  lutimesSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { type Contents, hasStarted, readExit, readRecord } from '../../src/workers/local/folders.ts'
import { WorkerFolders } from '../../src/workers/local/worker-folders.ts'

const HOUR_MS = 3_600_000

let root: string
let workersDir: string
let sparesDir: string
let folders: WorkerFolders

beforeEach(() => {
  root = realpathSync(mkdtempSync(join(tmpdir(), 'worker-folders-')))
  workersDir = join(root, 'workers')
  sparesDir = join(root, 'workers-spare')
  mkdirSync(workersDir)
  mkdirSync(join(root, 'tasks', 'sub'), { recursive: true })
  writeFileSync(join(root, 'tasks', 'sub', 'data'), 'data')
  symlinkSync('sub/data', join(root, 'tasks', 'linked'))
  symlinkSync('circle', join(root, 'tasks', 'circle'))
  writeFileSync(join(root, 'tasks', 'task.sh'), 'echo hi\n')
  folders = new WorkerFolders(workersDir)
  // The tasks have been there for long.
  vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + HOUR_MS })
})
afterEach(() => {
  vi.useRealTimers()
  rmSync(root, { recursive: true })
})

function prepared(name: string, contents: Partial<Contents> = {}): string {
  return preparedBy(folders, join(workersDir, name), contents)
}

function preparedBy(by: WorkerFolders, folder: string, contents: Partial<Contents> = {}): string {
  const name = basename(folder)
  by.prepare(folder, join(root, 'tasks'), {
    record: {
      ...{ name, taskId: name, size: null, createdAt: 1, maxLogBytes: 1 },
      slot: { pid: 1, startedAt: 'boot 1' },
    },
    ...{ taskFile: 'task.sh', files: [], notes: [], ...contents },
  })
  return folder
}

/** All there is, with its mode and content. */
function everything(folder: string): Record<string, string> {
  const names = readdirSync(folder, { recursive: true, encoding: 'utf8' }).toSorted()
  return Object.fromEntries(
    ['.', ...names].map((name) => {
      const stats = statSync(join(folder, name))
      const text = stats.isFile() ? readFileSync(join(folder, name), 'utf8') : ''
      // A record tells the folder by its number as well.
      const content = lstatSync(join(folder, name)).isSymbolicLink()
        ? `-> ${readlinkSync(join(folder, name))}`
        : text.replace(/"folder":"\d+ /, '"folder":"')
      return [name, `${stats.mode.toString(8)} ${stats.nlink} ${content}`]
    }),
  )
}

describe('the folder of a worker whose task', () => {
  const deeds: Record<string, (folder: string) => void> = {
    'touched nothing': () => {},
    'ended as tasks end': (folder) => {
      writeFileSync(join(folder, 'exit'), 'startup 1 The startup script failed\n', { flag: 'r+' })
      writeFileSync(join(folder, 'log'), 'a secret\n')
    },
    'left files in its home and its temporary folder': (folder) => {
      for (const name of ['home/.bashrc', 'home/a', 'tmp/b']) writeFileSync(join(folder, name), '')
    },
    'left files beyond the links of its home': (folder) => {
      for (const name of ['home/my/projects/a', 'home/practicus/task/b', 'home/my/c']) {
        writeFileSync(join(folder, name), '')
      }
    },
    'led the links of its home elsewhere': (folder) => {
      for (const name of ['home/my/projects', 'home/practicus/task']) {
        rmSync(join(folder, name))
        symlinkSync(join(root, 'tasks'), join(folder, name))
      }
    },
    'put folders in the place of the links of its home': (folder) => {
      for (const name of ['home/my', 'home/practicus/task']) {
        rmSync(join(folder, name), { recursive: true })
        mkdirSync(join(folder, name, 'of'), { recursive: true })
      }
    },
    'opened its home to all': (folder) => chmodSync(join(folder, 'home'), 0o777),
    'put another home in its place': (folder) => {
      renameSync(join(folder, 'home'), join(folder, 'tmp', 'home'))
      symlinkSync('/etc', join(folder, 'home'))
    },
    'changed its copy of the tasks': (folder) => {
      writeFileSync(join(folder, 'tasks', 'task.sh'), 'echo no\n')
      writeFileSync(join(folder, 'tasks', 'more.sh'), '')
    },
    'wrote as many other bytes into its script': (folder) => {
      writeFileSync(join(folder, 'tasks', 'task.sh'), 'echo no\n', { flag: 'r+' })
    },
    'opened its script to all': (folder) => chmodSync(join(folder, 'tasks', 'task.sh'), 0o777),
    'made another file of its script': (folder) => {
      rmSync(join(folder, 'tasks', 'task.sh'))
      symlinkSync(join(root, 'elsewhere'), join(folder, 'tasks', 'task.sh'))
    },
    'left a file beside its script': (folder) => writeFileSync(join(folder, 'tasks', 'a'), ''),
    'left a file in a folder of the tasks': (folder) => {
      writeFileSync(join(folder, 'tasks', 'sub', 'a'), '')
    },
    'removed what it should not': (folder) => {
      for (const name of ['exit', 'home', 'log', 'tasks', 'worker.json']) {
        rmSync(join(folder, name), { recursive: true })
      }
    },
    'left more files': (folder) => {
      writeFileSync(join(folder, 'startup.sh'), '')
      mkdirSync(join(folder, 'more', 'of', 'it'), { recursive: true })
    },
    'made other files of those that the service writes': (folder) => {
      rmSync(join(folder, 'exit'))
      symlinkSync(join(root, 'elsewhere'), join(folder, 'exit'))
      linkSync(join(folder, 'worker.json'), join(root, 'kept'))
    },
    'left what Python compiled': (folder) => {
      mkdirSync(join(folder, 'tasks', '__pycache__'))
      writeFileSync(join(folder, 'tasks', '__pycache__', 'a.pyc'), '')
    },
    'opened its own folder to all': (folder) => chmodSync(folder, 0o755),
    'removed its folder': (folder) => rmSync(folder, { recursive: true }),
  }
  for (const [deed, act] of Object.entries(deeds)) {
    test(`${deed} leaves nothing to the next one`, () => {
      writeFileSync(join(root, 'elsewhere'), 'elsewhere')
      const first = prepared('worker')
      const fresh = everything(first)
      act(first)
      folders.release(first)
      expect(readdirSync(workersDir)).toEqual([])
      expect(everything(prepared('worker'))).toEqual(fresh)
      expect(readFileSync(join(root, 'elsewhere'), 'utf8')).toBe('elsewhere')
    })
  }

  test('set the time of a link of its home leaves nothing to the next one', () => {
    const link = (folder: string) => lstatSync(join(folder, 'home', 'practicus', 'task'))
    const first = prepared('first')
    lutimesSync(join(first, 'home', 'practicus', 'task'), 1, 1)
    folders.release(first)
    expect(link(prepared('second')).mtimeMs).not.toBe(1000)
  })

  test('has the places that people know from Practicus AI', () => {
    const folder = prepared('worker')
    const real = (name: string) => realpathSync(join(folder, 'home', name))
    expect(real('my/projects')).toBe(join(folder, 'home', 'projects'))
    expect(real('practicus/task')).toBe(join(folder, 'tasks'))
  })

  test('touched nothing serves the next one, with another log', () => {
    const first = prepared('first')
    // Held open, as by one who follows the log.
    linkSync(join(first, 'log'), join(root, 'followed'))
    const kept = [
      ...['home', 'tmp', 'tasks', 'tasks/task.sh', 'tasks/sub/data', 'tasks/linked', 'exit'],
      ...['home/projects', 'home/my', 'home/my/projects', 'home/practicus/task'],
    ]
    // One made anew may get the number of the one that was removed.
    const printsIn = (folder: string) =>
      kept.map((name) => {
        const { ino, birthtimeMs } = lstatSync(join(folder, name))
        return `${name} ${ino} ${birthtimeMs}`
      })
    const before = printsIn(first)
    folders.release(first)
    const second = prepared('second', { notes: ['of the second'] })
    expect(printsIn(second)).toEqual(before)
    expect(readFileSync(join(second, 'log'), 'utf8')).toContain('of the second')
    expect(readFileSync(join(root, 'followed'), 'utf8')).not.toContain('of the second')
  })
})

describe('the next worker has the tasks as they are by then, when meanwhile', () => {
  const changes: Record<string, (tasks: string) => void> = {
    'a script was written': (tasks) => writeFileSync(join(tasks, 'task.sh'), 'echo other\n'),
    'as many other bytes were written': (tasks) => {
      writeFileSync(join(tasks, 'task.sh'), 'echo no\n', { flag: 'r+' })
    },
    'a script was replaced': (tasks) => {
      writeFileSync(join(tasks, '.task.sh'), 'echo no\n')
      renameSync(join(tasks, '.task.sh'), join(tasks, 'task.sh'))
    },
    'a file came': (tasks) => writeFileSync(join(tasks, 'more.sh'), ''),
    'a file went': (tasks) => rmSync(join(tasks, 'linked')),
    'a file may be executed': (tasks) => chmodSync(join(tasks, 'task.sh'), 0o755),
    'a file in a folder was written': (tasks) => writeFileSync(join(tasks, 'sub', 'data'), 'new'),
    'all are others': (tasks) => {
      renameSync(tasks, join(root, 'old'))
      mkdirSync(tasks)
      writeFileSync(join(tasks, 'task.sh'), '')
    },
    'the spare folders were cleaned away': () => rmSync(sparesDir, { recursive: true }),
  }
  for (const [change, act] of Object.entries(changes)) {
    for (const age of ['for long', 'just now']) {
      test(`${change}, and the tasks had been there ${age}`, () => {
        if (age === 'just now') vi.useRealTimers()
        folders.release(prepared('first'))
        act(join(root, 'tasks'))
        const next = prepared('next')
        const others = join(root, 'others')
        mkdirSync(others)
        const fresh = preparedBy(new WorkerFolders(others), join(others, 'next'))
        expect(everything(join(next, 'tasks'))).toEqual(everything(join(fresh, 'tasks')))
      })
    }
  }
})

test('what somebody writes into a spare folder does not reach the next worker', () => {
  const fresh = everything(prepared('worker'))
  folders.release(join(workersDir, 'worker'))
  const [spare = ''] = readdirSync(sparesDir)
  writeFileSync(join(sparesDir, spare, 'tasks', 'task.sh'), 'echo no\n')
  expect(everything(prepared('worker'))).toEqual(fresh)
})

test('a spare folder tells of no task, should the power fail before the next one is on the disk', () => {
  const folder = prepared('worker')
  writeFileSync(join(folder, 'exit'), 'task 0\n', { flag: 'r+' })
  folders.release(folder)
  const [spare = ''] = readdirSync(sparesDir)
  const left = join(sparesDir, spare)
  expect(['exit', 'worker.json'].map((name) => statSync(join(left, name)).size)).toEqual([0, 0])
  expect([readRecord(left), readExit(left), hasStarted(left)]).toEqual([
    undefined,
    undefined,
    false,
  ])
})

test('what was there under the name of a worker makes room', () => {
  const fresh = everything(prepared('worker'))
  writeFileSync(join(workersDir, 'worker', 'home', 'old'), '')
  expect(everything(prepared('worker'))).toEqual(fresh)
})

test('nothing is spared of workers of an earlier process, nor what it had spared', () => {
  const [first, second] = [prepared('first'), prepared('second')]
  folders.release(first)
  expect(readdirSync(sparesDir)).toHaveLength(1)
  folders = new WorkerFolders(workersDir)
  folders.release(second)
  expect([...readdirSync(workersDir), ...readdirSync(sparesDir)]).toEqual([])
})

test('workers are not copied into each other where their folder is a link into the tasks folder', () => {
  const big = join(root, 'tasks', 'big')
  mkdirSync(join(big, 'workers'), { recursive: true })
  rmSync(workersDir, { recursive: true })
  symlinkSync(join(big, 'workers'), workersDir)
  folders = new WorkerFolders(workersDir)
  prepared('first')
  expect(readdirSync(join(prepared('second'), 'tasks', 'big'))).toEqual([])
})

test('closing removes what was spared', () => {
  folders.release(prepared('first'))
  folders.close()
  expect(readdirSync(sparesDir)).toEqual([])
})

test('a folder that cannot be filled leaves nothing behind', () => {
  rmSync(join(root, 'tasks'), { recursive: true })
  expect(() => prepared('worker')).toThrow('ENOENT')
  expect([...readdirSync(workersDir), ...readdirSync(sparesDir)]).toEqual([])
})
