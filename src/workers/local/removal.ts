/** Removes what tasks leave: hostile trees of any size and depth, without holding up the thread. */
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

const SLICE_MS = 10
/** The clock is looked at after so many files. */
const FILES_PER_LOOK = 32
/** Folders in a folder that are remembered at a time. */
const BATCH = 1000
/** Linux takes paths of up to 4096 bytes, and is slow to follow long ones. Below the folder to be removed. */
const DEPTH_LENGTH_MAX = 512
const LISTINGS_MAX = 3
const ASIDE = 'unremovable-'

/** What could not be removed: where it is now, and why. */
export interface Unremovable {
  path: string
  cause: string
}

/** Called whenever their number changes; with what was found to be one. */
export type OnUnremovable = (count: number, found?: Unremovable) => void

/**
 * Removes trees, a slice at a time. What cannot be removed (an immutable file, a mount, a folder of another user) is set aside
 * under a name of its own, and tried again when asked to.
 */
export class Removal {
  readonly #unremovable = new Map<string, Unremovable>()
  readonly #underWay = new Map<string, { steps: Steps; done: PromiseWithResolvers<void> }>()
  readonly #asideDir: string
  readonly #onUnremovable: OnUnremovable
  #next: NodeJS.Immediate | undefined

  /** What lies in `asideDir` is out of everybody's way. */
  constructor(asideDir: string, onUnremovable: OnUnremovable) {
    this.#asideDir = asideDir
    this.#onUnremovable = onUnremovable
  }

  /** Removes what takes a moment at once, the rest in slices. Settles when that is done. Never rejects. */
  add(path: string): Promise<void> {
    return this.#do(path, () => removing(path))
  }

  /** Removes all that is in a folder but these. What cannot be removed stays. Settles when that is done. Never rejects. */
  empty(folder: string, kept: readonly string[]): Promise<void> {
    return this.#do(`${folder}/`, function* () {
      yield* removing(folder, kept)
      return undefined
    })
  }

  /** True of what is being removed, or cannot be. */
  has(path: string): boolean {
    return this.#underWay.has(path) || this.#unremovable.has(path)
  }

  /** Tries again what could not be removed. */
  retry(): void {
    for (const path of this.#unremovable.keys()) void this.add(path)
  }

  /** Stops. What is left is found at the next start. */
  close(): void {
    clearImmediate(this.#next)
    for (const { steps, done } of this.#underWay.values()) {
      steps.return(undefined)
      done.resolve()
    }
    this.#underWay.clear()
  }

  async #do(key: string, begin: () => Steps): Promise<void> {
    const known = this.#underWay.get(key)
    if (known) return known.done.promise
    const steps = begin()
    if (this.#advance(key, steps)) return
    const done = Promise.withResolvers<void>()
    this.#underWay.set(key, { steps, done })
    this.#continue()
    await done.promise
  }

  #continue(): void {
    this.#next ??= setImmediate(() => {
      this.#next = undefined
      const [first] = this.#underWay
      if (!first) return
      const [path, { steps, done }] = first
      if (this.#advance(path, steps)) {
        this.#underWay.delete(path)
        done.resolve()
      }
      if (this.#underWay.size > 0) this.#continue()
    })
  }

  /** True when all is done that can be done. */
  #advance(path: string, steps: Steps): boolean {
    const endsAt = performance.now() + SLICE_MS
    for (let files = 1; ; files += 1) {
      const step = steps.next()
      if (step.done) {
        this.#note(path, step.value)
        return true
      }
      if (files % FILES_PER_LOOK === 0 && performance.now() > endsAt) return false
    }
  }

  #note(path: string, obstacle: unknown): void {
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

  /** The path it has from then on. */
  #setAside(path: string): string {
    // A worker's folder that could not be moved stays where it is, as does what was set aside before.
    if (dirname(path) !== this.#asideDir || basename(path).startsWith(ASIDE)) return path
    const aside = join(this.#asideDir, ASIDE + randomUUID())
    try {
      renameSync(path, aside)
      return aside
    } catch {
      // It is counted all the same, under the name that it has.
      return path
    }
  }
}

/** True when it was removed: it is small, and nothing hinders. */
export function removedAtOnce(path: string): boolean {
  const steps = removing(path)
  for (let files = 0; files < BATCH; files += 1) {
    const step = steps.next()
    if (step.done) return step.value === undefined
  }
  steps.return(undefined)
  return false
}

/** Removes a tree without entering the mounts in it. Throws when something is left. */
export async function removeTree(path: string): Promise<void> {
  const left: Unremovable[] = []
  await new Removal('', (_count, found) => found && left.push(found)).add(path)
  if (left[0]) throw new Error(`${path} could not be removed (${left[0].cause})`)
}

/** Yields after each file; returns what hindered it first, undefined when all is gone. */
type Steps = Generator<undefined, unknown>

/** A folder that is being emptied. Paths are bytes, one a character: names of files need not be UTF-8. */
interface Level {
  path: string
  name: string
  above: Level | undefined
  /** What cannot be removed. */
  blocked: Set<string>
  listings: number
  isOpened: boolean
}

/**
 * Depth first, without recursion. What lies too deep for a path is moved up. Mounts are not entered: what is in there is not
 * the task's. With some of it kept, the folder itself stays.
 */
function* removing(root: string, kept: readonly string[] = []): Steps {
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
          opening(level, () => unlinkSync(bytes(`${level.path}/${name}`)))
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
            opening(level, () => renameSync(bytes(path), bytes(up)))
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
        opening(level.above, () => rmdirSync(bytes(path)))
      } else if (level.above) level.above.blocked.add(level.name)
    } catch (err) {
      // Somebody wrote meanwhile.
      if (codeOf(err) === 'ENOTEMPTY' && level.listings < LISTINGS_MAX) continue
      if (codeOf(err) !== 'ENOENT') blocked(level.above, level.name, err)
    }
    levels.splice(levels.lastIndexOf(level), 1)
  }
  return obstacle
}

function newLevel(path: string, name: string, above: Level | undefined): Level {
  return { path, name, above, blocked: new Set(), listings: 0, isOpened: false }
}

function* entriesOf(level: Level): Generator<{ name: string; isDirectory: boolean }> {
  const directory = opening(level, () =>
    // Its types do not know that a path may be bytes, nor that names then are.
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

/** Does it again with a folder's permissions given back to its owner (Go's module cache takes them away). */
function opening<T>(level: Level | undefined, act: () => T): T {
  try {
    return act()
  } catch (err) {
    const isDenied = ['EACCES', 'EPERM'].includes(codeOf(err) ?? '')
    if (!isDenied || !level || level.isOpened) throw err
    level.isOpened = true
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

/** Paths of mounts, as seen below `root`. */
function mountsBelow(root: string): Set<string> {
  const real = realpathSync.native(root, 'latin1' as BufferEncoding)
  const found = new Set<string>()
  for (const line of readFileSync('/proc/self/mountinfo', 'latin1').split('\n')) {
    // proc(5): the fifth field, with blanks and the like as \ooo.
    const path = (line.split(' ')[4] ?? '').replace(/\\([0-7]{3})/g, (_, octal: string) =>
      String.fromCharCode(Number.parseInt(octal, 8)),
    )
    if (path.startsWith(`${real}/`)) {
      found.add(Buffer.from(root).toString('latin1') + path.slice(real.length))
    }
  }
  return found
}
