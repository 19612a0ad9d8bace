import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { Agent, get } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Worker, WorkerBackend } from '../../src/core/ports.ts'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'

const POLL = { timeout: 20_000, interval: 10 }

let folder: string
let app: TestApp
let address: string

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-runner-logs-'))
  app = await startApp()
  address = await app.http.listen({ host: '127.0.0.1', port: 0 })
})

afterAll(async () => {
  // Ends tasks that a failed test left waiting.
  await rm(folder, { recursive: true, force: true, maxRetries: 10 })
  await app[Symbol.asyncDispose]()
})

/** A task that prints what it is handed, piece by piece. */
async function startPieces(overrides: object = {}, by: TestApp = app) {
  const pieces = await mkdtemp(join(folder, 'pieces-'))
  const request = taskRequest({
    task_file_name: 'bad-pieces.sh',
    worker_config: { env_variables: { PIECES: pieces } },
    ...overrides,
  })
  expect(await by.submit(request)).toMatchObject({ status: 200 })
  let count = 0
  return {
    taskId: request.task_id,
    url: `/tasks/${request.task_id}/logs`,
    async print(piece: string | Buffer) {
      await writeFile(join(pieces, 'draft'), piece)
      await rename(join(pieces, 'draft'), join(pieces, String(count)))
      count += 1
    },
    /** It ends after what it was handed; nobody waits for that. */
    release: () => writeFile(join(pieces, 'end'), ''),
    async end() {
      await writeFile(join(pieces, 'end'), '')
      return by.finished(request.task_id)
    },
  }
}

/** A finished task with this log. */
async function finishedWith(log: string | Buffer) {
  const task = await startPieces()
  await task.print(log)
  await task.end()
  return task
}

interface Event {
  id?: string
  event?: string
  data: string
}

interface Follower {
  /** Settles once the answer has begun. */
  response: Promise<Response>
  events: Event[]
  /** What came so far. */
  text(): string
  until(text: string): Promise<void>
  /** Waits for the end of the stream. */
  ended: Promise<void>
  leave(): void
}

/** Reads Server-Sent Events as their specification says (HTML Standard, section 9.2.6). */
function follow(url: string, headers: Record<string, string> = {}): Follower {
  const abort = new AbortController()
  const response = fetch(url, { headers, signal: abort.signal })
  const events: Event[] = []
  const read = async () => {
    let unread = ''
    const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
    for await (const chunk of (await response).body ?? []) {
      const blocks = (unread + decoder.decode(chunk, { stream: true })).split('\n\n')
      unread = blocks.pop() ?? ''
      for (const block of blocks) {
        const event: Event & { lines: string[] } = { data: '', lines: [] }
        for (const line of block.split(/\r\n|\r|\n/)) {
          const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line) ?? []
          if (name === 'data') event.lines.push(value ?? '')
          else if (name === 'id' || name === 'event') event[name] = value ?? ''
        }
        const { lines, ...rest } = event
        if (lines.length > 0) events.push({ ...rest, data: lines.join('\n') })
      }
    }
  }
  const text = () =>
    events
      .filter(({ event }) => event === undefined)
      .map(({ data }) => data)
      .join('')
  return {
    response,
    events,
    text,
    until: (expected) => expect.poll(text, POLL).toBe(expected),
    ended: read().catch((err: unknown) => {
      if (!abort.signal.aborted) throw err
    }),
    leave: () => abort.abort(),
  }
}

function endOf({ events }: Follower): unknown {
  const last = events.at(-1)
  return last?.event === 'end' ? JSON.parse(last.data) : undefined
}

const SUCCEEDED = { status: 'succeeded', reason: 'completed' }

