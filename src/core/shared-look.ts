/**
 * Looks at what may have changed since the last time. Who asks while a look at the same thing is under way shares the next one
 * with all who ask until then: no answer is older than its question, and a crowd costs two looks.
 */
export class SharedLook<Found> {
  readonly #look: (name: string) => Promise<Found>
  readonly #underWay = new Map<string, Promise<Found>>()
  readonly #next = new Map<string, Promise<Found>>()

  constructor(look: (name: string) => Promise<Found>) {
    this.#look = look
  }

  /** Throws what the look throws. */
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
    const look = this.#look(name).finally(() => this.#underWay.delete(name))
    this.#underWay.set(name, look)
    return look
  }
}
