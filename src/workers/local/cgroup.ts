/** Cgroups of slots. Synchronous: runs on the local workers' thread. */
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync, realpathSync, rmdirSync, statSync } from 'node:fs'
import { basename, dirname, join, normalize, relative } from 'node:path'
import { codeOf } from './failures.ts'
import type { ProcessQuery, ProcessSource } from './leftover-finder.ts'
import { identify, type ProcessIdentity, ticksOf } from './processes.ts'

/** Hierarchies of version 1, best first. No controller does anything unless it is told to; cpuset would need to be. */
const V1_HIERARCHIES = ['pids', 'freezer', 'name=systemd']
/** A directory has two links, and one more for each cgroup in it. */
const LINKS_WITHOUT_CHILDREN = 2
/** One that is gone, one of threads (whose processes are told with those above it), and one too deep to be named. */
const UNREADABLE: readonly string[] = ['ENOENT', 'ENODEV', 'EOPNOTSUPP', 'ENAMETOOLONG']
const TRIAL = 'trial'
const TRIAL_MS = 10_000
/** Ends with 0 if this shell is in the cgroup then, as the kernel tells it. */
const ENTER = `echo $$ >"$0/cgroup.procs" || exit
while read -r own; do case $own in *"$1") exit 0 ;; esac; done </proc/$$/cgroup
exit 1`

export interface CgroupMount {
  mountPoint: string
  /** Which cgroup is mounted there. */
  root: string
  /** Hierarchies of version 1; undefined for version 2. */
  hierarchies: readonly string[] | undefined
}

/**
 * Makes one cgroup for each slot below the service's own. What a task starts stays in the cgroup of its slot's shell, whatever it does
 * to its session, environment and descriptors; only root, or who may write to all of these cgroups, can move a process out.
 *
 * No controllers are enabled: then a cgroup of version 2 may hold both processes and other cgroups.
 */
export class SlotCgroups {
  /** Cgroups of this workersDir alone are in here. */
  readonly #folder: string
  readonly #mountPoints: readonly string[]