describe('the log as text', () => {
  test('is whole, plain and not to be sniffed', async () => {
    const { url } = await finishedWith('<b>one</b>\ntwo')
    const reply = await app.http.inject({ method: 'GET', url })
    expect(reply.body).toBe('<b>one</b>\ntwo')
    expect(reply.headers).toMatchObject({
      'content-type': 'text/plain; charset=utf-8',
      'x-content-type-options': 'nosniff',
    })
  })

  test('shows what a running task has printed so far', async () => {
    const task = await startPieces()
    await task.print('so far\n')
    await expect.poll(() => app.text(task.url), POLL).toBe('so far\n')
    await task.end()
  })

  test('is empty for a task that printed nothing', async () => {
    const task = await startPieces()
    await task.end()
    expect(await app.text(task.url)).toBe('')
  })

  test('tail_mb gives the last bytes, and the first line says how many were cut', async () => {
    const log = `${'0123456789abcde\n'.repeat(8192)}the end\n`
    const { url } = await finishedWith(log)
    const text = await app.text(`${url}?tail_mb=0.0625`)
    const cut = log.length - 65_536
    const first = `[task-runner] ${cut} bytes of log before this line were cut\n`
    expect(text.slice(0, first.length)).toBe(first)
    expect(text.slice(first.length)).toBe(log.slice(cut))
    expect(await app.text(`${url}?tail_mb=5`)).toBe(log)
  })

  test('a tail of a running task is cut in the same way', async () => {
    const task = await startPieces()
    const log = 'line\n'.repeat(20_000)
    await task.print(log)
    await expect.poll(async () => (await app.text(task.url)).length, POLL).toBe(log.length)
    const text = await app.text(`${task.url}?tail_mb=0.0625`)
    expect(text).toMatch(/^\[task-runner\] 34464 bytes of log before this line were cut\n/)
    expect(text.endsWith(log.slice(34_464))).toBe(true)
    await task.end()
  })

  test('a tail begins with a whole character, and counts the rest of the cut one as cut', async () => {
    // 3 bytes each; 65,536 is not a multiple of 3.
    const { url } = await finishedWith('€'.repeat(30_000))
    const text = await app.text(`${url}?tail_mb=0.0625`)
    const kept = Math.floor(65_536 / 3)
    expect(text).toBe(
      `[task-runner] ${90_000 - kept * 3} bytes of log before this line were cut\n${'€'.repeat(kept)}`,
    )
  })

  test('bytes that are not UTF-8 are shown as U+FFFD, and the rest is whole', async () => {
    const { url } = await finishedWith(
      Buffer.from([0x61, 0xff, 0x62, 0xe2, 0x82, 0x0a, 0x63, 0xc3]),
    )
    expect(await app.text(url)).toBe('a\ufffdb\ufffd\nc\ufffd')
  })

  test.each([
    ...[
      'tail_mb=0',
      'tail_mb=-1',
      'tail_mb=5.1',
      'tail_mb=',
      'tail_mb=many',
      'tail_mb=1&tail_mb=2',
    ],
    ...['follow=yes', 'follow=', 'follow=True', 'tail=1'],
  ])('?%s is refused, naming the parameter', async (query) => {
    const { url } = await finishedWith('x')
    expect(await app.get(`${url}?${query}`)).toMatchObject({
      status: 422,
      body: { success: false, errors: [{ path: query.split('=')[0] }] },
    })
  })
})

