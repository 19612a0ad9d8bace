import type { LogTail, Worker } from './ports.ts'
import { turn } from './turns.ts'
import { ValueSearch } from './value-search.ts'

/** Minimum length of a masked value: shorter ones would match all over a log. */
const MASKED_BYTES_MIN = 6
const LINES_MAX = 100
const MASK = Buffer.from('***')
const NOTHING = Buffer.alloc(0)
/** Bytes masked per turn of the event loop: about a millisecond. */
export const MASKED_A_TURN = 32 * 1024

/**
 * Replaces secret values in logs by `***`, also a value that spans two pieces. Takes time linear in
 * the length of the log.
 */
export class Masker {
  readonly #search: ValueSearch
  /** Bytes before a cut that are needed to recognize a value that spans the cut. */
  readonly overlapBytes: number

  constructor(values: ReadonlyArray<string | null>) {
    const variants = values.flatMap((value) => (value ? withLines(value).flatMap(encodings) : []))
    const masked = [...new Set(variants)]
      .map((value) => Buffer.from(value))
      .filter((value) => value.length >= MASKED_BYTES_MIN)
    this.#search = new ValueSearch(masked)
    this.overlapBytes = Math.max(0, this.#search.longestValue - 1)
  }

  /** Masks a short text synchronously. */
  mask(text: Buffer): Buffer {
    const stream = this.stream()
    return Buffer.concat([stream.push(text), stream.flush()])
  }

  /**
   * Masks a text of any length, piece by piece, and yields to the event loop between pieces. The
   * first `contextBytes` are searched, not returned. With `isGrowing`, an end that may be the
   * beginning of a value is omitted.
   */
  async maskLong(
    text: Buffer,
    { contextBytes = 0, isGrowing = false }: { contextBytes?: number; isGrowing?: boolean } = {},
  ): Promise<Buffer> {
    await this.ready()
    const stream = this.stream(contextBytes)
    const masked: Buffer[] = []
    for (let at = 0; at < text.length; at += MASKED_A_TURN) {
      if (text.length > MASKED_A_TURN) await turn()
      masked.push(stream.push(text.subarray(at, at + MASKED_A_TURN)))
    }
    if (!isGrowing) masked.push(stream.flush())
    return Buffer.concat(masked)
  }

  /** Builds the search with turns of the event loop in between; the first use would not yield. */
  async ready(): Promise<void> {
    while (this.#search.buildNext()) await turn()
  }

  /** Returns a stream; the first `contextBytes` pushed are searched, not returned. */
  stream(contextBytes = 0): MaskedStream {
    while (this.#search.buildNext());
    return new MaskedStream(this.#search, contextBytes)
  }
}

/**
 * Masks a text piece by piece. If it begins in the middle of a log, the bytes before it are pushed
 * first, as context: the text may begin inside a value.
 */
export class MaskedStream {
  readonly #search: ValueSearch
  /** State of the search. */
  #node = 0
  #readBytes = 0
  /** Index after the last byte that was returned or was context. */
  #returnedTo: number
  #hasReturned = false
  /** Text from that index on. */
  #held: Buffer = NOTHING
  /** Runs of overlapping values that end after that index: start, end, start, end, … */
  readonly #runs: number[] = []

  constructor(search: ValueSearch, contextBytes: number) {
    this.#search = search
    this.#returnedTo = contextBytes
  }

  /** Returns, masked, the text that no later piece can change. */
  push(piece: Buffer): Buffer {
    const before = this.#readBytes
    this.#node = this.#search.read(this.#node, piece, (from, to) => {
      this.#found(before + from, before + to)
    })
    this.#readBytes += piece.length
    const text = this.#held.length === 0 ? piece : Buffer.concat([this.#held, piece])
    return this.#return(text, this.#readBytes - this.#search.openBytes(this.#node))
  }

  /** Returns the held text, masked; call it at the end of the text. */
  flush(): Buffer {
    return this.#return(this.#held, this.#readBytes)
  }

  /** Returns the number of bytes held: neither returned nor masked yet. */
  heldBytes(): number {
    const [from = Number.POSITIVE_INFINITY, to = 0] = this.#runs
    const isMaskOut = this.#hasReturned && from < this.#returnedTo
    return Math.max(0, this.#readBytes - Math.max(this.#returnedTo, isMaskOut ? to : 0))
  }

  /** Adds a value to the runs. Values are added in the order of their ends. */
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

  /** Returns the text up to `border`, an index into the whole text, masked; holds the rest. */
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
    // A value is longer than its mask, except the first and the last, which borders may cut.
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

/** Maximum length of a value searched encoded: a long one, such as a key, is printed as it is. */
const ENCODED_BYTES_MAX = 4096

/** Returns a value as it is, and as it appears in JSON, URLs and base64. */
function encodings(value: string): string[] {
  const bytes = Buffer.from(value)
  if (bytes.length < MASKED_BYTES_MIN || bytes.length > ENCODED_BYTES_MAX) return [value]
  return [value, ...inJson(value), ...inUrls(value), ...inBase64(bytes)]
}

/** Returns the value as a JSON string, with and without characters beyond ASCII escaped. */
function inJson(value: string): string[] {
  const json = JSON.stringify(value).slice(1, -1)
  const ascii = json.replace(
    /[\u0080-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`,
  )
  return [json, ascii]
}

/** Returns the value percent-encoded by each common rule; git writes lower-case digits. */
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

/** Returns the base64 characters that depend on the value alone, at each offset modulo 3. */
function inBase64(value: Buffer): string[] {
  return [0, 1, 2].flatMap((offset) => {
    const base64 = Buffer.concat([Buffer.alloc(offset), value]).toString('base64')
    const bits = (offset + value.length) * 8
    const certain = base64.slice(Math.ceil((offset * 8) / 6), Math.floor(bits / 6))
    return [certain, certain.replaceAll('+', '-').replaceAll('/', '_')]
  })
}

/** Returns the value and each of its lines: a task may print one line of a key. */
function withLines(value: string): string[] {
  const lines = value.split(/\r?\n/)
  // Values of many lines, such as bundles of certificates, are searched only as a whole.
  if (lines.length === 1 || lines.length > LINES_MAX) return [value]
  return [value, ...lines.filter((line) => line.trim().length >= MASKED_BYTES_MIN)]
}

/**
 * Returns the end of a worker's log, masked. `log.totalBytes` is the length of the whole log with
 * masks, `rawBytes` without. `hasEnded`: the task writes no more.
 */
export async function maskedTail(
  worker: Worker,
  masker: Masker,
  maxBytes: number,
  hasEnded = false,
): Promise<{ log: LogTail; rawBytes: number }> {
  const isGrowing = !hasEnded && (await worker.status()) === 'Running'
  const { content, totalBytes } = await worker.logs({ maxBytes: maxBytes + masker.overlapBytes })
  const contextBytes = Math.max(0, content.length - maxBytes)
  const masked = await masker.maskLong(content, { contextBytes, isGrowing })
  const removedBytes = content.length - contextBytes - masked.length
  return { log: { content: masked, totalBytes: totalBytes - removedBytes }, rawBytes: totalBytes }
}
