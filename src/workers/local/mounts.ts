export interface Mount {
  mountPoint: string
  /** The folder of the file system that is mounted there. */
  root: string
  type: string
  /** Options of the file system; for cgroups of version 1 they include the controllers. */
  options: readonly string[]
}

/** Returns the mounts that /proc/<pid>/mountinfo lists (proc(5)). */
export function mountsIn(mountinfo: string): Mount[] {
  return mountinfo.split('\n').flatMap((line) => {
    const [mount = '', superblock = ''] = line.split(' - ')
    const [, , , root, mountPoint] = mount.split(' ').map(unescaped)
    const [type = '', , options = ''] = superblock.split(' ')
    return root === undefined || mountPoint === undefined
      ? []
      : [{ mountPoint, root, type, options: options.split(',') }]
  })
}

/** Decodes blanks and the like, which are written as `\040`. */
function unescaped(field: string): string {
  return field.replace(/\\([0-7]{3})/g, (_, octal: string) =>
    String.fromCharCode(Number.parseInt(octal, 8)),
  )
}
