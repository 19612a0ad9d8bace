/** Outcomes of tasks that did not end by their own exit code, and what a log says of them. Pure. */
import type { LogTail } from './ports.ts'
import type { Outcome } from './task.ts'

const NEWLINE = 10
const OURS = '[task-runner] '
/** Bytes that lines of ours have at most, of a task that printed nothing. */
const OUR_BYTES_MAX = 64 * 1024

/** A log as it is committed; `rawBytes` counts what it has without masks. */
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

/** What stands in for a log that the worker does not give. */
export const UNREADABLE_LOG: TakenLog = takenLog(`${OURS}The log could not be read\n`)

function takenLog(text: string): TakenLog {
  const content = Buffer.from(text)
  return { log: { content, totalBytes: content.length }, rawBytes: content.length }
}

/**
 * Adds a last line that says why the task ended, unless it ended by its own exit code and printed
 * something: a receiver gets the log and nothing else that tells. Where the worker has said the
 * same, nothing is added.
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
  // Where lines of ours are there, they may say that output is missing.
  return `Failed with exit code ${exitCode}${content.length === 0 ? ', without any output' : ''}`
}

/** Whether anything in the log is not a line of ours. */
function hasOutput(content: Buffer): boolean {
  for (let at = 0; at < content.length; ) {
    if (content.subarray(at, at + OURS.length).toString() !== OURS) return true
    const end = content.indexOf(NEWLINE, at)
    if (end < 0) return true
    at = end + 1
  }
  return false
}

/** Whether something comes after the last line end. */
function endsInLine(content: Buffer): boolean {
  return content.length > 0 && content.at(-1) !== NEWLINE
}

function endsWithLine(content: Buffer, text: string): boolean {
  const line = Buffer.from(text)
  const before = content.subarray(0, Math.max(0, content.length - line.length))
  return content.subarray(before.length).equals(line) && !endsInLine(before)
}
