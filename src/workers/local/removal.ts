/** Removes the files of tasks: hostile trees of any size and depth, without blocking the thread. */
import { randomUUID } from 'node:crypto'
import {
  chmodSync,
  type Dirent,
  lstatSync,
  opendirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmdirSync,
  unlinkSync,
} from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { codeOf } from './failures.ts'
import { mountsIn } from './mounts.ts'

const SLICE_MS = 10
/** Number of files between two reads of the clock. */
const FILES_PER_CHECK = 32
/** Maximum subfolders kept in memory for each folder. */
const BATCH = 1000
/**
 * Maximum length of a path below the folder to be removed: Linux accepts up to 4096 bytes, but is
 * slow with long paths.
 */
const DEPTH_LENGTH_MAX = 512
const LISTINGS_MAX = 3
const ASIDE = 'unremovable-'

/** A tree that cannot be removed. */
export interface Unremovable {
  /** Where it is now. */
  path: string
  cause: string
}

/** Receives the number of unremovable trees when it changes, and the new one, if any. */
export type OnUnremovable = (count: number, found?: Unremovable) => void

/**
 * Removes trees, a slice at a time. A tree that cannot be removed (an immutable file, a mount, a
 * folder of another user) gets another name, and is tried again by `retry`.
 */
export class Removal {
  readonly #unremovable = new Map<string, Unremovable>()
  readonly #active = new Map<string, { steps: Steps; done: PromiseWithResolvers<void> }>()
  readonly #asideDir: string
  readonly #onUnremovable: OnUnremovable
  #next: NodeJS.Immediate | undefined

  /** `asideDir`: the folder in which trees that cannot be removed are renamed. */
  constructor(asideDir: string, onUnremovable: OnUnremovable) {
    this.#asideDir = asideDir
    this.#onUnremovable = onUnremovable
  }

  /** Removes a tree; a small one at once. Settles when done or impossible. Never rejects. */
  add(path: string): Promise<void> {
    return this.#run(path, () => removalSteps(path))
  }