describe('follow=true', () => {
  test('is answered at once, before the task has printed anything', async () => {
    const task = await startPieces()
    const signal = AbortSignal.timeout(5_000)
    const response = await fetch(`${address}${task.url}?follow=true`, { signal })
    expect(response.status).toBe(200)
    expect(response.headers.get('content-type')).toBe('text/event-stream')
    expect(response.headers.get('cache-control')).toBe('no-store')
    await response.body?.cancel()
    await task.end()
  })

  test('lines arrive while the task runs, with byte offsets as ids, and then how it ended', async () => {
    const task = await startPieces()
    const follower = follow(`${address}${task.url}?follow=true`)
    await task.print('one\n')
    await follower.until('one\n')
    expect((await app.get(`/tasks/${task.taskId}`)).body.status).toBe('running')
    await task.print('zwölf\n\n  three ')
    await follower.until('one\nzwölf\n\n  three ')
    await task.print(': four')
    await follower.until('one\nzwölf\n\n  three : four')
    expect(endOf(follower)).toBeUndefined()
    await task.end()
    await follower.ended
    expect(endOf(follower)).toEqual(SUCCEEDED)
    const ids = follower.events.flatMap(({ id }) => (id === undefined ? [] : [id]))
    const offsets = follower.events.slice(0, -1).map((_, index, events) =>
      String(
        Buffer.byteLength(
          events
            .slice(0, index + 1)
            .map(({ data }) => data)
            .join(''),
        ),
      ),
    )
    expect(ids).toEqual(offsets)
  })

  test('the end event tells a failure and its reason', async () => {
    const task = await startPieces()
    const follower = follow(`${address}${task.url}?follow=true`)
    await app.post(`/tasks/${task.taskId}/cancel`)
    await follower.ended
    expect(endOf(follower)).toEqual({ status: 'cancelled', reason: 'cancelled' })
    await app.finished(task.taskId)
  })

  test('a follower of a task that still waits sees all of it once it runs', async () => {
    await using narrow = await startApp({ MAX_CONCURRENT_TASKS: '1' })
    const base = await narrow.http.listen({ host: '127.0.0.1', port: 0 })
    const first = await startPieces({}, narrow)
    const second = await startPieces({}, narrow)
    expect((await narrow.get(`/tasks/${second.taskId}`)).body.status).toBe('queued')
    const follower = follow(`${base}${second.url}?follow=true`)
    await first.end()
    await second.print('at last\n')
    await follower.until('at last\n')
    await second.end()
    await follower.ended
    expect(endOf(follower)).toEqual(SUCCEEDED)
  })

  test('a follower of a finished task gets the log and the end at once', async () => {
    const task = await finishedWith('done\nlong ago')
    const follower = follow(`${address}${task.url}?follow=true`)
    await follower.ended
    expect(follower.text()).toBe('done\nlong ago')
    expect(follower.events.at(-2)?.id).toBe('13')
    expect(endOf(follower)).toEqual(SUCCEEDED)
  })

  test('two followers of one task see the same', async () => {
    const task = await startPieces()
    const url = `${address}${task.url}?follow=true`
    const followers = [follow(url), follow(url)]
    await task.print('for both\n')
    for (const follower of followers) await follower.until('for both\n')
    followers[0]?.leave()
    await task.print('for one\n')
    await followers[1]?.until('for both\nfor one\n')
    await task.end()
    await followers[1]?.ended
  })

  test('a log of many pieces arrives whole and in order', async () => {
    const task = await startPieces()
    const follower = follow(`${address}${task.url}?follow=true`)
    // Characters of 1 to 4 bytes, so that borders of pieces fall into them.
    const log = Array.from({ length: 40_000 }, (_, index) => `${index} aü€🚀`).join('\n')
    await task.print(log)
    await task.end()
    await follower.ended
    expect(follower.text() === log).toBe(true)
    expect(follower.events.at(-2)?.id).toBe(String(Buffer.byteLength(log)))
  })
})

