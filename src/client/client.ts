import { setTimeout as pause } from 'node:timers/promises'
import type { z } from 'zod'
import {
  acceptedSchema,
  callbackStateSchema,
  cancelledSchema,
  cleanupSchema,
  doneSchema,
  errorSchema,
  taskListSchema,
  taskSchema,
  workerListSchema,
  type workerSchema,
} from '../wire/responses.ts'
import type { taskRequestSchema } from '../wire/task-request.ts'
import { readEvents, type ServerEvent } from './events.ts'

export type TaskRunnerRequest = z.input<ReturnType<typeof taskRequestSchema>>
export type Task = z.output<typeof taskSchema>
export type TaskList = z.output<typeof taskListSchema>
export type Worker = z.output<typeof workerSchema>

export interface TaskRunnerClientOptions {
  /** URL of the service, including its `BASE_PATH`. */
  url: string
  token?: string | undefined
  /** Maximum attempts of a call while the service is unreachable or busy. Default 5. */
  attempts?: number | undefined
  /** Timeout of one attempt. Default 30000. */
  timeoutMs?: number | undefined
}

/** A call that failed. `status` is null if the service was unreachable. */
export class TaskRunnerApiError extends Error {
  override name = 'TaskRunnerApiError'
  readonly status: number | null
  /** Error code, such as `task_not_found`. Null if there was no response, or one without a code. */
  readonly code: string | null
  /** The invalid fields, if that is the error. */
  readonly errors: ReadonlyArray<{ path: string; message: string }>

  constructor(
    message: string,
    options: {
      status: number | null
      code?: string | undefined
      errors?: TaskRunnerApiError['errors'] | undefined
      cause?: unknown
    },
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.status = options.status
    this.code = options.code ?? null
    this.errors = options.errors ?? []
  }
}

/** Statuses worth another attempt; 500 is not. */
const RETRIED_STATUSES: readonly number[] = [429, 502, 503, 504]
const RETRY_MS = 250
const RETRY_MAX_MS = 10_000
const POLL_MS = 250
const POLL_MAX_MS = 5_000
const UNREACHABLE_MS_MAX = 600_000
/** Empty streams in a row after which a proxy is assumed to block streams. */
const STREAMS_WITHOUT_EVENT_MAX = 3

const MEGABYTE = 1024 * 1024
const LOG_BYTES_KEPT = 5 * MEGABYTE
const CUT_LINE = /^\[task-runner\] \d+ bytes of log before this line were cut\n/

/** Writes bigints digit for digit. */
function writeBigint(_name: string, value: unknown): unknown {
  return typeof value === 'bigint' ? JSON.rawJSON(String(value)) : value
}

interface Call {
  method?: 'GET' | 'POST' | 'DELETE'
  body?: unknown
  headers?: Record<string, string>
  signal?: AbortSignal | undefined
  once?: boolean
}

/**
 * A client of the service. It retries idempotent calls while the service is unreachable or busy
 * (429, 502, 503, 504), and respects `Retry-After`. Throws `TaskRunnerApiError`.
 */
export class TaskRunnerClient {
  readonly #options: { url: string; token: string; attempts: number; timeoutMs: number }

  constructor(options: TaskRunnerClientOptions) {
    const { url, token = '', attempts = 5, timeoutMs = 30_000 } = options
    this.#options = { url: url.replace(/\/+$/, ''), token, attempts, timeoutMs }
  }

  /**
   * Resolves when the task is stored and will run. Repeating a request starts nothing.
   * `traceparent` makes the task part of a trace (W3C Trace Context).
   */
  async submit(
    request: TaskRunnerRequest,
    { signal, traceparent }: { signal?: AbortSignal; traceparent?: string | undefined } = {},
  ) {
    const headers = traceparent === undefined ? {} : { traceparent }
    const call: Call = { method: 'POST', body: request, headers, signal }
    return this.#json(acceptedSchema, '/task-runner', call)
  }

  async get(taskId: string, signal?: AbortSignal): Promise<Task> {
    return this.#json(taskSchema, taskPath(taskId), { signal })
  }

  /** Lists tasks, newest first. Pass `next_cursor` as `cursor` to get the next page. */
  async list(
    filter: { status?: string; task_file_name?: string; limit?: number; cursor?: string } = {},
  ): Promise<TaskList> {
    const query = new URLSearchParams(
      Object.entries(filter).flatMap(([name, value]) =>
        value === undefined ? [] : [[name, String(value)]],
      ),
    )
    return this.#json(taskListSchema, `/tasks?${query}`)
  }

