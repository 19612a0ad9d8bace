import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { incompleteBytes, logText } from '../../src/wire/log-text.ts'

const bytes = (max: number) => fc.uint8Array({ maxLength: max }).map((array) => Buffer.from(array))
const unicode = fc.string({ unit: 'grapheme', maxLength: 40 })

describe('logText', () => {
  test('a whole log is its text; what is no UTF-8 becomes U+FFFD', () => {
    const content = Buffer.from('hello é 😀\n')
    expect(logText({ content, totalBytes: content.length })).toBe('hello é 😀\n')
    expect(logText({ content: Buffer.from([0x61, 0xff, 0x62]), totalBytes: 3 })).toBe('a\ufffdb')
    expect(logText({ content: Buffer.alloc(0), totalBytes: 0 })).toBe('')
  })

  test('a log that was cut says first how many bytes are missing', () => {
    expect(logText({ content: Buffer.from('end\n'), totalBytes: 1_004 })).toBe(
      '[task-runner] 1000 bytes of log before this line were cut\nend\n',
    )
    expect(logText({ content: Buffer.alloc(0), totalBytes: 7 })).toBe(
      '[task-runner] 7 bytes of log before this line were cut\n',
    )
  })

  test('a cut within a character drops its rest, and counts it', () => {
    const whole = Buffer.from('a😀b')
    expect(logText({ content: whole.subarray(2), totalBytes: 6 })).toBe(
      '[task-runner] 5 bytes of log before this line were cut\nb',
    )
  })

  test('wherever any text is cut, the kept text is a true end of it, and the count is right', () => {
    fc.assert(
      fc.property(unicode, fc.nat(), (text, at) => {
        const whole = Buffer.from(text)
        const cut = whole.length === 0 ? 0 : at % whole.length
        const shown = logText({ content: whole.subarray(cut), totalBytes: whole.length })
        if (cut === 0) {
          expect(shown).toBe(text)
          return
        }
        const [, count = '', kept = ''] =
          /^\[task-runner\] (\d+) bytes of log before this line were cut\n(.*)$/s.exec(shown) ?? []
        expect(Buffer.byteLength(kept) + Number(count)).toBe(whole.length)
        expect(text.endsWith(kept)).toBe(true)
        expect(Number(count) - cut).toBeLessThanOrEqual(3)
      }),
      { numRuns: 500 },
    )
  })
})

describe('incompleteBytes', () => {
  test.each([
    ['', 0],
    ['61', 0],
    ['c3', 1],
    ['c3a9', 0],
    ['e2', 1],
    ['e282', 2],
    ['e282ac', 0],
    ['f09f98', 3],
    ['f09f9880', 0],
    ['80', 0],
    ['808080', 0],
  ])('the end of %s waits for %i bytes', (hex, expected) => {
    expect(incompleteBytes(Buffer.from(hex, 'hex'))).toBe(expected)
  })

  test('text that is cut anywhere and held back so far never shows half a character', () => {
    fc.assert(
      fc.property(unicode, fc.nat(), (text, at) => {
        fc.pre(!text.includes('\ufffd'))
        const whole = Buffer.from(text)
        const piece = whole.subarray(0, whole.length === 0 ? 0 : at % (whole.length + 1))
        const complete = piece.subarray(0, piece.length - incompleteBytes(piece)).toString()
        expect(text.startsWith(complete)).toBe(true)
      }),
      { numRuns: 500 },
    )
  })

  test('for any bytes, decoding in two pieces gives what decoding at once gives', () => {
    const nasty = fc.array(fc.constantFrom(0x61, 0x80, 0xbf, 0xc3, 0xe2, 0xed, 0xf0, 0xf4, 0xff), {
      maxLength: 8,
    })
    const any = fc.oneof(
      bytes(12),
      nasty.map((array) => Buffer.from(array)),
    )
    fc.assert(
      fc.property(any, any, (first, second) => {
        const border = first.length - incompleteBytes(first)
        const whole = Buffer.concat([first, second])
        const pieces = whole.subarray(0, border).toString() + whole.subarray(border).toString()
        expect(incompleteBytes(first)).toBeLessThanOrEqual(3)
        expect(pieces).toBe(whole.toString())
      }),
      { numRuns: 2_000 },
    )
  })
})
