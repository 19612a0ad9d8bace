import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import {
  createServer,
  type IncomingMessage,
  type RequestListener,
  type ServerResponse,
} from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Admission } from './admission.ts'
import { readBody } from './api-request.ts'
import { type Clock, createClock } from './clock.ts'
import { type Controllers, startControllers } from './controllers.ts'
import { kubeconfigOf, makeCertificates } from './credentials.ts'
import { DISCOVERY } from './discovery.ts'
import { createFaults, type Faults } from './faults.ts'
import { type Kubelet, type KubeletOptions, startKubelet } from './kubelet.ts'
import { Logs } from './logs.ts'
import { type Cluster, createObject, type DeleteOptions, deleteObject } from './objects.ts'
import { type Objects, RESOURCES, type Resource } from './resources.ts'
import { type Routes, route, send } from './routes.ts'
import { ApiError } from './status.ts'
import { Store } from './store.ts'
import { Watches } from './watches.ts'

export interface FakeKubernetesOptions {
  /** HTTPS, by a CA of this server's own. */
  tls?: boolean
  token?: string
  /** The kubeconfig's namespace, and where the methods below look. Made at the start. */
  namespace?: string
  /** Further namespaces to make. */
  namespaces?: string[]
  behave?: KubeletOptions['behave']
  /** Runs pods as processes of this machine. */
  runProcesses?: boolean
  /** `manual`: time moves by `clock.advance` alone. */
  clock?: 'real' | 'manual'
  /** How many changes watches can be resumed over. */
  historySize?: number
  admission?: Partial<Admission>
}

export interface LoggedRequest {
  method: string
  path: string
  query: Record<string, string>
  body: unknown
  userAgent: string
  at: number
  /** Absent until it is answered. */
  status?: number
}

export interface FakeKubernetes extends AsyncDisposable {
  url: string
  port: number
  /** YAML, and the file it was written to. */
  kubeconfig: { text: string; path: string }
  /** The CA's certificate, PEM; empty without TLS. */
  caData: string
  namespace: string
  /** What is accepted as bearer; settable, to rotate it. */
  token: string
  clock: Clock
  /** All objects of a kind, in every namespace. */
  objects<R extends Resource>(resource: R): Objects[R][]
  object<R extends Resource>(resource: R, name: string): Objects[R] | undefined
  /** What someone else does to the cluster; not in `requests`. */
  create<R extends Resource>(resource: R, body: object): Objects[R]
  change<R extends Resource>(resource: R, name: string, mutate: (draft: Objects[R]) => void): void
  delete(resource: Resource, name: string, options?: DeleteOptions): void
  /** Forgets history: older watches and `continue` tokens get 410. */
  compact(): void
  requests: LoggedRequest[]
  /** Unknown fields that clients sent. Should stay empty. */
  warnings: string[]
  faults: Faults
  watches: Watches
  logs: Logs
  /** The whole log of a pod's container, default its first. */
  logOf(podName: string, container?: string): string
  kubelet: Kubelet
  controllers: Controllers
  admission: Admission
  /** What the token may not do: `create jobs`, `get pods/log`. */
  denied: Set<string>
  /** Refuses and breaks connections, until `up`. */
  down(): Promise<void>
  /** Does nothing while it is up. */
  up(): Promise<void>
}

const PUBLIC = ['/version', '/readyz', '/livez', '/healthz']

