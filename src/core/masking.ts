import type { LogTail, Worker } from './ports.ts'

/** Shorter values would turn half a log into stars, and are no secrets worth the name. */
const MASKED_BYTES_MIN = 6
const LINES_MAX = 100
const MASK = Buffer.from('***')

/** A run of bytes that are part of a value: from, and up to but not including. */
type Run = [from: number, to: number]

/** Replaces secret values in logs by `***`, also where a value is split over two pieces. */
export class Masker {
  readonly #values: Buffer[]
  /** How many bytes before a cut must be looked at, so that no value is cut in two. */
  readonly overlapBytes: number

  constructor(values: ReadonlyArray<string | null>) {
    this.#values = [...new Set(values.flatMap((value) => (value ? withLines(value) : [])))]
      .map((value) => Buffer.from(value))
      .filter((value) => value.length >= MASKED_BYTES_MIN)
    this.overlapBytes = Math.max(0, ...this.#values.map((value) => value.length - 1))
  }

  /** The text between two borders, with its values masked; what lies around is only looked at. */
  mask(text: Buffer, from = 0, to = text.length): Buffer {
    const runs = clipped(this.#runs(text), from, to)
    const rest = text.subarray(from, to)
    return runs.length === 0 ? rest : replaced(rest, runs)
  }

  /**
   * Masks a text that comes in pieces. `flush` gives what was held back, at the end; `heldBytes` is how much
   * of the text that is at the moment. The first `lookedAtBytes` are not given out: what stands before a
   * beginning in the middle of a text tells whether it is in the middle of a value.
   */
  stream(lookedAtBytes = 0): { push(piece: Buffer): Buffer; flush(): Buffer; heldBytes(): number } {
    let held: Buffer = Buffer.alloc(0)
    let unshown = lookedAtBytes
    // Of what is held: bytes that belong to a run whose mask went out already.
    let maskedAhead = 0
    const advance = (text: Buffer, border: number): Buffer => {
      const from = Math.min(unshown, border)
      const runs = this.#runs(text, maskedAhead)
      const across = runs.find(([start, end]) => start < border && end > border)
      const shown = clipped(runs, from, border)
      const out = replaced(text.subarray(from, border), shown)
      const wasShown = maskedAhead > from && border > from
      maskedAhead = across ? across[1] - border : Math.max(0, maskedAhead - border)
      unshown -= from
      held = text.subarray(border)
      return wasShown ? out.subarray(MASK.length) : out
    }
    return {
      push: (piece) => {
        const text = Buffer.concat([held, piece])
        return advance(text, this.safeBorder(text))
      },
      flush: () => advance(held, held.length),
      heldBytes: () => Math.max(0, held.length - maskedAhead - unshown),
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
  safeBorder(text: Buffer): number {
    for (let at = Math.max(0, text.length - this.overlapBytes); at < text.length; at += 1) {
      const length = text.length - at
      const begins = this.#values.some(
        (value) =>
          value[0] === text[at] &&
          value.length > length &&
          value.subarray(0, length).equals(text.subarray(at)),
      )
      if (begins) return at
    }
    return text.length
  }
}

/** Of a value of several lines, as keys have them, a task may print a single one. */
function withLines(value: string): string[] {
  const lines = value.split(/\r?\n/)
  // Each is searched for: of longer ones, such as certificates, the whole has to do.
  if (lines.length === 1 || lines.length > LINES_MAX) return [value]
  return [value, ...lines.filter((line) => line.trim().length >= MASKED_BYTES_MIN)]
}

/** The runs between two borders, counted from the first. */
function clipped(runs: Run[], from: number, border: number): Run[] {
  return runs
    .filter(([start, end]) => end > from && start < border)
    .map(([start, end]) => [Math.max(start, from) - from, Math.min(end, border) - from])
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
 * `rawBytes` what was logged. `hasEnded`: the task is known to write no more.
 */
export async function maskedTail(
  worker: Worker,
  masker: Masker,
  maxBytes: number,
  hasEnded = false,
): Promise<{ log: LogTail; rawBytes: number }> {
  const isGrowing = !hasEnded && (await worker.status()) === 'Running'
  const { content, totalBytes } = await worker.logs({ maxBytes: maxBytes + masker.overlapBytes })
  const from = Math.max(0, content.length - maxBytes)
  // Of a log that goes on, the end may be half a value.
  const to = isGrowing ? Math.max(from, masker.safeBorder(content)) : content.length
  const masked = masker.mask(content, from, to)
  const removedBytes = content.length - from - masked.length
  return { log: { content: masked, totalBytes: totalBytes - removedBytes }, rawBytes: totalBytes }
}