  /** Removes all entries of a folder but `kept`, as far as possible. Never rejects. */
  empty(folder: string, kept: readonly string[]): Promise<void> {
    return this.#run(`${folder}/`, function* () {
      yield* removalSteps(folder, kept)
      return undefined
    })
  }

  /** Returns whether a tree is being removed, or cannot be. */
  has(path: string): boolean {
    return this.#active.has(path) || this.#unremovable.has(path)
  }

  /** Tries again to remove the unremovable trees. */
  retry(): void {
    for (const path of this.#unremovable.keys()) void this.add(path)
  }

  /** Stops. The next start of the service removes the rest. */
  close(): void {
    clearImmediate(this.#next)
    for (const { steps, done } of this.#active.values()) {
      steps.return(undefined)
      done.resolve()
    }
    this.#active.clear()
  }

  async #run(key: string, begin: () => Steps): Promise<void> {
    const known = this.#active.get(key)
    if (known) return known.done.promise
    const steps = begin()
    if (this.#advance(key, steps)) return
    const done = Promise.withResolvers<void>()
    this.#active.set(key, { steps, done })
    this.#schedule()
    await done.promise
  }

  #schedule(): void {
    this.#next ??= setImmediate(() => {
      this.#next = undefined
      const [first] = this.#active
      if (!first) return
      const [path, { steps, done }] = first
      if (this.#advance(path, steps)) {
        this.#active.delete(path)
        done.resolve()
      }
      if (this.#active.size > 0) this.#schedule()
    })
  }

  /** Returns whether the removal is finished. */
  #advance(path: string, steps: Steps): boolean {
    const endsAt = performance.now() + SLICE_MS
    for (let files = 1; ; files += 1) {
      const step = steps.next()
      if (step.done) {
        this.#record(path, step.value)
        return true
      }
      if (files % FILES_PER_CHECK === 0 && performance.now() > endsAt) return false
    }
  }

  #record(path: string, obstacle: unknown): void {
    const before = this.#unremovable.get(path)
    if (obstacle === undefined) {
      if (this.#unremovable.delete(path)) this.#onUnremovable(this.#unremovable.size)
      return
    }
    if (before) return
    const found = { path: this.#setAside(path), cause: codeOf(obstacle) ?? String(obstacle) }
    this.#unremovable.set(found.path, found)
    this.#onUnremovable(this.#unremovable.size, found)
  }

  /** Renames a tree. Returns the path that it has from then on. */
  #setAside(path: string): string {
    // A worker's folder that could not be moved stays in its place.
    if (dirname(path) !== this.#asideDir || basename(path).startsWith(ASIDE)) return path
    const aside = join(this.#asideDir, ASIDE + randomUUID())
    try {
      renameSync(path, aside)
      return aside
    } catch {
      // It keeps its name.
      return path
    }
  }
}

/** Removes a tree if it is small. Returns whether nothing of it is left. */
export function removeIfSmall(path: string): boolean {
  const steps = removalSteps(path)
  for (let files = 0; files < BATCH; files += 1) {
    const step = steps.next()
    if (step.done) return step.value === undefined
  }
  steps.return(undefined)
  return false
}

/** Removes a tree but no mounts in it. Throws when something is left. */
export async function removeTree(path: string): Promise<void> {
  const left: Unremovable[] = []
  await new Removal('', (_count, found) => found && left.push(found)).add(path)
  if (left[0]) throw new Error(`${path} could not be removed (${left[0].cause})`)
}

/** Yields after each file; returns the first error, or undefined when all is removed. */
type Steps = Generator<undefined, unknown>

/** A folder that is being emptied. Paths hold one byte a character: names need not be UTF-8. */
interface Level {
  path: string
  name: string
  above: Level | undefined
  /** Names of entries that cannot be removed. */
  blocked: Set<string>
  listings: number
  isChmodded: boolean
}

/**
 * Removes depth first, without recursion. Folders too deep for a path are moved up. Mounts are not
 * entered: their files are not the task's. With entries `kept`, the folder itself stays.
 */
function* removalSteps(root: string, kept: readonly string[] = []): Steps {
  const rootPath = Buffer.from(root).toString('latin1')
  const top = newLevel(rootPath, '', undefined)
  for (const name of kept) top.blocked.add(name)
  let obstacle: unknown
  let mounts: ReadonlySet<string> | undefined
  const blocked = (level: Level | undefined, name: string, cause: unknown) => {
    obstacle ??= cause
    level?.blocked.add(name)
  }
  if (!isFolder(rootPath)) {
    try {
      unlinkSync(root)
    } catch (err) {
      if (codeOf(err) !== 'ENOENT') return err
    }
    return undefined
  }
  const levels = [top]
  for (let level = levels.at(-1); level; level = levels.at(-1)) {
    const folders: string[] = []
    level.listings += 1
    try {
      for (const { name, isDirectory } of entriesOf(level)) {
        yield undefined
        if (level.blocked.has(name)) continue
        if (isDirectory) {
          folders.push(name)
          if (folders.length >= BATCH) break
          continue
        }
        try {
          permitted(level, () => unlinkSync(bytes(`${level.path}/${name}`)))
        } catch (err) {
          blocked(level, name, err)
        }
      }
      for (const name of folders) {
        let path = `${level.path}/${name}`
        let above = level
        mounts ??= mountsBelow(root)
        try {
          if (mounts.has(path)) throw Object.assign(new Error('a mount'), { code: 'EBUSY' })
          if (path.length > rootPath.length + DEPTH_LENGTH_MAX) {
            const up = `${rootPath}/${randomUUID()}`
            permitted(level, () => renameSync(bytes(path), bytes(up)))
            path = up
            above = top
            mounts = undefined
          }
          levels.push(newLevel(path, path.slice(path.lastIndexOf('/') + 1), above))
        } catch (err) {
          blocked(level, name, err)
        }
      }
      if (folders.length > 0) {
        level.listings = 0
        continue
      }
      if (level.blocked.size === 0) {
        const { path } = level
        permitted(level.above, () => rmdirSync(bytes(path)))
      } else if (level.above) level.above.blocked.add(level.name)
    } catch (err) {
      // A process added files meanwhile.
      if (codeOf(err) === 'ENOTEMPTY' && level.listings < LISTINGS_MAX) continue
      if (codeOf(err) !== 'ENOENT') blocked(level.above, level.name, err)
    }
    levels.splice(levels.lastIndexOf(level), 1)
  }
  return obstacle
}

function newLevel(path: string, name: string, above: Level | undefined): Level {
  return { path, name, above, blocked: new Set(), listings: 0, isChmodded: false }
}

function* entriesOf(level: Level): Generator<{ name: string; isDirectory: boolean }> {
  const directory = permitted(level, () =>
    // The types of opendirSync lack paths and names as Buffers.
    opendirSync(bytes(level.path) as unknown as string, { encoding: 'buffer' as 'utf8' }),
  )
  try {
    for (;;) {
      const entry = directory.readSync() as unknown as Dirent<Buffer> | null
      if (!entry) return
      yield { name: entry.name.toString('latin1'), isDirectory: entry.isDirectory() }
    }
  } finally {
    directory.closeSync()
  }
}

/** Acts in a folder; restores missing permissions, which Go's module cache takes away. */
function permitted<T>(level: Level | undefined, act: () => T): T {
  try {
    return act()
  } catch (err) {
    const isDenied = ['EACCES', 'EPERM'].includes(codeOf(err) ?? '')
    if (!isDenied || !level || level.isChmodded) throw err
    level.isChmodded = true
    chmodSync(bytes(level.path), 0o700)
    return act()
  }
}

function isFolder(path: string): boolean {
  return lstatSync(bytes(path), { throwIfNoEntry: false })?.isDirectory() ?? false
}

function bytes(path: string): Buffer {
  return Buffer.from(path, 'latin1')
}

/** Returns the paths of mounts below `root`. */
function mountsBelow(root: string): Set<string> {
  const real = realpathSync.native(root, 'latin1' as BufferEncoding)
  const given = Buffer.from(root).toString('latin1')
  const mounts = mountsIn(readFileSync('/proc/self/mountinfo', 'latin1'))
  const below = mounts.filter(({ mountPoint }) => mountPoint.startsWith(`${real}/`))
  return new Set(below.map(({ mountPoint }) => given + mountPoint.slice(real.length)))
}
