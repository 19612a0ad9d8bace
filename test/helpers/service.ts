import { type ChildProcess, type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { testEnv } from './app.ts'

export interface Service {
  url: string
  process: ChildProcess
  /** Every line it logged. */
  log: string[]
  /** Settles when the process has ended, with its exit code or signal. */
  ended: Promise<number | string>
  kill(signal?: NodeJS.Signals): Promise<number | string>
}

const ROOT = new URL('../..', import.meta.url).pathname
const MAIN = new URL('../../src/main.ts', import.meta.url).pathname
/** `NAME=value … exec node --flag … src/main.ts` */
const START: string[] = JSON.parse(
  readFileSync(join(ROOT, 'package.json'), 'utf8'),
).scripts.start.split(' ')
const START_ENV = Object.fromEntries(
  START.filter((word) => /^[A-Z_]+=/.test(word)).map((word) => word.split('=')),
)
const START_FLAGS = START.filter((word) => word.startsWith('--'))
const WITH_FAILPOINT = new URL('./service-with-failpoint.ts', import.meta.url).pathname

/** The real service as a process that `npm start` would start, of the user `uid`; with KILL_AT in `env`, one that dies at that point. */
export function startService(env: Record<string, string>, uid?: number): Promise<Service> {
  const script = env.KILL_AT === undefined ? MAIN : WITH_FAILPOINT
  return listeningService(
    spawn(process.execPath, [...START_FLAGS, script], {
      cwd: ROOT,
      env: testEnv({ ...START_ENV, PORT: '0', LOG_LEVEL: 'info', ...env }),
      stdio: ['ignore', 'pipe', 'pipe'],
      ...(uid === undefined ? {} : { uid, gid: uid }),
    }),
  )
}

/** The service by `npm start`, in a process group of its own. `process` is npm. */
export function npmStart(env: Record<string, string>): Promise<Service> {
  return listeningService(
    spawn('npm', ['start'], {
      cwd: ROOT,
      env: testEnv({ PORT: '0', LOG_LEVEL: 'info', ...env }),
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
    }),
  )
}

/** Waits until the service listens, or has ended. */
async function listeningService(child: ChildProcessByStdio<null, Readable, Readable>) {
  const ended = once(child, 'exit').then(([code, signal]) => code ?? signal)
  const log: string[] = []
  const listening = Promise.withResolvers<string>()
  createInterface(child.stderr).on('line', (line) => log.push(line))
  createInterface(child.stdout).on('line', (line) => {
    log.push(line)
    if (line.includes('"msg":"listening"')) listening.resolve(JSON.parse(line).address)
  })
  // One that dies before it listens is told by `ended`.
  void ended.then(() => listening.resolve(''))
  return {
    url: await listening.promise,
    process: child,
    log,
    ended,
    async kill(signal: NodeJS.Signals = 'SIGKILL') {
      child.kill(signal)
      return ended
    },
  }
}

/** Processes of this machine with one of these worker names, or of any worker in this data folder, in their environment. */
export function processesOf(dataDir: string): number[] {
  return readdirSync('/proc')
    .map(Number)
    .filter((pid) => {
      try {
        return readFileSync(`/proc/${pid}/environ`, 'utf8').includes(`HOME=${dataDir}/workers/`)
      } catch {
        return false
      }
    })
}
