import { randomUUID } from 'node:crypto'
import { open, readFile, rename } from 'node:fs/promises'
import { hostname } from 'node:os'
import type { Logger } from '../core/ports.ts'
import { fileIdentity } from './file-identity.ts'

/**
 * Returns the instance's name, which the file keeps across restarts and changes of the host name,
 * because local workers belong to the data folder. The file also holds its own identity, so that a
 * copy of the folder, which has no workers, gets a new name (`fileIdentity` has the limits). The
 * caller holds the lock of the folder.
 */
export async function keptInstanceName(path: string, log: Logger): Promise<string> {
  const content = await readFile(path, 'utf8').catch(ifMissing)
  // The previous release stored only the name, or nothing if it was killed while writing.
  const [kept = '', identity = ''] = content.split('\n')
  if (identity !== '' && identity === (await fileIdentity(path))) return kept
  const isCopy = identity !== ''
  const name = isCopy || kept === '' ? newInstanceName() : kept
  if (isCopy) {
    log.warn(
      { path, copiedFrom: kept, instance: name },
      'the data folder is a copy of the folder of another instance: this one gets a new name',
    )
  }
  await write(path, name)
  return name
}

export function newInstanceName(): string {
  return `${hostname()}-${randomUUID().slice(0, 8)}`
}

/** Writes the file atomically. Its identity is that of the draft, since a rename keeps it. */
async function write(path: string, name: string): Promise<void> {
  const draft = `${path}.draft`
  const file = await open(draft, 'w', 0o600)
  try {
    await file.writeFile(`${name}\n${await fileIdentity(draft)}\n`)
    await file.sync()
  } finally {
    await file.close()
  }
  await rename(draft, path)
}

function ifMissing(err: NodeJS.ErrnoException): string {
  if (err.code === 'ENOENT') return ''
  throw err
}
