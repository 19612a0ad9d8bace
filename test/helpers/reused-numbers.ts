/** Run in a PID namespace of its own, where nothing else starts processes and numbers can be chosen. Prints one line of JSON. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync, writeFileSync } from 'node:fs'
import { LeftoverFinder } from '../../src/workers/local/leftover-finder.ts'
import { identify, killIfSame, type ProcessIdentity } from '../../src/workers/local/processes.ts'

const SETTLED_SECONDS = 2
const ENV_OF = { one: { TASK_RUNNER_FOLDER: '/w/one' }, nobody: {} }
const finder = new LeftoverFinder('/w')
const pids = () => finder.find({ worker: 'one' }).map(({ pid }) => pid)

async function started(whose: keyof typeof ENV_OF, number?: number) {
  // Given out in turn, so the next one is the one after the last.
  if (number !== undefined) writeFileSync('/proc/sys/kernel/ns_last_pid', String(number - 1))
  const child = spawn('/bin/sleep', ['1000'], { env: ENV_OF[whose], stdio: 'ignore' })
  const identity = identify(child.pid ?? 0)
  if (!identity) throw new Error('no process')
  // It is in exec no more.
  while (!readFileSync(`/proc/${identity.pid}/cmdline`, 'latin1').startsWith('/bin/sleep')) {}
  return { child, identity }
}

async function ended({ child }: Awaited<ReturnType<typeof started>>): Promise<void> {
  const exit = once(child, 'exit')
  child.kill('SIGKILL')
  await exit
}

/** What is younger is read again anyway. */
async function settled({ startedAt }: ProcessIdentity): Promise<void> {
  const age = () =>
    Number(readFileSync('/proc/uptime', 'latin1').split(' ')[0]) -
    Number(startedAt.split(' ')[1]) / 100
  while (age() < SETTLED_SECONDS) await new Promise((resolve) => setTimeout(resolve, 10))
}

const scenarios = {
  /** A number that was the worker's, and is nobody's now. */
  async nobodys() {
    const own = await started('one')
    const before = pids().includes(own.identity.pid)
    await ended(own)
    const stranger = await started('nobody', own.identity.pid)
    const isReused = stranger.identity.pid === own.identity.pid
    const found = pids()
    killIfSame(own.identity)
    return { before, isReused, found, isSpared: identify(own.identity.pid) !== undefined }
  },
  /** A number that was nobody's, and is the worker's now. */
  async ours() {
    const stranger = await started('nobody')
    await settled(stranger.identity)
    const before = pids()
    await ended(stranger)
    const own = await started('one', stranger.identity.pid)
    const isReused = own.identity.pid === stranger.identity.pid
    return { before, isReused, isFound: pids().includes(own.identity.pid) }
  },
  /** How many times a file is read in a look at 100 processes that are nobody's. */
  async reads() {
    const all = []
    for (let i = 0; i < 100; i += 1) all.push(await started('nobody'))
    for (const { identity } of all) await settled(identity)
    const reads = () => Number(/^syscr: (\d+)$/m.exec(readFileSync('/proc/self/io', 'latin1'))?.[1])
    pids()
    const before = reads()
    for (let i = 0; i < 10; i += 1) pids()
    return { perLook: (reads() - before) / 10 }
  },
}

const [, , name = ''] = process.argv
// Holds: the test names one of them.
console.log(JSON.stringify(await scenarios[name as keyof typeof scenarios]()))
process.exit()
