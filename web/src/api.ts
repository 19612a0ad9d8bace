import type { z } from 'zod'
import type { Task, TaskList, TaskRunnerRequest, Worker } from '../../src/client/client.ts'
import type {
  acceptedSchema,
  callbackStateSchema,
  cancelledSchema,
  cleanupSchema,
  doneSchema,
  errorSchema,
  taskSummarySchema,
} from '../../src/wire/responses.ts'
import type { sessionSchema } from '../../src/wire/session.ts'
import type { statisticsSchema } from '../../src/wire/statistics.ts'

export type { Task, TaskList, TaskRunnerRequest, Worker }
export type Session = z.output<typeof sessionSchema>
export type TaskSummary = z.output<typeof taskSummarySchema>
export type Statistics = z.output<typeof statisticsSchema>
export type CallbackState = z.output<typeof callbackStateSchema>
type Done = z.output<typeof doneSchema>

export interface FieldError {
  path: string
  message: string
}

/** An error response of the service. `status` is null if there was no response. */
export class ApiError extends Error {
  override name = 'ApiError'
  readonly status: number | null
  readonly errors: readonly FieldError[]

  constructor(message: string, status: number | null, errors: readonly FieldError[] = []) {
    super(message)
    this.status = status
    this.errors = errors
  }
}

export interface Filter {
  status?: string
  task_file_name?: string
  callback_status?: string
}

const TIMEOUT_MS = 30_000

let onSignedOut = () => {}

/** Sets the listener that is called when the service requires a token and the session has none. */
export function whenSignedOut(listener: () => void): void {
  onSignedOut = listener
}

interface Call {
  method?: 'GET' | 'POST' | 'DELETE'
  body?: unknown
  signal?: AbortSignal | undefined
}

/** Calls the API. Paths are relative to the page, and so below its `BASE_PATH`. */
async function call<T>(path: string, { method = 'GET', body, signal }: Call = {}): Promise<T> {
  const response = await fetch(path, {
    method,
    signal: AbortSignal.any([...(signal ? [signal] : []), AbortSignal.timeout(TIMEOUT_MS)]),
    ...(body === undefined
      ? {}
      : { body: JSON.stringify(body), headers: { 'content-type': 'application/json' } }),
  }).catch(() => {
    signal?.throwIfAborted()
    throw new ApiError('The service is not responding', null)
  })
  // Safe: the types and the OpenAPI document of the service come from the same schemas.
  if (response.ok) return (await response.json()) as T
  if (response.status === 401 && path !== 'session') onSignedOut()
  const error = (await response.json().catch(() => ({}))) as Partial<z.output<typeof errorSchema>>
  const message = error.message ?? `The service responded with ${response.status}`
  throw new ApiError(message, response.status, error.errors)
}

const taskPath = (id: string) => `tasks/${encodeURIComponent(id)}`

export const api = {
  session: () => call<Session>('session'),
  signIn: (token: string) => call<Done>('session', { method: 'POST', body: { token } }),
  signOut: () => call<Done>('session', { method: 'DELETE' }),
  statistics: (minutes: number, signal?: AbortSignal) =>
    call<Statistics>(`statistics?minutes=${minutes}`, { signal }),
  tasks: (query: Filter & { limit: number; cursor?: string }, signal?: AbortSignal) => {
    const given = Object.entries(query).filter(([, value]) => value !== '')
    const search = new URLSearchParams(given.map(([name, value]) => [name, String(value)]))
    return call<TaskList>(`tasks?${search}`, { signal })
  },
  task: (id: string, signal?: AbortSignal) => call<Task>(taskPath(id), { signal }),
  callback: (id: string, signal?: AbortSignal) =>
    call<CallbackState>(`${taskPath(id)}/callback`, { signal }),
  cancel: (id: string) =>
    call<z.output<typeof cancelledSchema>>(`${taskPath(id)}/cancel`, { method: 'POST' }),
  redeliver: (id: string) => call<Done>(`${taskPath(id)}/callback/redeliver`, { method: 'POST' }),
  submit: (request: unknown) =>
    call<z.output<typeof acceptedSchema>>('task-runner', { method: 'POST', body: request }),
  taskFiles: () => call<{ task_files: string[] }>('task-files'),
  workers: (signal?: AbortSignal) => call<{ workers: Worker[] }>('workers', { signal }),
  terminate: (name: string) => call<Done>(`workers/${name}`, { method: 'DELETE' }),
  cleanUp: (seconds: number) =>
    call<z.output<typeof cleanupSchema>>('workers/cleanup', {
      method: 'POST',
      body: { older_than_seconds: seconds },
    }),
  description: () => call<ApiDescription>('docs/json'),
}

export interface ApiDescription {
  components: { schemas: Record<string, JsonSchema> }
}

/** The part of JSON Schema that the form supports. */
export interface JsonSchema {
  $ref?: string
  type?: string | string[]
  anyOf?: JsonSchema[]
  enum?: string[]
  description?: string
  properties?: Record<string, JsonSchema>
  required?: string[]
  additionalProperties?: boolean | JsonSchema
  items?: JsonSchema
  minimum?: number
  maximum?: number
  maxLength?: number
  examples?: unknown[]
}

export function logUrl(id: string, options: { follow: boolean }): string {
  return `${taskPath(id)}/logs${options.follow ? '?follow=true' : ''}`
}

export function hasEnded(task: Pick<TaskSummary, 'finished_at'>): boolean {
  return task.finished_at !== null
}

/** Returns whether neither the task nor its callback will change without a request. */
export function isSettled(task: Pick<TaskSummary, 'finished_at' | 'callback_status'>): boolean {
  return hasEnded(task) && task.callback_status !== 'pending'
}

export function messageOf(err: unknown): string {
  return err instanceof Error ? err.message : String(err)
}
