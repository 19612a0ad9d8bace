/** Codes of all failures reported to clients; routes/error-handler.ts maps them to statuses. */
export const ERROR_CODES = [
  'bad_request',
  'unauthorized',
  'host_refused',
  'site_refused',
  'not_found',
  'method_not_allowed',
  'task_not_found',
  'task_file_not_found',
  'worker_not_found',
  'task_id_conflict',
  'delivery_in_flight',
  'no_callback',
  'request_timeout',
  'request_too_large',
  'unsupported_media_type',
  'expectation_failed',
  'invalid_request',
  'queue_full',
  'headers_too_large',
  'busy',
  'draining',
  'not_ready',
  'store_unavailable',
  'workers_unavailable',
  'defaults_file_broken',
  'internal_error',
] as const
export type ErrorCode = (typeof ERROR_CODES)[number]

/** One invalid field; `path` is for example `worker_config.env_variables.A=B`. */
export interface FieldError {
  path: string
  message: string
}

/** A failure whose message is for the client. Match on `code`, never on the message. */
export class TaskRunnerError extends Error {
  override name = 'TaskRunnerError'
  readonly code: ErrorCode
  /** Seconds until a retry makes sense; sent as `Retry-After`. */
  readonly retryAfterSeconds: number | undefined

  constructor(
    code: ErrorCode,
    message: string,
    options: { cause?: unknown; retryAfterSeconds?: number } = {},
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.code = code
    this.retryAfterSeconds = options.retryAfterSeconds
  }
}

/** The disk of the store is full. Workers of ended tasks may free space on it. */
export class StoreFullError extends TaskRunnerError {
  override name = 'StoreFullError'

  constructor(cause: unknown) {
    super('store_unavailable', 'The disk of the store is full', { cause, retryAfterSeconds: 5 })
  }
}

/**
 * Workers are unavailable: the machine, its disk, the engine or a name server fails. Tasks wait,
 * and none is claimed until the backend's `check` passes. The message is a sentence for people,
 * such as "The Docker engine does not answer (ECONNREFUSED)".
 */
export class UnavailableError extends TaskRunnerError {
  override name = 'UnavailableError'

  constructor(message: string, options: { cause?: unknown } = {}) {
    super('workers_unavailable', message, { ...options, retryAfterSeconds: 5 })
  }
}

/** Maximum errors in a response: a hostile request can have a hundred thousand. */
const ERRORS_MAX = 100

/** The request is invalid; `errors` names each field. */
export class InvalidRequestError extends TaskRunnerError {
  override name = 'InvalidRequestError'
  readonly errors: readonly FieldError[]

  constructor(errors: readonly FieldError[]) {
    const named = errors.map((error) =>
      error.path === '' ? error.message : `${error.path}: ${error.message}`,
    )
    super('invalid_request', `Invalid request: ${named.slice(0, 5).join('; ')}`)
    const more = errors.length - ERRORS_MAX
    this.errors =
      more > 0
        ? [...errors.slice(0, ERRORS_MAX), { path: '', message: `and ${more} more` }]
        : errors
  }
}
