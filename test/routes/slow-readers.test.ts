import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { setTimeout as pause } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import Fastify, { type FastifyInstance } from 'fastify'
import { serializerCompiler, validatorCompiler } from 'fastify-type-provider-zod'
import { describe, expect, test } from 'vitest'
import { Masker } from '../../src/core/masking.ts'
import type { TaskStore, WorkerBackend } from '../../src/core/ports.ts'
import { KeptLogs } from '../../src/routes/log-pieces.ts'
import { closeIdleReaders } from '../../src/routes/slow-readers.ts'
import { taskLogRoutes } from '../../src/routes/task-logs.ts'
import { startApp, taskRequest } from '../helpers/app.ts'

const POLL = { timeout: 20_000, interval: 50 }
const MEGABYTE = 1024 * 1024
/** More than is kept of any log, and than the kernel takes for a reader that reads nothing. */
const LARGE = 40 * MEGABYTE
const IDLE_MS = 300

setFlagsFromString('--expose-gc')
const collectGarbage: () => void = runInNewContext('gc')

function portOf(http: FastifyInstance): number {
  const address = http.server.address()
  return typeof address === 'object' ? (address?.port ?? 0) : 0
}

/** Asks, and reads nothing after the beginning of the answer until it is told to. */
async function ask(port: number, path: string): Promise<Socket> {
  const socket = connect(port, '127.0.0.1')
  socket.on('error', () => {})
  socket.write(`GET ${path} HTTP/1.1\r\nHost: localhost\r\n\r\n`)
  await take(socket)
  return socket
}

/** Reads what is there, a piece. */
async function take(socket: Socket): Promise<void> {
  await once(socket.resume(), 'data')
  socket.pause()
}

async function connections(http: FastifyInstance): Promise<number> {
  return new Promise((resolve, reject) => {
    http.server.getConnections((err, count) => (err ? reject(err) : resolve(count)))
  })
}

/** A task with a log of so many bytes. */
async function startLogs(bytes: number, idleMs = IDLE_MS, status = 'succeeded') {
  let looks = 0
  const log = async () => {
    looks += 1
    return { content: Buffer.alloc(bytes, 'log line\n'), totalBytes: bytes }
  }
  // Hold: the routes of logs ask for nothing else.
  const tasks = {
    log,
    get: async () => ({ taskId: 'a', status, reason: 'completed', logBytes: bytes }),
  } as unknown as TaskStore
  const backend = { find: async () => undefined } as unknown as WorkerBackend
  const http = Fastify()
  http.setValidatorCompiler(validatorCompiler)
  http.setSerializerCompiler(serializerCompiler)
  closeIdleReaders(http, idleMs)
  await http.register(taskLogRoutes, {
    ...{ tasks, backend, kept: new KeptLogs(tasks), readerIdleMs: idleMs },
    ...{ maskerFor: () => new Masker([]), elsewhere: () => undefined },
  })
  await http.listen({ host: '127.0.0.1', port: 0 })
  return { http, looks: () => looks, [Symbol.asyncDispose]: async () => http.close() }
}

describe('a reader that takes nothing of its answer', () => {
  test.each(['/tasks/a/logs', '/tasks/a/logs?follow=true'])('is closed: %s', async (path) => {
    await using logs = await startLogs(LARGE)
    const idle = await ask(portOf(logs.http), path)
    await expect.poll(() => connections(logs.http), POLL).toBe(1)
    await expect.poll(() => connections(logs.http), POLL).toBe(0)
    // What had been sent is there, and the end is not.
    const received = await readAll(idle)
    expect(received.length).toBeGreaterThan(0)
    expect(received.length).toBeLessThan(5 * MEGABYTE)
  })

  test.each(['/tasks/a/logs', '/tasks/a/logs?follow=true'])(
    'is not closed while it takes some now and then: %s',
    async (path) => {
      const idleMs = 1_500
      await using logs = await startLogs(LARGE, idleMs)
      const slow = await ask(portOf(logs.http), path)
      const startedAt = Date.now()
      let bytes = 0
      let last = ''
      for await (const piece of slow.setEncoding('latin1')) {
        bytes += piece.length
        last = (last + piece).slice(-100)
        if (/\r\n0\r\n\r\n$|event: end/.test(last)) break
        // 1 MB a second.
        await pause(Math.max(0, (bytes / MEGABYTE) * 1000 - (Date.now() - startedAt)))
      }
      expect(Date.now() - startedAt).toBeGreaterThan(2 * idleMs)
      expect(bytes).toBeGreaterThan(5 * MEGABYTE - 128 * 1024)
    },
  )

  test('is not closed while there is nothing to take', async () => {
    await using logs = await startLogs(0, IDLE_MS, 'queued')
    const follower = await ask(portOf(logs.http), '/tasks/a/logs?follow=true')
    await pause(5 * IDLE_MS)
    expect(await connections(logs.http)).toBe(1)
    follower.destroy()
  })

  test('any other answer: it is closed as well', async () => {
    const http = Fastify()
    closeIdleReaders(http, IDLE_MS)
    http.get('/large', async () => 'x'.repeat(LARGE))
    http.get('/small', async () => 'x')
    await http.listen({ host: '127.0.0.1', port: 0 })
    const idle = await ask(portOf(http), '/large')
    await expect.poll(() => connections(http), POLL).toBe(1)
    await expect.poll(() => connections(http), POLL).toBe(0)
    expect((await readAll(idle)).length).toBeLessThan(LARGE)
    await http.close()
  })
})

