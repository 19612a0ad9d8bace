/** Outcomes of tasks without an exit code, and the last line of their logs. Pure. */
import type { LogTail } from './ports.ts'
import type { Outcome } from './task.ts'

const NEWLINE = 10
const OURS = '[task-runner] '
/** Maximum bytes of our lines in the log of a task that printed nothing. */
const OUR_BYTES_MAX = 64 * 1024

/** A log as it is committed; `rawBytes` is its length without masks. */
export interface TakenLog {
  log: LogTail
  rawBytes: number
}

export function failure(reason: Outcome['reason'], message: string): Outcome {
  const status = reason === 'cancelled' ? 'cancelled' : 'failed'
  return { status, reason, message, exitCode: null, signal: null }
}

export const CANCELLED = failure('cancelled', 'Cancelled on request')

/** Log of a task that had no worker. */
export const NO_LOG: TakenLog = takenLog('')

/** Log of a task whose worker does not return one. */
export const UNREADABLE_LOG: TakenLog = takenLog(`${OURS}The log could not be read\n`)

function takenLog(text: string): TakenLog {
  const content = Buffer.from(text)
  return { log: { content, totalBytes: content.length }, rawBytes: content.length }
}

/**
 * Adds a last line that says why the task failed: the callback's body has no field for it. Adds
 * none if the task exited by itself and printed something, or if the worker wrote the same line.
 */
export function withLastLine(
  taken: TakenLog,
  outcome: Outcome,
  { mask, maxBytes }: { mask: (text: string) => string; maxBytes: number },
): TakenLog {
  const why = whyOf(outcome, taken.log)
  if (why === undefined) return taken
  const { content, totalBytes } = taken.log
  const text = mask(`${OURS}${why.trim().replaceAll(/\s*[\r\n]+\s*/g, ' ')}\n`)
  if (endsWithLine(content, text)) return taken
  const line = Buffer.from(`${endsInLine(content) ? '\n' : ''}${text}`)
  const kept = content.subarray(Math.max(0, content.length + line.length - maxBytes))
  return {
    log: { content: Buffer.concat([kept, line]), totalBytes: totalBytes + line.length },
    rawBytes: taken.rawBytes + line.length,
  }
}

function whyOf(
  { reason, message, exitCode }: Outcome,
  { content, totalBytes }: LogTail,
): string | undefined {
  if (reason === 'completed') return undefined
  if (reason !== 'exit_code') return message ?? reason
  if (totalBytes > Math.min(content.length, OUR_BYTES_MAX) || hasOutput(content)) return undefined
  // Our lines, if any, may say that output is missing.
  return `Failed with exit code ${exitCode}${content.length === 0 ? ', without any output' : ''}`
}

/** Returns whether the log has any line but ours. */
function hasOutput(content: Buffer): boolean {
  for (let at = 0; at < content.length; ) {
    if (content.subarray(at, at + OURS.length).toString() !== OURS) return true
    const end = content.indexOf(NEWLINE, at)
    if (end < 0) return true
    at = end + 1
  }
  return false
}

/** Returns whether the last line is incomplete. */
function endsInLine(content: Buffer): boolean {
  return content.length > 0 && content.at(-1) !== NEWLINE
}

function endsWithLine(content: Buffer, text: string): boolean {
  const line = Buffer.from(text)
  const before = content.subarray(0, Math.max(0, content.length - line.length))
  return content.subarray(before.length).equals(line) && !endsInLine(before)
}
