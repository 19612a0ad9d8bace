import { randomUUID } from 'node:crypto'
import { open, readFile, rename } from 'node:fs/promises'
import { hostname } from 'node:os'
import type { Logger } from '../core/ports.ts'
import { fileIdentity } from './file-identity.ts'

/**
 * Returns the name kept in the file, made once: an instance has the same after a restart,
 * whatever its host is called by then, since its workers are where its data folder is. The file
 * says which file it is, so that a copy of the folder, whose workers are elsewhere, takes a name of
 * its own (`fileIdentity` says how far a copy can be told). The caller holds the lock of the
 * folder.
 */
export async function keptInstanceName(path: string, log: Logger): Promise<string> {
  const content = await readFile(path, 'utf8').catch(ifMissing)
  // The release before kept the name alone, or nothing when it was killed amid writing.
  const [kept = '', identity = ''] = content.split('\n')
  if (identity !== '' && identity === (await fileIdentity(path))) return kept
  const isCopy = identity !== ''
  const name = isCopy || kept === '' ? newInstanceName() : kept
  if (isCopy) {
    log.warn(
      { path, copiedFrom: kept, instance: name },
      'the data folder is a copy of that of another instance: this one takes a name of its own',
    )
  }
  await write(path, name)
  return name
}

export function newInstanceName(): string {
  return `${hostname()}-${randomUUID().slice(0, 8)}`
}

/**
 * Writes the file whole or not at all. A renamed file keeps its identity, so it is known
 * beforehand.
 */
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