describe('Last-Event-ID', () => {
  const resume = (url: string, id: string | number) =>
    follow(`${address}${url}?follow=true`, { 'last-event-id': String(id) })

  test('a client that comes back while the task runs loses nothing and sees nothing twice', async () => {
    const task = await startPieces()
    const first = follow(`${address}${task.url}?follow=true`)
    await task.print('one\n')
    await first.until('one\n')
    await task.print('zwölf\n')
    await first.until('one\nzwölf\n')
    const ids = first.events.map(({ id }) => id ?? '')
    first.leave()
    await first.ended
    await task.print('three\n')

    const fromFirst = resume(task.url, ids[0] ?? '')
    const fromSecond = resume(task.url, ids.at(-1) ?? '')
    await fromFirst.until('zwölf\nthree\n')
    await fromSecond.until('three\n')
    await task.print('four\n')
    await fromSecond.until('three\nfour\n')
    await task.end()
    await Promise.all([fromFirst.ended, fromSecond.ended])
    expect(fromFirst.text()).toBe('zwölf\nthree\nfour\n')
    expect(endOf(fromSecond)).toEqual(SUCCEEDED)
  })

  test('a client that comes back after the end gets the rest, from any offset', async () => {
    const log = 'one\ntwo\nthree'
    const task = await finishedWith(log)
    for (const offset of [0, 1, 4, 8, log.length - 1]) {
      const follower = resume(task.url, offset)
      await follower.ended
      expect(follower.text()).toBe(log.slice(offset))
      expect(endOf(follower)).toEqual(SUCCEEDED)
    }
    for (const offset of [log.length, log.length + 1, 999_999_999_999_999]) {
      const follower = resume(task.url, offset)
      await follower.ended
      expect(follower.events).toHaveLength(1)
      expect(endOf(follower)).toEqual(SUCCEEDED)
    }
  })

  test('one that comes back for bytes no longer kept is told how many it missed', async () => {
    const log = `${'x'.repeat(99)}\n`.repeat(60_000)
    const task = await finishedWith(log)
    const follower = resume(task.url, 100)
    await follower.ended
    const kept = 5 * 1024 * 1024
    const text = follower.text()
    expect(text.endsWith(log.slice(-kept))).toBe(true)
    expect(text.slice(0, 200)).toContain(`${log.length - kept - 100} bytes`)
    expect(follower.events.at(-2)?.id).toBe(String(log.length))
  })

  test('an empty id counts as none: some clients send it before they have one', async () => {
    const task = await finishedWith('x')
    const reply = await app.http.inject({
      method: 'GET',
      url: `${task.url}?follow=true`,
      headers: { 'last-event-id': '' },
    })
    expect(reply.statusCode).toBe(200)
    expect(reply.body).toContain('data: x\n')
  })

  test.each(['abc', '-1', '1.5', ' ', '1e3', '9999999999999999', '0x10'])(
    'the id %j is refused, naming the header',
    async (id) => {
      const task = await finishedWith('x')
      const reply = await app.http.inject({
        method: 'GET',
        url: `${task.url}?follow=true`,
        headers: { 'last-event-id': id },
      })
      expect(reply.statusCode).toBe(422)
      expect(reply.json()).toMatchObject({ success: false, errors: [{ path: 'last-event-id' }] })
    },
  )
})

describe('why a task ended', () => {
  const CANCELLED = '[task-runner] Cancelled on request\n'

  /** A task that prints this, and whose log has nothing else until it is cancelled. */
  async function startPrinting(printf: string, by: TestApp = app) {
    const SCRIPT = `trap 'exit 0' TERM; printf '${printf}'; sleep 60 >/dev/null 2>&1 & wait`
    const request = taskRequest({
      task_file_name: 'w-eval.sh',
      worker_config: { env_variables: { SCRIPT } },
    })
    await by.submit(request)
    const url = `/tasks/${request.task_id}/logs`
    await expect.poll(() => by.text(url), POLL).not.toBe('')
    const cancel = async () => {
      await by.post(`/tasks/${request.task_id}/cancel`)
      return by.finished(request.task_id)
    }
    return { url, cancel }
  }

  test.each([
    ['one\\n', 'one\n'],
    ['one', 'one\n'],
    ['50 %%\\r', '50 %\r\n'],
    ['cut \\303', 'cut \ufffd\n'],
  ])('ends the log, and a stream of it, on a line of its own: %s', async (printf, before) => {
    const task = await startPrinting(printf)
    const follower = follow(`${address}${task.url}?follow=true`)
    await expect.poll(() => follower.text(), POLL).not.toBe('')
    const { log_bytes } = await task.cancel()
    await follower.ended
    expect(await app.text(task.url)).toBe(before + CANCELLED)
    // Events end every line in the same way.
    expect(follower.text()).toBe(before.replace('\r', '') + CANCELLED)
    expect(follower.events.at(-2)?.id).toBe(String(log_bytes))
  })

  test('is what a client gets that comes back after the end, from its offset on', async () => {
    const task = await startPrinting('one\\n')
    const { log_bytes } = await task.cancel()
    const from = (id: number) =>
      follow(`${address}${task.url}?follow=true`, { 'last-event-id': String(id) })
    const rest = from('one\n'.length)
    await rest.ended
    expect(rest.text()).toBe(CANCELLED)
    const nothing = from(Number(log_bytes))
    await nothing.ended
    expect(nothing.events).toHaveLength(1)
  })

  test('reaches a follower who has read more than is kept of a log that could not be read', async () => {
    const unreadable = (worker: Worker): Worker =>
      new Proxy(worker, {
        get(target, name) {
          if (name === 'logs') return () => Promise.reject(new Error('EIO'))
          const value = Reflect.get(target, name, target)
          return typeof value === 'function' ? value.bind(target) : value
        },
      })
    await using own = await startApp(
      {},
      {
        wrapPorts: (ports) => {
          const provision: WorkerBackend['provision'] = async (...args) =>
            unreadable(await ports.backend.provision(...args))
          const backend = new Proxy(ports.backend, {
            get(target, name) {
              if (name === 'provision') return provision
              const value = Reflect.get(target, name, target)
              return typeof value === 'function' ? value.bind(target) : value
            },
          })
          return { ...ports, backend }
        },
      },
    )
    const base = await own.http.listen({ host: '127.0.0.1', port: 0 })
    const printed = 'a long line '.repeat(20)
    const task = await startPrinting(`${printed}\\n`, own)
    const follower = follow(`${base}${task.url}?follow=true`)
    await follower.until(`${printed}\n`)
    await task.cancel()
    await follower.ended
    expect(follower.text()).toBe(
      `${printed}\n[task-runner] The log could not be read\n${CANCELLED}`,
    )
  })
})

