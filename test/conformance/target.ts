import { randomBytes } from 'node:crypto'
import { afterAll, beforeAll, expect, vi } from 'vitest'
import { startOwnService } from './own-service.ts'

/**
 * The service under test, known by its HTTP API alone. TARGET_URL says where it is, TARGET_TOKEN what it
 * wants to see (vitest keeps BASE_URL for itself); without TARGET_URL this project's own service is started.
 *
 * An implementation under test must have the sample files of `tasks/`: parameters.sh, progress.sh, hello.py,
 * hello.ts and failing.py.
 */

export type Json = Record<string, unknown>

export interface Answer {
  status: number
  headers: Headers
  text: string
  /** Empty when the answer is not a JSON object. */
  body: Json
}

export interface LogEvent {
  id: string | undefined
  event: string
  data: string
}

interface RequestOptions {
  /** Sent as JSON. */
  json?: unknown
  /** Sent as it is, as `application/json` unless `headers` say otherwise. */
  raw?: string
  headers?: Record<string, string>
  /** Default: the token of the service; null sends none. */
  token?: string | null
}

/** Generous: a machine under test may be busy. */
export const POLL = { timeout: 20_000, interval: 25 }
const FINAL = ['succeeded', 'failed', 'cancelled']
const RUN = randomBytes(5).toString('hex')

/** Another one each time, also in another run against the same service. */
export function newTaskId(): string {
  return `conformance-${RUN}-${randomBytes(4).toString('hex')}`
}

/** A right request whose task ends at once; each call another task. */
export function taskRequest(overrides: Json = {}): Json & { task_id: string } {
  return {
    task_id: newTaskId(),
    task_file_name: 'progress.sh',
    worker_config: { env_variables: { STEPS: 0 } },
    ...overrides,
  }
}

/** parameters.sh, which prints its two variables. */
export const parameters = (first: unknown, second: unknown = 'second') => ({
  task_file_name: 'parameters.sh',
  worker_config: { env_variables: { MY_FIRST_PARAM: first, MY_SECOND_PARAM: second } },
})

/** Runs longer than any test. */
export const LONG_RUNNING = { worker_config: { env_variables: { STEPS: 600 } } }

/** The service under test for the tests of this file; removes what they made when they are done. */
export function useTarget(): Target {
  const url = process.env.TARGET_URL
  if (url !== undefined) {
    const target = new Target(url.replace(/\/+$/, ''), process.env.TARGET_TOKEN || undefined)
    afterAll(() => target.cleanUp())
    return target
  }
  const token = randomBytes(16).toString('hex')
  const target = new Target('', token)
  let stop = async () => {}
  beforeAll(async () => {
    const service = await startOwnService(token)
    target.url = service.url
    stop = service.stop
  })
  afterAll(async () => {
    try {
      await target.cleanUp()
    } finally {
      await stop()
    }
  })
  return target
}

export class Target {
  url: string
  readonly token: string | undefined
  readonly #accepted = new Set<string>()

  constructor(url: string, token: string | undefined) {
    this.url = url
    this.token = token
  }

  async request(method: string, path: string, options: RequestOptions = {}): Promise<Answer> {
    const response = await this.#fetch(method, path, options)
    const text = await response.text()
    return { status: response.status, headers: response.headers, text, body: objectOf(text) }
  }

  get(path: string, options?: RequestOptions): Promise<Answer> {
    return this.request('GET', path, options)
  }

  /** `POST /task-runner`; what is accepted is cleaned up at the end. */
  async submit(request: unknown, path = '/task-runner'): Promise<Answer> {
    const answer = await this.request('POST', path, { json: request })
    if (answer.status === 200) this.#accepted.add(String(answer.body.task_id))
    return answer
  }

  /** Submits a task that must be accepted. */
  async start(overrides: Json = {}): Promise<string> {
    const request = taskRequest(overrides)
    const answer = await this.submit(request)
    expect(answer.status, answer.text).toBe(200)
    return request.task_id
  }

  /** Runs a task to its end, whatever that is. */
  async run(overrides: Json = {}): Promise<{ taskId: string; task: Json; log: string }> {
    const taskId = await this.start(overrides)
    const task = await this.finished(taskId)
    return { taskId, task, log: await this.log(taskId) }
  }

  async task(taskId: string): Promise<Json> {
    const answer = await this.get(`/tasks/${encodeURIComponent(taskId)}`)
    expect(answer.status, answer.text).toBe(200)
    return answer.body
  }

  async log(taskId: string): Promise<string> {
    const answer = await this.get(`/tasks/${encodeURIComponent(taskId)}/logs`)
    expect(answer.status, answer.text).toBe(200)
    return answer.text
  }

