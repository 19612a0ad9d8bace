import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { describe, expect, test } from 'vitest'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'

const POLL = { timeout: 10_000, interval: 20 }
const PATH = '/sample-task-runner-callback'
const MEGABYTE = 1024 * 1024
const CALLBACK = { task_name: 'a.sh', task_id: 'a', success: true }

/** A connection that announces a body and sends the beginning of it. */
class Upload {
  readonly socket: Socket
  answer = ''

  private constructor(socket: Socket) {
    this.socket = socket.setEncoding('utf8').on('data', (text) => {
      this.answer += text
    })
  }

  static async begin(app: TestApp, head: string, bytes: number): Promise<Upload> {
    const address = app.http.server.address()
    const port = typeof address === 'object' ? (address?.port ?? 0) : 0
    const socket = connect(port, '127.0.0.1')
    await once(socket, 'connect')
    const upload = new Upload(socket)
    socket.write(
      `POST ${PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n${head}\r\n\r\n`,
    )
    socket.write('x'.repeat(bytes))
    return upload
  }
}

describe('bodies of the sample receivers', () => {
  test('large ones are read two at a time; others are told to come again before they are read', async () => {
    await using app = await startApp()
    await app.http.listen({ host: '127.0.0.1', port: 0 })
    const large = JSON.stringify({ ...CALLBACK, logs: 'x'.repeat(20_000) })
    const small = JSON.stringify({ ...CALLBACK, logs: 'x' })
    const post = (payload: string) =>
      app.http.inject({
        method: 'POST',
        url: PATH,
        payload,
        headers: { 'content-type': 'application/json' },
      })
    expect((await post(large)).statusCode).toBe(200)

    const uploads = [
      await Upload.begin(app, `Content-Length: ${32 * MEGABYTE - 10}`, MEGABYTE),
      await Upload.begin(app, 'Transfer-Encoding: chunked', 0),
    ]
    await expect.poll(async () => (await post(large)).statusCode, POLL).toBe(503)
    const refused = await post(large)
    expect(refused.headers['retry-after']).toBe('1')
    expect(refused.json()).toEqual({
      ...{ success: false, code: 'busy' },
      message: expect.stringContaining('large'),
    })
    const more = await Promise.all(
      Array.from({ length: 40 }, () =>
        Upload.begin(app, `Content-Length: ${32 * MEGABYTE - 10}`, 1),
      ),
    )
    for (const { answer } of await until(more)) expect(answer).toMatch(/^HTTP\/1.1 503 /)
    // What a callback usually is passes at any time.
    expect((await post(small)).statusCode).toBe(200)

    for (const { socket } of [...uploads, ...more]) socket.destroy()
    await expect.poll(async () => (await post(large)).statusCode, POLL).toBe(200)
    expect(
      (await Promise.all([post(large), post(large)])).map(({ statusCode }) => statusCode),
    ).toEqual([200, 200])
  })

  test('of more than 32 MB are refused', async () => {
    await using app = await startApp()
    const reply = await app.http.inject({
      method: 'POST',
      url: PATH,
      headers: { 'content-type': 'application/json', 'content-length': String(32 * MEGABYTE + 1) },
    })
    expect(reply.statusCode).toBe(413)
  })

  async function until(uploads: Upload[]): Promise<Upload[]> {
    for (const upload of uploads) await expect.poll(() => upload.answer, POLL).not.toBe('')
    return uploads
  }
})

describe('what the sample receivers take', () => {
  test.each([PATH, '/task-runner-callback'])('%s: further fields too', async (url) => {
    await using app = await startApp()
    expect(await app.post(url, { ...CALLBACK, logs: '', message: 'Done' })).toEqual({
      status: 200,
      body: { success: true, message: 'ok' },
    })
    expect(await app.post(url, { ...CALLBACK, message: 'Done' })).toMatchObject({
      status: 422,
      body: { errors: [{ path: 'logs', message: 'is required' }] },
    })
  })

  test.each(['5', '[]', 'null', 'true'])('the second takes no %s, and says so', async (payload) => {
    await using app = await startApp()
    const headers = { 'content-type': 'application/json' }
    const reply = await app.http.inject({ method: 'POST', url: `${PATH}2`, headers, payload })
    expect(reply.statusCode).toBe(422)
    expect(reply.json().errors).toEqual([
      { path: '', message: 'must be an object, or a string that holds one' },
    ])
  })
})

describe('where the sample receivers are off', () => {
  const REFUSED = {
    status: 422,
    body: {
      errors: [
        {
          path: 'callback_url',
          message: expect.stringMatching(/sample receiver.* disabled.*SAMPLE_CALLBACKS/),
        },
      ],
    },
  }

  test('a callback_url that names one of them is refused, and says how to enable them', async () => {
    await using app = await startApp({ SAMPLE_CALLBACKS: 'false', BASE_PATH: '/apps/runner' })
    const { port } = new URL(await app.http.listen({ host: '127.0.0.1', port: 0 }))
    const submit = async (callback_url: string, host: string) => {
      const url = `http://127.0.0.1:${port}/apps/runner/task-runner`
      const body = JSON.stringify(taskRequest({ callback_url }))
      const headers = ['Content-Type: application/json', `Content-Length: ${body.length}`]
      const socket = connect(Number(port), '127.0.0.1')
      socket.write(
        `POST ${new URL(url).pathname} HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n${headers.join('\r\n')}\r\n\r\n${body}`,
      )
      let answer = ''
      for await (const chunk of socket) answer += chunk
      return {
        status: Number(answer.split(' ')[1]),
        body: JSON.parse(answer.slice(answer.indexOf('{'))),
      }
    }
    const own = `127.0.0.1:${port}`
    const path = `/apps/runner${PATH}`
    for (const url of [
      `http://${own}${path}`,
      `http://${own}${path}2`,
      `http://${own}/apps/runner/task-runner-callback`,
      `http://${own}${path}/?key=value`,
      `http://localhost:${port}${path}`,
      `http://[::1]:${port}${path}`,
      // As a published port of a container, or a proxy, is called.
      `http://localhost:8080${path}`,
    ]) {
      expect(await submit(url, url.includes('8080') ? 'LOCALHOST:8080' : own), url).toMatchObject(
        REFUSED,
      )
    }
    for (const url of [
      `http://127.0.0.1:1${path}`,
      `http://${own}/other${PATH}3`,
      `http://10.1.2.3:${port}${path}`,
    ]) {
      const answer = await submit(url, own)
      expect(JSON.stringify(answer.body), url).not.toContain('SAMPLE_CALLBACKS')
    }
  })

  test('what was accepted while they were on stays so', async () => {
    const tasks = { SAMPLE_CALLBACKS: 'true' }
    const first = await startApp(tasks)
    const { port } = new URL(await first.http.listen({ host: '127.0.0.1', port: 0 }))
    const task = taskRequest({ callback_url: `http://127.0.0.1:${port}${PATH}` })
    const headers = { host: `127.0.0.1:${port}` }
    const submit = async (app: TestApp) =>
      (
        await app.http.inject({ method: 'POST', url: '/task-runner', headers, payload: task })
      ).json()
    expect(await submit(first)).toMatchObject({ success: true })
    await first.finished(task.task_id)
    await first.stop()
    await using second = await startApp({ SAMPLE_CALLBACKS: 'false' }, { dataDir: first.dataDir })
    expect(await submit(second)).toMatchObject({
      success: true,
      message: 'Already accepted: succeeded',
    })
  })
})
