/** Outcomes of tasks that did not end by their own exit code. Pure. */
import type { LogTail } from './ports.ts'
import type { Outcome } from './task.ts'

export function failure(reason: Outcome['reason'], message: string): Outcome {
  const status = reason === 'cancelled' ? 'cancelled' : 'failed'
  return { status, reason, message, exitCode: null, signal: null }
}

export const CANCELLED = failure('cancelled', 'Cancelled on request')

/** What stands in for a log that is not there: a receiver gets nothing else that tells why. */
export function ownLog(message: string): { log: LogTail; rawBytes: number } {
  const content = Buffer.from(`[task-runner] ${message}\n`)
  return { log: { content, totalBytes: content.length }, rawBytes: content.length }
}