describe('bytes that are hard to stream', () => {
  test('a character printed in two halves arrives as one, and ids fall on its border', async () => {
    const task = await startPieces()
    const follower = follow(`${address}${task.url}?follow=true`)
    await task.print(Buffer.from([0x61, 0xe2, 0x82]))
    await follower.until('a')
    expect(follower.events.at(-1)?.id).toBe('1')
    await task.print(Buffer.from([0xac, 0xf0, 0x9f]))
    await follower.until('a€')
    await task.print(Buffer.from([0x9a]))
    await task.print(Buffer.from([0x80, 0x62]))
    await follower.until('a€🚀b')
    await task.end()
    await follower.ended
    expect(follower.text()).toBe('a€🚀b')
  })

  test('invalid UTF-8 becomes U+FFFD, as in the log as text, and nothing after it is lost', async () => {
    const bytes = [0x61, 0xff, 0xfe, 0x0a, 0xc3, 0x28, 0xe2, 0x28, 0xa1, 0x80, 0x0a, 0xf8, 0x62]
    const task = await startPieces()
    const follower = follow(`${address}${task.url}?follow=true`)
    const shown = Buffer.from(bytes).toString()
    await task.print(Buffer.from(bytes))
    await follower.until(shown)
    await task.print('after\n')
    await follower.until(`${shown}after\n`)
    await task.end()
    await follower.ended
    expect(follower.text()).toBe(await app.text(task.url))
  })

  test('a log that ends inside a character ends with U+FFFD, and its id with the last byte', async () => {
    const task = await startPieces()
    const follower = follow(`${address}${task.url}?follow=true`)
    await task.print(Buffer.from([0x61, 0xe2, 0x82]))
    await follower.until('a')
    await task.end()
    await follower.ended
    expect(follower.text()).toBe('a\ufffd')
    expect(follower.events.at(-2)?.id).toBe('3')
  })

  test('carriage returns end lines, so that progress bars do not break the stream', async () => {
    const task = await startPieces()
    const follower = follow(`${address}${task.url}?follow=true`)
    await task.print('10 %\r20 %\rdata: x\rid: 1\revent: end\r\nnext\r\n')
    await follower.until('10 %\n20 %\ndata: x\nid: 1\nevent: end\nnext\n')
    await task.end()
    await follower.ended
    expect(follower.events.filter(({ event }) => event !== undefined)).toHaveLength(1)
    expect(endOf(follower)).toEqual(SUCCEEDED)
  })

  test('CR and LF of one line end printed apart are still one line end', async () => {
    const task = await startPieces()
    const follower = follow(`${address}${task.url}?follow=true`)
    await task.print('a\r')
    await expect.poll(() => follower.text().startsWith('a'), POLL).toBe(true)
    await task.print('\nb')
    await expect.poll(() => follower.text().endsWith('b'), POLL).toBe(true)
    await task.end()
    await follower.ended
    expect(follower.text()).toBe('a\nb')
  })

  test('NUL, escapes and a byte order mark pass through', async () => {
    const log = '\ufeffa\0b\u001b[31mred\u001b[0m\u2028\u0085\n'
    const task = await finishedWith(log)
    const follower = follow(`${address}${task.url}?follow=true`)
    await follower.ended
    expect(follower.text()).toBe(log)
  })
})

