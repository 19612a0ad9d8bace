import { setTimeout as pause } from 'node:timers/promises'
import type { WorkerRecord } from './folders.ts'
import type { ProcessSource } from './leftover-finder.ts'
import { type Fifo, identify, killIfSame, nameOf, type ProcessIdentity } from './processes.ts'

const KILL_ROUND_MS = 5
const KILL_ROUNDS_MAX = 400

/**
 * Returns the live processes of a worker, besides its shell and what writes its log. `run`: its task, while that runs, and
 * where its log goes.
 */
export function leftOf(
  processes: ProcessSource,
  worker: string,
  record: Pick<WorkerRecord, 'reader' | 'cgroup'> & { slot?: ProcessIdentity | undefined },
  run?: { log: Fifo | undefined },
): ProcessIdentity[] {
  const { slot, reader, cgroup } = record
  // The group counts while the shell is this worker's, and after it has gone. A shell that serves another worker by now, or a
  // process that got its number, has a group of others.
  const isOwn = slot && (run || identify(slot.pid) === undefined)
  const found = processes.find({
    ...{ worker, shell: slot, log: run?.log },
    ...(isOwn && { group: slot.pid, cgroup }),
  })
  return found.filter(({ pid }) => pid !== reader?.pid)
}

/**
 * Kills what `find` returns until that is nothing, and puts their names into `ended`. Returns false when some cannot be killed
 * (another user's, or stuck in the kernel).
 */
export async function killAll(find: () => ProcessIdentity[], ended?: string[]): Promise<boolean> {
  for (let round = 0; round < KILL_ROUNDS_MAX; round += 1) {
    const found = find()
    if (found.length === 0) return true
    if (round === 0) ended?.push(...found.flatMap((identity) => nameOf(identity) ?? []))
    for (const identity of found) killIfSame(identity)
    await pause(KILL_ROUND_MS)
  }
  return false
}
