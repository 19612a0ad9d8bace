/**
 * A service's local workers as a process of its own, with a limit or another user's rights. Does what its argument wants and
 * prints what came of it.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, existsSync, openSync, readdirSync, writeFileSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { setTimeout as pause } from 'node:timers/promises'
import type { Completion, WorkerSpec } from '../../src/core/ports.ts'
import { LocalBackend } from '../../src/workers/local/local-backend.ts'
import type { LocalSettings } from '../../src/workers/local/local-workers.ts'

const never = new AbortController().signal
const options = JSON.parse(process.argv[2] ?? '') as {
  settings: LocalSettings
  want: 'descriptors' | 'processes' | 'foreign'
  spec: WorkerSpec
  ready: string
  go: string
}
const { settings, want } = options
let names = 0

function specOf(taskId: string, script: string): WorkerSpec {
  names += 1
  const name = `task-${taskId}-${String(names).padStart(20, '0')}`
  return { ...options.spec, name, taskId, environment: { SCRIPT: script, WORKER_NAME: name } }
}

async function end(backend: LocalBackend, wanted: WorkerSpec) {
  const worker = await backend.provision(wanted, never)
  const ended = short(await worker.completion(never))
  await worker.terminate()
  return ended
}

function short({ reason, exitCode }: Completion): Pick<Completion, 'reason' | 'exitCode'> {
  return { reason, exitCode }
}

/** The error's name and words. */
function failure(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(
    () => 'none',
    (err: Error) => [err.name, err.message],
  )
}

/** Takes all that is left; returns what gives it back. */
async function starve(): Promise<() => Promise<void>> {
  if (want === 'descriptors') {
    const files: number[] = []
    try {
      for (;;) files.push(openSync('/dev/null', 'r'))
    } catch {
      return async () => {
        for (const file of files) closeSync(file)
      }
    }
  }
  const sleepers: ChildProcess[] = []
  for (;;) {
    const sleeper = spawn('sleep', ['1000'], { stdio: 'ignore' })
    sleeper.on('error', () => {})
    if (sleeper.pid === undefined) break
    sleepers.push(sleeper)
  }
  return async () => {
    for (const sleeper of sleepers) sleeper.kill('SIGKILL')
    while (sleepers.some(({ signalCode }) => signalCode === null)) await pause(5)
  }
}

async function runStarved() {
  const backend = new LocalBackend(settings)
  const go = `${settings.workersDir}-go`
  // Waits without a fork, which it may not be able to do.
  const waiting = `mkfifo f; exec 9<>f; : >${go}-on; until [ -e ${go} ]; do read -t 0.05 -u 9; done; exit 7`
  const runs = await backend.provision(specOf('runs', waiting), never)
  while (!existsSync(`${go}-on`)) await pause(5)
  const running = runs.completion(never)
  // Leaves an idle shell, which has all that it needs of us.
  await end(backend, specOf('warm-up', 'exit 0'))
  const giveBack = await starve()
  // The idle shell cannot fork, which only it knows.
  const handed =
    want === 'processes' ? await backend.provision(specOf('handed', 'exit 8'), never) : undefined
  const handedEnd = handed?.completion(never)
  const check = await failure(backend.check())
  const refused = backend.provision(specOf('refused', 'exit 0'), never)
  const refusal = await failure(refused)
  const status = await runs.status()
  await giveBack()
  const provision = refusal === 'none' ? short(await (await refused).completion(never)) : refusal
  if (refusal === 'none') await (await refused).terminate()
  await handedEnd
  await handed?.terminate()
  const listed = (await backend.list()).map(({ taskId }) => taskId)
  const folders = readdirSync(settings.workersDir).length
  const later = await end(backend, specOf('later', 'exit 9'))
  writeFileSync(go, '')
  const ran = await running
  for (const worker of await backend.list()) await worker.terminate()
  await backend.close()
  return {
    check,
    provision,
    status,
    listed,
    folders,
    later,
    ran: short(ran),
    handed: handedEnd && short(await handedEnd),
  }
}

async function runForeign() {
  await mkdir(settings.workersDir, { recursive: true })
  let backend = new LocalBackend(settings)
  const wanted = specOf('foreign', 'mkdir "$HOME/sub"; exit 0')
  const worker = await backend.provision(wanted, never)
  await worker.completion(never)
  writeFileSync(options.ready, wanted.name)
  while (!existsSync(options.go)) await pause(10)
  await worker.terminate()
  await backend.check()
  const left = [backend.leftBehind()]
  await backend.close()
  backend = new LocalBackend(settings)
  await backend.check()
  left.push(backend.leftBehind())
  const listed = await backend.list()
  const next = await end(backend, specOf('next', 'exit 9'))
  await backend.close()
  return { listed, left, next }
}

console.log(JSON.stringify(await (want === 'foreign' ? runForeign() : runStarved())))
