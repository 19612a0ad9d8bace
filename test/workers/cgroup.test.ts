import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import type { Readable, Writable } from 'node:stream'
import { afterEach, describe, expect, test } from 'vitest'
import {
  cgroupMounts,
  ownCgroupPaths,
  SlotCgroups,
  WorkerProcesses,
} from '../../src/workers/local/cgroup.ts'
import { LeftoverFinder } from '../../src/workers/local/leftover-finder.ts'
import { identify, killIfSame, type ProcessIdentity } from '../../src/workers/local/processes.ts'
import { skipReason } from '../helpers/programs.ts'

const folders: string[] = []
const shells: ChildProcessByStdio<Writable, Readable, null>[] = []
const leftovers: ProcessIdentity[] = []
const opened: SlotCgroups[] = []
const made: Array<[SlotCgroups, string]> = []

function newFolder(): string {
  const folder = realpathSync(mkdtempSync(join(tmpdir(), 'cgroup-')))
  folders.push(folder)
  return folder
}

function open(workersDir = newFolder()): SlotCgroups {
  const cgroups = SlotCgroups.open(workersDir)
  if (!cgroups) throw new Error('no cgroups')
  opened.push(cgroups)
  return cgroups
}

function make(cgroups: SlotCgroups, name: string): string {
  const path = cgroups.make(name)
  made.push([cgroups, path])
  return path
}

/** A shell as slots have it, in a cgroup. */
async function shellIn(path: string | undefined) {
  const shell = spawn('/bin/sh', ['-s'], {
    cwd: '/',
    detached: true,
    env: {},
    stdio: ['pipe', 'pipe', 'ignore'],
  })
  shells.push(shell)
  const run = async (script: string): Promise<string> => {
    shell.stdin.write(`${script}\n`)
    const [output] = await once(shell.stdout, 'data')
    return String(output).trim()
  }
  await run(`${path === undefined ? '' : `echo $$ >${path}/cgroup.procs; `}echo entered`)
  const identity = identify(shell.pid ?? 0)
  if (!identity) throw new Error('no shell')
  /** What a task leaves; `before` runs in it first. */
  const leave = async (before = ':'): Promise<ProcessIdentity> => {
    const pid = await run(
      `env -i PATH=/usr/bin:/bin setsid sh -c '${before}; echo $$; exec sleep 1000 >/dev/null' &`,
    )
    const left = identify(Number(pid))
    if (!left) throw new Error('nothing was left')
    leftovers.push(left)
    return left
  }
  return { identity, run, leave }
}

afterEach(async () => {
  for (const identity of leftovers.splice(0)) killIfSame(identity)
  for (const shell of shells.splice(0)) {
    const ended = once(shell, 'exit')
    if (shell.exitCode === null && shell.signalCode === null) {
      shell.kill('SIGKILL')
      await ended
    }
  }
  for (const [cgroups, path] of made.splice(0)) {
    await expect.poll(() => cgroups.remove(path)).toBe(true)
  }
  for (const cgroups of opened.splice(0)) cgroups.close()
  for (const folder of folders.splice(0)) rmSync(folder, { recursive: true })
})

/** Skips, by name, where no cgroup can be made. */
const withCgroups = (() => {
  const folder = mkdtempSync(join(tmpdir(), 'cgroup-'))
  const cgroups = SlotCgroups.open(folder)
  cgroups?.close()
  rmSync(folder, { recursive: true })
  if (cgroups) return test
  test.skip(skipReason('needs the right to make cgroups'), () => {})
  return test.skip
})()

