/** The environment that local tasks start from. */
import { join } from 'node:path'
import { COMMON_ENVIRONMENT } from '../environment.ts'

export interface Places {
  home: string
  tmp: string
}

/**
 * Returns the variables of a task, to which its request adds its own. `base` is what all tasks have. With `isRoot` pip has to
 * be told where to install.
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
    // The machine's Python stays as it is: what pip installs goes to the worker's home and ends with it. Debian's Python
    // refuses even that without this word (PEP 668).
    PIP_BREAK_SYSTEM_PACKAGES: '1',
    // Others' pip goes there by itself, since they may not write to the machine. Not told to them: with it pip refuses to
    // install into a venv, or with --target.
    ...(isRoot ? { PIP_USER: '1' } : {}),
    ...others,
    PATH: PATH ? `${ownPrograms}:${PATH}` : ownPrograms,
    HOME: home,
    TMPDIR: tmp,
  }
}
