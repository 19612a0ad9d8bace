/** A log that is read again, of an engine that may have lost what it had not stored. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { LogRereader } from '../../src/workers/docker/log-rereader.ts'
import { LogRing } from '../../src/workers/log-ring.ts'

const PIECE_BYTES = 16 * 1024
const RING_BYTES = 6 * 2 ** 20

/** An engine that hands on what a container writes as it comes, and stores it by lines, or pieces of long ones. */
function startEngine() {
  const ring = new LogRing(RING_BYTES)
  const rereader = new LogRereader(ring)
  const written: Buffer[] = []
  let stored = Buffer.alloc(0)
  let line = Buffer.alloc(0)
  let isAttached = true
  return {
    ring,
    log: () => ring.tail(RING_BYTES).content.toString(),
    written: () => Buffer.concat(written).toString(),
    stored: () => stored.toString(),
    write(text: string) {
      const bytes = Buffer.from(text)
      written.push(bytes)
      if (isAttached) ring.append(bytes)
      line = Buffer.concat([line, bytes])
      const whole: Buffer[] = []
      for (;;) {
        const end = line.indexOf('\n') + 1
        const length = end > 0 && end <= PIECE_BYTES ? end : PIECE_BYTES
        if (line.length < length || (end === 0 && line.length < PIECE_BYTES)) break
        whole.push(line.subarray(0, length))
        line = line.subarray(length)
      }
      stored = Buffer.concat([stored, ...whole])
    },
    /** It is killed: what it has not stored is gone. Whoever attached has to read the log from now on. */
    kill() {
      line = Buffer.alloc(0)
      isAttached = false
    },
    /** `dropped`: bytes of the beginning that are not there any more. */
    async read({ pieceBytes = 1000, dropped = 0 } = {}) {
      async function* pieces() {
        for (let at = dropped; at < stored.length; at += pieceBytes) {
          yield stored.subarray(at, at + pieceBytes)
        }
      }
      for await (const piece of rereader.unseen(pieces())) ring.append(piece)
    },
  }
}

describe('a log that is read again', () => {
  test.each([1, 3, 1000])(
    'by %d bytes goes on with the rest of a line whose beginning is lost',
    async (pieceBytes) => {
      const engine = startEngine()
      engine.write('one\ntwo, be')
      engine.kill()
      engine.write('gun before\nthree\n')
      expect(engine.stored()).toBe('one\ngun before\nthree\n')
      await engine.read({ pieceBytes })
      expect(engine.log()).toBe('one\ntwo, begun before\nthree\n')
      engine.write('four\n')
      await engine.read({ pieceBytes })
      expect(engine.log()).toBe(engine.written())
    },
  )

  test('takes nothing of the rest for what was lost because they begin alike', async () => {
    const engine = startEngine()
    engine.write('one\nprogress 10 %')
    engine.kill()
    engine.write('progress 20 %\n')
    await engine.read()
    expect(engine.log()).toBe('one\nprogress 10 %progress 20 %\n')
  })

  test('has no line twice that is not lost', async () => {
    const engine = startEngine()
    engine.write('same\nsame\nsa')
    engine.write('me\nsame\n')
    engine.kill()
    for (let times = 0; times < 3; times += 1) {
      await engine.read()
      expect(engine.log()).toBe('same\n'.repeat(4))
    }
  })

  test('goes on in a line of any length where the stored one does', async () => {
    const engine = startEngine()
    const words = (from: number) =>
      Array.from({ length: 5_000 }, (_, index) => `${from + index} `).join('')
    engine.write(`before\n${words(10_000)}`)
    engine.kill()
    engine.write(`${words(20_000)}\n`)
    await engine.read()
    expect(engine.log()).toBe(engine.written())
  })

  test('goes on where its beginning was dropped, too', async () => {
    const engine = startEngine()
    const line = (index: number) => `${String(index).padStart(99, '0')}\n`
    for (let index = 0; index < 55; index += 1) {
      engine.write(Array.from({ length: 1_000 }, (_, at) => line(index * 1_000 + at)).join(''))
    }
    engine.write('and begun ')
    engine.kill()
    engine.write('and ended\n')
    await engine.read({ pieceBytes: 50_000, dropped: 3_000_000 })
    expect(engine.log()).toBe(engine.written())
  })

  test('is whole, whatever is written and wherever the engine is killed for the first time', async () => {
    const writes = fc.array(fc.nat({ max: 40 }), { maxLength: 30 })
    await fc.assert(
      fc.asyncProperty(
        writes,
        writes,
        fc.integer({ min: 1, max: 50 }),
        async (before, after, pieceBytes) => {
          const engine = startEngine()
          let word = 0
          // No two places look the same; 0 ends the line.
          const write = (length: number) => {
            word += 1
            engine.write(length === 0 ? '\n' : `<${word}${'.'.repeat(length)}>`)
          }
          before.forEach(write)
          engine.kill()
          await engine.read({ pieceBytes })
          after.forEach(write)
          engine.write('\n')
          await engine.read({ pieceBytes })
          expect(engine.log()).toBe(engine.written())
        },
      ),
    )
  })
})
