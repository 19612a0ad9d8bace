import { stat } from 'node:fs/promises'

/**
 * Returns an id that copies of a file do not share: its inode and creation time. It survives
 * renames and changes in place. A snapshot of the whole volume shares it. On file systems without
 * creation times it is the inode alone; if inodes change at each mount, every file looks copied.
 */
export async function fileIdentity(path: string): Promise<string> {
  const { ino, birthtimeMs } = await stat(path, { bigint: true })
  return `${ino} ${birthtimeMs}`
}