  /**
   * Waits until the task has ended and returns it. Passes the log to `onLog` as it is written.
   * Keeps waiting while the service is unreachable, for at most ten minutes. Throws the signal's
   * reason.
   */
  async wait(
    taskId: string,
    options: { onLog?: (text: string) => void; signal?: AbortSignal | undefined } = {},
  ): Promise<Task> {
    const { onLog, signal } = options
    /** Bytes of the log passed on so far, which is not the length of the text. */
    let seenBytes = 0
    let isComplete = false
    try {
      for await (const event of this.#logEvents(taskId, signal)) {
        seenBytes = Number(event.id ?? seenBytes)
        onLog?.(event.data)
      }
      isComplete = true
    } catch (err) {
      // Streams do not get through, so poll instead.
      if (!isUnreachable(err, signal)) throw err
    }
    let seenAt = performance.now()
    for (let waitMs = POLL_MS; ; waitMs = Math.min(waitMs * 2, POLL_MAX_MS)) {
      try {
        const task = await this.get(taskId, signal)
        seenAt = performance.now()
        if (task.finished_at !== null) {
          if (onLog && !isComplete) onLog(await this.#rest(task, seenBytes))
          return task
        }
      } catch (err) {
        const isTooLong = performance.now() - seenAt > UNREACHABLE_MS_MAX
        if (isTooLong || !isUnreachable(err, signal)) throw err
      }
      await pause(waitMs, undefined, signal && { signal })
    }
  }

  /** Returns the stored log after the first `seenBytes`. */
  async #rest({ task_id, log_bytes }: Task, seenBytes: number): Promise<string> {
    const restBytes = (log_bytes ?? Number.POSITIVE_INFINITY) - seenBytes
    if (restBytes <= 0) return ''
    if (seenBytes === 0 || restBytes > LOG_BYTES_KEPT) return this.logs(task_id)
    const text = await this.logs(task_id, { tailMb: restBytes / MEGABYTE })
    // The bytes that this line reports as cut were passed on before.
    return text.replace(CUT_LINE, '')
  }

  /** Returns the last `tailMb` megabytes of the log, by default and at most 5. */
  async logs(taskId: string, options: { tailMb?: number } = {}): Promise<string> {
    const query = options.tailMb === undefined ? '' : `?tail_mb=${options.tailMb}`
    return (await this.#call(`${taskPath(taskId)}/logs${query}`)).text
  }

  /**
   * Yields the log as it is written, until the task has ended. Resumes a broken stream where it
   * stopped. Throws `TaskRunnerApiError`, with status null if streams do not get through.
   */
  async *follow(taskId: string, signal?: AbortSignal): AsyncGenerator<string, void> {
    for await (const event of this.#logEvents(taskId, signal)) yield event.data
  }

  async *#logEvents(taskId: string, signal?: AbortSignal): AsyncGenerator<ServerEvent, void> {
    let lastId: string | undefined
    for (let empty = 0; empty < STREAMS_WITHOUT_EVENT_MAX; ) {
      const { response } = await this.#call(
        `${taskPath(taskId)}/logs?follow=true`,
        { signal, headers: lastId === undefined ? {} : { 'last-event-id': lastId } },
        { stream: true },
      )
      empty += 1
      try {
        for await (const event of readEvents(response)) {
          if (event.name === 'end') return
          empty = 0
          lastId = event.id ?? lastId
          yield event
        }
      } catch (err) {
        signal?.throwIfAborted()
        if (!isNetworkError(err)) throw err
      }
      await pause(RETRY_MS, undefined, signal && { signal })
    }
    const message = 'The log cannot be followed: its stream ended three times without an event'
    throw new TaskRunnerApiError(message, { status: null })
  }

  /** Cancels the task. Repeating it is safe; a task that has ended does not change. */
  async cancel(taskId: string) {
    return this.#json(cancelledSchema, `${taskPath(taskId)}/cancel`, { method: 'POST' })
  }

  /** Returns the delivery of the callback with its attempts. */
  async callback(taskId: string) {
    return this.#json(callbackStateSchema, `${taskPath(taskId)}/callback`)
  }

  /** Sends the callback again. Not retried, since every call requests a delivery. */
  async redeliver(taskId: string) {
    const path = `${taskPath(taskId)}/callback/redeliver`
    return this.#json(doneSchema, path, { method: 'POST', once: true })
  }