const HYBRID = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime shared:9 - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime - cgroup2 cgroup2 rw
`

describe('where cgroups can be made', () => {
  test("version 2 comes first, then version 1, each in the service's own cgroup", () => {
    const own = '9:name=systemd:/system.slice/a b\n8:pids:/\n3:cpu,cpuacct:/x\n0::/a:b\n'
    expect(ownCgroupPaths(cgroupMounts(HYBRID), own)).toEqual([
      '/sys/fs/cgroup/uni fied/a:b',
      '/sys/fs/cgroup/pids',
      '/sys/fs/cgroup/systemd/system.slice/a b',
    ])
  })

  test('a mount that shows another part of the hierarchy is no place', () => {
    const mounts = cgroupMounts('41 31 0:38 /docker/1 /sys/fs/cgroup ro - cgroup2 cgroup ro\n')
    expect(ownCgroupPaths(mounts, '0::/docker/1/inner\n')).toEqual(['/sys/fs/cgroup/inner'])
    expect(ownCgroupPaths(mounts, '0::/docker/1\n')).toEqual(['/sys/fs/cgroup'])
    expect(ownCgroupPaths(mounts, '0::/docker/12\n')).toEqual([])
    expect(ownCgroupPaths(mounts, '0::/../other\n')).toEqual([])
  })

  test('without a hierarchy, or where no process can enter, there are none', () => {
    const proc = newFolder()
    const place = newFolder()
    writeFileSync(join(proc, 'cgroup'), '0::/\n')
    writeFileSync(join(proc, 'mountinfo'), '')
    expect(SlotCgroups.open(newFolder(), proc)).toBeUndefined()
    // A plain folder is none: no process enters it by a file that is called cgroup.procs.
    for (const dir of [place, join(place, 'gone')]) {
      writeFileSync(join(proc, 'mountinfo'), `1 1 0:1 / ${dir} rw - cgroup2 cgroup2 rw\n`)
      expect(SlotCgroups.open(newFolder(), proc)).toBeUndefined()
    }
    expect(SlotCgroups.open(join(place, 'gone'))).toBeUndefined()
  })
})

describe('SlotCgroups', () => {
  withCgroups('what a shell starts is in its cgroup, whatever it does', async () => {
    const cgroups = open()
    const path = make(cgroups, 'slot-1')
    const shell = await shellIn(path)
    const left = await shell.leave('cd /')
    expect(cgroups.processes(path)).toEqual([shell.identity.pid, left.pid])
    expect(cgroups.processes(make(cgroups, 'slot-2'))).toEqual([])
  })

  test.for(['pids', 'freezer', 'name=systemd'])(
    'a hierarchy of version 1 does as well: %s',
    async (hierarchy, { skip }) => {
      const mountinfo = readFileSync('/proc/self/mountinfo', 'utf8')
      const lines = mountinfo.split('\n').filter((line) => line.includes(` cgroup rw,${hierarchy}`))
      const proc = newFolder()
      writeFileSync(join(proc, 'mountinfo'), `${lines.join('\n')}\n`)
      writeFileSync(join(proc, 'cgroup'), readFileSync('/proc/self/cgroup'))
      const cgroups = SlotCgroups.open(newFolder(), proc)
      // Most machines have version 2 alone.
      if (!cgroups) return skip(`no hierarchy ${hierarchy} where cgroups can be made`)
      opened.push(cgroups)
      const path = make(cgroups, 'slot-1')
      const shell = await shellIn(path)
      const left = await shell.leave(`mkdir ${path}/a; echo $$ >${path}/a/cgroup.procs`)
      expect(path).toContain('/sys/fs/cgroup/')
      expect(cgroups.processes(path)).toEqual([shell.identity.pid, left.pid])
    },
  )

  withCgroups('processes in cgroups that a task made below are listed', async () => {
    const cgroups = open()
    const path = make(cgroups, 'slot-1')
    const shell = await shellIn(path)
    const left = await shell.leave(
      `mkdir -p ${path}/a/b ${path}/c; echo $$ >${path}/a/b/cgroup.procs`,
    )
    expect(cgroups.processes(path)).toEqual([shell.identity.pid, left.pid])
  })

  withCgroups(
    'a cgroup is removed with those below it, but not while processes are in one',
    async () => {
      const cgroups = open()
      const path = make(cgroups, 'slot-1')
      const shell = await shellIn(undefined)
      const left = await shell.leave(
        `mkdir -p ${path}/a/b ${path}/c; echo $$ >${path}/a/b/cgroup.procs`,
      )
      expect(cgroups.remove(path)).toBe(false)
      expect(existsSync(join(path, 'c'))).toBe(true)
      killIfSame(left)
      await expect.poll(() => cgroups.remove(path)).toBe(true)
      expect(existsSync(path)).toBe(false)
      expect(cgroups.remove(path)).toBe(true)
      expect(cgroups.processes(path)).toBeUndefined()
    },
  )

  withCgroups(
    'what an earlier service left is removed at the start, unless processes live in it',
    async () => {
      const workersDir = newFolder()
      const earlier = open(workersDir)
      const empty = earlier.make('slot-1')
      mkdirSync(join(empty, 'inner'))
      const used = make(earlier, 'slot-2')
      mkdirSync(join(used, 'inner'))
      const shell = await shellIn(used)
      const otherService = make(open(), 'slot-1')
      const cgroups = open(workersDir)
      expect(existsSync(empty)).toBe(false)
      expect(existsSync(join(used, 'inner'))).toBe(true)
      expect(existsSync(otherService)).toBe(true)
      expect(cgroups.processes(used)).toEqual([shell.identity.pid])
      expect(() => cgroups.make('slot-2')).toThrow(/EEXIST/)
    },
  )

  withCgroups('a path that is not of our making is neither listed nor removed', async () => {
    const cgroups = open()
    const path = make(cgroups, 'slot-1')
    const other = make(open(), 'slot-1')
    const shell = await shellIn(other)
    for (const odd of [
      other,
      dirname(path),
      dirname(dirname(path)),
      `${path}/`,
      `${path}/../../${other.split('/').slice(-2).join('/')}`,
      join('/tmp', ...path.split('/').slice(-2)),
      '',
    ]) {
      expect(cgroups.processes(odd), odd).toBeUndefined()
      expect(cgroups.remove(odd), odd).toBe(false)
    }
    for (const name of ['', '.', '..', 'a/b', '../a']) {
      expect(() => cgroups.make(name), name).toThrow(/not a name/)
    }
    expect(identify(shell.identity.pid)).toEqual(shell.identity)
  })
})

describe('WorkerProcesses', () => {
  withCgroups('the cgroup of a slot tells without a look at other processes', async () => {
    const cgroups = open()
    const cgroup = make(cgroups, 'slot-1')
    const { identity, leave } = await shellIn(cgroup)
    const looked: unknown[] = []
    const marks = { find: (sought: unknown) => looked.splice(0, 0, sought) as ProcessIdentity[] }
    const processes = new WorkerProcesses(marks, cgroups)
    const sought = { worker: 'task-one', shell: identity, group: identity.pid, cgroup }
    expect(processes.find(sought)).toEqual([])
    const left = await leave('cd /')
    expect(processes.find(sought)).toEqual([left])
    expect(looked).toEqual([])
  })

  withCgroups('what is older than the shell was moved in by somebody, and is spared', async () => {
    const cgroups = open()
    const cgroup = make(cgroups, 'slot-1')
    const older = await shellIn(undefined)
    await older.run(`echo $$ >${cgroup}/cgroup.procs; echo moved`)
    const shell = await shellIn(cgroup)
    const [boot, ticks] = shell.identity.startedAt.split(' ')
    const after = { pid: shell.identity.pid, startedAt: `${boot} ${Number(ticks) + 1}` }
    const processes = new WorkerProcesses({ find: () => [] }, cgroups)
    expect(processes.find({ worker: 'task-one', shell: after, cgroup })).toEqual([])
  })

  withCgroups.each([
    ['did not enter it', false],
    ['has ended', true],
  ])('marks tell as well where the shell %s', async (_, hasEntered) => {
    const workersDir = newFolder()
    const cgroups = open(workersDir)
    const cgroup = make(cgroups, 'slot-1')
    const { identity, leave } = await shellIn(hasEntered ? cgroup : undefined)
    const inside = await leave(`echo $$ >${cgroup}/cgroup.procs`)
    const outside = await leave(
      `echo $$ >${dirname(dirname(cgroup))}/cgroup.procs; cd ${workersDir}; mkdir task-one; cd task-one`,
    )
    if (hasEntered) {
      killIfSame(identity)
      await expect.poll(() => identify(identity.pid)).toBeUndefined()
    }
    const processes = new WorkerProcesses(new LeftoverFinder(workersDir), cgroups)
    const found = processes.find({ worker: 'task-one', shell: identity, cgroup })
    expect(found).toEqual([inside, outside])
  })

  test('without cgroups marks tell', async () => {
    const { identity, leave } = await shellIn(undefined)
    const workersDir = newFolder()
    mkdirSync(join(workersDir, 'task-one'))
    const left = await leave(`cd ${workersDir}/task-one`)
    const processes = new WorkerProcesses(new LeftoverFinder(workersDir), undefined)
    const sought = { worker: 'task-one', shell: identity, cgroup: '/sys/fs/cgroup/x/slot-1' }
    expect(processes.find(sought)).toEqual([left])
  })
})
