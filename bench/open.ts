/** Resources that are not disposed yet; a signal ends the bench without `await using`. */
export const open = new Set<AsyncDisposable>()

export async function closeAll(): Promise<void> {
  // Closes the last one first, like `await using`.
  for (const each of [...open].toReversed()) {
    try {
      await each[Symbol.asyncDispose]()
    } catch (err) {
      process.stderr.write(`${err}\n`)
    }
  }
}
