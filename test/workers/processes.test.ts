import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, describe, expect, test } from 'vitest'
import { LeftoverFinder, type ProcessQuery } from '../../src/workers/local/leftover-finder.ts'
import {
  identify,
  isAlive,
  kill,
  killIfSame,
  nameOf,
  type ProcessIdentity,
  writersOf,
} from '../../src/workers/local/processes.ts'
import { needs } from '../helpers/needs.ts'

const started: ChildProcess[] = []
const leftovers: ProcessIdentity[] = []
const folders: string[] = []

/** A process that has begun with its command: between fork and exec it would still look like us. */
async function start(
  script: string,
  options: { env?: Record<string, string>; detached?: boolean } = {},
): Promise<ChildProcess & { pid: number; lines: string[] }> {
  const child = spawn('/bin/sh', ['-c', `echo $$; ${script}`], {
    env: { PATH: '/usr/bin:/bin', ...options.env },
    detached: options.detached ?? false,
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  started.push(child)
  const lines: string[] = []
  child.stdout.on('data', (chunk) => lines.push(...String(chunk).trim().split('\n')))
  await once(child.stdout, 'data')
  const { pid } = child
  if (pid === undefined) throw new Error('no process')
  return Object.assign(child, { pid, lines })
}

async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  const ended = once(child, 'exit')
  child.kill('SIGKILL')
  await ended
}

afterEach(async () => {
  for (const identity of leftovers.splice(0)) {
    if (isAlive(identity))
      kill(identity.pid === groupOf(identity.pid) ? -identity.pid : identity.pid)
  }
  for (const child of started.splice(0)) {
    if (child.pid !== undefined && child.exitCode === null && child.signalCode === null) {
      await end(child)
    }
  }
  for (const folder of folders.splice(0)) rmSync(folder, { recursive: true, force: true })
})

const stateOf = (pid: number) => readFileSync(`/proc/${pid}/stat`, 'latin1').split(') ')[1]?.[0]

describe('identify and isAlive', () => {
  test('a live process has one identity, and it is alive with it', async () => {
    const child = await start('exec sleep 1000')
    const identity = identify(child.pid)
    expect(identity).toEqual({
      pid: child.pid,
      startedAt: expect.stringMatching(/^[0-9a-f-]{36} \d+$/),
    })
    expect(identify(child.pid)).toEqual(identity)
    expect(identity && isAlive(identity)).toBe(true)
  })

  test('a process that has ended is not alive', async () => {
    const child = await start('exec sleep 1000')
    const identity = identify(child.pid)
    await end(child)
    expect(identify(child.pid)).toBeUndefined()
    expect(identity && isAlive(identity)).toBe(false)
  })

  test('another process under the same number, or one before a reboot, is told apart', async () => {
    const child = await start('exec sleep 1000')
    const identity = identify(child.pid)
    if (!identity) throw new Error('no identity')
    const [boot, ticks] = identity.startedAt.split(' ')
    expect(isAlive({ ...identity, startedAt: `${boot} ${Number(ticks) - 1}` })).toBe(false)
    expect(isAlive({ ...identity, startedAt: `another-boot ${ticks}` })).toBe(false)
  })

  test('a zombie is not alive', async () => {
    // The parent becomes a program that never asks for its children's ends.
    const parent = await start('sleep 1000 & echo $!; exec sleep 1000')
    await expect.poll(() => parent.lines.length).toBe(2)
    const child = Number(parent.lines[1])
    const identity = identify(child)
    if (!identity) throw new Error('no identity')
    process.kill(child, 'SIGKILL')
    await expect.poll(() => stateOf(child)).toBe('Z')
    expect(identify(child)).toBeUndefined()
    expect(isAlive(identity)).toBe(false)
  })

  test('a program name with spaces and parentheses does not confuse', async () => {
    const child = await start(`exec python3 -c "
import ctypes, sys
ctypes.CDLL(None).prctl(15, b') Z 1 (', 0, 0, 0)
print('named', flush=True)
sys.stdin.read()"`)
    await expect.poll(() => child.lines).toContain('named')
    expect(readFileSync(`/proc/${child.pid}/stat`, 'latin1')).toContain('() Z 1 ()')
    expect(identify(child.pid)).toMatchObject({ pid: child.pid })
  })

  test('a process whose first thread has ended is alive while another runs', async () => {
    const child = await start(`exec python3 -c "
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
print('two', flush=True)
ctypes.CDLL(None).syscall(60 if __import__('os').uname().machine == 'x86_64' else 93, 0)"`)
    await expect.poll(() => child.lines).toContain('two')
    await expect.poll(() => stateOf(child.pid)).toBe('Z')
    expect(identify(child.pid)).toMatchObject({ pid: child.pid })
  })

  test('a number that no process has is none', () => {
    expect(identify(2 ** 22 + 1)).toBeUndefined()
  })
})
const fieldOf = (pid: number, index: number) =>
  Number(readFileSync(`/proc/${pid}/stat`, 'latin1').split(') ').at(-1)?.split(' ')[index])
const parentOf = (pid: number) => fieldOf(pid, 1)
const groupOf = (pid: number) => fieldOf(pid, 2)

describe('nameOf', () => {
  test('the name of a process is told without what could disturb a line of text', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'finder-'))
    folders.push(folder)
    const script = join(folder, 'a\u202eb\nc\x1b')
    writeFileSync(script, '#!/bin/sh\necho named; read -r line', { mode: 0o700 })
    const child = await start('exec "$SCRIPT"', { env: { SCRIPT: script } })
    await expect.poll(() => child.lines).toContain('named')
    const identity = identify(child.pid)
    if (!identity) throw new Error('no process')
    expect(nameOf(identity)).toBe('a\ufffdb\ufffdc\ufffd')
    expect(nameOf({ ...identity, startedAt: 'another' })).toBeUndefined()
  })
})

