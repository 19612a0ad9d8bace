import { constants } from 'node:os'
import type { Completion } from '../core/ports.ts'

/** How a task ended, as bootstrap.sh writes it down: `<phase> <exit code> <words>`. */
export interface Exit {
  /** `clone`, `startup`: the task itself did not run. */
  phase: 'clone' | 'startup' | 'task'
  code: number
  /** What the bootstrap has to say about it. */
  words: string | null
  /** In a container that stays: nothing is left of the task. */
  isOver: boolean
}

/** Undefined while it is not written. */
export function parseExit(line: string): Exit | undefined {
  const match = /^(clone|startup|task) (\d+)(?: (.+))?\n(over\n)?/.exec(line)
  if (!match) return undefined
  const [, phase, code, words = null, over] = match
  // Holds: the expression lets nothing else through.
  return {
    phase: phase as Exit['phase'],
    code: Number(code),
    words,
    isOver: over !== undefined,
  }
}

/** What an exit says about a task. */
export function completionOf({ phase, code, words }: Exit): Completion {
  const signal = signalName(code)
  if (phase === 'clone') {
    return { reason: 'startup_failed', exitCode: null, signal: null, message: words }
  }
  if (phase === 'startup') {
    return { reason: 'startup_failed', exitCode: code, signal, message: words }
  }
  if (code === 0) return { reason: 'completed', exitCode: 0, signal: null, message: null }
  if (signal) {
    return { reason: 'signal', exitCode: code, signal, message: `Ended by ${signal}` }
  }
  return { reason: 'exit_code', exitCode: code, signal: null, message: exitMessage(code) }
}

/** Without an exit nobody can know how a task ended. */
export function lost(message: string): Completion {
  return { reason: 'worker_lost', exitCode: null, signal: null, message }
}

/** A task that logged more than it may. */
export function overLogLimit(maxLogBytes: number): Completion {
  const message = `Logged more than the limit of ${maxLogBytes} bytes`
  return { reason: 'log_limit', exitCode: null, signal: null, message }
}

/** Codes 126 and 127 are the shell's own (POSIX XCU 2.8.2). */
function exitMessage(code: number): string {
  if (code === 126) return 'Exit code 126: a command was found but could not be executed'
  if (code === 127) return 'Exit code 127: the interpreter, or a command, was not found'
  return `Exit code ${code}`
}

const NAMES = new Map(Object.entries(constants.signals).map(([name, number]) => [number, name]))

/** Shells report a command that a signal ended as 128 + its number (POSIX XCU 2.8.2). Null for other codes. */
function signalName(exitCode: number): string | null {
  return exitCode > 128 ? (NAMES.get(exitCode - 128) ?? null) : null
}
