import type { LogTail, Worker } from './ports.ts'
import { turn } from './turns.ts'
import { ValueSearch } from './value-search.ts'

/** Shorter values would turn half a log into stars, and are no secrets worth the name. */
const MASKED_BYTES_MIN = 6
const LINES_MAX = 100
const MASK = Buffer.from('***')
const NOTHING = Buffer.alloc(0)
/** Bytes masked between two turns of the event loop: a millisecond's work. */
export const MASKED_A_TURN = 32 * 1024

/**
 * Replaces secret values in logs by `***`, also where a value is split over two pieces. The time it
 * takes is linear in the log, whatever that holds.
 */
export class Masker {
  readonly #search: ValueSearch
  /** How many bytes before a cut must be looked at, so that no value is cut in two. */
  readonly overlapBytes: number

  constructor(values: ReadonlyArray<string | null>) {
    const written = values.flatMap((value) => (value ? withLines(value).flatMap(encodings) : []))
    const masked = [...new Set(written)]
      .map((value) => Buffer.from(value))
      .filter((value) => value.length >= MASKED_BYTES_MIN)
    this.#search = new ValueSearch(masked)
    this.overlapBytes = Math.max(0, this.#search.longestValue - 1)
  }

  /** Masks a short text at once. */
  mask(text: Buffer): Buffer {
    const stream = this.stream()
    return Buffer.concat([stream.push(text), stream.flush()])
  }

  /**
   * Masks a text of any length, with turns of the event loop between pieces. The first
   * `lookedAtBytes` are only looked at. `isGrowing`: what may be the beginning of a value at the
   * end is left out.
   */
  async maskLong(
    text: Buffer,
    { lookedAtBytes = 0, isGrowing = false }: { lookedAtBytes?: number; isGrowing?: boolean } = {},
  ): Promise<Buffer> {
    await this.ready()
    const stream = this.stream(lookedAtBytes)
    const masked: Buffer[] = []
    for (let at = 0; at < text.length; at += MASKED_A_TURN) {
      if (text.length > MASKED_A_TURN) await turn()
      masked.push(stream.push(text.subarray(at, at + MASKED_A_TURN)))
    }
    if (!isGrowing) masked.push(stream.flush())
    return Buffer.concat(masked)
  }

  /**
   * Prepares the search for the values, with turns of the event loop between. Without it, the first
   * use does all of that at once.
   */
  async ready(): Promise<void> {
    while (this.#search.buildOn()) await turn()
  }

  /** Masks a text that comes in pieces. Of the first `lookedAtBytes` nothing is returned. */
  stream(lookedAtBytes = 0): MaskedStream {
    while (this.#search.buildOn());
    return new MaskedStream(this.#search, lookedAtBytes)
  }
}

/**
 * Masks a text that comes in pieces. Where it begins in the middle of a log, what stands before is
 * pushed as well and only looked at: it tells whether the text begins inside a value.
 */
export class MaskedStream {
  readonly #search: ValueSearch
  /** The state of the search. */
  #node = 0
  #readBytes = 0
  /** Index of the first byte that was neither returned nor only looked at. */
  #returnedTo: number
  #hasReturned = false
  /** The text from that index on. */
  #held: Buffer = NOTHING
  /**
   * Runs of values that end after that index, as a flat list of their first index and the index
   * after their last. Values that overlap are one run.
   */
  readonly #runs: number[] = []

  constructor(search: ValueSearch, lookedAtBytes: number) {
    this.#search = search
    this.#returnedTo = lookedAtBytes
  }

  /** Returns what no later piece can change, masked. */
  push(piece: Buffer): Buffer {
    const before = this.#readBytes
    this.#node = this.#search.read(this.#node, piece, (from, to) => {
      this.#found(before + from, before + to)
    })
    this.#readBytes += piece.length
    const text = this.#held.length === 0 ? piece : Buffer.concat([this.#held, piece])
    return this.#return(text, this.#readBytes - this.#search.openBytes(this.#node))
  }

  /** Returns what was held back, at the end of the text. */
  flush(): Buffer {
    return this.#return(this.#held, this.#readBytes)
  }

  /** Returns how many bytes of the text are held back: neither returned nor masked yet. */
  heldBytes(): number {
    const [from = Number.POSITIVE_INFINITY, to = 0] = this.#runs
    const isMaskOut = this.#hasReturned && from < this.#returnedTo
    return Math.max(0, this.#readBytes - Math.max(this.#returnedTo, isMaskOut ? to : 0))
  }

  /** Adds a value to the runs. Values come in the order of their ends. */
  #found(from: number, to: number): void {
    const runs = this.#runs
    const begin = from
    while (runs.length > 0) {
      const lastFrom = runs[runs.length - 2] ?? 0
      if (begin >= (runs[runs.length - 1] ?? 0)) break
      if (lastFrom <= begin) {
        runs[runs.length - 1] = to
        return
      }
      runs.length -= 2
    }
    runs.push(begin, to)
  }

  /** Returns the text up to a border, an index of the whole text, and holds the rest. */
  #return(text: Buffer, border: number): Buffer {
    const textFrom = this.#readBytes - text.length
    const from = this.#returnedTo
    if (border <= from) {
      this.#held = text.subarray(Math.max(0, from - textFrom))
      return NOTHING
    }
    const masked = this.#masked(text, textFrom, border)
    this.#held = text.subarray(border - textFrom)
    this.#returnedTo = border
    this.#hasReturned = true
    this.#forgetRuns(border)
    return masked
  }

  #masked(text: Buffer, textFrom: number, border: number): Buffer {
    const runs = this.#runs
    const from = this.#returnedTo
    if ((runs[0] ?? border) >= border) return text.subarray(from - textFrom, border - textFrom)
    // A whole value is longer than its mask; only the first and the last may be cut by the borders.
    const masked = Buffer.allocUnsafe(border - from + 2 * MASK.length)
    let length = 0
    let at = from
    for (let index = 0; index < runs.length; index += 2) {
      const [runFrom = 0, runTo = 0] = [runs[index], runs[index + 1]]
      if (runTo <= from) continue
      if (runFrom >= border) break
      if (runFrom > at) length += text.copy(masked, length, at - textFrom, runFrom - textFrom)
      const isMaskOut = this.#hasReturned && runFrom < from
      if (!isMaskOut) length += MASK.copy(masked, length)
      at = Math.min(runTo, border)
    }
    length += text.copy(masked, length, at - textFrom, border - textFrom)
    return masked.subarray(0, length)
  }

