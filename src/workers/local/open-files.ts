/** Finds the limit of open files for tasks: children inherit the one that Node has raised. */
import { readFileSync, readlinkSync } from 'node:fs'
import { basename } from 'node:path'

interface Limits {
  soft: number
  hard: number
}

/** Default limits of services under systemd and containerd. */
const DEFAULT_HARD_LIMIT = 524_288
const DEFAULT_SOFT_LIMIT = 1024

/**
 * Returns the soft limit that this process was started with; undefined if it is unknown. The
 * process itself has lost it, so it is read from the nearest ancestor that is not Node (as npm is),
 * unless a different hard limit shows that ours was set separately.
 */
export function openFilesAtStart(): number | undefined {
  const own = limitsOf(process.pid)
  if (!own || own.soft < own.hard) return undefined
  let pid = process.ppid
  while (pid > 0 && isNode(pid)) pid = parentOf(pid)
  const above = pid > 0 ? limitsOf(pid) : undefined
  if (above?.hard === own.hard) return above.soft
  return own.hard === DEFAULT_HARD_LIMIT ? DEFAULT_SOFT_LIMIT : undefined
}

function limitsOf(pid: number): Limits | undefined {
  const found = /^Max open files +(\d+) +(\d+)/m.exec(read(`/proc/${pid}/limits`))
  return found ? { soft: Number(found[1]), hard: Number(found[2]) } : undefined
}

function parentOf(pid: number): number {
  return Number(/^PPid:\s*(\d+)/m.exec(read(`/proc/${pid}/status`))?.[1] ?? 0)
}

function isNode(pid: number): boolean {
  try {
    return /^node(js)?$/.test(basename(readlinkSync(`/proc/${pid}/exe`)))
  } catch {
    // Another user's process.
    return false
  }
}

/** Returns an empty text if the file cannot be read. */
function read(path: string): string {
  try {
    return readFileSync(path, 'latin1')
  } catch {
    return ''
  }
}
