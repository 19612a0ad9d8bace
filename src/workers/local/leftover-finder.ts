/** Finds the processes of a worker. Synchronous: runs on the local workers' thread. */
import { existsSync, readdirSync, readFileSync, realpathSync } from 'node:fs'
import { join } from 'node:path'
import {
  type Fifo,
  identify,
  ifThere,
  inodeOf,
  isOpenOn,
  type ProcessIdentity,
  readIfThere,
  readLinkIfThere,
  readStat,
  TASK_RUNNER_FOLDER,
  ticksOf,
} from './processes.ts'

/** How the processes of one worker can be found. */
export interface ProcessQuery {
  worker: string
  /**
   * The shell that runs the worker's task; it is never in the result. Undefined: open files in the
   * worker's folder do not count, since only those of the shell's descendants do.
   */
  shell?: ProcessIdentity | undefined
  /** Process group and session of the shell, while it serves this worker and after its end. */
  group?: number | undefined
  /** The worker's log: a process with this as standard output or error is the worker's. */
  log?: Fifo | undefined
  /** The shell's cgroup, if it has one. Set only with `group`. */
  cgroup?: string | undefined
}

export interface ProcessSource {
  /** Returns the live processes of a worker, without its shell. */
  find(query: ProcessQuery): ProcessIdentity[]
}

const TICKS_PER_SECOND = 100
/** Age after which a process has passed from fork to exec: its environment no longer changes. */
const SETTLED_TICKS = 200
/** Maximum pids that the kernel skips: those in use, and those of failed forks. */
const SKIPPED_MAX = 64
/** Maximum forks between two scans: far fewer than there are pids, so that none is reused. */
const FORKS_MAX = 4096
/** Links in /proc/<pid> that survive exec, setsid and an overwritten environment. */
const LINKS = ['cwd', 'root', 'fd/0', 'fd/1', 'fd/2']
const OUTPUTS = ['1', '2']
const DELETED = Buffer.from(' (deleted)')
const SLASH = 0x2f

interface ProcessEntry {
  inode: number
  startTicks: number
  parent: number
  group: number
  session: number
  /** The worker that its environment names, or ''. */
  worker: string
  /** Its environment may not be read. */
  isUnreadable: boolean
  /** Start time of the oldest among the process and its ancestors. */
  oldestTicks: number
}

/**
 * Finds the processes of a worker by these marks:
 * - the worker's folder in their environment, which children inherit
 * - the process group and session of the slot's shell, and the pipe of the worker's log
 * - a working folder, root or standard descriptor inside the worker's folder, which stays when the
 *   environment is cleared; this has to be checked before that folder is renamed
 * - a parent that has one of these marks
 *
 * An administrator's process may have files in a worker's folder open, too. So open files count
 * only for a process that may descend from the worker's shell: neither it nor an ancestor is older
 * than that shell. A process that merely adopted it is no ancestor.
 *
 * What cannot have changed is not read again, so that the usual search only lists /proc.
 */
export class LeftoverFinder implements ProcessSource {
  /** Path as tasks have it in their environment. */
  readonly #workersDir: Buffer
  /** Path as the kernel reports it. */
  readonly #realDir: Buffer
  #known = new Map<number, ProcessEntry>()
  #adopters = possibleAdopters()
  readonly #pids = new PidAllocation()

  constructor(workersDir: string) {
    this.#workersDir = Buffer.from(join(workersDir, '/'))
    const real = ifThere(() => realpathSync.native(workersDir)) ?? workersDir
    this.#realDir = Buffer.from(join(real, '/'))
  }

  /** Makes the next search read everything again. */
  forget(): void {
    this.#known.clear()
    this.#adopters = possibleAdopters()
  }

