import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import type { CallbackPayload } from '../../src/core/ports.ts'
import { callbackSchema, encodeCallback } from '../../src/wire/callback.ts'
import { logText } from '../../src/wire/log-text.ts'
import { storedLog } from '../helpers/stored-log.ts'

/** The piece length of `encodeCallback`: borders are tried around its multiples. */
const PIECE = 64 * 1024

function payload(content: Buffer, overrides: Partial<CallbackPayload> = {}): CallbackPayload {
  const logs = storedLog(content)
  return { taskName: 'a.sh', taskId: 'an id', success: true, logs, ...overrides }
}

async function expected({ taskName, taskId, success, logs }: CallbackPayload): Promise<Buffer> {
  const text = logText(await logs.read())
  return Buffer.from(JSON.stringify({ task_name: taskName, task_id: taskId, success, logs: text }))
}

/** What a reader gets, which is what was looked at. */
async function bodyOf(wanted: CallbackPayload): Promise<Buffer> {
  const seen: Buffer[] = []
  const body = await encodeCallback(wanted, (piece) => seen.push(piece))
  for (const _ of ['first reader', 'second reader']) {
    const read = body.read()
    const whole = Buffer.isBuffer(read) ? read : Buffer.concat(await read.toArray())
    expect(whole.length).toBe(body.length)
    expect(whole.equals(Buffer.concat(seen))).toBe(true)
  }
  return Buffer.concat(seen)
}

/** Compares without printing megabytes. */
async function isSame(wanted: CallbackPayload): Promise<boolean> {
  return (await bodyOf(wanted)).equals(await expected(wanted))
}

describe('encodeCallback', () => {
  test('it has exactly the four fields', async () => {
    expect((await bodyOf(payload(Buffer.from('hi\n')))).toString()).toBe(
      '{"task_name":"a.sh","task_id":"an id","success":true,"logs":"hi\\n"}',
    )
  })

  test('for any log and any names it is what JSON.stringify gives, byte for byte', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.uint8Array({ maxLength: 300 }),
        fc.string({ unit: 'binary' }),
        fc.string(),
        fc.boolean(),
        fc.nat(3),
        async (bytes, taskName, taskId, success, cut) => {
          const content = Buffer.from(bytes)
          const logs = storedLog(content, bytes.length + cut)
          const wanted = payload(content, { taskName, taskId, success, logs })
          expect(await isSame(wanted)).toBe(true)
          const parsed: unknown = JSON.parse((await bodyOf(wanted)).toString())
          expect(callbackSchema.parse(parsed).logs).toBe(logText(await logs.read()))
        },
      ),
      { numRuns: 300 },
    )
  })

  test.each([-2, -1, 0, 1, 2])(
    'a character of four bytes, %i bytes from the border of two pieces stays whole',
    async (offset) => {
      const text = `${'a'.repeat(PIECE + offset)}😀${'b'.repeat(PIECE)}😀😀`
      expect(await isSame(payload(Buffer.from(text)))).toBe(true)
    },
  )

  test('a log of nothing but surrogate pairs stays whole, whatever stands before', async () => {
    for (const start of ['', 'a']) {
      expect(await isSame(payload(Buffer.from(start + '😀'.repeat(PIECE * 2))))).toBe(true)
    }
  })

  test('5 MB of coloured log, or of any bytes, are encoded as one would be', async () => {
    const coloured = Buffer.alloc(5 * 1024 * 1024, '\u001b[31m"é😀"\\\u001b[0m\r\n')
    const any = Buffer.alloc(1024 * 1024, Buffer.from(Array.from({ length: 256 }, (_, i) => i)))
    expect(await isSame(payload(coloured))).toBe(true)
    expect(await isSame(payload(any))).toBe(true)
  })

  test('a large log lets others have their turn', async () => {
    let turns = 0
    let isDone = false
    const count = () => {
      turns += 1
      if (!isDone) setImmediate(count)
    }
    setImmediate(count)
    await encodeCallback(payload(Buffer.alloc(5 * 1024 * 1024, '\u001b[31mx')))
    isDone = true
    expect(turns).toBeGreaterThan(20)
  })
})