  /** Waits until the task has ended. */
  async finished(taskId: string): Promise<Json> {
    await expect.poll(async () => (await this.task(taskId)).status, POLL).toBeOneOf(FINAL)
    return this.task(taskId)
  }

  async running(taskId: string): Promise<void> {
    await expect.poll(async () => (await this.task(taskId)).status, POLL).toBe('running')
  }

  /** The state of a task's callback, once it has that status. */
  async callback(taskId: string, status: string): Promise<Json> {
    const get = () => this.get(`/tasks/${taskId}/callback`)
    await expect.poll(async () => (await get()).body.status, POLL).toBe(status)
    return (await get()).body
  }

  /** Waits until the service does not know a worker of that name any more. */
  async workerGone(name: unknown): Promise<void> {
    await expect.poll(async () => (await this.get(`/workers/${name}`)).status, POLL).toBe(404)
  }

  /** Names of the workers that the service has for these tasks. */
  async workersOf(taskIds: Iterable<string>): Promise<string[]> {
    const mine = new Set(taskIds)
    const { body } = await this.get('/workers')
    // Holds: section 2 of the design; what is not so fails the test that looks.
    const workers = body.workers as Array<{ name: string; task_id: string }>
    return workers.filter((worker) => mine.has(worker.task_id)).map(({ name }) => name)
  }

  /** Follows a log; ends when the service ends the stream, or the caller stops asking. */
  async *follow(taskId: string, lastEventId?: string | number): AsyncGenerator<LogEvent> {
    const gone = new AbortController()
    const response = await this.#fetch(
      'GET',
      `/tasks/${taskId}/logs?follow=true`,
      lastEventId === undefined ? {} : { headers: { 'last-event-id': String(lastEventId) } },
      AbortSignal.any([gone.signal, AbortSignal.timeout(POLL.timeout)]),
    )
    try {
      expect(response.status).toBe(200)
      expect(response.headers.get('content-type')).toMatch(/^text\/event-stream/)
      const decoder = new TextDecoder()
      let rest = ''
      for await (const chunk of response.body ?? []) {
        rest += decoder.decode(chunk, { stream: true }).replaceAll('\r\n', '\n')
        for (let end = rest.indexOf('\n\n'); end >= 0; end = rest.indexOf('\n\n')) {
          const event = eventOf(rest.slice(0, end))
          rest = rest.slice(end + 2)
          if (event) yield event
        }
      }
    } finally {
      gone.abort()
    }
  }

  /** Ends what still runs and terminates every worker; fails when one stays. */
  async cleanUp(): Promise<void> {
    const taskIds = [...this.#accepted]
    await Promise.all(
      taskIds.map((id) => this.request('POST', `/tasks/${encodeURIComponent(id)}/cancel`)),
    )
    const left = async () => {
      const names = await this.workersOf(taskIds)
      await Promise.all(names.map((name) => this.request('DELETE', `/workers/${name}`)))
      return names
    }
    // `expect.poll` is for tests alone.
    await vi.waitFor(async () => expect(await left()).toEqual([]), POLL)
  }

  async #fetch(
    method: string,
    path: string,
    { json, raw, headers, token = this.token }: RequestOptions,
    signal = AbortSignal.timeout(POLL.timeout),
  ): Promise<Response> {
    const body = json === undefined ? raw : JSON.stringify(json)
    return fetch(this.url + path, {
      method,
      signal,
      redirect: 'manual',
      headers: {
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
        ...(token == null ? {} : { authorization: `Bearer ${token}` }),
        ...headers,
      },
      ...(body === undefined ? {} : { body }),
    })
  }
}

/** WHATWG HTML, 9.2.6; undefined for a comment that only keeps the connection alive. */
function eventOf(block: string): LogEvent | undefined {
  const fields = block.split('\n').flatMap((line) => {
    const [, name, value] = /^([^:]+):? ?(.*)$/.exec(line) ?? []
    return name === undefined ? [] : [{ name, value: value ?? '' }]
  })
  if (fields.length === 0) return undefined
  const valuesOf = (name: string) => fields.filter((it) => it.name === name).map((it) => it.value)
  return {
    id: valuesOf('id').at(-1),
    event: valuesOf('event').at(-1) ?? 'message',
    data: valuesOf('data').join('\n'),
  }
}

function objectOf(text: string): Json {
  try {
    const value: unknown = JSON.parse(text)
    if (value !== null && typeof value === 'object' && !Array.isArray(value)) return { ...value }
  } catch {
    // Not JSON: the test that expects some sees that its fields are missing.
  }
  return {}
}
