import { setTimeout as pause } from 'node:timers/promises'
import type { WorkerRecord } from './folders.ts'
import type { ProcessSource } from './leftover-finder.ts'
import {
  type Fifo,
  identify,
  isAlive,
  killIfSame,
  nameOf,
  type ProcessIdentity,
} from './processes.ts'

const ROUND_MS = 5
const ROUNDS_MAX = 400

/**
 * Returns the live processes of a worker, without its shell and the reader of its log. `run`: given
 * while the task runs.
 */
export function leftoversOf(
  processes: ProcessSource,
  worker: string,
  record: Pick<WorkerRecord, 'reader' | 'cgroup'> & { slot?: ProcessIdentity | undefined },
  run?: { log: Fifo | undefined },
): ProcessIdentity[] {
  const { slot, reader, cgroup } = record
  // The group is this worker's while its task runs, and after the shell has ended. Otherwise the
  // pid is that of a shell that serves another worker by now, or of another process.
  const isOwn = slot && (run || identify(slot.pid) === undefined)
  const found = processes.find({
    worker,
    shell: slot,
    log: run?.log,
    ...(isOwn && { group: slot.pid, cgroup }),
  })
  return found.filter(({ pid }) => pid !== reader?.pid)
}

/**
 * Kills processes until `find` returns none, and adds their names to `names`. Returns false when
 * some cannot be killed: another user's, or stuck in the kernel.
 */
export async function killAll(find: () => ProcessIdentity[], names?: string[]): Promise<boolean> {
  for (let round = 0; round < ROUNDS_MAX; round += 1) {
    const found = find()
    if (found.length === 0) return true
    if (round === 0) names?.push(...found.flatMap((identity) => nameOf(identity) ?? []))
    for (const identity of found) killIfSame(identity)
    await pause(ROUND_MS)
  }
  return false
}

/** Waits, two seconds at most, for the reader of a log: it ends once it has emptied the pipe. */
export async function readerEnded(reader: ProcessIdentity | undefined): Promise<void> {
  for (let round = 0; reader && round < ROUNDS_MAX && isAlive(reader); round += 1) {
    await pause(ROUND_MS)
  }
}
