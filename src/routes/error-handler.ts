import { type IncomingMessage, type ServerResponse, STATUS_CODES } from 'node:http'
import type { Socket } from 'node:net'
import type {
  FastifyError,
  FastifyInstance,
  FastifyReply,
  FastifyRequest,
  HTTPMethods,
} from 'fastify'
import { type ErrorCode, InvalidRequestError, TaskRunnerError } from '../core/errors.ts'

/** HTTP status of each error code. No other file knows them. */
export const STATUS_OF = {
  bad_request: 400,
  unauthorized: 401,
  host_refused: 403,
  site_refused: 403,
  not_found: 404,
  task_not_found: 404,
  task_file_not_found: 404,
  worker_not_found: 404,
  no_callback: 404,
  method_not_allowed: 405,
  request_timeout: 408,
  task_id_conflict: 409,
  delivery_in_flight: 409,
  request_too_large: 413,
  unsupported_media_type: 415,
  expectation_failed: 417,
  invalid_request: 422,
  queue_full: 429,
  headers_too_large: 431,
  internal_error: 500,
  defaults_file_broken: 500,
  busy: 503,
  draining: 503,
  not_ready: 503,
  store_unavailable: 503,
  workers_unavailable: 503,
} as const satisfies Record<ErrorCode, number>

/** Default `Retry-After` of a 503. */
const RETRY_AFTER_SECONDS = 5

/** Our codes and messages for errors of the framework. */
const FRAMEWORK_ERRORS: Record<string, [ErrorCode, string]> = {
  FST_ERR_CTP_BODY_TOO_LARGE: ['request_too_large', 'The request body is too large'],
  FST_ERR_CTP_INVALID_MEDIA_TYPE: ['unsupported_media_type', 'Send the body as application/json'],
  FST_ERR_CTP_EMPTY_JSON_BODY: ['invalid_request', 'The body is empty; send a JSON object'],
  FST_ERR_CTP_INVALID_JSON_BODY: ['invalid_request', 'The body is not valid JSON'],
  FST_ERR_HANDLER_TIMEOUT: ['store_unavailable', 'The request took too long'],
  FST_ERR_BAD_URL: ['invalid_request', 'The path is not valid percent-encoding'],
  FST_ERR_MAX_PARAM_LENGTH: ['invalid_request', 'The path is too long'],
  FST_ERR_CTP_INVALID_CONTENT_LENGTH: [
    'invalid_request',
    'The body does not match its Content-Length',
  ],
}

export function installErrorHandler(app: FastifyInstance): void {
  app.setErrorHandler(answerError)
  app.addHook('onRequest', async (request, reply) => {
    // RFC 9112, section 3.2. Node's own response would have no body.
    if (request.headers.host === undefined && request.raw.httpVersion === '1.1') {
      throw new TaskRunnerError('bad_request', 'The Host header is missing')
    }
    if (request.is404) throw noRoute(app, request, reply)
  })
}

/** Returns the error for a request without a route, and sets `Allow` to the methods of its path. */
function noRoute(
  app: FastifyInstance,
  { method, url }: FastifyRequest,
  reply: FastifyReply,
): TaskRunnerError {
  const path = url.split('?', 1)[0]
  // Safe: these are the methods that routes can have.
  const methods = app.supportedMethods as HTTPMethods[]
  const allowed = methods.filter((one) => app.findRoute({ method: one, url }) !== null)
  if (allowed.length === 0) {
    return new TaskRunnerError('not_found', `There is no route ${method} ${path}`)
  }
  const allow = allowed.sort().join(', ')
  reply.header('allow', allow)
  return new TaskRunnerError(
    'method_not_allowed',
    `${path} does not support ${method}, only ${allow}`,
  )
}

/** Responds to a request that failed. */
export function answerError(
  err: FastifyError | TaskRunnerError,
  request: FastifyRequest,
  reply: FastifyReply,
): void {
  const known = asTaskRunnerError(err)
  const status = STATUS_OF[known.code]
  if (status >= 500) request.log.error({ err }, 'request failed')
  const retryAfter = known.retryAfterSeconds ?? (status === 503 ? RETRY_AFTER_SECONDS : undefined)
  if (retryAfter !== undefined) reply.header('retry-after', retryAfter)
  if (known.code === 'unauthorized') reply.header('www-authenticate', 'Bearer')
  if (known.code === 'request_too_large') {
    // A client that is still sending would see a reset connection instead of this response, so the
    // rest of the body is read and dropped.
    reply.header('connection', 'keep-alive')
    request.raw.resume()
  }
  // Serialized here: a route that does not declare the status has no schema for this response.
  reply.code(status).type('application/json').serializer(String).send(bodyOf(known))
}

/** Responds to malformed, too long or too slow HTTP. Logs nothing of it: it may hold a token. */
export function answerBrokenHttp(err: NodeJS.ErrnoException, socket: Socket): void {
  if (!socket.writable || err.code === 'ECONNRESET') return void socket.destroy()
  const known =
    err.code === 'HPE_HEADER_OVERFLOW'
      ? new TaskRunnerError('headers_too_large', 'The headers are too large')
      : err.code === 'ERR_HTTP_REQUEST_TIMEOUT'
        ? new TaskRunnerError('request_timeout', 'The request took too long to arrive')
        : new TaskRunnerError('bad_request', 'The request is not valid HTTP')
  const status = STATUS_OF[known.code]
  const body = bodyOf(known)
  const length = Buffer.byteLength(body)
  socket.end(
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\nContent-Type: application/json\r\nContent-Length: ${length}\r\nConnection: close\r\n\r\n${body}`,
  )
}

/** Responds to an `Expect` other than `100-continue`. */
export function answerUnknownExpectation(_: IncomingMessage, response: ServerResponse): void {
  const message = 'Only "Expect: 100-continue" is supported'
  const body = bodyOf(new TaskRunnerError('expectation_failed', message))
  const headers = { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) }
  response.writeHead(STATUS_OF.expectation_failed, { ...headers, connection: 'close' }).end(body)
}

/** Returns the JSON of an error. */
function bodyOf(err: TaskRunnerError): string {
  const { code, message } = err
  const errors = err instanceof InvalidRequestError ? { errors: err.errors } : {}
  return JSON.stringify({ success: false, code, message, ...errors })
}

function invalid(message: string): InvalidRequestError {
  return new InvalidRequestError([{ path: '', message }])
}

function asTaskRunnerError(err: FastifyError | TaskRunnerError): TaskRunnerError {
  if (err instanceof TaskRunnerError) return err
  const framework = FRAMEWORK_ERRORS[err.code]
  if (framework?.[0] === 'invalid_request') return invalid(framework[1])
  if (framework) return new TaskRunnerError(...framework)
  if (err.statusCode !== undefined && err.statusCode < 500) return invalid(err.message)
  return new TaskRunnerError('internal_error', 'The service failed; its log says why')
}
