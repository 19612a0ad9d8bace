/**
 * What a task can make of its worker's folder. Each thing times each place is a task that no worker of another task may
 * notice. Shell lines for any POSIX shell; `$at` is the path of the place.
 */

/** Where the service looks, relative to the worker's folder. `.` is the folder itself. */
export const PLACES = ['exit', 'log', 'worker.json', 'home', 'tmp', 'tasks', '.'] as const
export type Place = (typeof PLACES)[number]

export interface OddThing {
  name: string
  /** Makes the thing at `$at`. What cannot be made there, for want of rights, leaves nothing there. */
  make: string
}

const GONE = 'rm -rf "$at"'

/** Where links lead, nothing can be written or removed, whatever is wrong with the code under test. */
export const ODD_THINGS: readonly OddThing[] = [
  { name: 'nothing', make: GONE },
  { name: 'an empty file', make: `${GONE}; : >"$at"` },
  { name: 'garbage', make: `${GONE}; printf 'task \\377{"name":[0]}\\n' >"$at"` },
  { name: 'JSON of other things', make: `${GONE}; echo '{"name":1,"slot":{"pid":-1}}' >"$at"` },
  { name: 'an empty folder', make: `${GONE}; mkdir "$at"` },
  { name: 'a folder with files', make: `${GONE}; mkdir "$at"; : >"$at/exit"; : >"$at/log"` },
  { name: 'a folder that nobody may enter', make: `${GONE}; mkdir -p "$at/in"; chmod 000 "$at"` },
  { name: 'a file that nobody may read', make: `${GONE}; : >"$at"; chmod 000 "$at"` },
  { name: 'a link to itself', make: `${GONE}; ln -s "$at" "$at"` },
  { name: 'a link to nowhere', make: `${GONE}; ln -s /nowhere/at/all "$at"` },
  { name: 'a link to a file elsewhere', make: `${GONE}; ln -s /proc/version "$at"` },
  { name: 'a link to a folder elsewhere', make: `${GONE}; ln -s /sys/kernel "$at"` },
  { name: 'a link to a device that never ends', make: `${GONE}; ln -s /dev/zero "$at"` },
  { name: 'a FIFO', make: `${GONE}; mkfifo "$at"` },
  {
    name: 'a socket',
    make: `${GONE}; perl -e 'use Socket; socket(S, PF_UNIX, SOCK_STREAM, 0); chdir(shift); bind(S, pack_sockaddr_un(shift))' "\${at%/*}" "\${at##*/}"`,
  },
  { name: 'a device that never ends', make: `${GONE}; mknod "$at" c 1 5 || :` },
  { name: 'a file of gigabytes', make: `${GONE}; : >"$at"; truncate -s 8G "$at"` },
]

/** The code that a task of `oddScript` ends with, where it can still be told. */
export const ODD_EXIT_CODE = 3

/** A task that makes the thing in the place, waits until the file `until` is there if it is given, and exits. */
export function oddScript({ make }: OddThing, place: Place, until?: string): string {
  return [
    'folder=$(cd "$HOME/.." && pwd)',
    // What replaces the folder that a shell is in must not keep it from going on.
    'cd /',
    `at=$folder${place === '.' ? '' : `/${place}`}`,
    make,
    ...(until === undefined ? [] : [`until [ -e ${until} ]; do sleep 0.02; done`]),
    `exit ${ODD_EXIT_CODE}`,
  ].join('\n')
}
