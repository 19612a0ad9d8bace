/** How many open files tasks may have: Node raises its own soft limit as it starts, and what it starts inherits that. */
import { readFileSync, readlinkSync } from 'node:fs'
import { basename } from 'node:path'

interface Limits {
  soft: number
  hard: number
}

/** What systemd and containerd give a service that asks for nothing: 1024, and this as its hard limit. */
const HARD_OF_MANAGERS = 524_288
const SOFT_OF_MANAGERS = 1024

/**
 * Returns the soft limit that this process was started with, as far as that can be told; undefined: leave it as it is. Nothing
 * in the process knows it any more. The process that started it does, or the first above that is no Node (npm is one), unless
 * the hard limit shows that ours was set apart from it.
 */
export function openFilesAtStart(): number | undefined {
  const own = limitsOf(process.pid)
  if (!own || own.soft < own.hard) return undefined
  let pid = process.ppid
  while (pid > 0 && isNode(pid)) pid = parentOf(pid)
  const above = pid > 0 ? limitsOf(pid) : undefined
  if (above?.hard === own.hard) return above.soft
  return own.hard === HARD_OF_MANAGERS ? SOFT_OF_MANAGERS : undefined
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
    // Another user's.
    return false
  }
}

/** Empty where it cannot be read. */
function read(path: string): string {
  try {
    return readFileSync(path, 'latin1')
  } catch {
    return ''
  }
}
