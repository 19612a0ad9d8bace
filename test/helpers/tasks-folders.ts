/** Tasks folders with one odd thing in them, beside an innocent task file, and what becomes of both. */
import { execFileSync } from 'node:child_process'
import { chmodSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

/** A user who is not root, and owns nothing. */
export const NOBODY = 65_534

/** The task file that has nothing to do with what is odd. */
export const INNOCENT = 'ok.sh'

export interface Oddity {
  /** Task file that the odd thing is, or has to do with. */
  file: string
  make(folder: string): void
  /** What a copy of the folder has besides the innocent file; folders end in a slash, links in an at sign. */
  copied?: string[]
  /** Paths that are left out and told of, each with the cause. */
  leftOut?: string[]
  /** What is listed besides the innocent file. */
  listed?: string[]
  /** Warnings besides those of what is left out. */
  warned?: string[]
  /** What becomes of a request for the file: refused with this status and message, failed with this message, or run. */
  outcome: { status: number; message: string } | { fails: string } | 'runs'
}

const NO_FILE = (file: string) => ({ status: 404, message: `There is no task file "${file}"` })
const write = (content = 'echo odd\n', mode = 0o644) => {
  return (path: string) => writeFileSync(path, content, { mode })
}
const at =
  (file: string, make: (path: string) => void): Oddity['make'] =>
  (folder) =>
    make(join(folder, file))
const inFolder =
  (name: string, mode: number): Oddity['make'] =>
  (folder) => {
    mkdirSync(join(folder, name))
    write()(join(folder, name, 'inner.sh'))
    chmodSync(join(folder, name), mode)
  }

export const ODDITIES: Record<string, Oddity> = {
  'a file that only root may read': {
    file: 'dump.sh',
    make: at('dump.sh', write('echo odd\n', 0o600)),
    leftOut: ['dump.sh (EACCES)'],
    outcome: { fails: 'The task file "dump.sh" cannot be read (EACCES)' },
  },
  'a link to a file that only root may read': {
    file: 'to-dump.sh',
    make: (folder) => {
      write('echo odd\n', 0o600)(join(folder, 'dump'))
      symlinkSync('dump', join(folder, 'to-dump.sh'))
    },
    leftOut: ['dump (EACCES)', 'to-dump.sh (EACCES)'],
    outcome: { fails: 'The task file "to-dump.sh" cannot be read (EACCES)' },
  },
  'a folder that only root may read': {
    file: 'lost+found/inner.sh',
    make: inFolder('lost+found', 0o700),
    leftOut: ['lost+found (EACCES)'],
    outcome: {
      status: 404,
      message: 'The task file "lost+found/inner.sh" cannot be read (EACCES)',
    },
  },
  'a link into a folder that only root may read': {
    file: 'to-inner.sh',
    make: (folder) => {
      inFolder('locked', 0o700)(folder)
      symlinkSync('locked/inner.sh', join(folder, 'to-inner.sh'))
    },
    leftOut: ['locked (EACCES)', 'to-inner.sh (EACCES)'],
    outcome: { status: 404, message: 'The task file "to-inner.sh" cannot be read (EACCES)' },
  },
  'a folder that all may list and only root may enter': {
    file: 'half/inner.sh',
    make: inFolder('half', 0o744),
    copied: ['half/'],
    leftOut: ['half/inner.sh (EACCES)'],
    outcome: { status: 404, message: 'The task file "half/inner.sh" cannot be read (EACCES)' },
  },
  'a name that is not UTF-8': {
    file: 'caf\uFFFD.sh',
    make: (folder) => {
      const path = Buffer.concat([
        Buffer.from(`${folder}/caf`),
        Buffer.from([0xe9]),
        Buffer.from('.sh'),
      ])
      writeFileSync(path, 'echo odd\n')
    },
    leftOut: ['caf\uFFFD.sh (its name is not UTF-8)'],
    outcome: NO_FILE('caf\uFFFD.sh'),
  },
  'a folder whose name is not UTF-8': {
    file: 'caf\uFFFD/inner.sh',
    make: (folder) => {
      const path = Buffer.concat([Buffer.from(`${folder}/caf`), Buffer.from([0xe9])])
      mkdirSync(path)
      writeFileSync(Buffer.concat([path, Buffer.from('/inner.sh')]), 'echo odd\n')
    },
    leftOut: ['caf\uFFFD (its name is not UTF-8)'],
    outcome: NO_FILE('caf\uFFFD/inner.sh'),
  },
  'a FIFO': {
    file: 'pipe.sh',
    make: at('pipe.sh', (path) => execFileSync('mkfifo', [path])),
    leftOut: ['pipe.sh (neither a file nor a folder)'],
    outcome: NO_FILE('pipe.sh'),
  },
  'a socket': {
    file: 'socket.sh',
    make: at('socket.sh', (path) => {
      const bind = 'import socket,sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])'
      execFileSync('/usr/bin/python3', ['-c', bind, path])
    }),
    leftOut: ['socket.sh (neither a file nor a folder)'],
    outcome: NO_FILE('socket.sh'),
  },
  'a link to a device': {
    file: 'zero.sh',
    make: at('zero.sh', (path) => symlinkSync('/dev/zero', path)),
    outcome: {
      status: 422,
      message: 'Invalid request: task_file_name: leads out of the tasks folder',
    },
  },
  'a link to itself': {
    file: 'circle.sh',
    make: at('circle.sh', (path) => symlinkSync('circle.sh', path)),
    leftOut: ['circle.sh (ELOOP)'],
    outcome: { status: 404, message: 'The task file "circle.sh" cannot be read (ELOOP)' },
  },
  'a link to nowhere': {
    file: 'nowhere.sh',
    make: at('nowhere.sh', (path) => symlinkSync('nothing.sh', path)),
    outcome: NO_FILE('nowhere.sh'),
  },
  'a link out of the folder': {
    file: 'out.sh',
    make: at('out.sh', (path) => symlinkSync('../outside.sh', path)),
    outcome: {
      status: 422,
      message: 'Invalid request: task_file_name: leads out of the tasks folder',
    },
  },
  'a link to the tasks folder itself': {
    file: 'again/ok.sh',
    make: at('again', (path) => symlinkSync('.', path)),
    copied: ['again@'],
    outcome: 'runs',
  },
  'a folder with a link to itself': {
    file: 'sub/again/inner.sh',
    make: (folder) => {
      inFolder('sub', 0o755)(folder)
      symlinkSync('.', join(folder, 'sub', 'again'))
    },
    copied: ['sub/', 'sub/again@', 'sub/inner.sh'],
    listed: ['sub/inner.sh'],
    outcome: 'runs',
  },
  'a folder and a file that are links inside the tasks folder': {
    file: 'linked/inner.sh',
    make: (folder) => {
      inFolder('sub', 0o755)(folder)
      symlinkSync('sub', join(folder, 'linked'))
      symlinkSync(join(folder, 'sub', 'inner.sh'), join(folder, 'file.sh'))
    },
    copied: ['file.sh', 'linked@', 'sub/', 'sub/inner.sh'],
    listed: ['file.sh', 'sub/inner.sh'],
    outcome: 'runs',
  },
  'a ConfigMap as Kubernetes mounts it': {
    file: 'mounted.sh',
    make: (folder) => {
      inFolder('..2026_11_29_14_00_00.1', 0o755)(folder)
      write()(join(folder, '..2026_11_29_14_00_00.1', 'mounted.sh'))
      symlinkSync('..2026_11_29_14_00_00.1', join(folder, '..data'))
      symlinkSync('..data/mounted.sh', join(folder, 'mounted.sh'))
    },
    copied: [
      '..2026_11_29_14_00_00.1/',
      '..2026_11_29_14_00_00.1/inner.sh',
      '..2026_11_29_14_00_00.1/mounted.sh',
      '..data@',
      'mounted.sh',
    ],
    listed: ['mounted.sh'],
    outcome: 'runs',
  },
  'names that look like paths or options': {
    file: `-rf $(id) it's.sh`,
    make: (folder) => {
      for (const name of [`-rf $(id) it's.sh`, '..\\..\\a', 'c:b', 'two\nlines']) {
        write()(join(folder, name))
      }
    },
    copied: [`-rf $(id) it's.sh`, '..\\..\\a', 'c:b', 'two\nlines'],
    listed: [`-rf $(id) it's.sh`],
    outcome: 'runs',
  },
  'a folder with the name of a task file': {
    file: 'folder.sh',
    make: at('folder.sh', (path) => mkdirSync(path)),
    copied: ['folder.sh/'],
    outcome: NO_FILE('folder.sh'),
  },
  'a FIFO in the place of a defaults file': {
    file: 'hi.sh',
    make: (folder) => {
      write()(join(folder, 'hi.sh'))
      execFileSync('mkfifo', [join(folder, 'hi_worker.json')])
    },
    copied: ['hi.sh'],
    leftOut: ['hi_worker.json (neither a file nor a folder)'],
    listed: ['hi.sh'],
    warned: ['The worker defaults file "hi_worker.json" cannot be used: it is not a plain file'],
    outcome: {
      status: 500,
      message: 'The worker defaults file "hi_worker.json" cannot be used: it is not a plain file',
    },
  },
  'a defaults file of 2 MB': {
    file: 'hi.sh',
    make: (folder) => {
      write()(join(folder, 'hi.sh'))
      write(' '.repeat(2_000_000))(join(folder, 'hi_worker.json'))
    },
    copied: ['hi.sh', 'hi_worker.json'],
    listed: ['hi.sh'],
    warned: ['The worker defaults file "hi_worker.json" cannot be used: it is larger than 1 MB'],
    outcome: {
      status: 500,
      message: 'The worker defaults file "hi_worker.json" cannot be used: it is larger than 1 MB',
    },
  },
  'a defaults file that only root may read': {
    file: 'hi.sh',
    make: (folder) => {
      write()(join(folder, 'hi.sh'))
      write('{}', 0o600)(join(folder, 'hi_worker.json'))
    },
    copied: ['hi.sh'],
    listed: ['hi.sh'],
    leftOut: ['hi_worker.json (EACCES)'],
    warned: [
      'The worker defaults file "hi_worker.json" cannot be used: it cannot be read (EACCES)',
    ],
    outcome: {
      status: 500,
      message:
        'The worker defaults file "hi_worker.json" cannot be used: it cannot be read (EACCES)',
    },
  },
}
