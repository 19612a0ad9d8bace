import { InvalidRequestError } from '../core/errors.ts'
import { joined } from './fields.ts'

/** Maximum names of one object, such as variables of a task. */
export const JSON_NAMES_MAX = 10_000
/** Maximum values in all, lists and objects included. */
const JSON_VALUES_MAX = 200_000

const [QUOTE, COMMA, BACKSLASH] = [0x22, 0x2c, 0x5c]
const [MINUS, FIRST_OF_NAN, FIRST_OF_INFINITY] = [0x2d, 0x4e, 0x49]
const [LIST, LIST_END, OBJECT, OBJECT_END] = [0x5b, 0x5d, 0x7b, 0x7d]

/** A list or object that is being read. */
interface Container {
  isObject: boolean
  commas: number
  /** Where its last name lies, with its quotes. */
  nameFrom: number
  nameTo: number
}

/**
 * Counts names and values before JSON is parsed: some megabytes of them would keep parser and
 * validation busy for seconds. Throws `invalid_request` with the path, below `prefix`, of what has
 * too many, or is no number of JSON. Other invalid JSON is left to the parser.
 */
export function limitJson(json: Buffer, prefix: readonly string[] = []): void {
  const open: Container[] = []
  let inside: Container | undefined
  let values = 1
  for (let at = 0; at < json.length; at += 1) {
    const byte = json[at]
    if (byte === QUOTE) {
      const end = endOfString(json, at)
      // The first string after a brace or a comma is a name; a string after that is its value.
      if (inside?.isObject && inside.nameTo <= inside.nameFrom) {
        inside.nameFrom = at
        inside.nameTo = end
      }
      at = end - 1
    } else if (byte === OBJECT || byte === LIST) {
      values += 1
      inside = { isObject: byte === OBJECT, commas: 0, nameFrom: at, nameTo: at }
      open.push(inside)
    } else if (byte === OBJECT_END || byte === LIST_END) {
      open.pop()
      inside = open.at(-1)
    } else if (byte === COMMA && inside) {
      values += 1
      inside.commas += 1
      inside.nameFrom = at
      inside.nameTo = at
      if (inside.isObject && inside.commas >= JSON_NAMES_MAX) {
        const path = joined([...prefix, ...pathOf(json, open.slice(0, -1))])
        throw new InvalidRequestError([{ path, message: `has more than ${JSON_NAMES_MAX} names` }])
      }
    }
    if (byte === FIRST_OF_NAN || byte === FIRST_OF_INFINITY) {
      const word = noNumber(json, at)
      if (word === undefined) return
      const path = joined([...prefix, ...pathOf(json, open)])
      const message = `${word} is not valid JSON: send null or a string`
      throw new InvalidRequestError([{ path, message }])
    }
    if (values > JSON_VALUES_MAX) {
      const message = `holds more than ${JSON_VALUES_MAX} values`
      throw new InvalidRequestError([{ path: joined([...prefix]), message }])
    }
  }
}

/** Python writes these numbers by default; the parser names no more than their first letter. */
function noNumber(json: Buffer, at: number): string | undefined {
  const word = /^(NaN|Infinity)\b/.exec(
    json.toString('latin1', at, at + 'Infinity'.length + 1),
  )?.[1]
  return word && json[at - 1] === MINUS ? `-${word}` : word
}

/** Index after the closing quote. */
function endOfString(json: Buffer, from: number): number {
  let at = from + 1
  while (at < json.length && json[at] !== QUOTE) at += json[at] === BACKSLASH ? 2 : 1
  return at + 1
}

function pathOf(json: Buffer, open: readonly Container[]): string[] {
  return open.map(({ isObject, commas, nameFrom, nameTo }) =>
    isObject ? json.toString('utf8', nameFrom + 1, nameTo - 1) : String(commas),
  )
}
