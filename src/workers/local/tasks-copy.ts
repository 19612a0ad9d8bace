/** A worker's own copy of the tasks folder: a task may change what it likes in there. */
import { hash } from 'node:crypto'
import {
  constants,
  copyFileSync,
  type Dirent,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  realpathSync,
  rmSync,
  type Stats,
  statSync,
  symlinkSync,
  utimesSync,
} from 'node:fs'
import { dirname, join, relative, sep } from 'node:path'
import { LINKED, NOT_COPIED } from '../../core/task-files.ts'

/** Prints of a copy, and of what it was made from. Both are as they were while their prints are the same. */
export interface TasksCopy {
  original: string
  copy: string
}

/** Clocks of file systems tick every 10 ms or faster: a file may change again in the tick in which it was looked at. */
const SETTLED_MS = 1000
const NEVER = ''
const MAYBE = { throwIfNoEntry: false } as const

/**
 * Makes `to` a copy of the tasks folder; nothing is done where the `last` copy, untouched since, still is one. Reflinks where
 * the disk can. Links are followed inside the tasks folder, and left out where they leave it. `notCopied`: real paths of folders that
 * may lie in there.
 */
export function copyTasks(
  tasksDir: string,
  to: string,
  notCopied: readonly string[],
  last: TasksCopy | undefined,
): TasksCopy {
  const root = realpathSync.native(tasksDir)
  const isSettledAt = Date.now() - SETTLED_MS
  const { print, changedAt } = look(root, (folder) => entriesOf(folder, notCopied))
  if (last?.original === print && isUntouched(to, last)) return last
  rmSync(to, { recursive: true, force: true })
  copyFolder(root, to, root, notCopied)
  return { original: changedAt < isSettledAt ? print : NEVER, copy: look(to).print }
}

/**
 * False also when it is gone. A write to a file shows even in the tick of the copying: copies have the times of their originals.
 * Asked before each use, too: what the finder of leftovers does not know may have written since the last one.
 */
export function isUntouched(folder: string, { copy }: TasksCopy): boolean {
  return existsSync(folder) && look(folder).print === copy
}

function copyFolder(from: string, to: string, root: string, skip: readonly string[]): void {
  mkdirSync(to, { mode: 0o700 })
  for (const entry of entriesOf(from, skip)) {
    const source = join(from, entry.name)
    const target = join(to, entry.name)
    if (LINKED.includes(entry.name)) symlinkSync(source, target)
    else if (entry.isDirectory()) copyFolder(source, target, root, skip)
    else if (entry.isFile()) copyFile(source, target)
    else if (entry.isSymbolicLink()) copyLinked(source, target, root)
  }
}

function copyLinked(link: string, target: string, root: string): void {
  if (!existsSync(link)) return
  const real = realpathSync(link)
  if (!real.startsWith(root + sep)) return
  if (statSync(real).isFile()) copyFile(real, target)
  // Leads to the same place inside the copy; a linked folder may contain itself.
  else symlinkSync(relative(dirname(link), real), target)
}

function copyFile(source: string, target: string): void {
  copyFileSync(source, target, constants.COPYFILE_FICLONE)
  const { atime, mtime } = statSync(source)
  utimesSync(target, atime, mtime)
}

/** `changedAt`: milliseconds since the epoch. On a network file system as new as its cache of attributes. */
function look(
  root: string,
  entriesIn = (folder: string) => readdirSync(folder, { withFileTypes: true }),
): { print: string; changedAt: number } {
  const lines: string[] = []
  let changedAt = 0
  const add = (path: string, stats: Stats | undefined) => {
    const { ino, mode, size, mtimeMs, ctimeMs } = stats ?? {}
    lines.push([relative(root, path), ino, mode, size, mtimeMs, ctimeMs].join(' '))
    // What went away while we look is changing just now.
    changedAt = Math.max(changedAt, ctimeMs ?? Number.POSITIVE_INFINITY)
  }
  const walk = (folder: string) => {
    add(folder, lstatSync(folder))
    for (const entry of entriesIn(folder)) {
      const path = join(folder, entry.name)
      if (entry.isDirectory() && !LINKED.includes(entry.name)) {
        walk(path)
        continue
      }
      add(path, lstatSync(path, MAYBE))
      // Links may lead nowhere, or in a circle.
      if (entry.isSymbolicLink() && existsSync(path)) add(path, statSync(path, MAYBE))
    }
  }
  walk(root)
  return { print: hash('sha256', lines.join('\n')), changedAt }
}

function entriesOf(folder: string, skip: readonly string[]): Dirent[] {
  return readdirSync(folder, { withFileTypes: true }).filter(
    ({ name }) => !NOT_COPIED.includes(name) && !skip.includes(join(folder, name)),
  )
}
