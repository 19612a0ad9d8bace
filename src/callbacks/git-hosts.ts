import { type GitHosts, WorkerError } from '../core/ports.ts'
import { type AddressGuard, BlockedAddressError } from './address-guard.ts'

/** The hosts that the guard lets repositories be cloned from. */
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
      const why =
        err instanceof BlockedAddressError
          ? 'may not be reached: it is not a public address, nor in GIT_ALLOWED_NETWORKS'
          : `was not found (${(err as NodeJS.ErrnoException).code ?? 'lookup failed'})`
      throw new WorkerError('startup_failed', `The git host "${url.hostname}" ${why}`)
    }
  }
}
