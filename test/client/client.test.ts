import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { TaskRunnerApiError, TaskRunnerClient } from '../../src/client/client.ts'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'

let app: TestApp
let url: string
let client: TaskRunnerClient
beforeAll(async () => {
  app = await startApp({ API_TOKENS: 'the-token', BASE_PATH: '/below' })
  url = `${await app.http.listen({ host: '127.0.0.1', port: 0 })}/below`
  client = new TaskRunnerClient({ url: `${url}/`, token: 'the-token' })
})
afterAll(() => app[Symbol.asyncDispose]())

const request = (overrides: object = {}) =>
  taskRequest(overrides) as ReturnType<typeof taskRequest> & { task_file_name: string } as never
const evaluating = (SCRIPT: string, overrides: object = {}) =>
  taskRequest({
    task_file_name: 'w-eval.sh',
    worker_config: { env_variables: { SCRIPT } },
    ...overrides,
  })
const asRequest = (given: object) => given as Parameters<TaskRunnerClient['submit']>[0]

describe('against the service', () => {
  test('a task is submitted, waited for with its log, and looked at', async () => {
    const task = evaluating('echo one; echo é; exit 3')
    expect(await client.submit(asRequest(task))).toEqual({
      success: true,
      message: 'Started Task successfully',
      task_id: task.task_id,
    })
    let log = ''
    const ended = await client.wait(task.task_id, {
      onLog: (text) => {
        log += text
      },
    })
    expect(ended).toMatchObject({ status: 'failed', reason: 'exit_code', exit_code: 3 })
    expect(log).toBe('one\né\n')
    expect(await client.logs(task.task_id, { tailMb: 1 })).toBe('one\né\n')
    expect((await client.list({ limit: 1 })).tasks).toMatchObject([{ task_id: task.task_id }])
    expect((await client.list({ status: 'queued' })).tasks).toEqual([])
    expect(await client.callback(task.task_id)).toMatchObject({ status: 'none' })
    // The same again starts nothing.
    expect((await client.submit(asRequest(task))).message).toBe('Already accepted: failed')
  })

  test('a running task is cancelled, and its worker seen until it ends', async () => {
    const task = evaluating('echo begun; exec sleep 1000')
    await client.submit(asRequest(task))
    const texts = client.follow(task.task_id)
    expect((await texts.next()).value).toBe('begun\n')
    expect(await client.workers()).toMatchObject([{ task_id: task.task_id, status: 'Running' }])
    expect(await client.cancel(task.task_id)).toMatchObject({ success: true })
    for await (const text of texts)
      expect(text, 'of the shell, about the end').not.toContain('begun')
    expect(await client.wait(task.task_id)).toMatchObject({ status: 'cancelled' })
  })

  test('a kept worker is terminated, and a cleanup names what it ended', async () => {
    const task = evaluating('exit 0', { terminate_on_completion: false })
    await client.submit(asRequest(task))
    const { worker_name } = await client.wait(task.task_id)
    expect(await client.terminateWorker(worker_name)).toMatchObject({ message: 'Terminated' })
    expect(await client.workers()).toEqual([])
    expect(await client.cleanup({ olderThanSeconds: 0 })).toEqual([])
  })

  test('waiting ends with its signal, and the task goes on', async () => {
    const task = evaluating('sleep 1000')
    await client.submit(asRequest(task))
    const impatient = new AbortController()
    const waiting = client.wait(task.task_id, { signal: impatient.signal })
    impatient.abort(new Error('enough'))
    await expect(waiting).rejects.toThrow('enough')
    expect(await client.get(task.task_id)).toMatchObject({ finished_at: null })
    await client.cancel(task.task_id)
    await client.wait(task.task_id)
  })

  test('a refusal tells the status, the code and each wrong field', async () => {
    const wrong = client.submit(request({ worker_config: { worker_size: 'x'.repeat(101) } }))
    await expect(wrong).rejects.toMatchObject({
      name: 'TaskRunnerApiError',
      ...{ status: 422, code: 'invalid_request' },
      errors: [{ path: 'worker_config.worker_size' }],
    })
    await expect(client.get('nothing')).rejects.toMatchObject({
      ...{ status: 404, code: 'task_not_found' },
    })
    await expect(client.wait('nothing')).rejects.toMatchObject({ status: 404 })
    const stranger = new TaskRunnerClient({ url, token: 'wrong' })
    await expect(stranger.workers()).rejects.toMatchObject({ status: 401 })
  })
})

