/** Reads /proc and sends signals. Synchronous: runs on the local workers' thread. */
import { lstatSync, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs'

export interface ProcessIdentity {
  pid: number
  /** Boot id and start time: they differ when another process has the pid, or after a reboot. */
  startedAt: string
}

/** Device and inode number of a FIFO, as `stat` returns them. */
export interface Fifo {
  dev: number
  ino: number
}

export interface ProcessStat {
  parent: number
  group: number
  session: number
  /** Start time in clock ticks since the machine booted. */
  startTicks: number
}

/** Variable in the environment of every local task: the worker's folder. Requests cannot set it. */
export const TASK_RUNNER_FOLDER = 'TASK_RUNNER_FOLDER'

/**
 * Errors of reading /proc: the process has ended or is another user's, or a path is too long or
 * unreachable.
 */
export const GONE: readonly string[] = [
  'ENOENT',
  'ESRCH',
  'EACCES',
  'EPERM',
  'ENAMETOOLONG',
  'ENOTCONN',
  'ESTALE',
]

let bootId: string | undefined

/**
 * Returns the identity of a live process; undefined when there is none, or it is a zombie. Throws
 * when that cannot be read.
 */
export function identify(pid: number): ProcessIdentity | undefined {
  const stat = readStat(pid)
  return stat && { pid, startedAt: `${readBootId()} ${stat.startTicks}` }
}

export function isAlive(identity: ProcessIdentity | undefined): boolean {
  return identity !== undefined && identify(identity.pid)?.startedAt === identity.startedAt
}

/**
 * Sends a signal; with a negative `pid` to a process group. Ignores processes that have ended, and
 * those that we may not signal: callers check what is left.
 */
export function kill(pid: number, signal: NodeJS.Signals = 'SIGKILL'): void {
  try {
    process.kill(pid, signal)
  } catch (err) {
    const { code } = err as NodeJS.ErrnoException
    if (code !== 'ESRCH' && code !== 'EPERM') throw err
  }
}

/** Sends the signal unless the process has ended, as another process may have its pid. */
export function killIfSame(identity: ProcessIdentity, signal: NodeJS.Signals = 'SIGKILL'): void {
  if (isAlive(identity)) kill(identity.pid, signal)
}

/** Returns the name of a process without control characters; undefined when it has ended. */
export function nameOf(identity: ProcessIdentity): string | undefined {
  const name = readIfThere(`/proc/${identity.pid}/comm`)?.toString().replace(/\n$/, '')
  // Checks after reading: the name could be that of another process with the same pid.
  return isAlive(identity) ? name?.replace(/\p{C}|\p{Zl}|\p{Zp}/gu, '\ufffd') : undefined
}

/** Returns the process group; undefined when the process has ended. */
export function groupOf({ pid }: ProcessIdentity): number | undefined {
  return readStat(pid)?.group
}

/**
 * Returns the start time in ticks since the machine booted; infinity for a process of an earlier
 * boot, which has no descendants.
 */
export function ticksOf({ startedAt }: ProcessIdentity): number {
  const [boot, ticks] = startedAt.split(' ')
  return boot === readBootId() ? Number(ticks) : Number.POSITIVE_INFINITY
}

/**
 * Returns the processes that can write to the log, on any descriptor. A process whose descriptors
 * may not be read is included.
 */
export function writersOf(log: Fifo, processes: readonly ProcessIdentity[]): ProcessIdentity[] {
  return processes.filter((identity) => {
    const descriptors = ifThere(() => readdirSync(`/proc/${identity.pid}/fd`))
    const isWriter = descriptors?.some((number) => isOpenOn(identity.pid, number, log)) ?? true
    return isWriter && isAlive(identity)
  })
}

/** Returns whether a descriptor of the process is open on the FIFO. */
export function isOpenOn(pid: number, descriptor: string, { dev, ino }: Fifo): boolean {
  const path = `/proc/${pid}/fd/${descriptor}`
  const target = readLinkIfThere(path)?.toString('latin1') ?? ''
  if (target !== `pipe:[${ino}]`) {
    if (!target.startsWith('/')) return false
    // Reads the inode from fdinfo first: `stat` of a file on a dead network file system would hang.
    const info = String(readIfThere(`/proc/${pid}/fdinfo/${descriptor}`))
    const [, inode = ino] = /^ino:\s*(\d+)$/m.exec(info) ?? []
    if (Number(inode) !== ino) return false
  }
  const stats = ifThere(() => statSync(path))
  return stats?.dev === dev && stats.ino === ino
}

/** Returns fields of /proc/<pid>/stat (proc(5)); undefined when the process is gone or a zombie. */
export function readStat(pid: number): ProcessStat | undefined {
  const stat = readIfThere(`/proc/${pid}/stat`)?.toString('latin1')
  if (stat === undefined) return undefined
  // The second field, the name, may hold spaces and parentheses.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  const [state, parent, group, session] = fields
  const [threads, startTicks] = [fields[17], fields[19]]
  // The state is that of the first thread, which others may outlive.
  if (state === 'Z' && Number(threads) <= 1) return undefined
  return {
    parent: Number(parent),
    group: Number(group),
    session: Number(session),
    startTicks: Number(startTicks),
  }
}

/** Returns the inode of /proc/<pid>, which changes when another process gets the pid. */
export function inodeOf(pid: number): number | undefined {
  return ifThere(() => lstatSync(`/proc/${pid}`).ino)
}

export function readIfThere(path: string): Buffer | undefined {
  return ifThere(() => readFileSync(path))
}

export function readLinkIfThere(path: string): Buffer | undefined {
  return ifThere(() => readlinkSync(path, 'buffer'))
}

/** Ignores errors in `GONE` only: a lack of descriptors must not look like an ended process. */
export function ifThere<T>(read: () => T): T | undefined {
  try {
    return read()
  } catch (err) {
    if (!GONE.includes((err as NodeJS.ErrnoException).code ?? '')) throw err
    return undefined
  }
}

function readBootId(): string {
  bootId ??= readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()
  return bootId
}
