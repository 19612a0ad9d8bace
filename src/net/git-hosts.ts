import { type GitHosts, WorkerError } from '../core/ports.ts'
import { type AddressGuard, BlockedAddressError } from './address-guard.ts'

/** Errors of the resolver that are final: the name does not exist or is malformed. */
const NO_SUCH_HOST = ['ENOTFOUND', 'ENODATA', 'EINVAL']

/** Resolves the hosts of repositories, as far as the guard allows them. */
export class GuardedGitHosts implements GitHosts {
  readonly #guard: AddressGuard

  constructor(guard: AddressGuard) {
    this.#guard = guard
  }

  refusal(url: URL): string | undefined {
    return this.#guard.refusal(url)
  }

  async addresses(url: URL): Promise<string[]> {
    try {
      return await this.#guard.addressesOf(url.hostname)
    } catch (err) {
      const host = `The git host "${url.hostname}"`
      if (err instanceof BlockedAddressError) {
        const why = 'not a public address; the operator can allow it with GIT_ALLOWED_NETWORKS'
        throw new WorkerError('startup_failed', `${host} may not be reached: ${why}`)
      }
      const { code = 'lookup failed' } = err as NodeJS.ErrnoException
      if (NO_SUCH_HOST.includes(code)) {
        throw new WorkerError('startup_failed', `${host} was not found (${code})`)
      }
      throw new Error(`${host} cannot be resolved at the moment (${code})`, { cause: err })
    }
  }
}
