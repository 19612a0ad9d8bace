import { once } from 'node:events'
import { type ClientRequest, request as httpRequest, type IncomingMessage } from 'node:http'
import { request as httpsRequest } from 'node:https'

/** Where the fake is: the fake itself, or parts of it to be wrong about. */
export interface ClientTarget {
  url: string
  token: string
  caData: string
}

export interface Answer {
  status: number
  headers: IncomingMessage['headers']
  // Whatever JSON the API sends: tests look into it with matchers.
  body: Record<string, unknown> & { metadata?: Record<string, unknown>; items?: Named[] }
  text: string
}

export interface Named {
  metadata: { name: string; resourceVersion: string }
}

export interface OpenStream {
  status: number
  chunks: Buffer[]
  /** `end` for a clean end, `cut` for a broken connection. */
  readonly ended: 'end' | 'cut' | undefined
  readonly text: string
  /** The watch events that have arrived whole. */
  readonly events: { type: string; object: Named & Record<string, unknown> }[]
  close(): void
}

interface CallOptions {
  body?: object | string | undefined
  headers?: Record<string, string>
}

function open(
  target: ClientTarget,
  method: string,
  path: string,
  options: CallOptions,
): ClientRequest {
  const { body, headers = {} } = options
  const text = typeof body === 'string' ? body : body && JSON.stringify(body)
  const send = target.url.startsWith('https') ? httpsRequest : httpRequest
  const request = send(target.url + path, {
    method,
    agent: false,
    ...(target.caData && { ca: target.caData }),
    headers: {
      authorization: `Bearer ${target.token}`,
      // The length, too: Node sends a DELETE's body without any framing otherwise.
      ...(text && {
        'content-type': 'application/json',
        'content-length': Buffer.byteLength(text),
      }),
      ...headers,
    },
  })
  request.end(text)
  return request
}

/** One request, bare: nothing between the test and what the fake really sends. */
export async function call(
  target: ClientTarget,
  method: string,
  path: string,
  body?: object | string,
  headers: Record<string, string> = {},
): Promise<Answer> {
  const request = open(target, method, path, { body, headers })
  const [response] = (await once(request, 'response')) as [IncomingMessage]
  const chunks: Buffer[] = []
  for await (const chunk of response) chunks.push(chunk)
  const text = Buffer.concat(chunks).toString()
  const json = response.headers['content-type']?.includes('json')
  return {
    status: response.statusCode ?? 0,
    headers: response.headers,
    body: json ? JSON.parse(text) : {},
    text,
  }
}

/** A watch or a followed log. */
export async function stream(target: ClientTarget, path: string): Promise<OpenStream> {
  const request = open(target, 'GET', path, {})
  const [response] = (await once(request, 'response')) as [IncomingMessage]
  const chunks: Buffer[] = []
  let ended: OpenStream['ended']
  response.on('data', (chunk) => chunks.push(chunk))
  response.on('end', () => {
    ended ??= 'end'
  })
  response.on('error', () => {
    ended ??= 'cut'
  })
  request.on('error', () => {
    ended ??= 'cut'
  })
  const text = () => Buffer.concat(chunks).toString()
  return {
    status: response.statusCode ?? 0,
    chunks,
    get ended() {
      return ended
    },
    get text() {
      return text()
    },
    get events() {
      const lines = text().split('\n').slice(0, -1)
      return lines.map((line) => JSON.parse(line))
    },
    close: () => request.destroy(),
  }
}
