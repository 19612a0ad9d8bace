import { DatabaseSync } from 'node:sqlite'

/**
 * Takes a lock that the system gives back however the process ends, which Node has for SQLite files alone. Throws when
 * another process holds it. Returns what gives it back.
 */
export async function lockFile(path: string): Promise<() => Promise<void>> {
  const file = new DatabaseSync(path, { timeout: 0 })
  try {
    file.exec('pragma locking_mode = exclusive; begin immediate; commit')
  } catch (cause) {
    file.close()
    throw new Error(`another service is using ${path}`, { cause })
  }
  return async () => file.close()
}
