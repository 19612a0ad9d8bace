import type { LogRing } from '../log-ring.ts'

/** However short its lines are, the engine's files hold so much of a log. */
const SURELY_KEPT_BYTES = 5 * 1024 * 1024
/** Where a log whose beginning may be gone is recognised by, and as much again before its end. */
const ANCHOR_BYTES = 64 * 1024
/** The engine stores whole lines, and longer ones in pieces of this size. */
const PIECE_BYTES = 16 * 1024
const NEWLINE = 10

/**
 * Finds in a log that is read from its beginning again what the ring has not got.
 *
 * The two are not always alike: of an unfinished line that we were handed as it came, an engine that is killed has
 * stored nothing, and its log goes on with the rest of that line. Counting bytes would skip that rest.
 */
export class LogRereader {
  readonly #ring: LogRing
  /** From these two offsets on the ring has what the log has. */
  #same = { inRing: 0, inLog: 0 }
  #bytesRead = 0

  /** `ring`: what is told here is to be appended to it at once. */
  constructor(ring: LogRing) {
    this.#ring = ring
  }

  /** Of the log, again and again: more than the ring has of it. */
  get bytesRead(): number {
    return this.#bytesRead
  }

  /** How many bytes the ring has, once it has this many of the log. */
  inRing(bytesInLog: number): number {
    return bytesInLog - this.#same.inLog + this.#same.inRing
  }

  async *unseen(pieces: AsyncIterable<Buffer>): AsyncGenerator<Buffer, void> {
    const ring = this.#ring
    const { inRing, inLog } = this.#same
    // The engine may have dropped the beginning: then offsets say nothing.
    const isCut = ring.totalBytes > SURELY_KEPT_BYTES
    const kept = ring.tail(isCut ? 2 * ANCHOR_BYTES : ring.totalBytes - inRing).content
    const known = kept.subarray(isCut ? ANCHOR_BYTES : 0)
    const begun = isCut
      ? after(kept.subarray(0, ANCHOR_BYTES), this.#counted(pieces))
      : skip(inLog, this.#counted(pieces))
    let at = 0
    for await (const piece of begun) {
      const length = sharedLength(known.subarray(at), piece)
      at += length
      if (at < known.length && length < piece.length) {
        // What follows in the ring is lost in the log, with the beginning of its line or piece.
        const lineAt = at === 0 ? 0 : known.lastIndexOf(NEWLINE, at - 1) + 1
        const lostAt = at - ((at - lineAt) % PIECE_BYTES)
        this.#same = { inRing: ring.totalBytes, inLog: inLog + lostAt }
        if (lostAt < at) yield known.subarray(lostAt, at)
        at = known.length
      }
      if (length < piece.length) yield piece.subarray(length)
    }
  }

  async *#counted(pieces: AsyncIterable<Buffer>): AsyncGenerator<Buffer, void> {
    for await (const piece of pieces) {
      this.#bytesRead += piece.length
      yield piece
    }
  }
}

async function* skip(bytes: number, pieces: AsyncIterable<Buffer>): AsyncGenerator<Buffer, void> {
  let toSkip = bytes
  for await (const piece of pieces) {
    const rest = piece.subarray(toSkip)
    toSkip -= piece.length - rest.length
    yield rest
  }
}

async function* after(anchor: Buffer, pieces: AsyncIterable<Buffer>): AsyncGenerator<Buffer, void> {
  let window: Buffer | undefined = Buffer.alloc(0)
  for await (const piece of pieces) {
    if (window === undefined) {
      yield piece
      continue
    }
    window = Buffer.concat([window, piece])
    const found = window.indexOf(anchor)
    if (found >= 0) {
      yield window.subarray(found + anchor.length)
      window = undefined
    } else window = window.subarray(Math.max(0, window.length - anchor.length + 1))
  }
}

/** How many bytes two begin with in common. */
function sharedLength(one: Buffer, other: Buffer): number {
  const most = Math.min(one.length, other.length)
  if (one.subarray(0, most).equals(other.subarray(0, most))) return most
  let length = 0
  while (one[length] === other[length]) length += 1
  return length
}
