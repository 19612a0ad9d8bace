import { execFileSync } from 'node:child_process'
import { accessSync, constants } from 'node:fs'
import { join } from 'node:path'

export const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium'
/** Image that workers of tests run; `.ci/docker` makes it. */
export const TEST_IMAGE = 'task-runner-test'

/** Programs that some tests need and a machine may lack: whether each is here, and its name for people. */
const PROGRAMS = {
  chromium: [() => isExecutable(CHROMIUM), `${CHROMIUM} (or another browser in CHROMIUM)`],
  curl: [() => isOnPath('curl'), 'curl'],
  docker: [
    () => succeeds('docker', 'image', 'inspect', TEST_IMAGE),
    `a Docker engine with the image ${TEST_IMAGE} (run .ci/docker and export what it prints)`,
  ],
  git: [() => isOnPath('git'), 'git'],
  jq: [() => isOnPath('jq'), 'jq'],
  kubectl: [() => isOnPath('kubectl'), 'kubectl'],
  perl: [() => isOnPath('perl'), 'perl'],
  'python3-pip': [
    () => succeeds('/usr/bin/python3', '-m', 'pip', '--version'),
    'python3-pip (pip for /usr/bin/python3)',
  ],
  'pid-namespace': [
    () => succeeds('unshare', '--pid', '--fork', '--kill-child', '--mount-proc', 'true'),
    'the right to make a PID namespace (root, and unshare of util-linux)',
  ],
  root: [() => process.getuid?.() === 0, 'root'],
} as const satisfies Record<string, readonly [isHere: () => boolean, name: string]>

export type Program = keyof typeof PROGRAMS

/** Returns the names of those programs that are not here; by default of all that tests need. */
export function missing(programs = Object.keys(PROGRAMS) as Program[]): string[] {
  return programs.filter((each) => !PROGRAMS[each][0]()).map((each) => PROGRAMS[each][1])
}

/**
 * Returns why tests that need these programs cannot run here; undefined when they can. Throws in continuous
 * integration, where everything has to be there.
 */
export function whyNot(...programs: Program[]): string | undefined {
  const names = missing(programs)
  return names.length === 0 ? undefined : skipReason(`needs ${names.join(' and ')}`)
}

/** Returns the reason of a skip. In continuous integration nothing is skipped: throws it. */
export function skipReason(reason: string): string {
  if (process.env.CI) throw new Error(reason)
  return reason
}

function isOnPath(name: string): boolean {
  return (process.env.PATH ?? '').split(':').some((folder) => isExecutable(join(folder, name)))
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK)
    return true
  } catch {
    return false
  }
}

function succeeds(command: string, ...args: string[]): boolean {
  try {
    execFileSync(command, args, { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}