  /**
   * Removes the empty cgroups that an earlier service left, and leaves those alone in which processes live. Returns undefined where
   * cgroups cannot be made or entered: in most containers, or without the rights.
   */
  static open(workersDir: string, procDir = '/proc/self'): SlotCgroups | undefined {
    try {
      const mounts = cgroupMounts(readFileSync(join(procDir, 'mountinfo'), 'utf8'))
      const own = readFileSync(join(procDir, 'cgroup'), 'utf8')
      const name = folderName(realpathSync.native(workersDir))
      for (const place of placesOf(mounts, own)) {
        const cgroups = new SlotCgroups(join(place, name), mounts)
        if (cgroups.#isUsable()) return cgroups
        cgroups.close()
      }
    } catch (err) {
      if (codeOf(err) === undefined) throw err
    }
    return undefined
  }

  private constructor(folder: string, mounts: readonly CgroupMount[]) {
    this.#folder = folder
    this.#mountPoints = mounts.map(({ mountPoint }) => mountPoint)
  }

  /**
   * Returns the path of a new cgroup, which a process enters by writing its id to `cgroup.procs` in it. Throws `EEXIST` when there is
   * one of that name: an earlier service's processes may be in it.
   */
  make(name: string): string {
    const path = join(this.#folder, name)
    if (!this.#isOurs(path)) throw new Error(`not a name for a cgroup: ${name}`)
    mkdirSync(path)
    return path
  }

  /**
   * Returns the ids of the processes in a cgroup and those below it. Undefined: there is no such cgroup, or it is none of ours.
   * The path may come from a worker's record, which its task may have changed: nothing else is listed.
   */
  processes(path: string): number[] | undefined {
    return this.#isOurs(path) ? processesIn(Buffer.from(path)) : undefined
  }

  /** Removes a cgroup with those that its task made in it. False while processes are in one of them. */
  remove(path: string): boolean {
    return this.#isOurs(path) && isRemoved(Buffer.from(path))
  }

  /** Removes what holds the cgroups, if nothing is in it any more. */
  close(): void {
    isRemovedAlone(Buffer.from(this.#folder))
  }

  #isUsable(): boolean {
    const trial = join(this.#folder, TRIAL)
    const tail = join('/', basename(this.#folder), TRIAL)
    try {
      makeUnlessThere(this.#folder)
      for (const child of childrenOf(Buffer.from(this.#folder))) isRemoved(child)
      makeUnlessThere(trial)
      // Whether a process may be moved depends on what is above both cgroups: only trying tells.
      const { status } = spawnSync('/bin/sh', ['-c', ENTER, trial, tail], {
        cwd: '/',
        env: {},
        stdio: 'ignore',
        timeout: TRIAL_MS,
      })
      return status === 0
    } catch (err) {
      if (codeOf(err) === undefined) throw err
      return false
    } finally {
      isRemovedAlone(Buffer.from(trial))
    }
  }

  /** An earlier service may have had its cgroups elsewhere, but under the same name. */
  #isOurs(path: string): boolean {
    const isBelow = (dir: string) => path.startsWith(join(dir, '/'))
    return (
      normalize(path) === path &&
      !path.endsWith('/') &&
      !path.includes('\0') &&
      basename(dirname(path)) === basename(this.#folder) &&
      this.#mountPoints.some(isBelow)
    )
  }
}

/** Finds processes by the cgroup of their slot where it has one, and by their marks otherwise. */
export class WorkerProcesses implements ProcessSource {
  readonly #marks: ProcessSource
  readonly #cgroups: SlotCgroups | undefined

  constructor(marks: ProcessSource, cgroups: SlotCgroups | undefined) {
    this.#marks = marks
    this.#cgroups = cgroups
  }

  find(query: ProcessQuery): ProcessIdentity[] {
    const { cgroup, shell } = query
    const pids = cgroup === undefined ? undefined : this.#cgroups?.processes(cgroup)
    if (!pids || !shell) return this.#marks.find(query)
    const since = ticksOf(shell)
    const members = pids.flatMap((pid) => (pid === process.pid ? [] : (identify(pid) ?? [])))
    // Older ones were moved in.
    const found = members.filter((one) => one.pid !== shell.pid && ticksOf(one) >= since)
    // A shell that could not enter, was moved out, or has ended proves nothing about what it started.
    const isInside = members.some(
      ({ pid, startedAt }) => pid === shell.pid && startedAt === shell.startedAt,
    )
    if (isInside) return found
    const others = this.#marks.find(query).filter(({ pid }) => !pids.includes(pid))
    return [...found, ...others]
  }
}

/** The mounts of cgroups among those in /proc/<pid>/mountinfo (proc(5)). */
export function cgroupMounts(mountinfo: string): CgroupMount[] {
  return mountinfo.split('\n').flatMap((line) => {
    const [mount = '', superblock = ''] = line.split(' - ')
    const [, , , root = '', mountPoint = ''] = mount.split(' ').map(unescaped)
    const [type, , options = ''] = superblock.split(' ')
    if (type !== 'cgroup' && type !== 'cgroup2') return []
    const hierarchies = type === 'cgroup' ? options.split(',') : undefined
    return [{ mountPoint, root, hierarchies }]
  })
}

/** Where the own cgroup is mounted, best place first. `own`: what /proc/<pid>/cgroup says (cgroups(7)). */
export function placesOf(mounts: readonly CgroupMount[], own: string): string[] {
  const lines = own.split('\n').flatMap((line) => {
    const [, hierarchies, path] = /^\d+:([^:]*):(.*)$/.exec(line) ?? []
    return hierarchies === undefined || path === undefined ? [] : [{ hierarchies, path }]
  })
  return ['', ...V1_HIERARCHIES].flatMap((wanted) => {
    const path = lines.find(({ hierarchies }) => hierarchies.split(',').includes(wanted))?.path
    const mount = mounts.find(({ hierarchies }) =>
      wanted === '' ? hierarchies === undefined : hierarchies?.includes(wanted),
    )
    if (path === undefined || mount === undefined) return []
    const below = relative(mount.root, path)
    // Not mounted here: a container sees a part alone.
    return below.startsWith('..') ? [] : [join(mount.mountPoint, below)]
  })
}

function folderName(workersDir: string): string {
  return `task-runner-${createHash('sha256').update(workersDir).digest('hex').slice(0, 16)}`
}

/** Spaces and the like are written as `\040`. */
function unescaped(field: string): string {
  return field.replace(/\\([0-7]{3})/g, (_, octal) =>
    String.fromCharCode(Number.parseInt(octal, 8)),
  )
}

function makeUnlessThere(path: string): void {
  try {
    mkdirSync(path)
  } catch (err) {
    if (codeOf(err) !== 'EEXIST') throw err
  }
}

/** Undefined when it is gone. */
function processesIn(cgroup: Buffer): number[] | undefined {
  let text: string
  let children: Buffer[]
  try {
    text = readFileSync(within(cgroup, 'cgroup.procs'), 'latin1')
    children = childrenOf(cgroup)
  } catch (err) {
    if (!UNREADABLE.includes(codeOf(err) ?? '')) throw err
    return undefined
  }
  // Zero: a process that is outside of our PID namespace.
  const pids = text
    .split('\n')
    .map(Number)
    .filter((pid) => pid > 0)
  for (const child of children) pids.push(...(processesIn(child) ?? []))
  return pids
}

/** In bytes: tasks name them. */
function childrenOf(cgroup: Buffer): Buffer[] {
  if (statSync(cgroup).nlink === LINKS_WITHOUT_CHILDREN) return []
  return readdirSync(cgroup, { encoding: 'buffer', withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .map(({ name }) => within(cgroup, name))
}

/** False while processes are in it or below it: then all of it stays. */
function isRemoved(cgroup: Buffer): boolean {
  try {
    if (processesIn(cgroup)?.length) return false
    for (const child of childrenOf(cgroup)) isRemoved(child)
  } catch (err) {
    if (!UNREADABLE.includes(codeOf(err) ?? '')) throw err
  }
  return isRemovedAlone(cgroup)
}

function isRemovedAlone(cgroup: Buffer): boolean {
  try {
    rmdirSync(cgroup)
    return true
  } catch (err) {
    if (codeOf(err) === undefined) throw err
    return codeOf(err) === 'ENOENT'
  }
}

function within(cgroup: Buffer, name: string | Buffer): Buffer {
  return Buffer.concat([
    cgroup,
    Buffer.from('/'),
    typeof name === 'string' ? Buffer.from(name) : name,
  ])
}