describe('secrets in the stream', () => {
  const token = 'secret-token-0123456789'

  test('the token is masked when it is printed in two halves', async () => {
    const task = await startPieces({ callback_url_token: token })
    const follower = follow(`${address}${task.url}?follow=true`)
    await task.print(`a ${token.slice(0, 9)}`)
    await follower.until('a ')
    await task.print(`${token.slice(9)} b\n`)
    await follower.until('a *** b\n')
    await task.end()
    await follower.ended
    expect(follower.text()).toBe('a *** b\n')
    expect(await app.text(task.url)).toBe('a *** b\n')
  })

  test('an id that points into the token does not show the rest of it', async () => {
    const task = await startPieces({ callback_url_token: token })
    await task.print(`a ${token} b\n`)
    await expect.poll(() => app.text(task.url), POLL).toBe('a *** b\n')
    const follower = follow(`${address}${task.url}?follow=true`, { 'last-event-id': '8' })
    await expect.poll(() => follower.text(), POLL).toContain('b\n')
    expect(follower.text()).not.toContain(token.slice(6))
    await task.end()
    await follower.ended
  })
})

describe('a service that stops', () => {
  test('ends while a task runs and a client with a kept-alive connection follows it', async () => {
    const own = await startApp()
    const base = await own.http.listen({ host: '127.0.0.1', port: 0 })
    const task = await startPieces({}, own)
    const agent = new Agent({ keepAlive: true })
    let streamed = ''
    let isEnded = false
    let isClosed = false
    get(`${base}${task.url}?follow=true`, { agent }, (response) => {
      response.setEncoding('utf8').on('data', (chunk) => {
        streamed += chunk
      })
      response.on('end', () => {
        isEnded = true
      })
    })
    await task.print('one\n')
    await expect.poll(() => streamed, POLL).toContain('data: one\n')
    const closed = own.stop().then(() => {
      isClosed = true
    })
    try {
      await expect
        .poll(() => ({ isEnded, isClosed }), { timeout: 10_000, interval: 20 })
        .toEqual({ isEnded: true, isClosed: true })
      expect(streamed).not.toContain('event: end')
    } finally {
      // For a service that does not end: what it may wait for goes away.
      agent.destroy()
      await task.release()
      await closed
      await own[Symbol.asyncDispose]()
    }
  })

  test('ends the streams, shows no half of a character or token, and the rest can be had later', async () => {
    const dataDir = await mkdtemp(join(folder, 'data-'))
    const token = 'secret-token-0123456789'
    const before = await startApp({}, { dataDir })
    const base = await before.http.listen({ host: '127.0.0.1', port: 0 })
    const half = await startPieces({}, before)
    const secret = await startPieces({ callback_url_token: token }, before)
    const ofHalf = follow(`${base}${half.url}?follow=true`)
    const ofSecret = follow(`${base}${secret.url}?follow=true`)
    await half.print(Buffer.from([0x61, 0xe2, 0x82]))
    await secret.print(`b ${token.slice(0, 12)}`)
    await ofHalf.until('a')
    await ofSecret.until('b ')
    await Promise.all([before.stop(), ofHalf.ended, ofSecret.ended])
    const [halfSeen, secretSeen] = [ofHalf.text(), ofSecret.text()]

    await using after = await startApp({}, { dataDir })
    const again = await after.http.listen({ host: '127.0.0.1', port: 0 })
    const idOf = ({ events }: Follower) => ({ 'last-event-id': events.at(-1)?.id ?? '' })
    const halfLater = follow(`${again}${half.url}?follow=true`, idOf(ofHalf))
    const secretLater = follow(`${again}${secret.url}?follow=true`, idOf(ofSecret))
    await half.print(Buffer.from([0xac]))
    await secret.print(`${token.slice(12)} c\n`)
    for (const task of [half, secret]) await task.release()
    await Promise.all([halfLater.ended, secretLater.ended])
    await after.finished(half.taskId)
    await after.finished(secret.taskId)
    expect(halfSeen + halfLater.text()).toBe('a€')
    expect(secretSeen + secretLater.text()).toBe('b *** c\n')
  })
})
