/** What a restart of the service, or another instance's taking over, does to the logs of workers. */
import { describe, expect, test, vi } from 'vitest'
import type { Worker } from '../../src/core/ports.ts'
import { presets } from '../fakes/kubernetes/presets.ts'
import { openKubernetes, podOf } from '../helpers/kubernetes.ts'
import { NEVER, spec } from './contract.ts'

const SLOW_MS = 60_000
const OK = { reason: 'completed', exitCode: 0, signal: null, message: null }

/** As `expect.poll`, which tests that run together cannot use. */
const soon = (check: () => void | Promise<void>) =>
  vi.waitFor(check, { timeout: 20_000, interval: 10 })

const lines = (from: number, to: number) =>
  Array.from({ length: to - from }, (_, index) => `line ${from + index}\n`).join('')

/** A worker whose log is followed, and a service that can be restarted. */
async function startWorker({
  maxLogBytes = 50 * 2 ** 20,
  lastLogMs = 5_000,
}: {
  maxLogBytes?: number
  lastLogMs?: number
} = {}) {
  const harness = await openKubernetes({
    settings: { waits: { lastLogMs } },
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
    ...{ fake, pod, handle, tail },
    get worker() {
      return worker
    },
    say: (output: string) => handle.log(output),
    /** Waits until so much was read of the log in all. */
    read: (totalBytes: number) =>
      soon(async () => expect((await tail()).totalBytes).toBe(totalBytes)),
    /** `between` happens while nobody reads. */
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

describe.concurrent('a log that is read again after a restart', () => {
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

  test('whose beginning was rotated away: what is left, counted from its first byte', async () => {
    await using it = await startWorker()
    it.say(lines(0, 50))
    await it.read(lines(0, 50).length)
    it.fake.logs.rotate()
    it.say(lines(50, 100))
    await it.read(lines(0, 100).length)
    await it.restart(() => it.say(lines(100, 120)))
    await it.read(lines(50, 120).length)
    it.say(lines(120, 150))
    const left = lines(50, 150)
    expect(await it.follow(lines(50, 70).length, left.length)).toBe(lines(70, 150))
    expect(await it.ended()).toEqual(OK)
    expect(await it.tail()).toEqual({ text: left, totalBytes: left.length })
  })

  test('of which nothing is left: it is empty, until more comes', async () => {
    await using it = await startWorker()
    it.say(lines(0, 50))
    await it.read(lines(0, 50).length)
    await it.restart(() => it.fake.logs.rotate())
    expect(await it.tail()).toEqual({ text: '', totalBytes: 0 })
    it.say(lines(50, 60))
    expect(await it.ended()).toEqual(OK)
    expect(await it.tail()).toEqual({ text: lines(50, 60), totalBytes: lines(50, 60).length })
  })

  test('after the task has ended meanwhile: it is whole', async () => {
    await using it = await startWorker()
    it.say(lines(0, 10))
    await it.read(lines(0, 10).length)
    await it.restart(() => {
      it.say(lines(10, 30))
      it.handle.exit(0, { message: 'task 0\n' })
    })
    expect(await it.worker.completion(NEVER)).toEqual(OK)
    expect(await it.tail()).toEqual({ text: lines(0, 30), totalBytes: lines(0, 30).length })
    expect(await it.follow(lines(0, 15).length, Number.POSITIVE_INFINITY)).toBe(lines(15, 30))
  })

  test('counts what is left against its limit', async () => {
    const maxLogBytes = lines(0, 100).length
    await using it = await startWorker({ maxLogBytes })
    it.say(lines(0, 60))
    await it.read(lines(0, 60).length)
    await it.restart(() => it.fake.logs.rotate())
    it.say('!'.repeat(maxLogBytes - 1))
    it.say('\n')
    await it.read(maxLogBytes)
    expect(await it.worker.status()).toBe('Running')
    it.say('!\n')
    expect(await it.worker.completion(AbortSignal.timeout(20_000))).toMatchObject({
      reason: 'log_limit',
    })
  })

  test('amid a long line', async () => {
    await using it = await startWorker()
    const long = 'a'.repeat(100_000)
    it.say(long)
    await soon(async () => expect((await it.tail()).totalBytes).toBeGreaterThan(39_000))
    const { totalBytes } = await it.tail()
    await it.restart()
    const whole = `${long}${'c'.repeat(10_000)}\nshort\n`
    const following = it.follow(totalBytes, whole.length)
    it.say(`${'c'.repeat(10_000)}\nshort\n`)
    expect(await following).toBe(whole.slice(totalBytes))
    expect(await it.ended()).toEqual(OK)
    expect((await it.tail()).text === whole).toBe(true)
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
