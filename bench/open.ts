/** What is not disposed yet: for an end from outside, which `await using` does not see. */
export const open = new Set<AsyncDisposable>()

export async function closeAll(): Promise<void> {
  // Like `await using`: what was opened last goes first.
  for (const each of [...open].toReversed()) {
    try {
      await each[Symbol.asyncDispose]()
    } catch (err) {
      process.stderr.write(`${err}\n`)
    }
  }
}
