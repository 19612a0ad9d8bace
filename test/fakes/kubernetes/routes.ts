import type { ServerResponse } from 'node:http'
import { type ApiRequest, type Target, targetOf, verbOf } from './api-request.ts'
import type { Logs } from './logs.ts'
import {
  type Cluster,
  createObject,
  type DeleteOptions,
  deleteObject,
  replaceObject,
} from './objects.ts'
import { jsonPatch, mergePatch } from './patch.ts'
import { representationOf } from './representation.ts'
import { type KubernetesObject, type Pod, RESOURCES, type Resource } from './resources.ts'
import { matcherOf } from './selectors.ts'
import { ApiError, badRequest, detailsOf, expired, forbidden, notFound } from './status.ts'
import type { Watches } from './watches.ts'

export interface Routes {
  cluster: Cluster
  logs: Logs
  watches: Watches
  /** What the token may not do: `create jobs`, `get pods/log`, `watch pods`. */
  denied: Set<string>
  /** The pages that `continue` tokens lead on to. */
  pages: Map<string, { objects: KubernetesObject[]; version: number }>
}

const USER = 'system:serviceaccount:default:task-runner'
const CREATED = 201

export function send(response: ServerResponse, code: number, body: unknown): void {
  response.writeHead(code, { 'content-type': 'application/json' }).end(JSON.stringify(body))
}

/** Answers, or throws the `ApiError` to answer with. */
export function route(routes: Routes, request: ApiRequest, response: ServerResponse): void {
  const { method, url } = request
  if (url.pathname === '/apis/authorization.k8s.io/v1/selfsubjectaccessreviews') {
    review(routes, request.body, response)
    return
  }
  const target = targetOf(url.pathname)
  if (!target) {
    throw new ApiError(404, 'NotFound', 'the server could not find the requested resource', {})
  }
  const { resource, namespace, name, subresource } = target
  const verb = verbOf(method, target, url.searchParams)
  if (!verb || (subresource === 'log' && verb !== 'get')) {
    const message = 'the server does not allow this method on the requested resource'
    throw new ApiError(405, 'MethodNotAllowed', message, {})
  }
  const path = subresource ? `${resource}/${subresource}` : resource
  if (routes.denied.has(`${verb} ${path}`)) {
    const scope = namespace ? `in the namespace "${namespace}"` : 'at the cluster scope'
    const what = `resource "${path}" in API group "${RESOURCES[resource].group}" ${scope}`
    throw forbidden(resource, name, `User "${USER}" cannot ${verb} ${what}`)
  }
  if (name) actOnOne(routes, verb, { ...target, name }, request, response)
  else if (verb === 'list') list(routes, target, request, response)
  else if (verb === 'create') create(routes, target, request, response)
  else if (verb === 'deletecollection') removeAll(routes, target, request, response)
  else {
    const represent = representationOf(resource, request.accept, routes.cluster.clock.now())
    const query = url.searchParams
    const matches = matcherOf(resource, query)
    routes.watches.serve({ resource, namespace, matches, represent, query }, response)
  }
}

function actOnOne(
  routes: Routes,
  verb: string,
  target: Target & { name: string },
  request: ApiRequest,
  response: ServerResponse,
): void {
  const { resource, namespace = '', name, subresource } = target
  const current = routes.cluster.store.get(resource, namespace, name)
  if (!current) throw notFound(resource, name)
  if (subresource === 'log') {
    routes.logs.serve(current as Pod, request.url.searchParams, response)
  } else if (verb === 'get') {
    const represent = representationOf(resource, request.accept, routes.cluster.clock.now())
    send(response, 200, represent.object(current))
  } else if (verb === 'delete') remove(routes, resource, current, request, response)
  else update(routes, target, current, request, response)
}

function review({ denied }: Routes, body: unknown, response: ServerResponse): void {
  const { spec } = body as { spec?: { resourceAttributes?: Record<string, string> } }
  const { verb, resource, subresource } = spec?.resourceAttributes ?? {}
  const asked = `${verb} ${subresource ? `${resource}/${subresource}` : resource}`
  send(response, CREATED, {
    kind: 'SelfSubjectAccessReview',
    apiVersion: 'authorization.k8s.io/v1',
    metadata: {},
    spec,
    status: { allowed: !denied.has(asked) },
  })
}

function list(routes: Routes, target: Target, request: ApiRequest, response: ServerResponse): void {
  const { resource, namespace } = target
  const { store, clock } = routes.cluster
  const query = request.url.searchParams
  const matches = matcherOf(resource, query)
  const limit = Number(query.get('limit') ?? 0) || Number.POSITIVE_INFINITY
  const token = query.get('continue')
  const selective = Boolean(query.get('labelSelector') || query.get('fieldSelector'))
  const left = token ? routes.pages.get(token) : undefined
  if (token && (!left || !store.since(left.version))) {
    throw expired(
      'The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.',
    )
  }
  const asked = Number(query.get('resourceVersion') ?? 0)
  if (asked > store.version) {
    throw new ApiError(
      504,
      'Timeout',
      `Too large resource version: ${asked}, current: ${store.version}`,
      {
        causes: [{ reason: 'ResourceVersionTooLarge', message: 'Too large resource version' }],
        retryAfterSeconds: 1,
      },
    )
  }
  const objects = left?.objects ?? store.list(resource, namespace).filter(matches)
  const version = left?.version ?? store.version
  const rest = objects.slice(limit)
  const metadata: Record<string, unknown> = { resourceVersion: String(version) }
  if (rest.length > 0) {
    // Pinned to the first page's version: later pages show nothing newer.
    const next = Buffer.from(`${version} ${routes.pages.size}`).toString('base64url')
    routes.pages.set(next, { objects: rest, version })
    metadata.continue = next
    if (!selective) metadata.remainingItemCount = rest.length
  }
  const represent = representationOf(resource, request.accept, clock.now())
  send(response, 200, represent.list(objects.slice(0, limit), metadata))
}