export async function startFakeKubernetes(
  options: FakeKubernetesOptions = {},
): Promise<FakeKubernetes> {
  const { tls = false, namespace = 'default', namespaces = [], historySize = 10_000 } = options
  const folder = await mkdtemp(join(tmpdir(), 'fake-kubernetes-'))
  const certificates = tls ? await makeCertificates(folder) : undefined
  const clock = createClock({ manual: options.clock === 'manual' })
  const store = new Store(clock, historySize)
  const admission: Admission = {
    quota: undefined,
    podSecurity: 'restricted',
    podSecurityAt: 'pod',
    webhook: undefined,
    terminatingNamespaces: new Set(),
    ...options.admission,
  }
  const cluster: Cluster = { store, clock, admission, warnings: [] }
  for (const name of new Set([namespace, ...namespaces])) {
    createObject(cluster, 'namespaces', '', { metadata: { name } })
  }
  const logs = new Logs(clock)
  const watches = new Watches(store, clock)
  const controllers = startControllers(cluster)
  const kubelet = startKubelet(cluster, logs, {
    behave: options.behave,
    runProcesses: options.runProcesses,
    root: join(folder, 'pods'),
  })
  const faults = createFaults(clock)
  const routes: Routes = { cluster, logs, watches, denied: new Set(), pages: new Map() }
  const requests: LoggedRequest[] = []

  async function handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const { method = 'GET', headers } = request
    const url = new URL(request.url ?? '/', 'http://fake')
    const userAgent = headers['user-agent'] ?? ''
    const logged: LoggedRequest = {
      method,
      path: url.pathname,
      query: Object.fromEntries(url.searchParams),
      body: undefined,
      userAgent,
      at: clock.now(),
    }
    requests.push(logged)
    response.on('close', () => {
      if (response.headersSent) logged.status = response.statusCode
    })
    // A connection that a test breaks is no error of the server's.
    response.on('error', () => {})
    try {
      const body = await readBody(request)
      logged.body = body
      if (!(await faults.meet(method, url, response))) return
      const { authorization } = headers
      const open = authorization === undefined && PUBLIC.includes(url.pathname)
      if (!open && authorization !== `Bearer ${fake.token}`) {
        throw new ApiError(401, 'Unauthorized', 'Unauthorized')
      }
      const document = DISCOVERY[url.pathname]
      if (document) send(response, 200, document)
      else if (PUBLIC.includes(url.pathname)) {
        response.writeHead(200, { 'content-type': 'text/plain' }).end('ok')
      } else {
        const { accept = '' } = headers
        const contentType = (headers['content-type'] ?? '').split(';')[0] ?? ''
        route(routes, { method, url, body, contentType, accept, userAgent }, response)
      }
    } catch (error) {
      fail(response, error)
    }
  }

  const listener: RequestListener = (request, response) => void handle(request, response)
  const server = certificates
    ? createTlsServer({ key: certificates.key, cert: certificates.cert }, listener)
    : createServer(listener)
  // Longer than any client's: the client closes first, and no request meets a closing connection.
  server.keepAliveTimeout = 180_000
  const listen = (port: number) =>
    new Promise<void>((resolve, reject) => {
      server.once('error', reject)
      server.listen(port, '127.0.0.1', () => {
        server.off('error', reject)
        resolve()
      })
    })
  const down = () =>
    new Promise<void>((resolve) => {
      server.close(() => resolve())
      server.closeAllConnections()
    })
  await listen(0)
  const { port } = server.address() as AddressInfo
  const url = `${tls ? 'https' : 'http'}://127.0.0.1:${port}`
  const token = options.token ?? 'fake-token'
  const text = kubeconfigOf(url, { token, namespace, ca: certificates?.ca })
  const path = join(folder, 'kubeconfig')
  await writeFile(path, text, { mode: 0o600 })

  const scope = (resource: Resource) => (resource === 'namespaces' ? '' : namespace)
  const existing = <R extends Resource>(resource: R, name: string) => {
    const object = store.get(resource, scope(resource), name)
    if (!object) throw new Error(`the fake has no ${RESOURCES[resource].kind} "${name}"`)
    return object
  }
  const fake: FakeKubernetes = {
    url,
    port,
    kubeconfig: { text, path },
    caData: certificates?.ca ?? '',
    namespace,
    token,
    clock,
    objects: (resource) => store.list(resource),
    object: (resource, name) => store.get(resource, scope(resource), name),
    create: (resource, body) => createObject(cluster, resource, scope(resource), body).object,
    change: (resource, name, mutate) =>
      void store.change(resource, existing(resource, name), mutate),
    delete: (resource, name, deletion) =>
      void deleteObject(cluster, resource, existing(resource, name), deletion),
    compact: () => store.compact(),
    requests,
    warnings: cluster.warnings,
    faults,
    watches,
    logs,
    logOf(podName, container) {
      const pod = existing('pods', podName)
      return logs.text(pod.metadata.uid, container ?? pod.spec.containers[0]?.name ?? '')
    },
    kubelet,
    controllers,
    admission,
    denied: routes.denied,
    down,
    async up() {
      if (!server.listening) await listen(port)
    },
    async [Symbol.asyncDispose]() {
      controllers.pause()
      if (server.listening) await down()
      await kubelet.close()
      clock.stop()
      await rm(folder, { recursive: true, force: true, maxRetries: 10 })
    },
  }
  return fake
}

function fail(response: ServerResponse, error: unknown): void {
  const failure =
    error instanceof ApiError
      ? error
      : new ApiError(500, 'InternalError', `Internal error occurred: ${(error as Error)?.stack}`)
  if (response.headersSent) {
    response.destroy()
    return
  }
  const retryAfter = failure.body.details?.retryAfterSeconds
  if (retryAfter !== undefined) response.setHeader('retry-after', String(retryAfter))
  send(response, failure.code, failure.body)
}
