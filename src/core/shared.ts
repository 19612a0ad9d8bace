/** Caches objects that are costly to make, by key, for as long as they are referenced. */
export class Shared<Thing extends object> {
  readonly #things = new Map<string, WeakRef<Thing>>()
  readonly #collected = new FinalizationRegistry<string>((key) => {
    // A new object may have been made under the key.
    if (this.#things.get(key)?.deref() === undefined) this.#things.delete(key)
  })

  /** Returns the cached object, or makes it. */
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
