/** What /proc tells about processes. Synchronous: runs on the local workers' thread. */
import {
  existsSync,
  lstatSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  statSync,
} from 'node:fs'
import { join } from 'node:path'

export interface ProcessIdentity {
  pid: number
  /** Boot id and start time: a number used again by another process, or after a reboot, is told apart. */
  startedAt: string
}

/** Device and inode number of a FIFO, as `stat` has them. */
export interface Fifo {
  dev: number
  ino: number
}

/** What tells the processes of one worker from all others. */
export interface Sought {
  worker: string
  /**
   * The shell that runs the worker's task. It is never found itself. Where a process stands counts only if it may descend
   * from this shell: undefined means that nothing is found by that.
   */
  shell?: ProcessIdentity | undefined
  /** Process group and session of the shell, while it is this worker's, and after it has ended. */
  group?: number | undefined
  /** Where the worker's log goes. What has it as its standard output or error is the worker's. */
  log?: Fifo | undefined
  /** The shell's cgroup, if it has one: given while `group` is. */
  cgroup?: string | undefined
}

export interface ProcessSource {
  /** Returns the live processes of a worker, besides its shell. */
  find(sought: Sought): ProcessIdentity[]
}

/** Variable in the environment of every local task: the worker's folder. Requests cannot set it. */
export const TASK_RUNNER_FOLDER = 'TASK_RUNNER_FOLDER'

/** A process young enough to be between fork and exec may still change its environment. */
const SETTLED_TICKS = 200
const TICKS_PER_SECOND = 100
/** Fields of /proc/<pid>/stat, counted from the third on. */
const STATE_FIELD = 0
const PARENT_FIELD = 1
const GROUP_FIELD = 2
const SESSION_FIELD = 3
const THREADS_FIELD = 17
const STARTED_AT_FIELD = 19
/** Numbers in use are skipped, and those of processes that failed to start are not used. */
const SKIPPED_MAX = 64
/** Far fewer than there are numbers: none was given out twice. */
const FORKS_MAX = 4096
/** What /proc answers about a process that has ended or is another user's, and about a path that is too long or out of reach. */
export const GONE: readonly string[] = [
  ...['ENOENT', 'ESRCH', 'EACCES', 'EPERM'],
  ...['ENAMETOOLONG', 'ENOTCONN', 'ESTALE'],
]
/** Kept over exec and setsid, and by programs that overwrite their environment to show a title. */
const LINKS = ['cwd', 'root', 'fd/0', 'fd/1', 'fd/2']
const OUTPUTS = ['1', '2']
const DELETED = Buffer.from(' (deleted)')
const SLASH = 0x2f

let bootId: string | undefined

/**
 * The identity of a live process; undefined when there is none, or it is a zombie. Throws when that
 * cannot be read.
 */