  /** Returns the names of the workers that processes have in their environment. */
  workers(): Set<string> {
    return new Set([...this.#scan().values()].flatMap(({ worker }) => (worker ? [worker] : [])))
  }

  find(query: ProcessQuery): ProcessIdentity[] {
    const entries = this.#scan()
    const isMarked = this.#markCheck(query)
    const found = new Set<number>()
    for (const [pid, entry] of entries) if (isMarked(pid, entry)) found.add(pid)
    if (found.size > 0) addChildren(found, entries)
    return [...found].flatMap((pid) => {
      const identity = identify(pid)
      const isSame = identity && ticksOf(identity) === entries.get(pid)?.startTicks
      const isShell = pid === query.shell?.pid && identity?.startedAt === query.shell.startedAt
      return isSame && !isShell ? [identity] : []
    })
  }

  #markCheck(query: ProcessQuery): (pid: number, entry: ProcessEntry) => boolean {
    const { worker, shell, group, log } = query
    const folder = Buffer.concat([this.#realDir, Buffer.from(worker)])
    const since = shell && ticksOf(shell)
    const leader = group !== undefined && shell ? identify(group) : undefined
    // Another process has the shell's pid: then the group is that one's, too.
    const isReused = leader !== undefined && leader.startedAt !== shell?.startedAt
    const ownGroup = isReused ? undefined : group
    const isOtherWorkers = (name: string) =>
      name !== '' && existsSync(Buffer.concat([this.#realDir, Buffer.from(name, 'latin1')]))
    return (pid, entry) => {
      if (pid === ownGroup) return false
      if (entry.worker === worker) return true
      if (entry.group === ownGroup || entry.session === ownGroup) return true
      const mayDescend = since === undefined || entry.oldestTicks >= since
      if (entry.isUnreadable || !mayDescend) return false
      if (log && OUTPUTS.some((number) => isOpenOn(pid, number, log))) return true
      if (since === undefined || !LINKS.some((link) => leadsInto(folder, pid, link))) return false
      // The environment outweighs open files.
      return !isOtherWorkers(entry.worker)
    }
  }

  /** Returns all processes but this one; reads only those that may have changed. */
  #scan(): Map<number, ProcessEntry> {
    const known = this.#known
    const entries = new Map<number, ProcessEntry>()
    const pids = readdirSync('/proc').map(Number).filter(Number.isInteger)
    const now = uptimeTicks()
    const mayBeNew = this.#pids.sinceLastCall()
    this.#known = new Map()
    const visit = (pid: number): ProcessEntry | undefined => {
      const before = entries.get(pid) ?? known.get(pid)
      const isSame = before && (entries.has(pid) || !mayBeNew(pid) || before.inode === inodeOf(pid))
      const entry = isSame ? before : this.#read(pid, visit)
      if (!entry) return undefined
      entries.set(pid, entry)
      const isSettled = entry.worker !== '' || now - entry.startTicks >= SETTLED_TICKS
      if (isSettled) this.#known.set(pid, entry)
      return entry
    }
    for (const pid of pids) if (pid !== process.pid) visit(pid)
    return entries
  }

  #read(pid: number, visit: (pid: number) => ProcessEntry | undefined): ProcessEntry | undefined {
    const inode = inodeOf(pid)
    const stat = readStat(pid)
    if (!stat || inode === undefined) return undefined
    const environment = readIfThere(`/proc/${pid}/environ`)
    const { parent, group, session, startTicks } = stat
    return {
      inode,
      startTicks,
      parent,
      group,
      session,
      worker: environment ? this.#workerIn(environment) : '',
      isUnreadable: environment === undefined,
      oldestTicks: this.#oldestTicks(startTicks, parent, visit),
    }
  }

  #oldestTicks(
    startTicks: number,
    parent: number,
    visit: (pid: number) => ProcessEntry | undefined,
  ): number {
    // A kernel thread, init, or a process that entered this container from outside.
    if (parent === 0) return 0
    const candidate = this.#adopters.has(parent) ? undefined : visit(parent)
    // A younger process got the pid after the parent had ended.
    const isParent = candidate && candidate.startTicks <= startTicks
    return isParent ? Math.min(candidate.oldestTicks, startTicks) : startTicks
  }

  /** Returns the worker that an environment names, or ''. Names need not be UTF-8. */
  #workerIn(environment: Buffer): string {
    const folder = valueIn(environment, TASK_RUNNER_FOLDER)
    for (const dir of [this.#workersDir, this.#realDir]) {
      if (!folder?.subarray(0, dir.length).equals(dir)) continue
      const name = folder.toString('latin1', dir.length)
      if (!name.includes('/')) return name
    }
    const name = valueIn(environment, 'WORKER_NAME')
    if (!name?.length) return ''
    // Another service of this machine may run a task with the same id: paths in HOME, TMPDIR or PWD
    // show which service it is.
    const within = Buffer.concat([Buffer.from('='), this.#workersDir, name, Buffer.from('/')])
    return environment.includes(within) ? name.toString('latin1') : ''
  }
}

/**
 * Narrows down which pids may belong to new processes: the kernel allocates them in ascending
 * order. When the number of forks does not fit the pids, any pid may be new: in a container, forks
 * of its neighbours count too, and the next pid can be set through /proc.
 */
class PidAllocation {
  #before = { last: Number.NaN, forks: Number.NaN }

  /** Returns which pids may be new since the last call. Call it after listing /proc. */
  sinceLastCall(): (pid: number) => boolean {
    const before = this.#before
    const forks = Number(/^processes (\d+)/m.exec(String(readIfThere('/proc/stat')))?.[1])
    const last = Number(readIfThere('/proc/sys/kernel/ns_last_pid') ?? Number.NaN)
    this.#before = { last, forks }
    const started = forks - before.forks
    const advanced = last - before.last
    const isInOrder = started >= 0 && advanced >= started && advanced <= started + SKIPPED_MAX
    return (pid) => !isInOrder || started > FORKS_MAX || (pid > before.last && pid <= last)
  }
}

/** Returns the processes that may adopt orphans: init, this process and its ancestors. */
function possibleAdopters(): Set<number> {
  const found = new Set([1])
  for (let pid = process.pid; pid > 1 && !found.has(pid); ) {
    found.add(pid)
    pid = readStat(pid)?.parent ?? 0
  }
  return found
}

/** Adds all descendants: once their parent has ended, they may have no mark. */
function addChildren(found: Set<number>, entries: ReadonlyMap<number, ProcessEntry>): void {
  const children = new Map<number, number[]>()
  for (const [pid, { parent, startTicks }] of entries) {
    const candidate = entries.get(parent)
    if (!candidate || candidate.startTicks > startTicks) continue
    const siblings = children.get(parent)
    if (siblings) siblings.push(pid)
    else children.set(parent, [pid])
  }
  // Iterating over a set includes the elements that are added meanwhile.
  for (const pid of found) for (const child of children.get(pid) ?? []) found.add(child)
}

/** Returns the value of the first variable of that name, as getenv(3) does. */
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

function uptimeTicks(): number {
  return Number(readFileSync('/proc/uptime', 'latin1').split(' ')[0]) * TICKS_PER_SECOND
}
