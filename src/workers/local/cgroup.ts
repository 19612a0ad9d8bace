/** Makes cgroups for slots. Synchronous: runs on the local workers' thread. */
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync, realpathSync, rmdirSync, statSync } from 'node:fs'
import { basename, dirname, join, normalize, relative } from 'node:path'
import { codeOf } from './failures.ts'
import type { ProcessQuery, ProcessSource } from './leftover-finder.ts'
import { type Mount, mountsIn } from './mounts.ts'
import { identify, type ProcessIdentity, ticksOf } from './processes.ts'

/** Hierarchies of version 1, best first: those whose cgroups need no setup and limit nothing. */
const V1_HIERARCHIES = ['pids', 'freezer', 'name=systemd']
/** Link count of a directory without subdirectories. */
const LINKS_WITHOUT_CHILDREN = 2
/**
 * Errors of reading a cgroup that is gone, is threaded (its parent lists the processes), or has a
 * path that is too long.
 */
const UNREADABLE: readonly string[] = ['ENOENT', 'ENODEV', 'EOPNOTSUPP', 'ENAMETOOLONG']
const TRIAL = 'trial'
const TRIAL_MS = 10_000
/** Shell commands that enter a cgroup and exit with 0 if the kernel confirms that. */
const ENTER = `echo $$ >"$0/cgroup.procs" || exit
while read -r own; do case $own in *"$1") exit 0 ;; esac; done </proc/$$/cgroup
exit 1`

/**
 * Makes one cgroup for each slot below the service's own. A task's processes stay in the cgroup of
 * their slot's shell, whatever they do to their session, environment and descriptors; only root, or
 * a user that may write to all of these cgroups, can move a process out.
 *
 * No controllers are enabled: then a cgroup of version 2 may hold both processes and other cgroups.
 */
export class SlotCgroups {
  /** Holds only cgroups of this workersDir. */
  readonly #folder: string
  readonly #mountPoints: readonly string[]

