import { constants } from 'node:os'
import type { Completion } from '../core/ports.ts'

/** Content of the exit file that bootstrap.sh writes: `<phase> <exit code> <message>`. */
export interface Exit {
  /** After `clone` or `startup`, the task itself did not run. */
  phase: 'clone' | 'startup' | 'task'
  code: number
  /** Message of the bootstrap. */
  message: string | null
  /** True in a container that stays, once no process of the task is left. */
  isOver: boolean
}

/** Returns undefined while the exit is not written. */
export function parseExit(line: string): Exit | undefined {
  const match = /^(clone|startup|task) (\d+)(?: (.+))?\n(over\n)?/.exec(line)
  if (!match) return undefined
  const [, phase, code, message = null, over] = match
  // The expression matches no other phases.
  return {
    phase: phase as Exit['phase'],
    code: Number(code),
    message,
    isOver: over !== undefined,
  }
}

/** Returns how a task with this exit ended. */
export function completionOf({ phase, code, message }: Exit): Completion {
  const signal = signalName(code)
  if (phase === 'clone') {
    return { reason: 'startup_failed', exitCode: null, signal: null, message }
  }
  if (phase === 'startup') {
    return { reason: 'startup_failed', exitCode: code, signal, message }
  }
  if (code === 0) return { reason: 'completed', exitCode: 0, signal: null, message: null }
  if (signal) {
    return { reason: 'signal', exitCode: code, signal, message: `Ended by ${signal}` }
  }
  return { reason: 'exit_code', exitCode: code, signal: null, message: exitMessage(code) }
}

/** Returns the completion of a task without an exit: nobody can know how it ended. */
export function lost(message: string): Completion {
  return { reason: 'worker_lost', exitCode: null, signal: null, message }
}

/** Returns the completion of a task that logged more than it may. */
export function overLogLimit(maxLogBytes: number): Completion {
  const message = `Logged more than the limit of ${maxLogBytes} bytes`
  return { reason: 'log_limit', exitCode: null, signal: null, message }
}

/** Returns a sentence; 126 and 127 are the shell's own codes (POSIX XCU 2.8.2). */
function exitMessage(code: number): string {
  if (code === 126) return 'Exit code 126: a command was found but could not be executed'
  if (code === 127) return 'Exit code 127: the interpreter, or a command, was not found'
  return `Exit code ${code}`
}

const NAMES = new Map(Object.entries(constants.signals).map(([name, number]) => [number, name]))

/** Returns the signal of a code above 128, as shells report it (POSIX XCU 2.8.2), else null. */
function signalName(exitCode: number): string | null {
  return exitCode > 128 ? (NAMES.get(exitCode - 128) ?? null) : null
}
