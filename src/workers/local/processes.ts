/** What /proc tells about processes. Synchronous: runs on the local workers' thread. */
import { readdirSync, readFileSync } from 'node:fs'

export interface ProcessIdentity {
  pid: number
  /** Boot id and start time: a number used again by another process, or after a reboot, is told apart. */
  startedAt: string
}

/** A process young enough to be between fork and exec may still change its environment. */
const SETTLED_TICKS = 200
const STARTED_AT_FIELD = 19
const GROUP_FIELD = 2
const STATE_FIELD = 0
/** What /proc answers about a process that has ended, or about another user's. */
const GONE: readonly string[] = ['ENOENT', 'ESRCH', 'EACCES', 'EPERM']

let bootId: string | undefined

/**
 * The identity of a live process; undefined when there is none, or it is a zombie. Throws when that
 * cannot be read.
 */
export function identify(pid: number): ProcessIdentity | undefined {
  const stat = readStat(pid)
  if (!stat || stat[STATE_FIELD] === 'Z') return undefined
  bootId ??= readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()
  return { pid, startedAt: `${bootId} ${stat[STARTED_AT_FIELD]}` }
}

export function isAlive(identity: ProcessIdentity): boolean {
  return identify(identity.pid)?.startedAt === identity.startedAt
}

/**
 * `pid` below 0: a whole group. One that is gone already is as good as killed; one we may not kill is found again by the caller's check.
 */
export function kill(pid: number, signal: NodeJS.Signals = 'SIGKILL'): void {
  try {
    process.kill(pid, signal)
  } catch (err) {
    const { code } = err as NodeJS.ErrnoException
    if (code !== 'ESRCH' && code !== 'EPERM') throw err
  }
}

/**
 * Finds what tasks leave behind: processes in a slot's group, or with a worker's name in their environment
 * (a task may have started sessions of its own). What is known not to belong to any worker is not read again,
 * so that the common case costs one listing of /proc.
 */
export class LeftoverFinder {
  readonly #workersDir: string
  #known = new Map<number, Inspected>()

  constructor(workersDir: string) {
    this.#workersDir = workersDir
  }

  /** Reads everything anew next time: heals what a reused process id may have hidden. */
  forget(): void {
    this.#known.clear()
  }

  /** Names of workers that processes carry. */
  workers(): Set<string> {
    this.find('', undefined)
    return new Set([...this.#known.values()].flatMap(({ worker }) => (worker ? [worker] : [])))
  }

  /** Processes that belong to the worker, besides its slot shell. `group` undefined: by name only. */
  find(workerName: string, group: number | undefined): number[] {
    const found: number[] = []
    const known = new Map<number, Inspected>()
    const isOf = ({ worker, group: its }: Inspected) => worker === workerName || its === group
    for (const entry of readdirSync('/proc')) {
      const pid = Number(entry)
      if (!Number.isInteger(pid) || pid === process.pid) continue
      let process_ = this.#known.get(pid) ?? inspect(pid, this.#workersDir)
      if (process_ && isOf(process_) && startOf(pid) !== process_.startedAt) {
        // What was known has ended, and another process may have its number by now.
        process_ = inspect(pid, this.#workersDir)
      }
      if (!process_) continue
      if (!process_.young) known.set(pid, process_)
      if (pid !== group && isOf(process_)) found.push(pid)
    }
    this.#known = known
    return found
  }
}

interface Inspected {
  /** '' for a process of no worker. */
  worker: string
  group: number
  /** In ticks since the machine started: with the number it names a process for good. */
  startedAt: string
  young?: true
}

/** Undefined also of a zombie, which nobody can end. */
function startOf(pid: number): string | undefined {
  const stat = readStat(pid)
  return stat?.[STATE_FIELD] === 'Z' ? undefined : stat?.[STARTED_AT_FIELD]
}

function inspect(pid: number, workersDir: string): Inspected | undefined {
  const stat = readStat(pid)
  if (!stat || stat[STATE_FIELD] === 'Z') return undefined
  const group = Number(stat[GROUP_FIELD])
  const startedAt = stat[STARTED_AT_FIELD] ?? ''
  const environment = readIfThere(`/proc/${pid}/environ`)
  // Another user's process, or one that ended just now.
  if (environment === undefined) return { worker: '', group, startedAt }
  const name = /(?:^|\0)WORKER_NAME=([^\0]*)/.exec(environment)?.[1] ?? ''
  // Another service of this machine may run a task of the same id: HOME, TMPDIR or PWD tell whose it is.
  const worker = environment.includes(`=${workersDir}/${name}/`) ? name : ''
  // One of a worker stays one of a worker.
  const isYoung = worker === '' && uptimeTicks() - Number(stat[STARTED_AT_FIELD]) < SETTLED_TICKS
  return isYoung ? { worker, group, startedAt, young: true } : { worker, group, startedAt }
}

/** Fields of /proc/<pid>/stat from the third on (proc(5)); the second may hold spaces and parentheses. */
function readStat(pid: number): string[] | undefined {
  const stat = readIfThere(`/proc/${pid}/stat`)
  return stat?.slice(stat.lastIndexOf(')') + 2).split(' ')
}

/** Anything but its absence is thrown: for want of a descriptor, no process may be taken for gone. */
function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, 'latin1')
  } catch (err) {
    if (!GONE.includes((err as NodeJS.ErrnoException).code ?? '')) throw err
    return undefined
  }
}

function uptimeTicks(): number {
  return Number(readFileSync('/proc/uptime', 'latin1').split(' ')[0]) * 100
}
