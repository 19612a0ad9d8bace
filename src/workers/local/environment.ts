/** Makes the environment of local tasks. */
import { join } from 'node:path'
import { COMMON_ENVIRONMENT } from '../environment.ts'

interface Places {
  home: string
  tmp: string
}

/**
 * Returns a task's variables, without those of its request. `base`: the variables of all tasks.
 * `isRoot`: tasks run as root.
 */
export function localEnvironment(
  base: Readonly<Record<string, string>>,
  { home, tmp }: Places,
  isRoot: boolean,
): Record<string, string> {
  const { PATH, ...others } = base
  const ownPrograms = join(home, '.local', 'bin')
  return {
    ...COMMON_ENVIRONMENT,
    // pip installs into the worker's home, never into the machine's Python. Debian's pip rejects
    // even that without this variable (PEP 668).
    PIP_BREAK_SYSTEM_PACKAGES: '1',
    // Without root, pip installs there by default. Set only for root, since it keeps pip from
    // installing into a venv or with --target.
    ...(isRoot ? { PIP_USER: '1' } : {}),
    ...others,
    PATH: PATH ? `${ownPrograms}:${PATH}` : ownPrograms,
    HOME: home,
    TMPDIR: tmp,
  }
}
