/** Shares things that are costly to make, each under its key, for as long as somebody holds it. */
export class Shared<Thing extends object> {
  readonly #things = new Map<string, WeakRef<Thing>>()
  readonly #collected = new FinalizationRegistry<string>((key) => {
    // Another one may have been made under the same key.
    if (this.#things.get(key)?.deref() === undefined) this.#things.delete(key)
  })

  /** Returns what somebody holds under the key, or makes it. */
  get(key: string, make: () => Thing): Thing {
    const known = this.#things.get(key)?.deref()
    if (known) return known
    const thing = make()
    this.#things.set(key, new WeakRef(thing))
    this.#collected.register(thing, key)
    return thing
  }

  /** Makes the next `get` make a new one. */
  forget(key: string): void {
    this.#things.delete(key)
  }
}
