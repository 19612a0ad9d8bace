import { describe, expect, test } from 'vitest'
import { LogRows, rowsWith, spansOf } from '../../web/src/log-rows.ts'

function rowsOf(...pieces: string[]): LogRows {
  const log = new LogRows()
  for (const piece of pieces) log.add(piece)
  return log
}
const texts = (log: LogRows) => log.rows.map(({ text }) => text)
const numbers = (log: LogRows) => log.rows.map(({ number }) => number)

describe('lines', () => {
  test('are the same however the log comes in pieces', () => {
    const whole = `one\n\n${'x'.repeat(2500)}\n\u001b[31mred\nstill red\u001b[0m\nno end`
    const log = rowsOf(whole)
    expect(numbers(log)).toEqual([1, 2, 3, undefined, undefined, 4, 5, 6])
    for (const size of [1, 2, 3, 7, 100, 1001]) {
      const pieces: string[] = []
      for (let at = 0; at < whole.length; at += size) pieces.push(whole.slice(at, at + size))
      expect(rowsOf(...pieces).rows, `in pieces of ${size}`).toEqual(log.rows)
    }
  })

  test('that have not ended are there, and go on', () => {
    const log = rowsOf('50 %')
    expect(texts(log)).toEqual(['50 %'])
    log.add(' done\nnext')
    expect(texts(log)).toEqual(['50 % done', 'next'])
    expect(numbers(log)).toEqual([1, 2])
  })

  test('longer than a row are cut, never inside a character or a colour', () => {
    const log = rowsOf(`${'x'.repeat(999)}\u{1f600}y\n${'x'.repeat(998)}\u001b[31mred\n`)
    expect(texts(log)).toEqual(['x'.repeat(999), '\u{1f600}y', 'x'.repeat(998), 'red'])
    expect(spansOf(log.rows[3] ?? expect.fail())).toMatchObject([{ text: 'red', color: '#ff8589' }])
  })

  test('of a log that never ends make room', () => {
    const log = new LogRows()
    for (let count = 0; count < 9; count += 1) log.add('line\n'.repeat(50_000))
    expect(log.rows.length).toBeLessThanOrEqual(400_000)
    expect(log.rows.at(-1)).toMatchObject({ number: 450_000 })
    expect(log.dropped + log.rows.length).toBe(450_000)
  })
})

describe('colours', () => {
  test('go on over the end of a line until they are reset', () => {
    const log = rowsOf('\u001b[1;32mgood\nstill\u001b[0m plain\nplain\n')
    expect(log.rows.map((row) => spansOf(row))).toEqual([
      [{ text: 'good', className: 'ansi-bold', color: '#5fd39a', background: undefined }],
      [
        { text: 'still', className: 'ansi-bold', color: '#5fd39a', background: undefined },
        { text: ' plain', className: '', color: undefined, background: undefined },
      ],
      [{ text: 'plain', className: '', color: undefined, background: undefined }],
    ])
  })

  test('never make text as dark as the ground', () => {
    const [row = expect.fail()] = rowsOf('\u001b[38;2;1;1;1mhidden?\u001b[0m\n').rows
    expect(spansOf(row)).toMatchObject([{ text: 'hidden?', color: 'rgb(130, 130, 130)' }])
  })

  test('are those of the palette', () => {
    const [row = expect.fail()] = rowsOf('\u001b[48;5;21mblue\u001b[48;5;232mgrey\n').rows
    expect(spansOf(row).map(({ background }) => background)).toEqual([
      'rgb(0, 0, 255)',
      'rgb(8, 8, 8)',
    ])
  })
})

test.each([
  ['\u001b]0;title\u0007text', 'text'],
  ['\u001b]8;;http://example.com\u001b\\link\u001b]8;;\u001b\\', 'link'],
  ['\u001b[2K\u001b[1Gprogress', 'progress'],
  ['\u001bP1;2qdata\u001b\\text', 'text'],
  ['\u001b]0;no end', '␛]0;no end'],
  ['\u001b[31', '␛[31'],
  ['a\u0000b\u0008c\u007f', 'a␀b␈c␡'],
  ['\u202eabc\u2066', '‹U+202E›abc‹U+2066›'],
  ['tab\tstays', 'tab\tstays'],
  ['\u009b31m', '‹U+009B›31m'],
])('%j is seen as %j', (raw, seen) => {
  const [row = expect.fail()] = rowsOf(`${raw}\n`).rows
  expect(row.text).toBe(seen)
  expect(
    spansOf(row)
      .map(({ text }) => text)
      .join(''),
  ).toBe(seen)
})

test('words are found in any case, and across colours', () => {
  const log = rowsOf('An \u001b[31mErr\u001b[0mor\nfine\nERROR\n')
  expect(rowsWith(log.rows, 'error')).toEqual([0, 2])
  expect(rowsWith(log.rows, '')).toEqual([])
})