function writeOptions({ url, userAgent }: ApiRequest) {
  return {
    strict: url.searchParams.get('fieldValidation') === 'Strict',
    dryRun: url.searchParams.get('dryRun') === 'All',
    manager: url.searchParams.get('fieldManager') ?? (userAgent.split('/')[0] || 'unknown'),
  }
}

function warn(response: ServerResponse, warnings: string[]): void {
  if (warnings.length === 0) return
  const quoted = (text: string) => text.replaceAll('\\', '\\\\').replaceAll('"', '\\"')
  response.setHeader(
    'warning',
    warnings.map((text) => `299 - "${quoted(text)}"`),
  )
}

function create(
  routes: Routes,
  target: Target,
  request: ApiRequest,
  response: ServerResponse,
): void {
  const { resource, namespace } = target
  if (namespace === undefined) throw badRequest('a namespace is required')
  const options = writeOptions(request)
  const made = createObject(routes.cluster, resource, namespace, request.body, options)
  warn(response, made.warnings)
  const represent = representationOf(resource, request.accept, routes.cluster.clock.now())
  send(response, CREATED, represent.object(made.object))
}

function update(
  routes: Routes,
  { resource, subresource }: Target,
  current: KubernetesObject,
  request: ApiRequest,
  response: ServerResponse,
): void {
  let next = request.body
  if (request.method === 'PATCH') {
    const type = request.contentType
    if (type === 'application/json-patch+json') next = jsonPatch(current, next)
    else if (
      type === 'application/merge-patch+json' ||
      type === 'application/strategic-merge-patch+json'
    ) {
      const patch = next as { metadata?: { resourceVersion?: string } }
      // A patch without a version fits any: only what it says itself is compared.
      next = mergePatch(current, patch)
    } else {
      throw new ApiError(
        415,
        'UnsupportedMediaType',
        `the body of the request was in an unknown format - accepted media types include: application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json`,
      )
    }
  }
  const { object, warnings } = replaceObject(routes.cluster, resource, current as never, next, {
    ...writeOptions(request),
    status: subresource === 'status',
  })
  warn(response, warnings)
  send(response, 200, object)
}

function deleteOptions({ body, url }: ApiRequest): DeleteOptions {
  const sent = (body ?? {}) as DeleteOptions
  const propagationPolicy = sent.propagationPolicy ?? url.searchParams.get('propagationPolicy')
  const grace = sent.gracePeriodSeconds ?? url.searchParams.get('gracePeriodSeconds')
  if (propagationPolicy && !['Orphan', 'Background', 'Foreground'].includes(propagationPolicy)) {
    throw new ApiError(
      422,
      'Invalid',
      `DeleteOptions.meta.k8s.io "" is invalid: propagationPolicy: Unsupported value: "${propagationPolicy}"`,
    )
  }
  return {
    ...(propagationPolicy && { propagationPolicy }),
    ...(grace !== null && grace !== undefined && { gracePeriodSeconds: Number(grace) }),
    ...(sent.preconditions && { preconditions: sent.preconditions }),
  }
}

const ORPHANED =
  'child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set propagationPolicy=Orphan to suppress this warning'

function remove(
  { cluster }: Routes,
  resource: Resource,
  current: KubernetesObject,
  request: ApiRequest,
  response: ServerResponse,
): void {
  const options = deleteOptions(request)
  if (resource === 'jobs' && !options.propagationPolicy) warn(response, [ORPHANED])
  const { object, gone } = deleteObject(cluster, resource, current as never, options)
  const { name, uid } = current.metadata
  const done = {
    kind: 'Status',
    apiVersion: 'v1',
    metadata: {},
    status: 'Success',
    details: { ...detailsOf(resource, name), uid },
  }
  send(response, 200, gone && resource !== 'pods' ? done : object)
}

function removeAll(
  { cluster }: Routes,
  { resource, namespace }: Target,
  request: ApiRequest,
  response: ServerResponse,
): void {
  const options = deleteOptions(request)
  if (resource === 'jobs' && !options.propagationPolicy) warn(response, [ORPHANED])
  const matches = matcherOf(resource, request.url.searchParams)
  const all = cluster.store.list(resource, namespace).filter(matches)
  const objects = all.map(
    (object) => deleteObject(cluster, resource, object as never, options).object,
  )
  const metadata = { resourceVersion: String(cluster.store.version) }
  const represent = representationOf(resource, request.accept, cluster.clock.now())
  send(response, 200, represent.list(objects, metadata))
}