  async workers(): Promise<Worker[]> {
    return (await this.#json(workerListSchema, '/workers')).workers
  }

  /** Terminates a worker and cancels its task. Not retried, since a second call gets a 404. */
  async terminateWorker(name: string) {
    const path = `/workers/${encodeURIComponent(name)}`
    return this.#json(doneSchema, path, { method: 'DELETE', once: true })
  }

  /**
   * Terminates workers stuck in Provisioning for more than 59 seconds or `olderThanSeconds`, and
   * returns their names. Not retried.
   */
  async cleanup(options: { olderThanSeconds?: number | undefined } = {}): Promise<string[]> {
    const body = { older_than_seconds: options.olderThanSeconds ?? null }
    const call = { method: 'POST', body, once: true } as const
    return (await this.#json(cleanupSchema, '/workers/cleanup', call)).workers
  }

  async #json<T extends z.ZodType>(schema: T, path: string, call: Call = {}): Promise<z.output<T>> {
    const { response, text } = await this.#call(path, call)
    const parsed = schema.safeParse(jsonOf(text))
    if (parsed.success) return parsed.data
    const message = `${this.#options.url} does not respond like a task runner`
    throw new TaskRunnerApiError(message, { status: response.status, cause: parsed.error })
  }

  /** Returns a successful response and its text, which is empty for a stream. */
  async #call(
    path: string,
    call: Call = {},
    options: { stream?: boolean } = {},
  ): Promise<{ response: Response; text: string }> {
    const attemptsMax = call.once ? 1 : this.#options.attempts
    for (let attempt = 1; ; attempt += 1) {
      const { response, text = '', err } = await this.#attempt(path, call, options)
      if (response?.ok) return { response, text }
      const isRetryable = !response || RETRIED_STATUSES.includes(response.status)
      if (!isRetryable || attempt >= attemptsMax) {
        throw response ? errorOf(response.status, text) : unreachable(this.#options.url, err)
      }
      const retryAfterMs = Number(response?.headers.get('retry-after')) * 1000 || 0
      const backoff = Math.min(RETRY_MS * 2 ** (attempt - 1), RETRY_MAX_MS)
      const waitMs = Math.max(backoff * (0.5 + Math.random()), Math.min(retryAfterMs, RETRY_MAX_MS))
      await pause(waitMs, undefined, call.signal && { signal: call.signal })
    }
  }

  async #attempt(
    path: string,
    { method = 'GET', body, headers = {}, signal }: Call,
    { stream = false }: { stream?: boolean },
  ): Promise<{ response?: Response; text?: string; err?: unknown }> {
    const { url, token, timeoutMs } = this.#options
    const timeout = AbortSignal.timeout(timeoutMs)
    const signals = [...(signal ? [signal] : []), ...(stream ? [] : [timeout])]
    try {
      const response = await fetch(url + path, {
        method,
        headers: {
          ...headers,
          ...(token === '' ? {} : { authorization: `Bearer ${token}` }),
          ...(body === undefined ? {} : { 'content-type': 'application/json' }),
        },
        body: body === undefined ? null : JSON.stringify(body, writeBigint),
        signal: AbortSignal.any(signals),
      })
      return stream && response.ok ? { response } : { response, text: await response.text() }
    } catch (err) {
      signal?.throwIfAborted()
      return { err }
    }
  }
}

function taskPath(taskId: string): string {
  return `/tasks/${encodeURIComponent(taskId)}`
}

function jsonOf(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

function errorOf(status: number, text: string): TaskRunnerApiError {
  // Errors of proxies have no code.
  const body = errorSchema.partial({ code: true }).safeParse(jsonOf(text)).data
  const message = body?.message ?? `The service responded with status ${status}`
  return new TaskRunnerApiError(message, { status, code: body?.code, errors: body?.errors })
}

function unreachable(url: string, cause: unknown): TaskRunnerApiError {
  const inner = cause instanceof Error && cause.cause instanceof Error ? cause.cause : cause
  const why = inner instanceof Error ? inner.message : String(inner)
  return new TaskRunnerApiError(`${url} cannot be reached: ${why}`, { status: null, cause })
}

/** Returns whether the call may succeed later. Throws the reason of an aborted signal. */
function isUnreachable(err: unknown, signal: AbortSignal | undefined): boolean {
  signal?.throwIfAborted()
  return (
    err instanceof TaskRunnerApiError &&
    (err.status === null || RETRIED_STATUSES.includes(err.status))
  )
}

/** Returns whether a connection failed, which fetch reports as a TypeError. */
function isNetworkError(err: unknown): boolean {
  return err instanceof TypeError || (err instanceof Error && err.name === 'TimeoutError')
}
