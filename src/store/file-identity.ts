import { stat } from 'node:fs/promises'

/**
 * Returns what tells a file from its copies: its inode and the time it was made at. A copy, or a
 * restore into another file, has others; renaming the file or changing it in place keeps them.
 * Nothing of a file tells a snapshot of the whole volume from its original. A file system that
 * keeps no time of birth leaves the inode alone, and one that numbers its files anew at each mount
 * makes a file look like a copy.
 */
export async function fileIdentity(path: string): Promise<string> {
  const { ino, birthtimeMs } = await stat(path, { bigint: true })
  return `${ino} ${birthtimeMs}`
}
