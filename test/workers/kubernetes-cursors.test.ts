/** What a restart of the service, or another instance's taking over, does to the logs of workers. */
import { describe, expect, test, vi } from 'vitest'
import type { LogCursors, Worker } from '../../src/core/ports.ts'
import { LogCursor } from '../../src/workers/kubernetes/log-cursor.ts'
import { presets } from '../fakes/kubernetes/presets.ts'
import { openKubernetes, podOf } from '../helpers/kubernetes.ts'
import { QUIET } from '../helpers/stores.ts'
import { NEVER, spec } from './contract.ts'

const SLOW_MS = 60_000
const OK = { reason: 'completed', exitCode: 0, signal: null, message: null }

/** As `expect.poll`, which tests that run together cannot use. */
const soon = (check: () => void | Promise<void>) =>
  vi.waitFor(check, { timeout: 20_000, interval: 10 })

const lines = (from: number, to: number) =>
  Array.from({ length: to - from }, (_, index) => `line ${from + index}\n`).join('')

class MemoryCursors implements LogCursors {
  readonly kept = new Map<string, string>()
  fails = false

  async read(taskId: string): Promise<string | undefined> {
    if (this.fails) throw new Error('the disk is full')
    return this.kept.get(taskId)
  }

  async write(taskId: string, cursor: string): Promise<void> {
    if (this.fails) throw new Error('the disk is full')
    this.kept.set(taskId, cursor)
  }
}

/** A worker whose log is followed, and a service that can be restarted. */
async function startWorker({
  maxLogBytes = 50 * 2 ** 20,
  cursorMs = SLOW_MS,
  lastLogMs = 5_000,
}: {
  maxLogBytes?: number
  /** By default no cursor is written until the service stops. */
  cursorMs?: number
  lastLogMs?: number
} = {}) {
  const cursors = new MemoryCursors()
  const warnings: string[] = []
  const harness = await openKubernetes({
    settings: {
      logCursors: cursors,
      log: { ...QUIET, warn: (_, message) => warnings.push(message) },
      waits: { logCursorMs: cursorMs, lastLogMs },
    },
    fake: { behave: () => presets.runs() },
  })
  const { fake } = harness
  const wanted = spec('true', { maxLogBytes })
  let worker: Worker = await harness.backend.provision(wanted, NEVER)
  const pod = await podOf(fake, wanted.name)
  const handle = fake.kubelet.handle(pod)
  const tail = async () => {
    const { content, totalBytes } = await worker.logs({ maxBytes: 2 ** 23 })
    return { text: content.toString(), totalBytes }
  }
  return {
    ...{ fake, pod, cursors, warnings, handle, tail },
    taskId: wanted.taskId,
    get worker() {
      return worker
    },
    say: (output: string) => handle.log(output),
    /** Waits until so much was read of the log in all. */
    read: (totalBytes: number) =>
      soon(async () => expect((await tail()).totalBytes).toBe(totalBytes)),
    /** What has to be in the store, or to be rotated away, before anybody reads on is done by `between`. */
    async restart(between: () => void | Promise<void> = () => {}) {
      const backend = await harness.reopen()
      await between()
      // Holds: nobody has removed it.
      worker = (await backend.find(wanted.name)) as Worker
    },
    /** What a follower gets from this offset on, until the log has been read to `to`. */
    async follow(from: number, to: number): Promise<string> {
      const got: Buffer[] = []
      let at = from
      for await (const bytes of worker.follow({ from, signal: AbortSignal.timeout(20_000) })) {
        got.push(bytes)
        at += bytes.length
        if (at >= to) break
      }
      return Buffer.concat(got).toString()
    },
    async ended(exitCode = 0) {
      handle.exit(exitCode, { message: `task ${exitCode}\n` })
      return worker.completion(AbortSignal.timeout(20_000))
    },
    [Symbol.asyncDispose]: () => harness[Symbol.asyncDispose](),
  }
}

