import { constants } from 'node:os'

const NAMES = new Map(Object.entries(constants.signals).map(([name, number]) => [number, name]))

/** Shells report a command that a signal ended as 128 + its number (POSIX XCU 2.8.2). Null for other codes. */
export function signalName(exitCode: number): string | null {
  return exitCode > 128 ? (NAMES.get(exitCode - 128) ?? null) : null
}
