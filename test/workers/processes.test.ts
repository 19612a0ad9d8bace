import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { afterEach, describe, expect, test } from 'vitest'
import { identify, isAlive, LeftoverFinder } from '../../src/workers/local/processes.ts'

const started: ChildProcess[] = []

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
  for (const child of started.splice(0)) {
    if (child.pid !== undefined && child.exitCode === null && child.signalCode === null) {
      await end(child)
    }
  }
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

  test('a number that no process has is none', () => {
    expect(identify(2 ** 22 + 1)).toBeUndefined()
  })
})

const WORKERS = '/w'
const ownedBy = (name: string) => ({ WORKER_NAME: name, HOME: `${WORKERS}/${name}/home` })

describe('LeftoverFinder', () => {
  test('processes with the name of the worker are found, whatever their session, and no others', async () => {
    const finder = new LeftoverFinder(WORKERS)
    const one = await start('exec sleep 1000', { env: { ...ownedBy('task-one'), A: 'b' } })
    const apart = await start('exec setsid -w sleep 1000', { env: ownedBy('task-one') })
    await start('exec sleep 1000', { env: ownedBy('task-one-more') })
    // Of a worker of the same name that another service of this machine has.
    await start('exec sleep 1000', {
      env: { WORKER_NAME: 'task-one', HOME: '/other/task-one/home' },
    })
    await start('exec sleep 1000', { env: { NOT_WORKER_NAME: 'task-one' } })
    await start('exec sleep 1000', { env: { OTHER: 'WORKER_NAME=task-one' } })
    await start('exec sleep 1000')
    const found = finder.find('task-one', undefined)
    expect(found).toEqual(expect.arrayContaining([one.pid, apart.pid]))
    // `setsid -w` may have a child by now.
    for (const pid of found) {
      expect(readFileSync(`/proc/${pid}/environ`, 'latin1')).toMatch(/(^|\0)WORKER_NAME=task-one\0/)
    }
    expect(finder.find('task-two', undefined)).toEqual([])
  })

  test("processes of a slot's group are found, but not the slot itself", async () => {
    const finder = new LeftoverFinder(WORKERS)
    const slot = await start('env -i /bin/sleep 1000 & echo $!; wait', { detached: true })
    await expect.poll(() => slot.lines.length).toBe(2)
    const child = Number(slot.lines[1])
    try {
      expect(finder.find('task-none', slot.pid)).toEqual([child])
      expect(finder.find('task-none', undefined)).toEqual([])
      // When the slot is gone, its group is still that of its children.
      await end(slot)
      expect(finder.find('task-none', slot.pid)).toEqual([child])
    } finally {
      process.kill(child, 'SIGKILL')
    }
    await expect.poll(() => finder.find('task-none', slot.pid)).toEqual([])
  })

  test('a killed process whose parent does not ask for its end counts as gone', async () => {
    const finder = new LeftoverFinder(WORKERS)
    const parent = await start(
      'env WORKER_NAME=task-z HOME=/w/task-z/home sleep 1000 & echo $!; exec sleep 1000',
    )
    await expect.poll(() => parent.lines.length).toBe(2)
    const child = Number(parent.lines[1])
    await expect.poll(() => finder.find('task-z', undefined)).toEqual([child])
    process.kill(child, 'SIGKILL')
    await expect.poll(() => stateOf(child)).toBe('Z')
    expect(finder.find('task-z', undefined)).toEqual([])
  })

  test('a young process is read again: its environment may still change', async () => {
    const finder = new LeftoverFinder(WORKERS)
    const child = await start(
      'read line; WORKER_NAME=task-late HOME=/w/task-late/home exec sleep 1000',
    )
    expect(finder.find('task-late', undefined)).toEqual([])
    child.stdin?.write('go\n')
    await expect.poll(() => finder.find('task-late', undefined)).toEqual([child.pid])
  })

  test('the finder never names its own process', async () => {
    const script = `
      import { LeftoverFinder } from ${JSON.stringify(
        new URL('../../src/workers/local/processes.ts', import.meta.url).pathname,
      )}
      console.log(JSON.stringify(new LeftoverFinder('/w').find('task-self', undefined)))`
    const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
      env: { WORKER_NAME: 'task-self', HOME: '/w/task-self/home' },
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const [output] = await once(child.stdout, 'data')
    await once(child, 'exit')
    expect(JSON.parse(String(output))).toEqual([])
  })
})
