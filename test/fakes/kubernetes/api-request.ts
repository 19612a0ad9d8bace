import type { IncomingMessage } from 'node:http'
import { decodeAccessReview } from './protobuf.ts'
import { RESOURCES, type Resource } from './resources.ts'
import { ApiError, badRequest } from './status.ts'

export interface ApiRequest {
  method: string
  url: URL
  body: unknown
  contentType: string
  accept: string
  userAgent: string
}

export interface Target {
  resource: Resource
  namespace: string | undefined
  name: string | undefined
  subresource: string | undefined
}

/** `/api/v1/…` and `/apis/batch/v1/…`; undefined for any other path. */
export function targetOf(path: string): Target | undefined {
  const [, root, rest = ''] = /^\/(api\/v1|apis\/batch\/v1)\/(.+)$/.exec(path) ?? []
  if (!root) return undefined
  const parts = rest.split('/').map(decodeURIComponent)
  const inNamespace = parts[0] === 'namespaces' && parts.length > 2
  const namespace = inNamespace ? parts[1] : undefined
  const [resource = '', name, subresource, ...more] = inNamespace ? parts.slice(2) : parts
  if (!Object.hasOwn(RESOURCES, resource) || more.length > 0) return undefined
  const known = resource as Resource
  const group = root === 'api/v1' ? '' : 'batch'
  if (RESOURCES[known].group !== group) return undefined
  if (subresource && !RESOURCES[known].subresources?.includes(subresource)) return undefined
  if (name && !namespace && known !== 'namespaces') return undefined
  const scope = known === 'namespaces' ? '' : namespace
  return { resource: known, namespace: scope, name, subresource }
}

export function verbOf(
  method: string,
  { name }: Target,
  query: URLSearchParams,
): string | undefined {
  const watching = ['true', '1'].includes(query.get('watch') ?? '')
  if (method === 'GET') return name ? 'get' : watching ? 'watch' : 'list'
  if (method === 'DELETE') return name ? 'delete' : 'deletecollection'
  if (method === 'POST') return name ? undefined : 'create'
  return name ? { PUT: 'update', PATCH: 'patch' }[method] : undefined
}

const BODY_BYTES_MAX = 3 * 1024 * 1024

export async function readBody(request: IncomingMessage): Promise<unknown> {
  const chunks: Buffer[] = []
  let bytes = 0
  for await (const chunk of request) {
    bytes += chunk.length
    if (bytes <= BODY_BYTES_MAX) chunks.push(chunk)
  }
  if (bytes > BODY_BYTES_MAX) {
    const message = `Request entity too large: limit is ${BODY_BYTES_MAX}`
    throw new ApiError(413, 'RequestEntityTooLarge', message)
  }
  if (bytes === 0) return undefined
  const type = request.headers['content-type'] ?? ''
  const review = decodeAccessReview(Buffer.concat(chunks))
  if (review) return review
  if (type.includes('protobuf') || type.includes('yaml')) {
    throw new ApiError(415, 'UnsupportedMediaType', `the body was in an unknown format: ${type}`)
  }
  try {
    return JSON.parse(Buffer.concat(chunks).toString())
  } catch (error) {
    throw badRequest(`couldn't get version/kind; json parse error: ${(error as Error).message}`)
  }
}
