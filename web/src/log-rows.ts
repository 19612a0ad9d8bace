import Anser from 'anser'
import { visible } from './text.ts'

/** Maximum characters of a row. Longer lines take several rows, so that each is quick to draw. */
const ROW_CHARACTERS = 1000
/** Limits of the log; the oldest rows are dropped. A running task may print more than 5 MB. */
const ROWS_MAX = 400_000
const CHARACTERS_MAX = 16_000_000
const CARRY_MAX = 200

const ESC = '\u001b'
/** Escape sequences other than colours: titles and links (OSC, DCS, …), cursor moves, erasing. */
const WITHOUT_COLOUR =
  // biome-ignore lint/suspicious/noControlCharactersInRegex: it matches escapes
  /\u001b(?:[\]PX^_][^\u0007\u001b]*(?:\u0007|\u001b\\)|\[[\d;:<=>?]*[ -/]*(?![m])[@-~]|\[[<=>?][\d;]*m|[()*+][A-Za-z0-9]|[=>78cDEHMNOZ])/g
// biome-ignore lint/suspicious/noControlCharactersInRegex: it matches escapes
const COLOUR = /\u001b\[([\d;]*)m/g
// biome-ignore lint/suspicious/noControlCharactersInRegex: it matches escapes
const STRAY_ESC = /\u001b(?!\[[\d;]*m)/g
// biome-ignore lint/suspicious/noControlCharactersInRegex: it matches escapes
const UNFINISHED = /\u001b(?:\[[\d;]{0,60})?$/

export interface Row {
  /** Line number; undefined if the row continues a line. */
  number: number | undefined
  /** Text that is shown and searched. */
  text: string
  /** Text with colour sequences, if it has any. */
  ansi: string | undefined
}

export interface Span {
  text: string
  className: string
  color: string | undefined
  background: string | undefined
}

/** A growing log, split into rows. */
export class LogRows {
  rows: Row[] = []
  /** Count of the rows that were dropped. */
  dropped = 0
  #lines = 0
  #characters = 0
  #carry = ''
  /** Source of the last row, if its line has not ended. */
  #open: { raw: string; carry: string; number: number | undefined } | undefined

  add(text: string): void {
    const open = this.#open
    if (open) {
      const last = this.rows.pop()
      this.#characters -= last?.text.length ?? 0
      this.#carry = open.carry
    }
    let isStart = !open || open.number !== undefined
    if (open && isStart) this.#lines -= 1
    this.#open = undefined
    const lines = ((open?.raw ?? '') + text).split('\n')
    const rest = lines.pop() ?? ''
    for (const line of lines) {
      for (const piece of pieces(line)) {
        this.#push(piece, isStart)
        isStart = false
      }
      isStart = true
    }
    for (const piece of rest === '' ? [] : pieces(rest)) {
      const carry = this.#carry
      this.#push(piece, isStart)
      this.#open = { raw: piece, carry, number: this.rows.at(-1)?.number }
      isStart = false
    }
    this.#makeRoom()
  }

  #push(raw: string, isStart: boolean): void {
    if (isStart) this.#lines += 1
    const number = isStart ? this.#lines : undefined
    const coloured = raw.includes(ESC)
      ? raw.replace(WITHOUT_COLOUR, '').replace(STRAY_ESC, '\u241b')
      : raw
    const text = visible(raw.includes(ESC) ? coloured.replace(COLOUR, '') : raw)
    const ansi = this.#carry + coloured
    this.rows.push({ number, text, ansi: ansi.includes(ESC) ? ansi : undefined })
    this.#characters += text.length
    if (coloured.includes(ESC)) this.#carry = carryAfter(this.#carry, coloured)
  }

  #makeRoom(): void {
    if (this.rows.length <= ROWS_MAX && this.#characters <= CHARACTERS_MAX) return
    const gone = this.rows.splice(0, Math.ceil(this.rows.length / 4))
    for (const row of gone) this.#characters -= row.text.length
    this.dropped += gone.length
  }
}

/** Splits a line into pieces that do not end inside an escape sequence. */
function pieces(line: string): string[] {
  if (line.length <= ROW_CHARACTERS) return [line]
  const found: string[] = []
  for (let at = 0; at < line.length; ) {
    let piece = line.slice(at, at + ROW_CHARACTERS)
    if (at + piece.length < line.length) {
      const whole = piece.replace(UNFINISHED, '').replace(/[\ud800-\udbff]$/, '')
      if (whole !== '') piece = whole
    }
    found.push(piece)
    at += piece.length
  }
  return found
}

/** Returns the colour sequences in effect after `text`. */
function carryAfter(before: string, text: string): string {
  let carry = before
  for (const [sequence, codes = ''] of text.matchAll(COLOUR)) {
    if (/^0*$/.test(codes)) carry = ''
    else if (codes.startsWith('0;') || carry.length > CARRY_MAX) carry = sequence
    else carry += sequence
  }
  return carry
}

/** Splits a row into spans with classes and colours. */
export function spansOf(row: Row): Span[] {
  if (row.ansi === undefined) {
    return [{ text: row.text, className: '', color: undefined, background: undefined }]
  }
  return Anser.ansiToJson(row.ansi, { json: true, use_classes: true, remove_empty: true }).map(
    ({ content, decorations, fg, bg, fg_truecolor, bg_truecolor }) => {
      const isDarkOnBright = fg === 'ansi-black' && bg !== null
      const grounds = isDarkOnBright ? FOREGROUNDS : BACKGROUNDS
      return {
        text: visible(content),
        className: decorations.map((name) => `ansi-${name}`).join(' '),
        color: isDarkOnBright ? GROUND : colour(fg, fg_truecolor, FOREGROUNDS),
        background: colour(bg, bg_truecolor, grounds),
      }
    },
  )
}

/** Background of the log, as in style.css. */
const GROUND = '#14171d'
const NAMES = ['black', 'red', 'green', 'yellow', 'blue', 'magenta', 'cyan', 'white']
/** Named and bright colours, chosen to be readable on the log's background and on each other. */
const FOREGROUNDS = [
  ...['#8b94a5', '#ff8589', '#5fd39a', '#e5c07b', '#8aa9ff', '#d89bf0', '#63d0dc', '#e4e7ee'],
  ...['#98a1b2', '#ffa7aa', '#8be9b8', '#ffe08f', '#b3c6ff', '#ecc3fb', '#9cebf3', '#ffffff'],
]
const BACKGROUNDS = [
  ...['#000000', '#7a1a1e', '#0d4f2d', '#5c4007', '#213a82', '#5a246d', '#0d4e56', '#4a5160'],
  ...['#2c313b', '#8c1d22', '#0f5c34', '#6b4a08', '#24408f', '#66297c', '#0f5a63', '#5a6273'],
]

function colour(name: string | null, truecolor: string | null, named: string[]) {
  const isText = named === FOREGROUNDS
  if (name === 'ansi-truecolor' && truecolor) return rgb(truecolor.split(', ').map(Number), isText)
  const [, bright, word = ''] = /^ansi-(bright-)?(\w+)$/.exec(name ?? '') ?? []
  if (NAMES.includes(word)) return named[NAMES.indexOf(word) + (bright ? NAMES.length : 0)]
  const index = Number(/^ansi-palette-(\d+)$/.exec(name ?? '')?.[1] ?? -1)
  return index < 0 ? undefined : rgb(paletteColour(index), isText)
}

/** Returns a colour of the 256-colour palette: a cube of 216 colours, then greys. */
function paletteColour(index: number): number[] {
  if (index >= 232) {
    const grey = 8 + (index - 232) * 10
    return [grey, grey, grey]
  }
  const part = (divisor: number) => {
    const level = Math.floor((index - 16) / divisor) % 6
    return level === 0 ? 0 : 55 + level * 40
  }
  return [part(36), part(6), part(1)]
}

/** Returns a CSS colour, brightened if it is for text: a task must not hide what it prints. */
function rgb(parts: number[], isText: boolean): string {
  const [red = 0, green = 0, blue = 0] = parts
  const brightness = red * 0.3 + green * 0.59 + blue * 0.11
  const lift = isText ? Math.max(0, (130 - brightness) / (255 - brightness)) : 0
  return `rgb(${parts.map((part) => Math.round(part + (255 - part) * lift)).join(', ')})`
}

/** Returns the indexes of the rows that contain `words`, ignoring case. */
export function rowsWith(rows: readonly Row[], words: string): number[] {
  const wanted = words.toLowerCase()
  if (wanted === '') return []
  return rows.flatMap((row, index) => (row.text.toLowerCase().includes(wanted) ? [index] : []))
}
