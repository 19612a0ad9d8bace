import {
  chmodSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Contents } from '../../src/workers/local/folders.ts'
import { WorkerFolders } from '../../src/workers/local/worker-folders.ts'

let root: string
let workersDir: string
let sparesDir: string
let folders: WorkerFolders

beforeEach(() => {
  root = realpathSync(mkdtempSync(join(tmpdir(), 'worker-folders-')))
  workersDir = join(root, 'workers')
  sparesDir = join(root, 'workers-spare')
  mkdirSync(workersDir)
  mkdirSync(join(root, 'tasks'))
  writeFileSync(join(root, 'tasks', 'task.sh'), 'echo hi\n')
  folders = new WorkerFolders(workersDir)
})
afterEach(() => rmSync(root, { recursive: true }))

function prepared(name: string, contents: Partial<Contents> = {}): string {
  const folder = join(workersDir, name)
  folders.prepare(folder, join(root, 'tasks'), {
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
      const content = stats.isFile() ? readFileSync(join(folder, name), 'utf8') : ''
      return [name, `${stats.mode.toString(8)} ${stats.nlink} ${content}`]
    }),
  )
}

describe('the folder of a worker whose task', () => {
  const deeds: Record<string, (folder: string) => void> = {
    'touched nothing': () => {},
    'ended as tasks end': (folder) => {
      writeFileSync(join(folder, 'started'), 'yes\n', { flag: 'r+' })
      writeFileSync(join(folder, 'exit'), 'startup 1 The startup script failed\n', { flag: 'r+' })
      writeFileSync(join(folder, 'log'), 'a secret\n')
    },
    'left files in its home and its temporary folder': (folder) => {
      for (const name of ['home/.bashrc', 'home/a', 'tmp/b']) writeFileSync(join(folder, name), '')
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
      for (const name of ['exit', 'started']) {
        rmSync(join(folder, name))
        symlinkSync(join(root, 'elsewhere'), join(folder, name))
      }
      linkSync(join(folder, 'worker.json'), join(root, 'kept'))
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

  test('touched nothing serves the next one, with another log', () => {
    const first = prepared('first')
    // Held open, as by one who follows the log.
    linkSync(join(first, 'log'), join(root, 'followed'))
    const { ino } = statSync(join(first, 'home'))
    folders.release(first)
    const second = prepared('second', { notes: ['of the second'] })
    expect(statSync(join(second, 'home')).ino).toBe(ino)
    expect(readFileSync(join(second, 'log'), 'utf8')).toContain('of the second')
    expect(readFileSync(join(root, 'followed'), 'utf8')).toBe('')
  })
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
  expect(readdirSync(root).toSorted()).toEqual(['tasks', 'workers'])
  expect(readdirSync(workersDir)).toEqual([])
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