describe('many readers that read nothing', () => {
  const READERS = 50

  test.each([
    ['of a task that has ended', '/logs', ''],
    ['of a task that has ended, as followers', '/logs?follow=true', ''],
    ['of a task that runs', '/logs', 'sleep'],
    ['of a task that runs, as followers', '/logs?follow=true', 'sleep'],
  ])('%s cost some hundred KB each', async (_name, path, then) => {
    await using app = await startApp()
    await app.http.listen({ host: '127.0.0.1', port: 0 })
    const task = taskRequest({
      task_file_name: 'bad-flood.sh',
      worker_config: { env_variables: { BYTES: 5 * MEGABYTE - 8, THEN: then } },
    })
    await app.submit(task)
    const log = `/tasks/${task.task_id}${path}`
    if (then === '') await app.finished(task.task_id)
    else {
      const whole = async () => (await app.text(`/tasks/${task.task_id}/logs`)).length
      await expect.poll(whole, POLL).toBe(5 * MEGABYTE)
    }
    collectGarbage()
    const before = memoryHeld()
    const served: Socket[] = []
    app.http.server.on('connection', (socket) => served.push(socket))
    const sockets: Socket[] = []
    for (let count = 0; count < READERS; count += 1) sockets.push(await ask(portOf(app.http), log))
    // Until no reader is given any more.
    let given = 0
    const isAtRest = () => {
      const last = given
      given = served.reduce((sum, { bytesWritten }) => sum + bytesWritten, 0)
      return given - last < READERS * 100
    }
    await expect.poll(isAtRest, { ...POLL, interval: 500 }).toBe(true)
    expect(given / READERS).toBeGreaterThan(MEGABYTE / 2)
    const held = () => {
      collectGarbage()
      // Text on its way is in none of the figures of V8.
      const unsent = served.reduce((sum, { writableLength }) => sum + writableLength, 0)
      return (memoryHeld() - before + unsent) / READERS / 1024
    }
    await expect.poll(held, POLL).toBeLessThan(500)
    // Still so after another look, and nobody was sent away.
    expect(held()).toBeLessThan(500)
    expect(await connections(app.http)).toBe(READERS)
    for (const socket of sockets) socket.destroy()
    await app.post(`/tasks/${task.task_id}/cancel`)
    await app.finished(task.task_id)
  })

  test('take the log from the store together', async () => {
    await using logs = await startLogs(MEGABYTE)
    const texts = Array.from({ length: 50 }, () => logs.http.inject('/tasks/a/logs'))
    for (const { body } of await Promise.all(texts)) expect(body.length).toBe(MEGABYTE)
    expect(logs.looks()).toBeLessThan(5)
  })
})

/** What the client's own sockets hold is the same for whatever the service does. */
function memoryHeld(): number {
  const { heapUsed, external } = process.memoryUsage()
  return heapUsed + external
}

/** What comes until the connection ends. */
async function readAll(socket: Socket): Promise<string> {
  let received = ''
  socket.setEncoding('latin1').on('data', (chunk: string) => {
    received += chunk
  })
  socket.resume()
  await once(socket, 'close')
  return received
}