describe('against a service in trouble', () => {
  type Handler = (request: IncomingMessage, response: ServerResponse, count: number) => void

  async function startServer(handler: Handler) {
    let count = 0
    const server = createServer((incoming, response) => {
      count += 1
      handler(incoming, response, count)
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    // Holds: it listens on TCP.
    const { port } = server.address() as { port: number }
    return {
      client: (options: object = {}) =>
        new TaskRunnerClient({ url: `http://127.0.0.1:${port}`, ...options }),
      count: () => count,
      [Symbol.asyncDispose]: async () => {
        server.closeAllConnections()
        server.close()
      },
    }
  }
  const json = (response: ServerResponse, status: number, body: object, headers: object = {}) =>
    response
      .writeHead(status, { 'content-type': 'application/json', ...headers })
      .end(JSON.stringify(body))
  const accepted = { success: true, message: 'Started Task successfully', task_id: 'a' }

  test.each([429, 502, 503, 504])(
    'a call is made again after %i, until it succeeds',
    async (status) => {
      await using server = await startServer((_, response, count) => {
        if (count < 3) json(response, status, { success: false, message: 'busy' })
        else json(response, 200, accepted)
      })
      expect(await server.client().submit(request())).toEqual(accepted)
      expect(server.count()).toBe(3)
    },
  )

  test('a call is made again after its connection was cut', async () => {
    await using server = await startServer((incoming, response, count) => {
      if (count < 3) incoming.socket.destroy()
      else json(response, 200, accepted)
    })
    expect(await server.client().submit(request())).toEqual(accepted)
  })

  test('a call whose answer does not come is made again', async () => {
    await using server = await startServer((_, response, count) => {
      if (count > 1) json(response, 200, accepted)
    })
    expect(await server.client({ timeoutMs: 100 }).submit(request())).toEqual(accepted)
  })

  test.each([400, 401, 404, 409, 422, 500])('after %i it is not', async (status) => {
    await using server = await startServer((_, response) =>
      json(response, status, { success: false, message: 'no' }),
    )
    await expect(server.client().submit(request())).rejects.toMatchObject({
      ...{ status, code: null, message: 'no' },
    })
    expect(server.count()).toBe(1)
  })

  test('it gives up in the end, and says why', async () => {
    await using server = await startServer((_, response) =>
      json(response, 503, { success: false, message: 'shutting down' }),
    )
    const giving = server.client({ attempts: 2 }).workers()
    await expect(giving).rejects.toMatchObject({ status: 503, message: 'shutting down' })
    expect(server.count()).toBe(2)
    const nowhere = new TaskRunnerClient({ url: 'http://127.0.0.1:1', attempts: 2 })
    await expect(nowhere.workers()).rejects.toThrow(TaskRunnerApiError)
    await expect(nowhere.workers()).rejects.toThrow('cannot be reached')
  })

  test('what is no task runner says so', async () => {
    await using server = await startServer((_, response) => response.end('<html>'))
    await expect(server.client().workers()).rejects.toThrow('does not respond like a task runner')
  })

  const final = {
    ...{ task_id: 'a', task_file_name: 'a.sh', status: 'succeeded', reason: 'completed' },
    ...{
      message: null,
      waiting_for: null,
      exit_code: 0,
      signal: null,
      worker_name: 'w',
      instance: 'i',
      priority: 0,
      traceparent: null,
      callback_status: 'none',
    },
    ...{
      created_at: '2026-01-05T08:00:00.000Z',
      claimed_at: null,
      started_at: null,
      worker_config: {},
    },
    ...{ finished_at: '2026-01-05T08:00:00.000Z', callback_url: null, timeout_seconds: 1 },
    ...{ terminate_on_completion: true, log_bytes: 8 },
  }

  test('a stream that is cut is taken up where it was', async () => {
    await using server = await startServer((incoming, response) => {
      if (!incoming.url?.includes('follow')) return json(response, 200, final)
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      const at = incoming.headers['last-event-id']
      if (at === undefined) {
        response.write('id: 4\ndata: one\ndata: \n\nid: 9\ndata: half an ev', () =>
          response.socket?.end(),
        )
      } else {
        response.write(`:\n\nid: 8\ndata: from ${at}\ndata: \n\n`)
        response.end('event: end\ndata: {}\n\n')
      }
      return undefined
    })
    let log = ''
    const task = await server.client().wait('a', {
      onLog: (text) => {
        log += text
      },
    })
    expect(log).toBe('one\nfrom 4\n')
    expect(task.status).toBe('succeeded')
  })

  /**
   * Waits for a task of the real service. Of its stream, only an event with the first bytes comes
   * through.
   */
  async function waitWithCutStream(taskId: string, first: { bytes: number; text: string }) {
    let streams = 0
    const headers = { authorization: 'Bearer the-token' }
    await using server = await startServer(async (incoming, response) => {
      if (!incoming.url?.includes('follow')) {
        const reply = await app.http.inject({ url: `/below${incoming.url}`, headers })
        return response.writeHead(reply.statusCode).end(reply.rawPayload)
      }
      streams += 1
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      const data = first.text.replaceAll('\n', '\ndata: ')
      return response.end(streams === 1 ? `id: ${first.bytes}\ndata: ${data}\n\n` : '')
    })
    let log = ''
    await server.client({ attempts: 1 }).wait(taskId, {
      onLog: (text) => {
        log += text
      },
    })
    return log
  }

  test.each([
    ['CRLF', Buffer.from('one\r\ntwo\r\nthree\r\nfour\r\n')],
    ['characters of several bytes', Buffer.from('zw\u00f6lf \u20ac\n\u{1f680} and\nthe end')],
    ['bytes that are no text', Buffer.from('a\xff\xfeb\n c\xffd\n e', 'latin1')],
    ['nothing more', Buffer.from('all of it\n')],
  ])('where streams are cut, the rest comes with the end: of a log with %s', async (_name, log) => {
    const task = evaluating(`echo ${log.toString('base64')} | base64 -d`)
    await client.submit(asRequest(task))
    await client.wait(task.task_id)
    for (let bytes = 0; bytes >= 0; bytes = log.indexOf('\n', bytes) + 1 || -1) {
      const text = log.subarray(0, bytes).toString().replaceAll('\r\n', '\n')
      const first = { bytes, text }
      expect(await waitWithCutStream(task.task_id, first), `from ${bytes}`).toBe(
        text + log.subarray(bytes).toString(),
      )
    }
  })

  test('where streams are cut, the rest comes with the end: of a log of more than is kept', async () => {
    const SCRIPT = "yes 'a line' | head -c 6000000; echo; echo the end"
    const task = evaluating(SCRIPT)
    await client.submit(asRequest(task))
    await client.wait(task.task_id)
    const bytes = 5_999_998
    const text = '[task-runner] 757130 bytes of log before this line were cut\n\u2026'
    expect(await waitWithCutStream(task.task_id, { bytes, text })).toBe(`${text}ne\nthe end\n`)
    // What was missed on the way is told.
    const early = await waitWithCutStream(task.task_id, { bytes: 14, text: 'a line\na line\n' })
    expect(early).toMatch(
      /^a line\na line\n\[task-runner\] \d+ bytes of log before this line were cut\n/,
    )
    expect(early.endsWith('\nthe end\n')).toBe(true)
  })

  test('where streams are cut, rather a few bytes come again than none: of a log with masked values', async () => {
    const token = 'the-callback-token'
    const task = evaluating('echo "$TOKEN first"; echo "$TOKEN second"; echo third', {
      callback_url_token: token,
    })
    Object.assign((task.worker_config as { env_variables: object }).env_variables, { TOKEN: token })
    await client.submit(asRequest(task))
    await client.wait(task.task_id)
    const text = '*** first\n'
    const bytes = `${token} first\n`.length
    const log = await waitWithCutStream(task.task_id, { bytes, text })
    expect(log.startsWith(text)).toBe(true)
    expect(log.endsWith('*** second\nthird\n')).toBe(true)
    expect(log).not.toContain('task-runner')
  })

  test('a restart that takes longer than one call is tried is waited out', async () => {
    await using server = await startServer((incoming, response, count) => {
      if (count < 6) return incoming.socket.destroy()
      if (incoming.url?.includes('follow')) return response.writeHead(200).end()
      return json(response, 200, final)
    })
    const task = await server.client({ attempts: 2 }).wait('a')
    expect(task.status).toBe('succeeded')
  })

  test.each([
    ['cleanup', (client: TaskRunnerClient) => client.cleanup()],
    ['redeliver', (client: TaskRunnerClient) => client.redeliver('a')],
    ['terminateWorker', (client: TaskRunnerClient) => client.terminateWorker('w')],
  ])('%s is not repeated', async (_, call) => {
    await using server = await startServer((incoming) => incoming.socket.destroy())
    await expect(call(server.client())).rejects.toMatchObject({ status: null })
    expect(server.count()).toBe(1)
  })

  test('where no stream comes through it asks until the task has ended, and takes the log then', async () => {
    let asked = 0
    await using server = await startServer((incoming, response) => {
      if (incoming.url?.includes('follow')) return response.writeHead(200).end()
      if (incoming.url?.endsWith('/logs')) return response.end('the log\n')
      asked += 1
      return json(response, 200, asked < 3 ? { ...final, finished_at: null } : final)
    })
    const texts: string[] = []
    await server.client().wait('a', { onLog: (text) => texts.push(text) })
    expect(texts).toEqual(['the log\n'])
    expect(asked).toBe(3)
  })
})