describe.concurrent('a log that is read on after a restart', () => {
  test('whose beginning was rotated away: what is left, and where it lies, to the byte', async () => {
    await using it = await startWorker()
    it.say(lines(0, 50))
    await it.read(lines(0, 50).length)
    it.fake.logs.rotate()
    it.say(lines(50, 100))
    await it.read(lines(0, 100).length)
    await it.restart(() => it.say(lines(100, 120)))
    const offset = lines(0, 70).length
    const following = it.follow(offset, lines(0, 150).length)
    await it.read(lines(0, 120).length)
    it.say(lines(120, 150))
    expect(await following).toBe(lines(70, 150))
    expect(await it.ended()).toEqual(OK)
    const whole = lines(0, 150)
    expect(await it.tail()).toEqual({ text: lines(50, 150), totalBytes: whole.length })
  })

  test('of which nothing is left: it is counted on', async () => {
    await using it = await startWorker()
    it.say(lines(0, 50))
    await it.read(lines(0, 50).length)
    const offset = lines(0, 50).length
    await it.restart(() => it.fake.logs.rotate())
    expect(await it.tail()).toEqual({ text: '', totalBytes: offset })
    const following = it.follow(offset, lines(0, 60).length)
    it.say(lines(50, 60))
    expect(await following).toBe(lines(50, 60))
    expect(await it.ended()).toEqual(OK)
    expect(await it.tail()).toEqual({ text: lines(50, 60), totalBytes: lines(0, 60).length })
  })

  test('of which all is left, again and again', async () => {
    await using it = await startWorker()
    for (let round = 0; round < 4; round += 1) {
      it.say(lines(round * 10, round * 10 + 10))
      const whole = lines(0, round * 10 + 10)
      await it.read(whole.length)
      await it.restart()
      expect(await it.tail()).toEqual({ text: whole, totalBytes: whole.length })
      expect(await it.follow(20, whole.length)).toBe(whole.slice(20))
    }
    expect(await it.ended()).toEqual(OK)
    expect(await it.tail()).toEqual({ text: lines(0, 40), totalBytes: lines(0, 40).length })
  })

  test('whose cursor is behind what was told: offsets are those of before', async () => {
    await using it = await startWorker()
    it.say(lines(0, 30))
    await it.read(lines(0, 30).length)
    it.fake.logs.rotate()
    it.say(lines(30, 50))
    await it.read(lines(0, 50).length)
    await it.restart()
    const behind = it.cursors.kept.get(it.taskId) ?? ''
    it.say(lines(50, 100))
    await it.read(lines(0, 100).length)
    const offset = lines(0, 90).length
    await it.restart(() => {
      expect(it.cursors.kept.get(it.taskId)).not.toBe(behind)
      it.cursors.kept.set(it.taskId, behind)
    })
    const following = it.follow(offset, lines(0, 101).length)
    await it.read(lines(0, 100).length)
    it.say(lines(100, 101))
    expect(await following).toBe(lines(90, 101))
    const totalBytes = lines(0, 101).length
    expect(await it.tail()).toEqual({ text: lines(30, 101), totalBytes })
  })

  test('while the service was away, and ended: it is whole', async () => {
    await using it = await startWorker()
    it.say(lines(0, 10))
    await it.read(lines(0, 10).length)
    it.fake.logs.rotate()
    it.say(lines(10, 20))
    await it.read(lines(0, 20).length)
    await it.restart(() => {
      it.say(lines(20, 30))
      it.handle.exit(0, { message: 'task 0\n' })
    })
    expect(await it.worker.completion(NEVER)).toEqual(OK)
    expect(await it.tail()).toEqual({ text: lines(10, 30), totalBytes: lines(0, 30).length })
    expect(await it.follow(lines(0, 15).length, Number.POSITIVE_INFINITY)).toBe(lines(15, 30))
  })

  test('that cannot be read any more: it is as long as it was', async () => {
    await using it = await startWorker({ lastLogMs: 300 })
    it.say(lines(0, 10))
    await it.read(lines(0, 10).length)
    await it.restart(() => {
      it.fake.logs.unreachable.add(it.pod)
      it.handle.exit(0, { message: 'task 0\n' })
    })
    expect(await it.worker.completion(NEVER)).toEqual(OK)
    const { text, totalBytes } = await it.tail()
    expect(text).toMatch(/^\[task-runner\] The end of the log could not be read: /)
    expect(totalBytes).toBe(lines(0, 10).length + text.length)
  })

  test('counts all of it against its limit', async () => {
    const maxLogBytes = lines(0, 100).length
    await using it = await startWorker({ maxLogBytes })
    it.say(lines(0, 60))
    await it.read(lines(0, 60).length)
    await it.restart(() => it.fake.logs.rotate())
    it.say(lines(60, 100))
    await it.read(maxLogBytes)
    expect(await it.worker.status()).toBe('Running')
    it.say('!\n')
    expect(await it.worker.completion(AbortSignal.timeout(20_000))).toMatchObject({
      reason: 'log_limit',
    })
  })

  test.each([
    ['where its runtime cut it', Number.POSITIVE_INFINITY, 98_304],
    ['anywhere', 40_000, undefined],
  ])(
    'amid a long line, %s',
    async (_, cutAfterBytes, expected) => {
      await using it = await startWorker()
      const long = `${'a'.repeat(30_000)}${'b'.repeat(70_000)}`
      it.fake.faults.inject({ path: new RegExp(`${it.pod}/log$`), cutAfterBytes })
      for (const stream of it.fake.logs.streams) stream.cut()
      it.say(long)
      await soon(async () => expect((await it.tail()).totalBytes).toBeGreaterThan(39_000))
      if (expected) await it.read(expected)
      const { totalBytes } = await it.tail()
      await it.restart(() => {
        const { bytes, ...cursor } = JSON.parse(it.cursors.kept.get(it.taskId) ?? '')
        expect(bytes).toBe(cursor.totalBytes)
        expect(bytes).toBe(totalBytes)
        it.fake.faults.clear()
      })
      const whole = `${long}${'c'.repeat(10_000)}\nshort\n`
      const following = it.follow(totalBytes, whole.length)
      it.say(`${'c'.repeat(10_000)}\nshort\n`)
      expect(await following).toBe(whole.slice(totalBytes))
      expect(await it.ended()).toEqual(OK)
      expect((await it.tail()).text === whole).toBe(true)
    },
    SLOW_MS,
  )

  test('with lines of one and the same time: each is there once', async () => {
    await using it = await startWorker()
    it.say(lines(0, 5))
    it.fake.logs.stopped = true
    it.say(lines(5, 10))
    await it.read(lines(0, 10).length)
    await it.restart(() => it.say(lines(10, 15)))
    const following = it.follow(lines(0, 9).length, lines(0, 20).length)
    await it.read(lines(0, 15).length)
    it.fake.logs.stopped = false
    it.say(lines(15, 20))
    expect(await following).toBe(lines(9, 20))
    expect(await it.tail()).toEqual({ text: lines(0, 20), totalBytes: lines(0, 20).length })
  })

  test('that is cut, and rotated, while it is read: what is left has no hole', async () => {
    await using it = await startWorker()
    it.say(lines(0, 100))
    await it.read(lines(0, 100).length)
    const cut = { path: new RegExp(`${it.pod}/log$`), times: 1, cutAfterBytes: 2_000 }
    let fault: { hits: number } | undefined
    await it.restart(() => {
      fault = it.fake.faults.inject(cut)
    })
    const reading = it.tail()
    await soon(() => expect(fault?.hits).toBe(1))
    it.fake.logs.rotate()
    it.say(lines(100, 110))
    const totalBytes = lines(0, 110).length
    expect(await reading).toEqual({ text: lines(100, 110), totalBytes })
  })

  test('that its node cannot give at the moment is waited for, and not told to be empty', async () => {
    await using it = await startWorker()
    it.say(lines(0, 10))
    await it.read(lines(0, 10).length)
    const asked = () => it.fake.requests.filter(({ path }) => path.endsWith('/log')).length
    const before = asked()
    await it.restart(() => {
      it.fake.logs.unavailable.add(it.pod)
    })
    const tail = it.tail()
    await soon(() => expect(asked()).toBeGreaterThan(before + 1))
    it.fake.logs.unavailable.clear()
    expect(await tail).toEqual({ text: lines(0, 10), totalBytes: lines(0, 10).length })
  })

  test.each([
    ['no JSON', '{"time":"0017'],
    ['of another shape', '["a"]'],
    ['null', 'null'],
    ['with a time that is none', '{"time":"yesterday","count":1,"bytes":7,"totalBytes":7}'],
    ['with numbers that are none', `{"time":"${time(0)}","count":1,"bytes":"7","totalBytes":7}`],
    ['with fractions', `{"time":"${time(0)}","count":1,"bytes":7,"totalBytes":7.5}`],
    ['with less than nothing', `{"time":"${time(0)}","count":1,"bytes":7,"totalBytes":-7}`],
  ])('whose cursor is %s: as if there were none, and a warning', async (_, garbled) => {
    await using it = await startWorker()
    it.say(lines(0, 10))
    await it.read(lines(0, 10).length)
    await it.restart(() => {
      it.cursors.kept.set(it.taskId, garbled)
    })
    await it.read(lines(0, 10).length)
    expect(it.warnings.filter((message) => /cursor cannot be used/.test(message))).toHaveLength(1)
    expect(await it.ended()).toEqual(OK)
    expect(await it.tail()).toEqual({ text: lines(0, 10), totalBytes: lines(0, 10).length })
  })

  test('whose cursor says less than there is: the last bytes of it', async () => {
    await using it = await startWorker()
    it.say(lines(0, 10))
    await it.read(lines(0, 10).length)
    await it.restart(() => {
      const cursor = JSON.parse(it.cursors.kept.get(it.taskId) ?? '')
      it.cursors.kept.set(it.taskId, JSON.stringify({ ...cursor, totalBytes: 14 }))
    })
    expect(await it.tail()).toEqual({ text: lines(8, 10), totalBytes: 14 })
    it.say('more\n')
    expect(await it.ended()).toEqual(OK)
    expect(await it.tail()).toEqual({ text: `${lines(8, 10)}more\n`, totalBytes: 19 })
  })

  test('with a store that fails: its task is none the worse', async () => {
    await using it = await startWorker({ cursorMs: 20 })
    it.cursors.fails = true
    it.say(lines(0, 10))
    await soon(() => expect(it.warnings).toContain('a log cursor could not be written'))
    await it.restart()
    it.say(lines(10, 20))
    await it.read(lines(0, 20).length)
    expect(it.warnings.some((message) => /cursor cannot be used/.test(message))).toBe(true)
    it.cursors.fails = false
    it.say(lines(20, 30))
    // From now on it is kept again.
    await soon(() =>
      expect(JSON.parse(it.cursors.kept.get(it.taskId) ?? '{}').totalBytes).toBe(
        lines(0, 30).length,
      ),
    )
    expect(await it.ended()).toEqual(OK)
    expect(await it.tail()).toEqual({ text: lines(0, 30), totalBytes: lines(0, 30).length })
  })

  test('once read to its end, has no cursor written any more: its task may be gone', async () => {
    await using it = await startWorker()
    it.say(lines(0, 10))
    await it.read(lines(0, 10).length)
    expect(await it.ended()).toEqual(OK)
    await it.restart()
    expect(it.cursors.kept.size).toBe(0)
  })

  test('the service stopping is no end of a log', async () => {
    await using it = await startWorker({ lastLogMs: SLOW_MS })
    it.say('said\n')
    await it.read(5)
    it.fake.logs.unreachable.add(it.pod)
    const asked = () => it.fake.requests.filter(({ path }) => path.endsWith('/log')).length
    const before = asked()
    const leave = new AbortController()
    let got = ''
    const following = (async () => {
      const { signal } = leave
      for await (const bytes of it.worker.follow({ from: 0, signal })) got += bytes.toString()
    })()
    it.handle.exit(0, { message: 'task 0\n' })
    await soon(() => expect(asked()).toBeGreaterThan(before + 1))
    await it.restart(() => it.fake.logs.unreachable.clear())
    leave.abort()
    await following
    expect(got).toBe('said\n')
    expect(await it.worker.completion(NEVER)).toEqual(OK)
    expect(await it.tail()).toEqual({ text: 'said\n', totalBytes: 5 })
  })
})

