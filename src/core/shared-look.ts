/**
 * Shares lookups by name. Calls during a lookup share the next one, so that no result is older than
 * its call, and any number of concurrent calls costs two lookups.
 */
export class SharedLook<Found> {
  readonly #look: (name: string) => Promise<Found>
  readonly #underWay = new Map<string, Promise<Found>>()
  readonly #next = new Map<string, Promise<Found>>()

  constructor(look: (name: string) => Promise<Found>) {
    this.#look = look
  }

  /** Looks the name up. Throws whatever the lookup throws. */
  at(name: string): Promise<Found> {
    const next = this.#next.get(name)
    if (next) return next
    const underWay = this.#underWay.get(name)
    if (!underWay) return this.#begin(name)
    const begin = () => {
      this.#next.delete(name)
      return this.#begin(name)
    }
    const shared = underWay.then(begin, begin)
    this.#next.set(name, shared)
    return shared
  }

  #begin(name: string): Promise<Found> {
    const lookup = this.#look(name).finally(() => this.#underWay.delete(name))
    this.#underWay.set(name, lookup)
    return lookup
  }
}