export function identify(pid: number): ProcessIdentity | undefined {
  const stat = readStat(pid)
  return stat && { pid, startedAt: `${ourBoot()} ${stat[STARTED_AT_FIELD]}` }
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

/** Sends the signal unless the process has ended: its number may be another's by now. */
export function killIfSame(identity: ProcessIdentity, signal: NodeJS.Signals = 'SIGKILL'): void {
  if (isAlive(identity)) kill(identity.pid, signal)
}

/** The name of a process for people, with what could disturb a line of text replaced; undefined when it has ended. */
export function nameOf(identity: ProcessIdentity): string | undefined {
  const name = readIfThere(`/proc/${identity.pid}/comm`)?.toString().replace(/\n$/, '')
  // Read before it is asked whose it was.
  return isAlive(identity) ? name?.replace(/\p{C}|\p{Zl}|\p{Zp}/gu, '\ufffd') : undefined
}

/** Its process group; undefined when it has ended. */
export function groupOf({ pid }: ProcessIdentity): number | undefined {
  const group = readStat(pid)?.[GROUP_FIELD]
  return group === undefined ? undefined : Number(group)
}

/** Those of the processes that could still write into the log, on any descriptor. One that may not be looked into could. */
export function writersOf(log: Fifo, processes: readonly ProcessIdentity[]): ProcessIdentity[] {
  return processes.filter((identity) => {
    const descriptors = ifThere(() => readdirSync(`/proc/${identity.pid}/fd`))
    const isWriter = descriptors?.some((number) => holds(identity.pid, number, log)) ?? true
    return isWriter && isAlive(identity)
  })
}

/**
 * Finds what tasks leave behind, by the marks that processes carry:
 * - the worker's folder in their environment, which children inherit,
 * - the group and the session of the slot's shell, and the pipe of its log,
 * - a working folder, root or standard descriptor that lies in the worker's folder: this stays where the environment is cleared.
 *   Folders are looked at where they are now, so this comes before they are renamed.
 * - a parent that is found.
 *
 * An administrator may look into a worker's folder as well. So where a process stands counts only if it may descend from the
 * worker's shell: neither it nor any parent that it has is older than that shell. A parent that merely adopted it says nothing.
 *
 * What is known not to change is not read again, so that the common case costs one listing of /proc.
 */
export class LeftoverFinder implements ProcessSource {
  /** As tasks have it in their environment. */
  readonly #workersDir: Buffer
  /** As the kernel tells it. */
  readonly #realDir: Buffer
  #known = new Map<number, Seen>()
  #adopters = adopters()
  readonly #numbers = new NumbersGiven()

  constructor(workersDir: string) {
    this.#workersDir = Buffer.from(join(workersDir, '/'))
    const real = ifThere(() => realpathSync.native(workersDir)) ?? workersDir
    this.#realDir = Buffer.from(join(real, '/'))
  }

  /** Reads everything anew next time. */
  forget(): void {
    this.#known.clear()
    this.#adopters = adopters()
  }

  /** Names of workers that processes carry in their environment. */
  workers(): Set<string> {
    return new Set([...this.#look().values()].flatMap(({ owner }) => (owner ? [owner] : [])))
  }

  find(sought: Sought): ProcessIdentity[] {
    const seen = this.#look()
    const isOf = this.#marksOf(sought)
    const found = new Set<number>()
    for (const [pid, process_] of seen) if (isOf(pid, process_)) found.add(pid)
    if (found.size > 0) addChildren(found, seen)
    return [...found].flatMap((pid) => {
      const identity = identify(pid)
      const isSame = identity && ticksOf(identity) === seen.get(pid)?.startedAt
      const isShell = pid === sought.shell?.pid && identity?.startedAt === sought.shell.startedAt
      return isSame && !isShell ? [identity] : []
    })
  }

  #marksOf({ worker, shell, group, log }: Sought): (pid: number, seen: Seen) => boolean {
    const folder = Buffer.concat([this.#realDir, Buffer.from(worker)])
    const since = shell && ticksOf(shell)
    const leader = group !== undefined && shell ? identify(group) : undefined
    // Its number is used again: then the group is another's, too.
    const isReused = leader !== undefined && leader.startedAt !== shell?.startedAt
    const ownGroup = isReused ? undefined : group
    const isStranger = (owner: string) =>
      owner !== '' && existsSync(Buffer.concat([this.#realDir, Buffer.from(owner, 'latin1')]))
    return (pid, seen) => {
      if (pid === ownGroup) return false
      if (seen.owner === worker || seen.group === ownGroup || seen.session === ownGroup) return true
      const mayDescend = since === undefined || seen.eldestAt >= since
      if (seen.isOthers || !mayDescend) return false
      if (log && OUTPUTS.some((number) => holds(pid, number, log))) return true
      if (since === undefined || !LINKS.some((link) => leadsInto(folder, pid, link))) return false
      // Of two workers it is the one's whose environment it has.
      return !isStranger(seen.owner)
    }
  }

  /** All processes but our own, as they were read when they could last change. */
  #look(): Map<number, Seen> {
    const known = this.#known
    const seen = new Map<number, Seen>()
    const pids = readdirSync('/proc').map(Number).filter(Number.isInteger)
    const now = uptimeTicks()
    const isNew = this.#numbers.given()
    this.#known = new Map()
    const look = (pid: number): Seen | undefined => {
      const before = seen.get(pid) ?? known.get(pid)
      const isSame = before && (seen.has(pid) || !isNew(pid) || before.inode === inodeOf(pid))
      const process_ = isSame ? before : inspect(pid, look)
      if (!process_) return undefined
      seen.set(pid, process_)
      // One of a worker stays one of a worker.
      const isSettled = process_.owner !== '' || now - process_.startedAt >= SETTLED_TICKS
      if (isSettled) this.#known.set(pid, process_)
      return process_
    }
    const inspect = (pid: number, parentOf: (pid: number) => Seen | undefined) => {
      const inode = inodeOf(pid)
      const stat = readStat(pid)
      if (!stat || inode === undefined) return undefined
      const startedAt = Number(stat[STARTED_AT_FIELD])
      const parent = Number(stat[PARENT_FIELD])
      const environment = readIfThere(`/proc/${pid}/environ`)
      return {
        inode,
        startedAt,
        parent,
        group: Number(stat[GROUP_FIELD]),
        session: Number(stat[SESSION_FIELD]),
        owner: environment ? this.#ownerIn(environment) : '',
        isOthers: environment === undefined,
        eldestAt: this.#eldestAt(startedAt, parent, parentOf),
      }
    }
    for (const pid of pids) if (pid !== process.pid) look(pid)
    return seen
  }

  #eldestAt(startedAt: number, parent: number, look: (pid: number) => Seen | undefined): number {
    // The kernel's, the first of all, or one that entered this container from outside.
    if (parent === 0) return 0
    const itsParent = this.#adopters.has(parent) ? undefined : look(parent)
    // A younger one got the number after the parent had ended.
    const isParent = itsParent && itsParent.startedAt <= startedAt
    return isParent ? Math.min(itsParent.eldestAt, startedAt) : startedAt
  }

  /** The worker whose environment this is, '' for none. In bytes: neither need be UTF-8. */
  #ownerIn(environment: Buffer): string {
    const folder = valueIn(environment, TASK_RUNNER_FOLDER)
    for (const dir of [this.#workersDir, this.#realDir]) {
      if (!folder?.subarray(0, dir.length).equals(dir)) continue
      const name = folder.toString('latin1', dir.length)
      if (!name.includes('/')) return name
    }
    const name = valueIn(environment, 'WORKER_NAME')
    if (!name?.length) return ''
    // Another service of this machine may run a task of the same id: HOME, TMPDIR or PWD tell whose it is.
    const within = Buffer.concat([Buffer.from('='), this.#workersDir, name, Buffer.from('/')])
    return environment.includes(within) ? name.toString('latin1') : ''
  }
}

interface Seen {
  /** Of its folder in /proc: another process of that number has another. */
  inode: number
  /** In ticks since the machine started: with the number it names a process for good. */
  startedAt: number
  parent: number
  group: number
  session: number
  /** The worker whose environment it has, or ''. */
  owner: string
  /** Its environment may not be read. */
  isOthers: boolean
  /** When the eldest of it and the parents it had was started. */
  eldestAt: number
}

/**
 * Tells which process ids may have been given out since the last look: they are given out in turn, so the rest need not be looked at.
 * All may have been where that cannot be told: when the number of processes that were started does not fit, as in a container whose
 * neighbours start some, or where somebody chose the next number.
 */
class NumbersGiven {
  #before = { last: Number.NaN, forks: Number.NaN }

  /** To be called after the listing of processes. */
  given(): (pid: number) => boolean {
    const before = this.#before
    const forks = Number(/^processes (\d+)/m.exec(String(readIfThere('/proc/stat')))?.[1])
    const last = Number(readIfThere('/proc/sys/kernel/ns_last_pid') ?? Number.NaN)
    this.#before = { last, forks }
    const started = forks - before.forks
    const given = last - before.last
    const isInTurn = started >= 0 && given >= started && given <= started + SKIPPED_MAX
    return (pid) => !isInTurn || started > FORKS_MAX || (pid > before.last && pid <= last)
  }
}

/** When a process was started, in ticks since the machine was. Of an earlier boot nothing is left: nothing comes after it. */
export function ticksOf(identity: ProcessIdentity): number {
  const [boot, ticks] = identity.startedAt.split(' ')
  return boot === ourBoot() ? Number(ticks) : Number.POSITIVE_INFINITY
}

/** Processes that orphans may get as their parents: this one and those above it, whatever they are. */
function adopters(): Set<number> {
  const found = new Set([1])
  for (let pid = process.pid; pid > 1 && !found.has(pid); ) {
    found.add(pid)
    pid = Number(readStat(pid)?.[PARENT_FIELD] ?? 0)
  }
  return found
}

/** Children of what is found are the worker's as well; once their parent is ended, nothing would tell. */
function addChildren(found: Set<number>, seen: ReadonlyMap<number, Seen>): void {
  const children = new Map<number, number[]>()
  for (const [pid, { parent, startedAt }] of seen) {
    const itsParent = seen.get(parent)
    if (!itsParent || itsParent.startedAt > startedAt) continue
    const siblings = children.get(parent)
    if (siblings) siblings.push(pid)
    else children.set(parent, [pid])
  }
  // A set is walked to its end, however it grows meanwhile.
  for (const pid of found) for (const child of children.get(pid) ?? []) found.add(child)
}

/** The value of the first variable of that name, as getenv(3) finds it. */
function valueIn(environment: Buffer, name: string): Buffer | undefined {
  const start = `${name}=`
  let at = 0
  if (environment.toString('latin1', 0, start.length) !== start) {
    const found = environment.indexOf(`\0${start}`)
    if (found < 0) return undefined
    at = found + 1
  }
  const end = environment.indexOf(0, at)
  return environment.subarray(at + start.length, end < 0 ? environment.length : end)
}

function leadsInto(folder: Buffer, pid: number, link: string): boolean {
  const target = readLinkIfThere(`/proc/${pid}/${link}`)
  if (!target?.subarray(0, folder.length).equals(folder)) return false
  const rest = target.subarray(folder.length)
  return rest.length === 0 || rest[0] === SLASH || rest.equals(DELETED)
}

function holds(pid: number, descriptor: string, { dev, ino }: Fifo): boolean {
  const path = `/proc/${pid}/fd/${descriptor}`
  const target = readLinkIfThere(path)?.toString('latin1') ?? ''
  if (target !== `pipe:[${ino}]`) {
    if (!target.startsWith('/')) return false
    // A look at the file itself waits for its file system, which may never answer.
    const info = String(readIfThere(`/proc/${pid}/fdinfo/${descriptor}`))
    const [, inode = ino] = /^ino:\s*(\d+)$/m.exec(info) ?? []
    if (Number(inode) !== ino) return false
  }
  const stats = ifThere(() => statSync(path))
  return stats?.dev === dev && stats.ino === ino
}

/** Undefined also of a zombie, which nobody can end. */
function readStat(pid: number): string[] | undefined {
  const stat = readIfThere(`/proc/${pid}/stat`)?.toString('latin1')
  // The second field may hold spaces and parentheses (proc(5)).
  const fields = stat?.slice(stat.lastIndexOf(')') + 2).split(' ')
  // The thread that was first may end before the others.
  const hasEnded = fields?.[STATE_FIELD] === 'Z' && Number(fields[THREADS_FIELD]) <= 1
  return hasEnded ? undefined : fields
}

function inodeOf(pid: number): number | undefined {
  return ifThere(() => lstatSync(`/proc/${pid}`).ino)
}

function readIfThere(path: string): Buffer | undefined {
  return ifThere(() => readFileSync(path))
}

function readLinkIfThere(path: string): Buffer | undefined {
  return ifThere(() => readlinkSync(path, 'buffer'))
}

/** Anything but its absence is thrown: for want of a descriptor, no process may be taken for gone. */
function ifThere<T>(read: () => T): T | undefined {
  try {
    return read()
  } catch (err) {
    if (!GONE.includes((err as NodeJS.ErrnoException).code ?? '')) throw err
    return undefined
  }
}

function ourBoot(): string {
  bootId ??= readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()
  return bootId
}

function uptimeTicks(): number {
  return Number(readFileSync('/proc/uptime', 'latin1').split(' ')[0]) * TICKS_PER_SECOND
}