  #forgetRuns(before: number): void {
    let count = 0
    while (count < this.#runs.length && (this.#runs[count + 1] ?? 0) <= before) count += 2
    this.#runs.splice(0, count)
  }
}

/** A longer value, such as a key, is hardly printed encoded. */
const ENCODED_BYTES_MAX = 4096

/** A value as it is, and as JSON, URLs and base64 spell it. */
function encodings(value: string): string[] {
  const bytes = Buffer.from(value)
  if (bytes.length < MASKED_BYTES_MIN || bytes.length > ENCODED_BYTES_MAX) return [value]
  return [value, ...inJson(value), ...inUrls(value), ...inBase64(bytes)]
}

/** As most libraries write a string, and as those that keep to ASCII. */
function inJson(value: string): string[] {
  const json = JSON.stringify(value).slice(1, -1)
  const ascii = json.replace(
    /[\u0080-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`,
  )
  return [json, ascii]
}

/** Percent-encoded, by all rules of what stays as it is; in small letters as git writes it. */
function inUrls(value: string): string[] {
  const kept = [/[\w.~-]/, /[\w.~/-]/, /[\w.*-]/, /[\w.~!'()*-]/]
  const encoded = kept.map((isKept) =>
    Array.from(Buffer.from(value), (byte) => {
      const character = String.fromCharCode(byte)
      return isKept.test(character) ? character : `%${byte.toString(16).padStart(2, '0')}`
    }).join(''),
  )
  return encoded.flatMap((small) => {
    const large = small.replace(/%../g, (code) => code.toUpperCase())
    return [small, large, large.replaceAll('%20', '+')]
  })
}

/** What is certain in base64 of a text that holds the value: it depends on where in three bytes the value begins. */
function inBase64(value: Buffer): string[] {
  return [0, 1, 2].flatMap((offset) => {
    const base64 = Buffer.concat([Buffer.alloc(offset), value]).toString('base64')
    const bits = (offset + value.length) * 8
    const certain = base64.slice(Math.ceil((offset * 8) / 6), Math.floor(bits / 6))
    return [certain, certain.replaceAll('+', '-').replaceAll('/', '_')]
  })
}

/** Of a value of several lines, as keys have them, a task may print a single one. */
function withLines(value: string): string[] {
  const lines = value.split(/\r?\n/)
  // Each is searched for: of longer ones, such as certificates, the whole has to do.
  if (lines.length === 1 || lines.length > LINES_MAX) return [value]
  return [value, ...lines.filter((line) => line.trim().length >= MASKED_BYTES_MIN)]
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
  const lookedAtBytes = Math.max(0, content.length - maxBytes)
  // Of a log that goes on, the end may be half a value.
  const masked = await masker.maskLong(content, { lookedAtBytes, isGrowing })
  const removedBytes = content.length - lookedAtBytes - masked.length
  return { log: { content: masked, totalBytes: totalBytes - removedBytes }, rawBytes: totalBytes }
}
