import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { LogRing } from '../../src/workers/log-ring.ts'
import { NEVER } from './contract.ts'

const capacities = fc.integer({ min: 1, max: 20_000 })
/** Many small ones, some larger than the ring or than what a follower is given at once. */
const pieces = fc.array(
  fc.oneof(
    { weight: 4, arbitrary: fc.integer({ min: 0, max: 40 }) },
    { weight: 2, arbitrary: fc.integer({ min: 1_000, max: 9_000 }) },
    { weight: 1, arbitrary: fc.integer({ min: 60_000, max: 150_000 }) },
  ),
  { maxLength: 30 },
)

/** A log in which no two places look the same, cut into these pieces. */
function logOf(sizes: readonly number[]): { whole: Buffer; cut: Buffer[] } {
  const whole = Buffer.alloc(sizes.reduce((sum, size) => sum + size, 0))
  for (let at = 0; at < whole.length; at += 1) whole[at] = (at * 31 + (at >> 8) * 17) % 251
  let from = 0
  const cut = sizes.map((size) => {
    from += size
    return whole.subarray(from - size, from)
  })
  return { whole, cut }
}

async function rest(following: AsyncGenerator<Buffer>): Promise<Buffer> {
  const chunks: Buffer[] = []
  for await (const chunk of following) chunks.push(chunk)
  return Buffer.concat(chunks)
}

describe('LogRing', () => {
  test('whatever comes, the tail is the last bytes, as many as asked for and kept', () => {
    fc.assert(
      fc.property(capacities, pieces, fc.nat(200_000), (capacity, sizes, maxBytes) => {
        const ring = new LogRing(capacity)
        const { whole, cut } = logOf(sizes)
        for (const piece of cut) ring.append(piece)
        const { content, totalBytes } = ring.tail(maxBytes)
        expect(totalBytes).toBe(whole.length)
        expect(ring.totalBytes).toBe(whole.length)
        const kept = Math.min(maxBytes, capacity, whole.length)
        expect(content.equals(whole.subarray(whole.length - kept))).toBe(true)
      }),
    )
  })

  test('whatever comes after, a tail stays what it was', () => {
    const ring = new LogRing(10)
    ring.append(Buffer.from('0123456789'))
    const { content } = ring.tail(10)
    ring.append(Buffer.from('abcdefghij'))
    expect(content.toString()).toBe('0123456789')
  })

  test('a follower gets each byte from its offset on once, if it keeps up', async () => {
    await fc.assert(
      fc.asyncProperty(pieces, fc.nat(5_000), async (sizes, from) => {
        const ring = new LogRing(200_000)
        const { whole, cut } = logOf(sizes)
        const following = ring.follow(from, NEVER)
        const got: Buffer[] = []
        let bytes = 0
        for (const piece of cut) {
          ring.append(piece)
          while (from + bytes < ring.totalBytes) {
            const { value } = await following.next()
            got.push(value as Buffer)
            bytes += (value as Buffer).length
          }
        }
        ring.end()
        expect(await following.next()).toEqual({ done: true, value: undefined })
        expect(Buffer.concat(got).equals(whole.subarray(from))).toBe(true)
      }),
    )
  })

  test('a follower that comes late gets what is kept, from its offset on', async () => {
    await fc.assert(
      fc.asyncProperty(capacities, pieces, fc.nat(50_000), async (capacity, sizes, from) => {
        const ring = new LogRing(capacity)
        const { whole, cut } = logOf(sizes)
        for (const piece of cut) ring.append(piece)
        ring.end()
        const start = Math.max(from, whole.length - capacity)
        const got = await rest(ring.follow(from, NEVER))
        expect(got.equals(whole.subarray(start))).toBe(true)
      }),
    )
  })

  test('a slow follower misses what was overwritten, and nothing else', async () => {
    const ring = new LogRing(8)
    const following = ring.follow(0, NEVER)
    ring.append(Buffer.from('abcd'))
    expect((await following.next()).value?.toString()).toBe('abcd')
    ring.append(Buffer.from('efghijkl'))
    ring.append(Buffer.from('mn'))
    ring.end()
    // 14 bytes so far, of which it had 4, and the ring has the last 8.
    expect((await rest(following)).toString()).toBe('ghijklmn')
  })

  test('a follower that waits is told what comes, and the end', async () => {
    const ring = new LogRing(8)
    const following = ring.follow(0, NEVER)
    const first = following.next()
    ring.append(Buffer.from('ab'))
    expect((await first).value?.toString()).toBe('ab')
    const last = following.next()
    ring.end()
    ring.end()
    expect(await last).toEqual({ done: true, value: undefined })
    expect(ring.isEnded).toBe(true)
  })

  test('a follower whose signal aborts ends, waiting or not', async () => {
    const ring = new LogRing(8)
    const leave = new AbortController()
    const following = ring.follow(0, leave.signal)
    const waiting = following.next()
    leave.abort()
    expect(await waiting).toEqual({ done: true, value: undefined })
    ring.append(Buffer.from('ab'))
    expect(await rest(ring.follow(0, leave.signal))).toHaveLength(0)
    expect((await ring.follow(0, NEVER).next()).value?.toString()).toBe('ab')
  })

  test('an offset that is not reached yet waits for it', async () => {
    const ring = new LogRing(8)
    const following = ring.follow(3, NEVER)
    const first = following.next()
    ring.append(Buffer.from('ab'))
    ring.append(Buffer.from('cdef'))
    expect((await first).value?.toString()).toBe('def')
    await following.return()
  })
})