/** As a cursor has it. */
function time(seconds: number): string {
  return `${String(seconds).padStart(12, '0')}.000000000`
}

describe('a cursor', () => {
  const position = (totalBytes: number) => ({ time: time(9), count: 1, bytes: 1, totalBytes })

  function startCursor(write: (text: string) => Promise<void> = async () => {}) {
    const written: number[] = []
    const cursor = new LogCursor({
      cursors: {
        read: async () => undefined,
        write: (_, text) => {
          written.push(JSON.parse(text).totalBytes)
          return write(text)
        },
      },
      ...{ taskId: 't', log: QUIET },
    })
    return { cursor, written }
  }

  test('is written while the log moves, every two seconds, as it is then', async () => {
    vi.useFakeTimers()
    try {
      const { cursor, written } = startCursor()
      for (let at = 1; at <= 50; at += 1) {
        cursor.moved(position(at))
        await vi.advanceTimersByTimeAsync(100)
      }
      expect(written).toEqual([20, 40])
      await vi.advanceTimersByTimeAsync(60_000)
      expect(written).toEqual([20, 40, 50])
    } finally {
      vi.useRealTimers()
    }
  })

  test('is written at once when the log is let go, unless it has not moved', async () => {
    const { cursor, written } = startCursor()
    await cursor.flush()
    cursor.moved(position(1))
    await cursor.flush()
    await cursor.flush()
    expect(written).toEqual([1])
  })

  test('is never overtaken by one before it, and all are waited for', async () => {
    const slow = Promise.withResolvers<void>()
    const { cursor, written } = startCursor(() => slow.promise)
    cursor.moved(position(1))
    const first = cursor.flush()
    await vi.waitFor(() => expect(written).toEqual([1]), 10_000)
    cursor.moved(position(2))
    let isOver = false
    const second = cursor.flush().then(() => {
      isOver = true
    })
    await new Promise(setImmediate)
    expect(written).toEqual([1])
    expect(isOver).toBe(false)
    slow.resolve()
    await Promise.all([first, second])
    expect(written).toEqual([1, 2])
  })

  test('that is dropped is not written', async () => {
    const { cursor, written } = startCursor()
    cursor.moved(position(1))
    cursor.drop()
    await cursor.flush()
    expect(written).toEqual([])
  })
})