describe('killIfSame', () => {
  test('only the very process is killed, never one that has its number', async () => {
    const child = await start('exec sleep 1000')
    const identity = identify(child.pid)
    if (!identity) throw new Error('no process')
    killIfSame({ ...identity, startedAt: `${identity.startedAt}0` })
    expect(isAlive(identity)).toBe(true)
    killIfSame(identity, 'SIGTERM')
    expect(await once(child, 'exit')).toEqual([null, 'SIGTERM'])
  })
})

/** A worker as its task sees it: a folder, and a shell that runs what a test leaves behind. */
async function worker({ dir = 'workers' } = {}) {
  const root = realpathSync(mkdtempSync(join(tmpdir(), 'finder-')))
  folders.push(root)
  const workersDir = join(root, dir)
  const folder = join(workersDir, 'task-one')
  for (const name of ['tasks', 'home', 'tmp']) mkdirSync(join(folder, name), { recursive: true })
  const shell = spawn('/bin/sh', ['-s'], {
    cwd: '/',
    detached: true,
    env: {},
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  started.push(shell)
  const identity = identify(shell.pid ?? 0)
  if (!identity) throw new Error('no shell')
  leftovers.push(identity)
  const finder = new LeftoverFinder(workersDir)
  const pidFile = join(root, 'pid')
  const pidIn = (file: string) => (existsSync(file) ? readFileSync(file, 'utf8') : '')
  return {
    root,
    workersDir,
    folder,
    finder,
    shell: identity,
    pidFile,
    find: (more: Partial<ProcessQuery> = {}) =>
      finder
        .find({ worker: 'task-one', shell: identity, group: identity.pid, ...more })
        .map(({ pid }) => pid),
    /** Runs a task that writes the id of what it leaves behind to `pidFile`. */
    async leave(script: string, env: Record<string, string> = {}): Promise<number> {
      const variables = Object.entries({ PATH: '/usr/bin:/bin', ...env })
        .map(([name, value]) => `${name}='${value}'`)
        .join(' ')
      writeFileSync(join(root, 'task.sh'), script)
      shell.stdin.write(
        `cd '${folder}/tasks' && ${variables} /bin/sh '${root}/task.sh' </dev/null >>'${folder}/log' 2>&1; cd /; echo ended\n`,
      )
      await once(shell.stdout, 'data')
      await expect.poll(() => pidIn(pidFile)).toMatch(/^\d+\n$/)
      const left = identify(Number(pidIn(pidFile)))
      if (!left) throw new Error('nothing was left')
      leftovers.push(left)
      return left.pid
    },
  }
}

const ownedBy = (folder: string) => ({ WORKER_NAME: 'task-one', HOME: `${folder}/home` })

describe('LeftoverFinder', () => {
  test('processes with the folder of the worker in their environment are found, and no others', async () => {
    const one = await start('exec sleep 1000', { env: { TASK_RUNNER_FOLDER: '/w/task-one' } })
    const named = await start('exec sleep 1000', {
      env: { WORKER_NAME: 'task-one', HOME: '/w/task-one/home', A: 'b' },
    })
    const apart = await start('exec setsid -w sleep 1000', {
      env: { TASK_RUNNER_FOLDER: '/w/task-one' },
    })
    const others: Record<string, string>[] = [
      { TASK_RUNNER_FOLDER: '/w/task-one-more' },
      { TASK_RUNNER_FOLDER: '/w/task-one/home' },
      { NOT_TASK_RUNNER_FOLDER: '/w/task-one' },
      { OTHER: 'TASK_RUNNER_FOLDER=/w/task-one' },
      { WORKER_NAME: 'task-one-more', HOME: '/w/task-one-more/home' },
      // Of workers of the same name that another service of this machine has.
      { WORKER_NAME: 'task-one', HOME: '/other/task-one/home' },
      { TASK_RUNNER_FOLDER: '/other/task-one' },
      { NOT_WORKER_NAME: 'task-one', HOME: '/w/task-one/home' },
      {},
    ]
    for (const env of others) await start('exec sleep 1000', { env })
    const finder = new LeftoverFinder('/w')
    const found = finder.find({ worker: 'task-one' })
    // `setsid -w` may have a child by now.
    const own = found.filter(({ pid }) => identify(pid) && parentOf(pid) !== apart.pid)
    expect(own.map(({ pid }) => pid)).toEqual([one.pid, named.pid, apart.pid])
    expect(found).toContainEqual(identify(one.pid))
    expect(finder.workers()).toEqual(new Set(['task-one', 'task-one-more']))
    expect(finder.find({ worker: 'task-two' })).toEqual([])
  })

  test("processes of a slot's group are found, but not the slot itself", async () => {
    const finder = new LeftoverFinder('/w')
    const slot = await start('env -i /bin/sleep 1000 & echo $!; wait', { detached: true })
    await expect.poll(() => slot.lines.length).toBe(2)
    const child = identify(Number(slot.lines[1]))
    if (!child) throw new Error('no child')
    leftovers.push(child)
    const sought = { worker: 'task-none', shell: identify(slot.pid) }
    expect(finder.find({ ...sought, group: slot.pid })).toEqual([child])
    expect(finder.find({ worker: 'task-none', group: slot.pid })).toEqual([child])
    expect(finder.find(sought)).toEqual([])
    // When the slot is gone, its group is still that of its children.
    await end(slot)
    expect(finder.find({ ...sought, group: slot.pid })).toEqual([child])
    killIfSame(child)
    await expect.poll(() => finder.find({ ...sought, group: slot.pid })).toEqual([])
  })

  test("the group of a process that got the shell's number is not looked for", async () => {
    const stranger = await start('env -i /bin/sleep 1000 & echo $!; wait', { detached: true })
    await expect.poll(() => stranger.lines.length).toBe(2)
    const shell = identify(stranger.pid)
    if (!shell) throw new Error('no process')
    leftovers.push(identify(Number(stranger.lines[1])) ?? shell)
    const [boot, ticks] = shell.startedAt.split(' ')
    const ended = { ...shell, startedAt: `${boot} ${Number(ticks) - 1}` }
    const finder = new LeftoverFinder('/w')
    const found = finder.find({ worker: 'task-none', shell: ended, group: stranger.pid })
    expect(found).toEqual([])
  })

  test('a killed process whose parent does not ask for its end counts as gone', async () => {
    const finder = new LeftoverFinder('/w')
    const parent = await start(
      'env TASK_RUNNER_FOLDER=/w/task-z sleep 1000 & echo $!; exec sleep 1000',
    )
    await expect.poll(() => parent.lines.length).toBe(2)
    const child = Number(parent.lines[1])
    const pids = () => finder.find({ worker: 'task-z' }).map(({ pid }) => pid)
    await expect.poll(pids).toEqual([child])
    process.kill(child, 'SIGKILL')
    await expect.poll(() => stateOf(child)).toBe('Z')
    expect(pids()).toEqual([])
  })

  test('a young process is read again: its environment may still change', async () => {
    const finder = new LeftoverFinder('/w')
    const child = await start('read line; TASK_RUNNER_FOLDER=/w/task-late exec sleep 1000')
    const pids = () => finder.find({ worker: 'task-late' }).map(({ pid }) => pid)
    expect(pids()).toEqual([])
    child.stdin?.write('go\n')
    await expect.poll(pids).toEqual([child.pid])
  })

  test('a daemon that cleared its environment is found by its folder', async () => {
    const one = await worker()
    const pid = await one.leave(
      `(env -i setsid sh -c 'echo $$ >${one.pidFile}; exec sleep 1000' >/dev/null 2>&1 &)`,
      ownedBy(one.folder),
    )
    expect(one.find()).toEqual([pid])
    // Without its shell, nothing tells it from an administrator who looks into the folder.
    expect(one.find({ shell: undefined, group: undefined })).toEqual([])
  })

  needs('perl')('a daemon that writes its title over its environment is found', async () => {
    const one = await worker()
    writeFileSync(
      join(one.root, 'daemon.pl'),
      `use POSIX; exit if fork; setsid();
      open STDIN, '/dev/null'; open STDOUT, '>/dev/null'; open STDERR, '>/dev/null';
      $0 = 'my daemon';
      open my $pid, '>', '${one.pidFile}'; print $pid "$$\\n"; close $pid;
      sleep 1000`,
    )
    const pid = await one.leave(`perl ${one.root}/daemon.pl`, ownedBy(one.folder))
    expect(readFileSync(`/proc/${pid}/environ`, 'latin1')).not.toContain('WORKER_NAME')
    expect(one.find()).toEqual([pid])
  })

  test("a daemon that went elsewhere is found, whatever folders the request's variables name", async () => {
    const one = await worker()
    const pid = await one.leave(
      `cd /; cd /usr; (setsid sh -c 'echo $$ >${one.pidFile}; exec sleep 1000' >/dev/null 2>&1 &)`,
      { ...ownedBy(one.folder), HOME: '/root', TMPDIR: '/tmp', TASK_RUNNER_FOLDER: one.folder },
    )
    expect(one.find()).toEqual([pid])
  })

  test.each([
    ['WORKER_NAME', (folder: string) => ownedBy(folder)],
    ['TASK_RUNNER_FOLDER', (folder: string) => ({ TASK_RUNNER_FOLDER: folder })],
    ['its working folder alone', () => ({})],
  ])('letters outside ASCII in the folder of the workers change nothing: %s', async (_, env) => {
    const one = await worker({ dir: 'ünï' })
    const cd = Object.keys(env('')).length > 0 ? 'cd /; cd /usr; ' : ''
    const pid = await one.leave(
      `${cd}(setsid sh -c 'echo $$ >${one.pidFile}; exec sleep 1000' >/dev/null 2>&1 &)`,
      env(one.folder),
    )
    expect(one.find()).toEqual([pid])
  })

  test('bytes that are not UTF-8 in the environment hide nothing, and are nobody', async () => {
    const finder = new LeftoverFinder('/w')
    const odd = `A=$(printf '\\351\\303') `
    const own = await start(`${odd} TASK_RUNNER_FOLDER=/w/task-odd exec sleep 1000`)
    await start(`TASK_RUNNER_FOLDER=/w/task-odd$(printf '\\351') exec sleep 1000`)
    await start(`WORKER_NAME=task-odd HOME=/w$(printf '\\351')/task-odd/home exec sleep 1000`)
    const pids = () => finder.find({ worker: 'task-odd' }).map(({ pid }) => pid)
    await expect.poll(pids).toEqual([own.pid])
    expect(pids()).toEqual([own.pid])
  })

  test.each([
    ['standard input', 'exec sleep 1000 <FOLDER/tmp/file', 'cd /;'],
    ['output to a removed file', 'exec sleep 1000 >FOLDER/tmp/file; rm FOLDER/tmp/file', 'cd /;'],
    [
      'removed working folder',
      'exec sleep 1000',
      'mkdir FOLDER/tmp/gone; cd FOLDER/tmp/gone; rmdir FOLDER/tmp/gone;',
    ],
    ["removed worker's folder", 'exec sleep 1000', 'cd FOLDER; rm -r FOLDER;'],
  ])('a daemon is found by what it holds in the folder: %s', async (_, exec, before) => {
    const one = await worker()
    writeFileSync(join(one.folder, 'tmp/file'), 'x')
    const fill = (text: string) => text.replaceAll('FOLDER', one.folder)
    const pid = await one.leave(
      fill(
        `${before} (env -i setsid sh -c 'echo $$ >${one.pidFile}; ${exec}' </dev/null >/dev/null 2>&1 &)`,
      ),
    )
    expect(one.find()).toEqual([pid])
  })

  test("a job with a group of its own is found by the shell's session", async () => {
    const one = await worker()
    const pid = await one.leave(
      `cd /; set -m; (exec env -i sh -c 'echo $$ >${one.pidFile}; exec sleep 1000' >/dev/null 2>&1 &)`,
    )
    expect(one.find()).toEqual([pid])
  })

  test('children of what is found are found with it: once it is killed, nothing would tell', async () => {
    const one = await worker()
    const child = await one.leave(
      `(setsid sh -c '(cd /; exec env -i sh -c "echo \\$\\$ >${one.pidFile}; exec sleep 1000") & wait' >/dev/null 2>&1 &)`,
      { TASK_RUNNER_FOLDER: one.folder },
    )
    expect(one.find().sort()).toEqual([parentOf(child), child].sort())
    for (const identity of one.finder.find({ worker: 'task-one' })) killIfSame(identity)
  })

  test('a working folder too deep to be told hides no others', async () => {
    const one = await worker()
    writeFileSync(
      join(one.root, 'deep.py'),
      `import os, time
for _ in range(20): os.mkdir('d' * 250); os.chdir('d' * 250)
open('${one.pidFile}', 'w').write(f'{os.getpid()}\\n')
time.sleep(1000)`,
    )
    await one.leave(`(env -i setsid python3 ${one.root}/deep.py >/dev/null 2>&1 &)`, {
      PATH: process.env.PATH ?? '',
    })
    const shallow = await one.leave(
      `rm ${one.pidFile}; (env -i setsid sh -c 'echo $$ >${one.pidFile}; exec sleep 1000' >/dev/null 2>&1 &)`,
    )
    expect(one.find()).toEqual([shallow])
  })

  test('what stands in the folder and is older than the shell is spared, with what it starts', async () => {
    const administrator = await start('while read -r line; do eval "$line"; done')
    // Start times are told in hundredths of a second.
    const tick = () => readFileSync('/proc/uptime', 'latin1').split(' ')[0]
    const before = tick()
    await expect.poll(tick).not.toBe(before)
    const one = await worker()
    writeFileSync(join(one.folder, 'log'), '')
    administrator.stdin?.write(`cd ${one.folder}; sleep 1000 <log & echo $!\n`)
    await expect.poll(() => administrator.lines.length).toBe(2)
    const reader = identify(Number(administrator.lines[1]))
    if (!reader) throw new Error('no reader')
    leftovers.push(reader)
    await expect.poll(() => nameOf(reader)).toBe('sleep')
    expect(one.find()).toEqual([])
    // Once its parent has ended, only its own age tells.
    const later = await worker()
    expect(later.finder.find({ worker: 'task-one', shell: reader })).toEqual([])
  })

  test("another service's worker of the same name is spared, in its own folder", async () => {
    const one = await worker()
    const other = await worker()
    const pid = await other.leave(
      `(env -i setsid sh -c 'echo $$ >${other.pidFile}; exec sleep 1000' >/dev/null 2>&1 &)`,
    )
    expect(one.find()).toEqual([])
    expect(other.find()).toEqual([pid])
  })

  test("a process in this folder that has another worker's environment is the other's, while that is there", async () => {
    const one = await worker()
    const other = join(one.workersDir, 'task-two')
    mkdirSync(other)
    const pid = await one.leave(
      `(env -i TASK_RUNNER_FOLDER=${other} setsid sh -c 'echo $$ >${one.pidFile}; exec sleep 1000' >/dev/null 2>&1 &)`,
    )
    expect(one.find()).toEqual([])
    expect(one.find({ worker: 'task-two' })).toEqual([pid])
    rmSync(other, { recursive: true })
    expect(one.find()).toEqual([pid])
  })

  test("what has the pipe of the slot's log as its output is found, and what else could write into it is told", async () => {
    const one = await worker()
    const fifo = join(one.root, 'fifo')
    execFileSync('mkfifo', [fifo])
    const log = statSync(fifo)
    const holder = await start(`exec 5<>${fifo} sleep 1000`)
    await expect.poll(() => existsSync(`/proc/${holder.pid}/fd/5`)).toBe(true)
    const pid = await one.leave(
      `cd /; (env -i setsid sh -c 'echo $$ >${one.pidFile}; exec sleep 1000' 2>${fifo} >/dev/null &)`,
    )
    expect(one.find()).toEqual([])
    expect(one.find({ log })).toEqual([pid])
    const bystander = await start('exec sleep 1000')
    const all = [holder.pid, pid, bystander.pid].flatMap((each) => identify(each) ?? [])
    expect(writersOf(log, all).map((each) => each.pid)).toEqual([holder.pid, pid])
    const [first] = all
    expect(first && writersOf(log, [{ ...first, startedAt: 'another' }])).toEqual([])
  })

  test('a pipe without a name is told by its number', async () => {
    const one = await worker()
    const pid = await one.leave(
      `cd /; (env -i setsid sh -c 'echo $$ >${one.pidFile}; exec sleep 1000' 2>&1 >/dev/null | (exec sleep 1000 >/dev/null 2>&1) &)`,
    )
    const log = statSync(`/proc/${pid}/fd/2`)
    expect(one.find({ group: undefined })).toEqual([])
    expect(one.find({ group: undefined, log })).toEqual([pid])
    expect(one.find({ group: undefined, log: { ...log, dev: log.dev + 1 } })).toEqual([])
  })

  needs('perl', 'root')('a daemon whose root lies in the folder is found', async () => {
    const one = await worker()
    const pid = await one.leave(
      `cd /; (env -i setsid perl -e '
          open my $pid, ">", "${one.pidFile}"; chroot "${one.folder}/home";
          print $pid "$$\n"; close $pid; sleep 1000' >/dev/null 2>&1 &)`,
    )
    expect(one.find()).toEqual([pid])
  })

  test('the finder never names its own process', async () => {
    const script = `
      import { LeftoverFinder } from ${JSON.stringify(
        new URL('../../src/workers/local/leftover-finder.ts', import.meta.url).pathname,
      )}
      console.log(JSON.stringify(new LeftoverFinder('/w').find({ worker: 'task-self' })))`
    const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
      env: { WORKER_NAME: 'task-self', HOME: '/w/task-self/home' },
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const [output] = await once(child.stdout, 'data')
    await once(child, 'exit')
    expect(JSON.parse(String(output))).toEqual([])
  })
})

describe('process ids', () => {
  const script = new URL('../helpers/reused-numbers.ts', import.meta.url).pathname
  const inNamespace = needs('pid-namespace')

  /** Everything in the namespace ends with its first process. */
  function outcomeOf(scenario: string) {
    const flags = ['--pid', '--fork', '--kill-child', '--mount-proc']
    return JSON.parse(
      execFileSync('unshare', [...flags, process.execPath, script, scenario], { encoding: 'utf8' }),
    )
  }

  inNamespace("a process that has the number of a worker's is spared", () => {
    const outcome = { before: true, isReused: true, found: [], isSpared: true }
    expect(outcomeOf('nobodys')).toEqual(outcome)
  })

  inNamespace("a process of a worker's is found under a number that was nobody's", () => {
    expect(outcomeOf('ours')).toEqual({ before: [], isReused: true, isFound: true })
  })

  inNamespace("what is known to be nobody's costs no reads", () => {
    // Ten times as many processes were there.
    const { perLook } = outcomeOf('reads')
    expect(perLook).toBeLessThan(10)
  })
})
