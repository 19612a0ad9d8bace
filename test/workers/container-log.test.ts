/** A container's log whose stream is cut, and which is read again. */
import { PassThrough } from 'node:stream'
import { expect, onTestFinished, test } from 'vitest'
import { ContainerLog, READ_AGAIN } from '../../src/workers/docker/container-log.ts'

const ALL = 2 ** 20

/** A log of streams that the test writes and cuts: each is opened after the one before. */
function open() {
  const closing = new AbortController()
  onTestFinished(() => closing.abort())
  const streams: PassThrough[] = []
  let lastLine: string | undefined
  let readBytes = 0
  const next = () => {
    const stream = new PassThrough()
    streams.push(stream)
    return stream
  }
  const log = new ContainerLog(next(), {
    open: async () => next(),
    lastLine: async () => lastLine,
    onGrown: (totalBytes) => {
      readBytes = totalBytes
    },
    bytesKept: ALL,
    closing: closing.signal,
  })
  let followed = ''
  const following = (async () => {
    for await (const piece of log.follow(0, closing.signal)) followed += piece
  })()
  return {
    log,
    text: () => log.tail(ALL).content.toString(),
    followed: () => followed,
    /** Bytes read of the stream that is open. */
    readBytes: () => readBytes,
    following,
    write: (words: string) => void streams.at(-1)?.write(words),
    /** Cuts the stream, and waits for the next one. */
    async cut() {
      const before = streams.length
      streams.at(-1)?.destroy(new Error('cut'))
      await expect.poll(() => streams.length).toBe(before + 1)
    },
    async end(line = '') {
      lastLine = line
      streams.at(-1)?.end()
      await following
    },
  }
}

test('after a line end it goes on, without a word and without a byte twice', async () => {
  const it = open()
  it.write('one\n')
  await expect.poll(it.followed).toBe('one\n')
  await it.cut()
  it.write('one\ntwo\n')
  await it.end()
  expect(it.followed()).toBe('one\ntwo\n')
  expect(it.text()).toBe('one\ntwo\n')
})

test('what was read is there until as much was read again', async () => {
  const it = open()
  it.write('one\ntwo\n')
  await expect.poll(it.followed).toBe('one\ntwo\n')
  await it.cut()
  it.write('one\n')
  await expect.poll(it.readBytes).toBe(4)
  expect(it.text()).toBe('one\ntwo\n')
  // A stream that is cut on its way takes the place of nothing.
  await it.cut()
  expect(it.text()).toBe('one\ntwo\n')
  it.write('one\ntwo\nthree\n')
  await expect.poll(it.text).toBe('one\ntwo\nthree\n')
  await it.end()
  expect(it.followed()).toBe('one\ntwo\nthree\n')
})

test('a line whose beginning the engine lost is told, and the log is what the engine has', async () => {
  const it = open()
  it.write('one\ntwo, be')
  await expect.poll(it.followed).toBe('one\ntwo, be')
  await it.cut()
  it.write('one\ngun\nthree\n')
  await it.end()
  expect(it.followed()).toBe(`one\ntwo, be\n${READ_AGAIN}gun\nthree\n`)
  expect(it.text()).toBe('one\ngun\nthree\n')
})

test('a shorter log takes the place of a longer one after a moment, and followers get all of it', async () => {
  const it = open()
  it.write('one\ntwo\nthree\n')
  await expect.poll(it.followed).toBe('one\ntwo\nthree\n')
  await it.cut()
  it.write('three\n')
  await expect.poll(it.text).toBe('three\n')
  it.write('four\n')
  await it.end()
  expect(it.followed()).toBe(`one\ntwo\nthree\n${READ_AGAIN}three\nfour\n`)
})

test('of an unfinished line comes again what the engine may have lost: 16 KB', async () => {
  const it = open()
  const bar = 'progress\r'.repeat(10_000)
  it.write(bar)
  await expect.poll(it.followed).toBe(bar)
  await it.cut()
  it.write(`${bar}done\n`)
  await it.end()
  expect(it.followed()).toBe(`${bar}\n${READ_AGAIN}${bar.slice(-16 * 1024)}done\n`)
  expect(it.text()).toBe(`${bar}done\n`)
})

test('what was read stays when the engine has nothing, with the last line on a line of its own', async () => {
  const it = open()
  it.write('before')
  await expect.poll(it.followed).toBe('before')
  await it.cut()
  await it.end('the end may be missing\n')
  expect(it.text()).toBe('before\nthe end may be missing\n')
  expect(it.followed()).toBe('before\nthe end may be missing\n')
})
