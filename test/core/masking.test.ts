import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdtemp, rename, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Masker, maskedTail } from '../../src/core/masking.ts'
import type { Worker } from '../../src/core/ports.ts'
import { encodedForGit } from '../../src/core/worker-setup.ts'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'

/** Five times what was measured, for machines that are busy. */
const TOTAL_MS_MAX = 2_000
/** Five times what anybody may be held up by one piece of work. */
const LOOP_MS_MAX = 100
const POLL = { timeout: 20_000, interval: 20 }

/** Of few letters, so that values overlap each other and themselves all the time. */
const letters = (options: { minLength?: number; maxLength?: number }) =>
  fc.string({ unit: fc.constantFrom('a', 'b'), ...options })
const values = fc.array(letters({ minLength: 6, maxLength: 9 }), { minLength: 1, maxLength: 12 })
const pieces = fc.array(letters({ maxLength: 12 }), { maxLength: 8 })

describe('masking', () => {
  test('a text that comes in pieces is masked like the whole', () => {
    fc.assert(
      fc.property(values, pieces, (secrets, parts) => {
        const masker = new Masker(secrets)
        expect(streamed(masker, parts)).toBe(masker.mask(Buffer.from(parts.join(''))).toString())
      }),
      { numRuns: 2_000 },
    )
  })

  test('no value survives, overlapping ones included', () => {
    fc.assert(
      fc.property(values, pieces, (secrets, parts) => {
        const masker = new Masker(secrets)
        const whole = masker.mask(Buffer.from(parts.join(''))).toString()
        for (const text of [whole, streamed(masker, parts)]) {
          for (const secret of secrets) expect(text).not.toContain(secret)
        }
      }),
      { numRuns: 2_000 },
    )
  })

  test('exactly the bytes of values are gone, and everything else is kept in its order', () => {
    fc.assert(
      fc.property(values, pieces, (secrets, parts) => {
        const text = parts.join('')
        const isSecret = Array.from(text, () => false)
        for (const secret of secrets) {
          for (let at = text.indexOf(secret); at >= 0; at = text.indexOf(secret, at + 1)) {
            isSecret.fill(true, at, at + secret.length)
          }
        }
        const kept = Array.from(text, (letter, at) => (isSecret[at] ? '' : letter)).join('')
        const masked = new Masker(secrets).mask(Buffer.from(text)).toString()
        expect(masked.replaceAll('***', '')).toBe(kept)
        expect(masked.includes('***')).toBe(isSecret.includes(true))
      }),
      { numRuns: 1_000 },
    )
  })

  test('bytes that are no text pass through as they are', () => {
    fc.assert(
      fc.property(fc.array(fc.uint8Array({ maxLength: 30 })), (parts) => {
        const masker = new Masker(['not-in-there-at-all'])
        const stream = masker.stream()
        const out = [...parts.map((part) => stream.push(Buffer.from(part))), stream.flush()]
        expect(Buffer.concat(out)).toEqual(Buffer.concat(parts))
      }),
    )
  })

  test.each([
    ['Python writes JSON', 'import json, sys; print(json.dumps({"a": sys.argv[1]}))'],
    [
      'Python writes JSON beyond ASCII',
      'import json, sys; print(json.dumps(sys.argv[1], ensure_ascii=False))',
    ],
    [
      'Python quotes a URL',
      'import sys, urllib.parse as u; print(u.quote(sys.argv[1]), u.quote(sys.argv[1], safe=""))',
    ],
    [
      'Python writes a form',
      'import sys, urllib.parse as u; print(u.urlencode({"a": sys.argv[1]}))',
    ],
    [
      'Python writes base64',
      'import base64, sys\nfor n in range(4): t = ("x" * n + sys.argv[1] + "y" * n).encode(); print(base64.b64encode(t), base64.urlsafe_b64encode(t))',
    ],
  ])('a value is found as %s', (_how, script) => {
    for (const secret of [
      'hunter2hunter2',
      'S3cr3t "quoted" pass/word+x=\\y',
      'geheim-\u00fc\u{1f511}~',
    ]) {
      const printed = execFileSync('/usr/bin/python3', ['-c', script, secret]).toString()
      const masked = new Masker([secret]).mask(Buffer.from(printed)).toString()
      // What is left is known without the secret: names, quotes, and at most a letter of base64 on each side.
      expect(masked.split('***').length, masked).toBeGreaterThan(1)
      const bare = masked.replaceAll(/\*\*\*|[b"'{}: a=,\n]/g, '')
      expect(bare.length, masked).toBeLessThanOrEqual(script.includes('base64') ? 64 : 0)
      expect(masked).not.toContain(secret.slice(0, 6))
    }
  })

  test('a value is found as JavaScript, git and HTTP write it', () => {
    const secret = 'S3cr3t (quoted)! pass/word+x=\\y'
    const masked = (text: string) => new Masker([secret]).mask(Buffer.from(text)).toString()
    expect(masked(encodeURIComponent(secret))).toBe('***')
    expect(masked(`${new URLSearchParams({ a: secret })}`)).toBe('a=***')
    expect(masked(JSON.stringify({ a: secret }))).toBe('{"a":"***"}')
    expect(masked(encodedForGit(secret))).toBe('***')
    const basic = Buffer.from(`app:${secret}`).toString('base64')
    expect(masked(`Basic ${basic}`)).toMatch(/^Basic [A-Za-z0-9]{6}\*\*\*.{0,2}$/)
  })

  test('a value is found between bytes that are no text, and cut inside of a character', () => {
    const masker = new Masker(['geheim-\u00fc\u{1f511}'])
    const text = Buffer.concat([
      Buffer.from([0xff, 0xc3]),
      Buffer.from('geheim-\u00fc\u{1f511}'),
      Buffer.from([0x80, 0]),
    ])
    const expected = Buffer.concat([
      Buffer.from([0xff, 0xc3]),
      Buffer.from('***'),
      Buffer.from([0x80, 0]),
    ])
    expect(masker.mask(text)).toEqual(expected)
    for (let cut = 0; cut <= text.length; cut += 1) {
      const stream = masker.stream()
      const out = [text.subarray(0, cut), text.subarray(cut)].map((part) => stream.push(part))
      expect(Buffer.concat([...out, stream.flush()]), `cut at ${cut}`).toEqual(expected)
    }
  })

  test('values shorter than six bytes are no secrets', () => {
    const masker = new Masker(['', 'a', 'abcde', null])
    expect(masker.mask(Buffer.from('abcde a')).toString()).toBe('abcde a')
    expect(masker.overlapBytes).toBe(0)
    expect(streamed(masker, ['abc', 'de'])).toBe('abcde')
    // Bytes, not characters.
    expect(
      new Masker(['\u00fc\u00fc\u00fc']).mask(Buffer.from('\u00fc\u00fc\u00fc')).toString(),
    ).toBe('***')
    expect(new Masker(['abcdef']).mask(Buffer.from('abcdef')).toString()).toBe('***')
  })

  test('what is held back is at most a value less one byte, and comes out at the end', () => {
    fc.assert(
      fc.property(values, pieces, (secrets, parts) => {
        const masker = new Masker(secrets)
        const stream = masker.stream()
        for (const part of parts) {
          stream.push(Buffer.from(part))
          expect(stream.heldBytes()).toBeGreaterThanOrEqual(0)
          expect(stream.heldBytes()).toBeLessThanOrEqual(masker.overlapBytes)
        }
        stream.flush()
        expect(stream.heldBytes()).toBe(0)
      }),
      { numRuns: 1_000 },
    )
  })
})

describe('masking costs the same whatever a log and the values hold', () => {
  const MEGABYTE = 1024 * 1024
  const letterA = Buffer.alloc(5 * MEGABYTE, 'a')
  /** As `ssh-keygen -t rsa` writes them. */
  const sshKeys = Array.from({ length: 10 }, () => {
    const base64 = randomBytes(1_600).toString('base64')
    const lines = base64.match(/.{1,90}/g) ?? []
    return ['-----BEGIN OPENSSH PRIVATE KEY-----', ...lines, '-----END-----'].join('\n')
  })
  const usual = Buffer.from(
    Array.from(
      { length: 60_000 },
      (_, line) => `2026-01-05T08:00:00Z INFO worker-${line % 7} handled request ${line} in 12 ms`,
    ).join('\n'),
  )
  const manyRuns = Buffer.from('abcdef'.repeat(870_000))
  const endsOtherwise = `${'a'.repeat(8_191)}b`

  test.each([
    ['a token of 6 letters in a log of the same letter', ['aaaaaa'], letterA, '***'],
    ['a token of 8,192 of them', ['a'.repeat(8_192)], letterA, '***'],
    ['a token that almost matches everywhere', [endsOtherwise], letterA, letterA],
    ['200 values that begin alike', alike(200), letterA, letterA],
    ['values within each other', nested(64), letterA, '***'],
    ['ten ssh keys in a usual log', sshKeys, usual, usual],
    ['a value over and over', ['abcdef'], manyRuns, '***'.repeat(870_000)],
  ])('%s', async (_name, secrets, text, expected) => {
    const masker = new Masker(secrets)
    const startedAt = performance.now()
    const masked = await masker.maskLong(text)
    expect(performance.now() - startedAt).toBeLessThan(TOTAL_MS_MAX)
    expect(masked.equals(Buffer.from(expected))).toBe(true)
  })

  test('others wait for one piece of work, however many logs are masked at once', async () => {
    const masker = new Masker(['aaaaaa', ...sshKeys])
    const loop = monitorEventLoopDelay({ resolution: 1 })
    await masker.maskLong(letterA)
    loop.enable()
    const maskers = Array.from({ length: 10 }, (_, index) =>
      index % 2 === 0 ? masker : new Masker(sshKeys),
    )
    await Promise.all(maskers.map((each) => each.maskLong(letterA)))
    loop.disable()
    expect(loop.percentile(99) / 1e6).toBeLessThan(LOOP_MS_MAX)
  })
})

describe('the masked tail of a log', () => {
  test('a value across the cut is masked whole', async () => {
    const secret = 'secret-value'
    const text = `before ${secret} after`
    for (let maxBytes = 0; maxBytes <= text.length; maxBytes += 1) {
      const { log } = await maskedTail(workerWithLog(text), new Masker([secret]), maxBytes)
      const shown = log.content.toString()
      const cut = text.length - maxBytes
      const start = text.indexOf(secret)
      const end = start + secret.length
      if (cut <= start) expect(shown).toBe(text.slice(cut).replace(secret, '***'))
      else if (cut < end) expect(shown).toBe(`***${text.slice(end)}`)
      else expect(shown).toBe(text.slice(cut))
    }
  })

  test('shows no piece of a value at its beginning, wherever it is cut', async () => {
    await fc.assert(
      fc.asyncProperty(
        values,
        letters({ maxLength: 40 }),
        fc.nat(40),
        async (secrets, text, max) => {
          const masker = new Masker(secrets)
          const { log, rawBytes } = await maskedTail(workerWithLog(text), masker, max)
          const cut = Math.max(0, text.length - max)
          expect(log.content.toString()).toBe(tailByHand(text, cut, secrets))
          expect(rawBytes).toBe(text.length)
          // Nothing cut: the sizes agree, so that nothing claims to be missing.
          if (cut === 0) expect(log.totalBytes).toBe(log.content.length)
          else expect(log.totalBytes).toBeGreaterThan(log.content.length)
        },
      ),
      { numRuns: 2_000 },
    )
  })
})

describe('a task that prints its callback token', () => {
  const TOKEN = 'canary-token-0123456789-abcdefghij'

  test('in odd pieces: masked in the live log, the stream, the kept log and the callback', async () => {
    await using receiver = await startReceiver()
    await using task = await startPrinting({
      callback_url: receiver.url,
      callback_url_token: TOKEN,
    })
    const { app, id } = task
    const streaming = app.http.inject({ method: 'GET', url: `/tasks/${id}/logs?follow=true` })

    await task.print(`start\n${TOKEN.slice(0, 11)}`)
    await expect.poll(() => app.text(`/tasks/${id}/logs`), POLL).toContain('start\n')
    await task.print(TOKEN.slice(11, 12))
    await task.print(`${TOKEN.slice(12)}${TOKEN}${TOKEN}\n${TOKEN.slice(0, 5)}${TOKEN} between `)
    await expect.poll(() => app.text(`/tasks/${id}/logs`), POLL).toContain('between ')
    const shown = `start\n*********\n${TOKEN.slice(0, 5)}*** between `
    expect(await app.text(`/tasks/${id}/logs`)).toBe(shown)
    const { body: running } = await app.get(`/tasks/${id}`)
    expect(running.status).toBe('running')
    expect(await app.text(`/workers/${running.worker_name}/logs`)).toBe(shown)

    await task.print(TOKEN.slice(0, 20))
    await task.print(`${TOKEN.slice(20)} end\n`)
    await task.end()
    const whole = `${shown}*** end\n`
    const { body } = await receiver.callbackOf(id)
    expect(body.logs).toBe(whole)
    await app.finished(id)
    expect(await app.text(`/tasks/${id}/logs`)).toBe(whole)
    const { payload } = await streaming
    expect(textOf(payload)).toBe(whole)
    for (const text of [payload, body.logs]) expect(text).not.toContain(TOKEN)
  })

  test('and has printed half of it: the live log holds that half back', async () => {
    await using task = await startPrinting({ callback_url_token: TOKEN })
    await task.print(`start\n${TOKEN.slice(0, -1)}`)
    const log = () => task.app.text(`/tasks/${task.id}/logs`)
    await expect.poll(log, POLL).toContain('start\n')
    // Whoever reads this, and the rest a moment later, would have it whole.
    expect(await log()).toBe('start\n')
  })

  test('cannot be made to show it by a stream that begins inside of it', async () => {
    const before = 'some text before it '
    await using task = await startPrinting({ callback_url_token: TOKEN })
    await task.print(`${before}${TOKEN} and after`)
    await expect.poll(() => task.app.text(`/tasks/${task.id}/logs`), POLL).toContain('and after')
    const offsets = Array.from({ length: TOKEN.length - 1 }, (_, index) => index + 1)
    const streams = offsets.map((offset) =>
      task.app.http.inject({
        method: 'GET',
        url: `/tasks/${task.id}/logs?follow=true`,
        headers: { 'last-event-id': String(before.length + offset) },
      }),
    )
    await task.print('!')
    await task.end()
    for (const [index, { payload }] of (await Promise.all(streams)).entries()) {
      expect(payload).toContain('and after')
      // Six bytes are what counts as a secret.
      for (let at = offsets[index] ?? 0; at + 6 <= TOKEN.length; at += 1) {
        expect(payload, `from ${offsets[index]}`).not.toContain(TOKEN.slice(at, at + 6))
      }
    }
  })

  test('cannot be made to show it by a stream of a short tail of one long line', async () => {
    // 0.001 MB is 1,049 bytes: the tail begins in the middle of the token, and there is no line end.
    const after = 'x'.repeat(1_049 - 17)
    await using task = await startPrinting({ callback_url_token: TOKEN })
    await task.print(`${'y'.repeat(2_000)}${TOKEN}${after}`)
    await expect.poll(() => task.app.text(`/tasks/${task.id}/logs`), POLL).toContain(after)
    const streaming = task.app.http.inject({
      method: 'GET',
      url: `/tasks/${task.id}/logs?follow=true&tail_mb=0.001`,
    })
    // The stream has begun once this has been read by it.
    await task.print('z')
    await task.end()
    const { payload } = await streaming
    expect(payload).toContain('event: end')
    expect(payload).not.toContain(TOKEN.slice(-10))
    expect(await task.app.text(`/tasks/${task.id}/logs?tail_mb=0.001`)).not.toContain(
      TOKEN.slice(-10),
    )
  })

  test.each([
    ['with a callback', 'http://127.0.0.1:9/nobody'],
    ['without a callback', null],
  ])('and is kept for a look inside: masked in the log of its worker, %s', async (_, url) => {
    await using task = await startPrinting({
      callback_url: url,
      callback_url_token: TOKEN,
      terminate_on_completion: false,
    })
    await task.print(`it is ${TOKEN}\n`)
    await task.end()
    const { worker_name } = await task.app.finished(task.id)
    for (const path of [`/workers/${worker_name}/logs`, `/tasks/${task.id}/logs`]) {
      expect(await task.app.text(path), path).toBe('it is ***\n')
    }
    expect(textOf(await task.app.text(`/tasks/${task.id}/logs?follow=true`))).toBe('it is ***\n')
  })
})

/** So many values that differ in their last byte alone. */
function alike(count: number): string[] {
  return Array.from(
    { length: count },
    (_, index) => `${'a'.repeat(40)}${String.fromCharCode(256 + index)}`,
  )
}

/** Values of one letter, each longer than the one before. */
function nested(count: number): string[] {
  return Array.from({ length: count }, (_, index) => 'a'.repeat(6 + index))
}

function streamed(masker: Masker, parts: string[]): string {
  const stream = masker.stream()
  const out = parts.map((part) => stream.push(Buffer.from(part)))
  return Buffer.concat([...out, stream.flush()]).toString()
}

/** The plain way: runs of secret bytes become stars, counted from the cut on. */
function tailByHand(text: string, cut: number, secrets: string[]): string {
  const runs: Array<[number, number]> = []
  for (const secret of secrets) {
    for (let at = text.indexOf(secret); at >= 0; at = text.indexOf(secret, at + 1)) {
      runs.push([at, at + secret.length])
    }
  }
  let shown = ''
  let at = cut
  let end = -1
  for (const [from, to] of runs.sort(([a, x], [b, y]) => a - b || y - x)) {
    if (to <= cut) continue
    if (from < end) {
      end = Math.max(end, to)
    } else {
      shown += `${text.slice(at, Math.max(from, cut))}***`
      end = to
    }
    at = Math.max(at, end)
  }
  return shown + text.slice(at)
}

function workerWithLog(text: string): Worker {
  const whole = Buffer.from(text)
  const logs: Worker['logs'] = async ({ maxBytes }) => ({
    content: whole.subarray(Math.max(0, whole.length - maxBytes)),
    totalBytes: whole.length,
  })
  // Holds: `maskedTail` asks for the log and the status, and nothing else.
  return { logs, status: async () => 'Completed' } as unknown as Worker
}

interface PrintingTask extends AsyncDisposable {
  app: TestApp
  id: string
  /** Makes the task print this, in one write of its own, and waits until it has. */
  print(text: string): Promise<void>
  end(): Promise<void>
}

/** A task under way that prints what it is told. It has the token in its environment, as a real one would. */
async function startPrinting(request: object): Promise<PrintingTask> {
  const pieces = await mkdtemp(join(tmpdir(), 'task-runner-pieces-'))
  const app = await startApp()
  const task = taskRequest({
    task_file_name: 'bad-pieces.sh',
    worker_config: {
      env_variables: {
        PIECES: pieces,
        ...('callback_url_token' in request ? { TOKEN: String(request.callback_url_token) } : {}),
      },
    },
    ...request,
  })
  expect((await app.submit(task)).status).toBe(200)
  let count = 0
  const rawBytes = async () => {
    const { body } = await app.get(`/tasks/${task.task_id}`)
    const log = join(app.dataDir, 'workers', String(body.worker_name), 'log')
    const { size } = await stat(log).catch(() => ({ size: 0 }))
    return size
  }
  let printed = 0
  return {
    app,
    id: task.task_id,
    async print(text) {
      // Renamed into place: the task reads a piece as soon as it is there.
      const draft = join(pieces, `draft-${count}`)
      await writeFile(draft, text)
      await rename(draft, join(pieces, String(count)))
      count += 1
      printed += Buffer.byteLength(text)
      await expect.poll(rawBytes, POLL).toBe(printed)
    },
    end: () => writeFile(join(pieces, 'end'), ''),
    async [Symbol.asyncDispose]() {
      await writeFile(join(pieces, 'end'), '')
      await app.post(`/tasks/${task.task_id}/cancel`)
      await app[Symbol.asyncDispose]()
      await rm(pieces, { recursive: true, force: true })
    },
  }
}

/** The log that a stream of events carries. */
function textOf(events: string): string {
  return events
    .split('\n\n')
    .filter((event) => event.startsWith('id: '))
    .map((event) =>
      event
        .split('\n')
        .filter((line) => line.startsWith('data: ') || line === 'data:')
        .map((line) => line.slice('data: '.length))
        .join('\n'),
    )
    .join('')
}
