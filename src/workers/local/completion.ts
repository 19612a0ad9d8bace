import { constants } from 'node:os'
import type { Completion } from '../../core/ports.ts'
import type { Exit } from './folders.ts'

/** What an exit file says about a task; without one nobody can know how it ended. */
export function completionOf(exit: Exit | undefined): Completion {
  if (!exit) {
    const message =
      'The worker ended without recording an exit code (killed, or the machine restarted)'
    return { reason: 'worker_lost', exitCode: null, signal: null, message }
  }
  const { phase, code, words } = exit
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
