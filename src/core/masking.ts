import type { LogTail, Worker } from './ports.ts'

/** Shorter values would turn half a log into stars, and are no secrets worth the name. */
const MASKED_BYTES_MIN = 6
const MASK = Buffer.from('***')

/** A run of bytes that are part of a value: from, and up to but not including. */
type Run = [from: number, to: number]

/** Replaces secret values in logs by `***`, also where a value is split over two pieces. */
export class Masker {
  readonly #values: Buffer[]
  /** How many bytes before a cut must be looked at, so that no value is cut in two. */
  readonly overlapBytes: number

  constructor(values: ReadonlyArray<string | null>) {
    this.#values = [...new Set(values)]
      .map((value) => Buffer.from(value ?? ''))
      .filter((value) => value.length >= MASKED_BYTES_MIN)
    this.overlapBytes = Math.max(0, ...this.#values.map((value) => value.length - 1))
  }

  /** The text from `from` on, with its values masked; what lies before is only looked at. */
  mask(text: Buffer, from = 0): Buffer {
    const runs = this.#runs(text)
      .filter(([, to]) => to > from)
      .map(([start, to]): Run => [Math.max(start, from) - from, to - from])
    const rest = text.subarray(from)
    return runs.length === 0 ? rest : replaced(rest, runs)
  }

  /**
   * Masks a text that comes in pieces. `flush` gives what was held back, at the end; `heldBytes` is how much
   * of the text that is at the moment.
   */
  stream(): { push(piece: Buffer): Buffer; flush(): Buffer; heldBytes(): number } {
    let held: Buffer = Buffer.alloc(0)
    // Of what is held: bytes that belong to a run whose mask went out already.
    let maskedAhead = 0
    const advance = (text: Buffer, border: number): Buffer => {
      const runs = this.#runs(text, maskedAhead)
      const before = runs
        .filter(([from]) => from < border)
        .map(([from, to]): Run => [from, Math.min(to, border)])
      const across = runs.find(([from, to]) => from < border && to > border)
      const out = replaced(text.subarray(0, border), before)
      const wasAhead = maskedAhead > 0 && border > 0
      maskedAhead = across ? across[1] - border : Math.max(0, maskedAhead - border)
      held = text.subarray(border)
      return wasAhead ? out.subarray(MASK.length) : out
    }
    return {
      push: (piece) => {
        const text = Buffer.concat([held, piece])
        return advance(text, this.#safeBorder(text))
      },
      flush: () => advance(held, held.length),
      heldBytes: () => held.length - maskedAhead,
    }
  }

  /** Where values lie; those that overlap are one run. `ahead`: bytes at the beginning known to be in one. */
  #runs(text: Buffer, ahead = 0): Run[] {
    const found: Run[] = ahead > 0 ? [[0, ahead]] : []
    for (const value of this.#values) {
      for (let at = text.indexOf(value); at >= 0; at = text.indexOf(value, at + 1)) {
        found.push([at, at + value.length])
      }
    }
    const runs: Run[] = []
    for (const [from, to] of found.sort(([a], [b]) => a - b)) {
      const last = runs.at(-1)
      if (last && from < last[1]) last[1] = Math.max(last[1], to)
      else runs.push([from, to])
    }
    return runs
  }

  /** Where a value may begin whose rest is still to come; the text's length when none may. */
  #safeBorder(text: Buffer): number {
    for (let at = Math.max(0, text.length - this.overlapBytes); at < text.length; at += 1) {
      const rest = text.subarray(at)
      const begins = this.#values.some(
        (value) => value.length > rest.length && value.subarray(0, rest.length).equals(rest),
      )
      if (begins) return at
    }
    return text.length
  }
}

function replaced(text: Buffer, runs: Run[]): Buffer {
  const pieces: Buffer[] = []
  let at = 0
  for (const [from, to] of runs) {
    pieces.push(text.subarray(at, from), MASK)
    at = to
  }
  pieces.push(text.subarray(at))
  return Buffer.concat(pieces)
}

/**
 * The last bytes of a worker's log, masked. `log.totalBytes` counts what the log would have masked;
 * `rawBytes` what was logged.
 */
export async function maskedTail(
  worker: Worker,
  masker: Masker,
  maxBytes: number,
): Promise<{ log: LogTail; rawBytes: number }> {
  const { content, totalBytes } = await worker.logs({ maxBytes: maxBytes + masker.overlapBytes })
  const from = Math.max(0, content.length - maxBytes)
  const masked = masker.mask(content, from)
  const removedBytes = content.length - from - masked.length
  return { log: { content: masked, totalBytes: totalBytes - removedBytes }, rawBytes: totalBytes }
}
