import type { FastifyInstance, FastifyRequest } from 'fastify'
import { InvalidRequestError, TaskRunnerError } from '../core/errors.ts'
import { parseJson } from '../wire/json.ts'

/** Accepts only JSON in UTF-8. An empty body counts as absent, whatever its `Content-Type`. */
export function installBodyParser(app: FastifyInstance): void {
  app.removeAllContentTypeParsers()
  app.addContentTypeParser<Buffer>(
    'application/json',
    { parseAs: 'buffer' },
    async (request: FastifyRequest, body: Buffer) => {
      refuseEncodings(request.headers)
      return body.length === 0 ? undefined : parsed(body)
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

function parsed(body: Buffer): unknown {
  try {
    return parseJson(body)
  } catch (err) {
    if (!(err instanceof SyntaxError)) throw err
    throw new InvalidRequestError([{ path: '', message: `The body ${err.message}` }])
  }
}
