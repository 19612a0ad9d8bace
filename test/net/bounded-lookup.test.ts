import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { describe, expect, test, vi } from 'vitest'
import { BoundedLookup, type Lookup, serverResponds } from '../../src/net/bounded-lookup.ts'

const ADDRESS = [{ address: '192.0.2.1', family: 4 }]
const isHung = (name: string) => name.startsWith('hung')

/** The system's lookup, with names that hold a thread until the test lets go. */
function system() {
  const held: Array<() => void> = []
  const asked: string[] = []
  const lookup: Lookup = (name, _options, done) => {
    asked.push(name)
    if (isHung(name)) held.push(() => done(null, ADDRESS))
    else setImmediate(() => done(null, ADDRESS))
  }
  return { held, asked, lookup }
}

describe('names whose server is silent', () => {
  test('sixty of them delay no other name, and hold two places', async () => {
    const { asked, lookup } = system()
    const names = new BoundedLookup({ lookup, responds: async (name) => !isHung(name) })
    const hung = Array.from({ length: 60 }, (_, index) => names.addresses(`hung-${index}.example`))
    const startedAt = performance.now()
    expect(await names.addresses('healthy.example')).toEqual(ADDRESS)
    expect(performance.now() - startedAt).toBeLessThan(5 * 1_000)
    expect(asked.filter(isHung)).toHaveLength(2)
    for (const one of hung) await expect(one).rejects.toMatchObject({ code: 'ETIMEOUT' })
  })

  test('are looked up in turn, and are an ordinary name once they are answered quickly', async () => {
    const { held, asked, lookup } = system()
    const responds = vi.fn(async (name: string) => !isHung(name))
    const names = new BoundedLookup({ lookup, responds })
    const three = [1, 2, 3].map((index) => names.addresses(`hung-${index}.example`))
    await expect.poll(() => held.length).toBe(2)
    held.shift()?.()
    await expect.poll(() => asked).toHaveLength(3)
    for (const end of held.splice(0)) end()
    expect(await Promise.all(three)).toEqual([ADDRESS, ADDRESS, ADDRESS])
    const again = names.addresses('hung-1.example')
    await expect.poll(() => held.length).toBe(1)
    expect(responds, 'was asked once for each').toHaveBeenCalledTimes(3)
    held.shift()?.()
    await again
  })

  test('are refused for the moment when too many of them wait', async () => {
    const { lookup } = system()
    const names = new BoundedLookup({ lookup, responds: async () => false })
    const waiting = Array.from({ length: 130 }, (_, index) =>
      names.addresses(`hung-${index}.example`),
    )
    await expect(names.addresses('hung.example')).rejects.toMatchObject({ code: 'EAI_AGAIN' })
    expect(await Promise.allSettled(waiting)).toHaveLength(130)
  })

  test('that worked before hold six places at most, and are asked for anew after that', async () => {
    const { held, asked, lookup } = system()
    const responds = vi.fn(async () => true)
    const names = new BoundedLookup({ lookup, responds })
    const many = Array.from({ length: 10 }, (_, index) => names.addresses(`hung-${index}.example`))
    await expect.poll(() => held.length).toBe(6)
    expect(asked).toHaveLength(6)
    expect((await Promise.allSettled(many)).map(({ status }) => status)).toEqual(
      Array(10).fill('rejected'),
    )
    while (asked.length < 10) {
      held.shift()?.()
      await new Promise(setImmediate)
    }
    responds.mockClear()
    names.addresses('hung-0.example').catch(() => {})
    expect(responds).toHaveBeenCalledOnce()
  })
})

test('errors of the system are handed on', async () => {
  const lookup: Lookup = (_name, _options, done) =>
    done(Object.assign(new Error('no'), { code: 'ENOTFOUND' }), [])
  const names = new BoundedLookup({ lookup, responds: async () => true })
  await expect(names.addresses('a.example')).rejects.toMatchObject({ code: 'ENOTFOUND' })
})

describe('a name server', () => {
  async function server(answer: (query: Buffer) => Buffer | undefined) {
    const socket = createSocket('udp4')
    socket.on('message', (query, { port, address }) => {
      const answered = answer(query)
      if (answered) socket.send(answered, port, address)
    })
    socket.bind(0, '127.0.0.1')
    await once(socket, 'listening')
    return { responds: serverResponds([`127.0.0.1:${socket.address().port}`]), socket }
  }
  /** RFC 1035, section 4.1.1: the query as an answer, with this code. */
  const withCode = (query: Buffer, code: number) => {
    const answer = Buffer.from(query)
    answer[2] = 0x81
    answer[3] = 0x80 | code
    return answer
  }

  test.each([
    ['there is no such name', 3],
    ['it has failed', 2],
    ['it has no address', 0],
  ])('that says %s has answered', async (_what, code) => {
    const { responds, socket } = await server((query) => withCode(query, code))
    expect(await responds('a.example')).toBe(true)
    socket.close()
  })

  test('that says nothing has not', async () => {
    const { responds, socket } = await server(() => undefined)
    expect(await responds('a.example')).toBe(false)
    socket.close()
  })
})
