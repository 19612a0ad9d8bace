import type { FastifyInstance } from 'fastify'
import { InvalidRequestError, TaskRunnerError } from '../core/errors.ts'
import { limitJson } from '../wire/json.ts'

const utf8 = new TextDecoder('utf-8', { fatal: true })

/**
 * JSON in UTF-8 alone; an empty body counts as none, since many clients send the header with every
 * request.
 */
export function installBodyParser(app: FastifyInstance): void {
  const parse = app.getDefaultJsonParser('error', 'error')
  app.removeAllContentTypeParsers()
  app.addContentTypeParser<Buffer>(
    'application/json',
    { parseAs: 'buffer' },
    (request, body, done) => {
      try {
        refuseEncodings(request.headers)
        if (body.length === 0) return done(null, undefined)
        const text = fromUtf8(body)
        limitJson(body)
        return parse(request, text, done)
      } catch (err) {
        // Holds: what is thrown here are errors of ours.
        return done(err as Error)
      }
    },
  )
}

function refuseEncodings(headers: Record<string, string | string[] | undefined>): void {
  const coding = String(headers['content-encoding'] ?? 'identity')
  if (coding.toLowerCase() !== 'identity') {
    const message = `The body is encoded as "${coding}"; send it without Content-Encoding`
    throw new TaskRunnerError('unsupported_media_type', message)
  }
  const type = String(headers['content-type'])
  const charset = /;\s*charset\s*=\s*"?([^\s";]*)/i.exec(type)?.[1] ?? 'utf-8'
  if (!/^utf-?8$/i.test(charset)) {
    const message = `The charset of the body is "${charset}"; send UTF-8`
    throw new TaskRunnerError('unsupported_media_type', message)
  }
}

function fromUtf8(body: Buffer): string {
  try {
    return utf8.decode(body)
  } catch {
    throw new InvalidRequestError([{ path: '', message: 'The body is not UTF-8' }])
  }
}