  /**
   * Removes the empty cgroups of an earlier service, but none with processes in it. Returns
   * undefined where cgroups cannot be made or entered: in most containers, or without the
   * permissions.
   */
  static open(workersDir: string, procDir = '/proc/self'): SlotCgroups | undefined {
    try {
      const mounts = cgroupMounts(readFileSync(join(procDir, 'mountinfo'), 'utf8'))
      const own = readFileSync(join(procDir, 'cgroup'), 'utf8')
      const name = folderName(realpathSync.native(workersDir))
      for (const place of ownCgroupPaths(mounts, own)) {
        const cgroups = new SlotCgroups(join(place, name), mounts)
        if (cgroups.#isUsable()) return cgroups
        cgroups.close()
      }
    } catch (err) {
      if (codeOf(err) === undefined) throw err
    }
    return undefined
  }

  private constructor(folder: string, mounts: readonly Mount[]) {
    this.#folder = folder
    this.#mountPoints = mounts.map(({ mountPoint }) => mountPoint)
  }

  /**
   * Makes a cgroup and returns its path; a process enters it by writing its id to `cgroup.procs`.
   * Throws `EEXIST` when one of that name exists: processes of an earlier service may be in it.
   */
  make(name: string): string {
    const path = join(this.#folder, name)
    if (!this.#isOurs(path)) throw new Error(`not a name for a cgroup: ${name}`)
    mkdirSync(path)
    return path
  }

  /**
   * Returns the ids of the processes in a cgroup and those below it; undefined if it is gone or not
   * ours. The path comes from a worker's record, which the task may have changed: other cgroups are
   * not listed.
   */
  processes(path: string): number[] | undefined {
    return this.#isOurs(path) ? processesIn(Buffer.from(path)) : undefined
  }

  /** Removes a cgroup with those that its task made in it. Returns false if one has processes. */
  remove(path: string): boolean {
    return this.#isOurs(path) && removeWithChildren(Buffer.from(path))
  }

  /** Removes the parent of the cgroups, if it is empty. */
  close(): void {
    removeOne(Buffer.from(this.#folder))
  }

  #isUsable(): boolean {
    const trial = join(this.#folder, TRIAL)
    const tail = join('/', basename(this.#folder), TRIAL)
    try {
      makeIfMissing(this.#folder)
      for (const child of childrenOf(Buffer.from(this.#folder))) removeWithChildren(child)
      makeIfMissing(trial)
      // Whether a process may be moved depends on the parents of both cgroups: only a trial shows
      // it.
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
      removeOne(Buffer.from(trial))
    }
  }

  /** Accepts other mount points: an earlier service may have had its cgroups elsewhere. */
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

/** Finds processes by their slot's cgroup if it has one, otherwise by their marks. */
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
    // Processes older than the shell were moved in.
    const found = members.filter((one) => one.pid !== shell.pid && ticksOf(one) >= since)
    // If the shell is not in the cgroup (it could not enter, was moved out, or has ended), its
    // children need not be there either.
    const isInside = members.some(
      ({ pid, startedAt }) => pid === shell.pid && startedAt === shell.startedAt,
    )
    if (isInside) return found
    const others = this.#marks.find(query).filter(({ pid }) => !pids.includes(pid))
    return [...found, ...others]
  }
}

/** Returns the mounts of cgroups that /proc/<pid>/mountinfo lists. */
export function cgroupMounts(mountinfo: string): Mount[] {
  return mountsIn(mountinfo).filter(({ type }) => type === 'cgroup' || type === 'cgroup2')
}

/**
 * Returns the paths at which our own cgroup is mounted, best first. `own`: the content of
 * /proc/<pid>/cgroup (cgroups(7)).
 */
export function ownCgroupPaths(mounts: readonly Mount[], own: string): string[] {
  const lines = own.split('\n').flatMap((line) => {
    const [, hierarchies, path] = /^\d+:([^:]*):(.*)$/.exec(line) ?? []
    return hierarchies === undefined || path === undefined ? [] : [{ hierarchies, path }]
  })
  return ['', ...V1_HIERARCHIES].flatMap((wanted) => {
    const path = lines.find(({ hierarchies }) => hierarchies.split(',').includes(wanted))?.path
    const mount = mounts.find(({ type, options }) =>
      wanted === '' ? type === 'cgroup2' : type === 'cgroup' && options.includes(wanted),
    )
    if (path === undefined || mount === undefined) return []
    const below = relative(mount.root, path)
    // Outside of the mounted part, as in a container.
    return below.startsWith('..') ? [] : [join(mount.mountPoint, below)]
  })
}

function folderName(workersDir: string): string {
  return `task-runner-${createHash('sha256').update(workersDir).digest('hex').slice(0, 16)}`
}

/** Makes no parents, unlike `recursive`: where there are none, no cgroups are mounted. */
function makeIfMissing(path: string): void {
  try {
    mkdirSync(path)
  } catch (err) {
    if (codeOf(err) !== 'EEXIST') throw err
  }
}

/** Returns undefined when the cgroup is gone. */
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
  // 0 stands for a process outside of our PID namespace.
  const pids = text
    .split('\n')
    .map(Number)
    .filter((pid) => pid > 0)
  for (const child of children) pids.push(...(processesIn(child) ?? []))
  return pids
}

/** Returns paths as bytes: tasks choose the names, which need not be UTF-8. */
function childrenOf(cgroup: Buffer): Buffer[] {
  if (statSync(cgroup).nlink === LINKS_WITHOUT_CHILDREN) return []
  return readdirSync(cgroup, { encoding: 'buffer', withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .map(({ name }) => within(cgroup, name))
}

/** Removes a cgroup and those below it; returns false, removing none, if one has processes. */
function removeWithChildren(cgroup: Buffer): boolean {
  try {
    if (processesIn(cgroup)?.length) return false
    for (const child of childrenOf(cgroup)) removeWithChildren(child)
  } catch (err) {
    if (!UNREADABLE.includes(codeOf(err) ?? '')) throw err
  }
  return removeOne(cgroup)
}

function removeOne(cgroup: Buffer): boolean {
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
