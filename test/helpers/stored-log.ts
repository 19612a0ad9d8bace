import type { StoredLog } from '../../src/core/ports.ts'

/** A whole log, as a store has it. */
export function storedLog(content: Buffer, totalBytes = content.length): StoredLog {
  return { bytes: content.length, read: async () => ({ content, totalBytes }) }
}
