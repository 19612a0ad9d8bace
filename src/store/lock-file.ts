import { DatabaseSync } from 'node:sqlite'

/**
 * Takes a lock and returns a function that releases it. The system releases it however the process
 * ends; Node has such locks only for SQLite files. Throws if another process holds it.
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
