/** What is wrong with the API is never the outcome of a task. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import { UnavailableError } from '../../src/core/errors.ts'
import { type Worker, WorkerError, type WorkerSpec } from '../../src/core/ports.ts'
import {
  ApiError,
  ApiUnavailableError,
  FAILURES,
  type FailureKind,
  failureOf,
} from '../../src/workers/kubernetes/failures.ts'
import { loadKubeconfig } from '../../src/workers/kubernetes/kubeconfig.ts'
import { KubernetesBackend } from '../../src/workers/kubernetes/kubernetes-backend.ts'
import type { Fault } from '../fakes/kubernetes/faults.ts'
import { type PodScript, presets } from '../fakes/kubernetes/presets.ts'
import type { Pod } from '../fakes/kubernetes/resources.ts'
import type { FakeKubernetes } from '../fakes/kubernetes/server.ts'
import {
  type KubernetesHarness,
  kubernetesSettings,
  openKubernetes,
  podOf,
} from '../helpers/kubernetes.ts'
import { logOf, NEVER, spec } from './contract.ts'

const OK = { reason: 'completed', exitCode: 0, signal: null, message: null }
const TIMEOUT_MS = 2_000
const PATIENT_MS = 20_000
const RIDE_MS = 400
/** Short, and yet long enough for a machine that is busy. */
const WAITS = {
  ...{ lookMs: 50, rideMs: RIDE_MS, callMs: 1_000, checkMs: 2_000 },
  ...{ watchIdleMs: 1_000, logSilentMs: 1_000 },
  ...{ configGraceMs: 400, lastLogMs: 20_000, goneMs: 2_000 },
}
const exits = (code: number, log = '') => presets.exits(code, { log, message: `task ${code}\n` })
const soon = (check: () => void | Promise<void>) =>
  vi.waitFor(check, { timeout: PATIENT_MS, interval: 10 })

let harness: KubernetesHarness
let fake: FakeKubernetes
/** What becomes of the pods of each worker. */
const scripts = new Map<string, PodScript>()
/** Lets the command that the kubeconfig names for our credentials fail. */
let breakCredentials: () => Promise<void>
let mendCredentials: () => Promise<void>

beforeAll(async () => {
  harness = await openKubernetes({
    settings: { provisioningTimeoutMs: TIMEOUT_MS, waits: WAITS },
    fake: {
      tls: false,
      behave: (pod: Pod) => scripts.get(pod.metadata.labels?.['job-name'] ?? ''),
    },
  })
  fake = harness.fake
  const command = join(dirname(fake.kubeconfig.path), 'credentials.sh')
  const { token } = fake
  const credential = JSON.stringify({
    ...{ apiVersion: 'client.authentication.k8s.io/v1', kind: 'ExecCredential' },
    status: { token },
  })
  const write = (script: string) => writeFile(command, `#!/bin/sh\n${script}\n`, { mode: 0o700 })
  mendCredentials = async () => {
    fake.token = token
    await write(`echo '${credential}'`)
  }
  breakCredentials = async () => {
    await write('exit 1')
    // What we have is refused, so that it is asked for anew.
    fake.token = 'another'
  }
  await mendCredentials()
  const exec = `exec: {apiVersion: client.authentication.k8s.io/v1, command: ${command}}`
  await writeFile(fake.kubeconfig.path, fake.kubeconfig.text.replace(/token: .*/, exec))
  await harness.reopen()
  await soon(() => harness.backend.check())
})
afterEach(async () => {
  fake.faults.clear()
  fake.denied.clear()
  await fake.up()
  await mendCredentials()
  await soon(() => harness.backend.check())
})
afterAll(() => harness.dispose())

function scripted(script: PodScript, overrides: Partial<WorkerSpec> = {}): WorkerSpec {
  const wanted = spec('true', { image: 'registry.example/x:1', ...overrides })
  scripts.set(wanted.name, script)
  return wanted
}

const provision = (wanted: WorkerSpec, { backend = harness.backend, ms = PATIENT_MS } = {}) =>
  backend.provision(wanted, AbortSignal.timeout(ms))

const errorOf = (step: Promise<unknown>) =>
  step.then(
    () => undefined,
    (err: unknown) => err,
  )

const completionOf = (worker: Worker) => worker.completion(AbortSignal.timeout(PATIENT_MS))

/** Provisions again and again while we cannot, as the core does. */
async function endsWell(wanted: WorkerSpec): Promise<void> {
  // Less than all of that for each: what one waits for in vain is told, and not what hindered those before.
  const once = () => provision(wanted, { ms: PATIENT_MS / 2 })
  const worker = await vi.waitFor(once, { timeout: PATIENT_MS, interval: 10 })
  expect(await completionOf(worker)).toEqual(OK)
  await worker.terminate()
}

type Ours = {
  [Kind in FailureKind]: (typeof FAILURES)[Kind] extends 'ours' ? Kind : never
}[FailureKind]

const page = (code: number, body = '<html>Sign in</html>', contentType = 'text/html'): Fault => ({
  answer: { code, contentType, body },
})
const status = (code: number, message?: string): Fault => ({
  status: { code, ...(message === undefined ? {} : { message }) },
})
const RBAC =
  'jobs.batch is forbidden: User "system:serviceaccount:default:task-runner" cannot create resource "jobs" in API group "batch" in the namespace "workers"'

/** How each kind is brought about, in all its ways. */
const TROUBLES = {
  unreachable: { 'a connection cut': { drop: 'request' }, 'a reset': { reset: 'request' } },
  timed_out: { 'no answer': { blackhole: true } },
  credentials: { 'a command that fails': {} },
  unauthorized: { '401': status(401) },
  busy: { '429': { status: { code: 429, retryAfterSeconds: 30 } } },
  server_error: {
    ...{ '500': status(500, 'failed calling webhook "policy": connection refused') },
    ...{
      '502 of a proxy': { html: '<h1>Bad Gateway</h1>' },
      '503': status(503),
      '504': status(504),
    },
  },
  forbidden: {
    ...{ 'a right that is missing': status(403, RBAC) },
    'an API server that has just started': status(
      403,
      'is forbidden: not yet ready to handle request',
    ),
  },
  namespace: {
    'a namespace that is being removed': status(
      403,
      'jobs.batch "x" is forbidden: unable to create new content in namespace workers because it is being terminated',
    ),
  },
  conflict: { '409': status(409, 'Operation cannot be fulfilled on resourcequotas "team"') },
  expired: { '410': status(410) },
  garbage: {
    ...{ 'a page with 200': page(200), 'a page with 404': page(404), 'a page with 403': page(403) },
    ...{ 'a redirect': page(302), nothing: page(200, '', 'application/json') },
    'JSON that is cut': page(200, '{"kind":"JobLi', 'application/json'),
    'JSON of something else': page(200, '{"kind":"Status","metadata":{}}', 'application/json'),
    'JSON that is no object': page(200, 'null', 'application/json'),
  },
  other: { '405': status(405) },
} satisfies Record<Ours, Record<string, Fault>>

const rows = Object.entries(TROUBLES).flatMap(([kind, ways]) =>
  Object.entries(ways).map(([way, fault]) => ({ kind: kind as Ours, way, fault: fault as Fault })),
)

/** One way of each. */
const kinds = rows.filter(({ kind }, index) => rows.findIndex((row) => row.kind === kind) === index)

/** Strikes what `where` matches, until it is ended. */
async function strike({ kind, fault }: (typeof rows)[number], where: Fault) {
  if (kind === 'credentials') {
    await breakCredentials()
    return mendCredentials
  }
  const injected = fake.faults.inject({ ...where, ...fault })
  return async () => {
    expect(injected.hits).toBeGreaterThan(0)
    injected.remove()
  }
}

describe('trouble of ours', () => {
  describe.each([
    ['Jobs', { method: 'POST', path: /\/jobs$/ }, rows],
    ['Secrets', { method: 'POST', path: /\/secrets$/ }, kinds],
  ])('while %s are made', (_, where, struck) => {
    test.each(struck)(
      '$kind, $way: provisioning waits outside, and succeeds later',
      async (row) => {
        const wanted = scripted(exits(0))
        const end = await strike(row, where)
        const began = performance.now()
        const error = await errorOf(provision(wanted))
        expect(error).toBeInstanceOf(UnavailableError)
        expect(error).not.toBeInstanceOf(WorkerError)
        expect(performance.now() - began).toBeLessThan(PATIENT_MS / 2)
        // On a busy machine a call may be late, whatever else it meets.
        expect([row.kind, 'timed_out']).toContain((error as ApiUnavailableError).kind)
        await end()
        await endsWell(wanted)
      },
    )
  })

  describe('while a task runs', () => {
    test.each(kinds)('$kind, $way: it ends as it did, with its log', async (row) => {
      const wanted = scripted(presets.runs({ log: 'begun\n' }))
      const worker = await provision(wanted)
      const pod = await podOf(fake, wanted.name)
      await soon(async () => expect(await logOf(worker)).toBe('begun\n'))
      const other = new KubernetesBackend(harness.settings)
      const found = await other.find(wanted.name)
      const end = await strike(row, { path: /\/namespaces\/workers\// })
      for (const watch of fake.watches.open) watch.cut()
      for (const stream of fake.logs.streams) stream.cut()
      const handle = fake.kubelet.handle(pod)
      handle.log('ended\n')
      handle.exit(7, { message: 'task 7\n' })
      // Of one that has seen it run, and of one that has just been started.
      const ends = [worker, found].map((each) => each && completionOf(each))
      const settled = vi.fn()
      for (const each of ends) each?.then(settled, settled)
      for (const backend of [harness.backend, other]) {
        const steps = [backend.list(), backend.find(wanted.name), backend.check()].map(errorOf)
        for (const error of steps) expect(await error).toBeInstanceOf(UnavailableError)
      }
      expect(settled).not.toHaveBeenCalled()
      await end()
      for (const each of ends) {
        expect(await each).toMatchObject({ reason: 'exit_code', exitCode: 7 })
      }
      expect(await logOf(worker)).toBe('begun\nended\n')
      await other.close()
      await worker.terminate()
    })

    test.each(kinds)('$kind, $way: that it is gone is not taken for granted', async (row) => {
      const wanted = scripted(presets.runs({ log: 'begun\n' }))
      const worker = await provision(wanted)
      const isLook = (query: URLSearchParams) => !query.has('watch')
      const end = await strike(row, { method: 'GET', path: /\/(jobs|pods)/, query: isLook })
      const completion = completionOf(worker)
      const settled = vi.fn()
      completion.then(settled, settled)
      const pod = await podOf(fake, wanted.name)
      fake.delete('jobs', wanted.name, { propagationPolicy: 'Background' })
      await soon(() => expect(fake.object('pods', pod)).toBeUndefined())
      expect(await errorOf(harness.backend.find(wanted.name))).toBeInstanceOf(UnavailableError)
      await end()
      expect(await completion).toMatchObject({ reason: 'worker_lost' })
    })
  })
})

describe('provisioning', () => {
  test.each([
    ['a quota', status(403, 'jobs.batch "x" is forbidden: exceeded quota: team'), 'unschedulable'],
    ['a webhook', status(400, 'admission webhook "a" denied the request: no'), 'startup_failed'],
    ['a policy', status(422, "ValidatingAdmissionPolicy 'a' denied request: no"), 'startup_failed'],
    ['an object that is too large', status(413), 'startup_failed'],
    ['an object that is not valid', status(422), 'startup_failed'],
  ] as const)("%s is the task's", async (_, fault, reason) => {
    const wanted = scripted(exits(0))
    const where = { method: 'POST', path: /\/jobs$/ }
    const injected = fake.faults.inject({ ...where, ...fault })
    await harness.backend.check()
    const error = await errorOf(provision(wanted, { ms: TIMEOUT_MS }))
    expect(error).toBeInstanceOf(WorkerError)
    expect((error as WorkerError).reason).toBe(reason)
    injected.remove()
    await endsWell(wanted)
  })

  test.each(['before', 'after'])(
    'an API that goes away %s a pod that starts has its Secret: the worker is found again',
    async (when) => {
      const wanted = scripted(presets.pending())
      const secrets = { method: 'POST', path: /\/secrets$/ }
      if (when === 'before') fake.faults.inject({ ...secrets, blackhole: true })
      const isGiven = () => expect(fake.object('secrets', wanted.name)).toBeDefined()
      const error = errorOf(provision(wanted))
      const pod = await podOf(fake, wanted.name)
      if (when === 'after') await soon(isGiven)
      const job = fake.object('jobs', wanted.name)?.metadata.uid
      await fake.down()
      const began = performance.now()
      expect(await error).toBeInstanceOf(UnavailableError)
      expect(performance.now() - began).toBeLessThan(PATIENT_MS / 2)
      fake.faults.clear()
      await fake.up()
      await soon(() => harness.backend.check())
      const ends = endsWell(wanted)
      // No kubelet starts a pod without it: that would be a worker that never began, and is made anew.
      await soon(isGiven)
      expect(fake.object('jobs', wanted.name)?.metadata.uid).toBe(job)
      fake.kubelet.play(pod, exits(0))
      await ends
    },
  )

  test('the time that is up while the API is away is no timeout of the task', async () => {
    const patient = new KubernetesBackend({
      ...harness.settings,
      waits: { ...WAITS, rideMs: PATIENT_MS },
    })
    await patient.list()
    const wanted = scripted(presets.pending())
    const error = errorOf(provision(wanted, { backend: patient, ms: 500 }))
    await podOf(fake, wanted.name)
    await fake.down()
    expect(await error).toBeInstanceOf(UnavailableError)
    await fake.up()
    await soon(() => harness.backend.check())
    await (await harness.backend.find(wanted.name))?.terminate()
    await patient.close()
  })

  test('a worker that was over before it was given its Secret is made anew', async () => {
    const wanted = scripted(presets.creating())
    const failing = fake.faults.inject({ method: 'POST', path: /\/secrets$/, ...status(503) })
    expect(await errorOf(provision(wanted))).toBeInstanceOf(UnavailableError)
    const first = fake.object('jobs', wanted.name)
    const handle = fake.kubelet.handle(await podOf(fake, wanted.name))
    handle.status((draft) => {
      Object.assign(draft, { phase: 'Failed', reason: 'DeadlineExceeded', message: 'too long' })
    })
    failing.remove()
    scripts.set(wanted.name, exits(0))
    const worker = await provision(wanted)
    expect(await completionOf(worker)).toEqual(OK)
    expect(fake.object('jobs', wanted.name)?.metadata.uid).not.toBe(first?.metadata.uid)
    expect(fake.object('secrets', wanted.name)).toBeDefined()
    await worker.terminate()
  })

  test('a cluster that makes no pods for anybody is waited for', async () => {
    fake.controllers.pause()
    const wanted = scripted(exits(0))
    const error = errorOf(provision(wanted, { ms: TIMEOUT_MS }))
    await soon(() => expect(fake.object('jobs', wanted.name)).toBeDefined())
    const { namespace = '', name, uid } = fake.object('jobs', wanted.name)?.metadata ?? {}
    fake.create('events', {
      metadata: { name: `${name}.1`, namespace },
      involvedObject: { kind: 'Job', name, namespace, uid },
      ...{ type: 'Warning', reason: 'FailedCreate' },
      message: 'Error creating: pods "x-" is forbidden: error looking up service account workers/y',
    })
    expect(await error).toBeInstanceOf(UnavailableError)
    expect(String(await error)).toMatch(/The cluster makes no pods: .*looking up service account/)
    fake.controllers.resume()
    await endsWell(wanted)
  })

  test('task files that somebody has removed are put again', async () => {
    await using own = await openKubernetes({
      settings: { waits: { lookMs: 50 } },
      fake: { runProcesses: true },
    })
    for (const round of [1, 2]) {
      const worker = await own.backend.provision(spec(`exit ${round}`), NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: round })
      await worker.terminate()
      const [files] = own.fake.objects('configmaps')
      own.fake.delete('configmaps', files?.metadata.name ?? '')
    }
  })
})

test('a node is not taken for lost while its kubelet could not report', async () => {
  const wanted = scripted(presets.runs())
  const worker = await provision(wanted)
  const pod = await podOf(fake, wanted.name)
  const completion = completionOf(worker)
  // Kubelets have a while to report, from here on.
  await fake.down()
  await fake.up()
  await soon(() => harness.backend.check())
  fake.kubelet.play(pod, presets.nodeLost())
  fake.change('pods', pod, ({ metadata }) => {
    metadata.deletionTimestamp = new Date(Date.now() - 60_000).toISOString()
  })
  const settled = vi.fn()
  completion.then(settled, settled)
  const asked = () => fake.requests.filter(({ path }) => path.endsWith('/log')).length
  await soon(() => expect(asked()).toBeGreaterThan(0))
  await expect(harness.backend.check()).resolves.toBeUndefined()
  expect(settled).not.toHaveBeenCalled()
  fake.kubelet.handle(pod).exit(3, { message: 'task 3\n' })
  fake.kubelet.revive(pod)
  expect(await completion).toMatchObject({ exitCode: 3 })
  await worker.terminate()
})

describe('a check', () => {
  test('leaves nothing, costs one call, and is shared', async () => {
    await harness.backend.check()
    const calls = () => fake.requests.filter(({ query }) => !query.watch)
    const before = calls().length
    await harness.backend.check()
    expect(calls().slice(before)).toMatchObject([{ method: 'POST', query: { dryRun: 'All' } }])
    await Promise.all(Array.from({ length: 20 }, () => harness.backend.check()))
    expect(calls().length).toBeLessThanOrEqual(before + 3)
    expect(fake.objects('jobs')).toEqual([])
  })

  test('passes once a right that was missing is granted', async () => {
    await harness.reopen()
    fake.denied.add('get pods/log')
    const error = await errorOf(harness.backend.check())
    expect(error).toBeInstanceOf(UnavailableError)
    expect((error as Error).message).toBe(
      'The service account may not get pods/log in namespace workers',
    )
    fake.denied.clear()
    await soon(() => harness.backend.check())
  })
})

describe('two services in one namespace, with one key', () => {
  const legacyInstance = 'of-the-key'
  let first: KubernetesBackend
  let second: KubernetesBackend
  let legacy: KubernetesBackend

  beforeAll(() => {
    const open = (deployment: string) =>
      new KubernetesBackend({ ...harness.settings, deployment, legacyInstance })
    first = open('first')
    second = open('second')
    legacy = open(legacyInstance)
  })
  afterAll(async () => {
    for (const backend of [first, second, legacy]) await backend.close()
  })

  const listed = async (backend: KubernetesBackend) =>
    (await backend.list()).map(({ name, mayBeForeign }) => ({ name, mayBeForeign }))

  test('never touch the workers of the other', async () => {
    const wanted = scripted(presets.runs())
    const { name } = wanted
    const worker = await provision(wanted, { backend: first })
    expect(await listed(first)).toEqual([{ name, mayBeForeign: false }])
    expect(await listed(second)).toEqual([])
    expect(await second.find(name)).toBeUndefined()
    const error = await errorOf(provision(wanted, { backend: second, ms: 300 }))
    expect(error).toMatchObject({ reason: 'startup_failed' })
    expect((error as Error).message).toMatch(/Another Job has the name/)
    expect(await worker.status()).toBe('Running')
    await worker.terminate()
  })

  test('a worker of the version before ends once, with its true outcome, for its very task', async () => {
    const wanted = scripted(presets.runs({ log: 'begun\n' }))
    const { name } = wanted
    await provision(wanted, { backend: legacy })
    expect(await listed(first)).toEqual([{ name, mayBeForeign: true }])
    const another = await errorOf(provision({ ...wanted, taskId: 'other' }, { backend: first }))
    expect(another).toMatchObject({ reason: 'startup_failed' })
    const adopted = await provision(wanted, { backend: first })
    const found = await first.find(name)
    expect(found).toMatchObject({ taskId: wanted.taskId, mayBeForeign: true })
    expect(fake.objects('jobs')).toHaveLength(1)
    fake.kubelet.play(await podOf(fake, name), exits(4))
    expect(await completionOf(adopted)).toMatchObject({ exitCode: 4 })
    await adopted.terminate()
    expect(fake.objects('jobs')).toEqual([])
  })
})

test.each([undefined, '', 'soon', '-1', '1e300'])(
  'an annotation that is broken (%j) hinders nobody',
  async (broken) => {
    const wanted = scripted(presets.runs({ log: 'begun\n' }))
    const worker = await provision(wanted)
    const created = fake.object('jobs', wanted.name)?.metadata.creationTimestamp ?? ''
    fake.change('jobs', wanted.name, ({ metadata }) => {
      for (const name of ['created-at', 'max-log-bytes']) {
        const key = `task-runner.io/${name}`
        if (broken === undefined) delete metadata.annotations?.[key]
        else metadata.annotations = { ...metadata.annotations, [key]: broken }
      }
    })
    const other = new KubernetesBackend(harness.settings)
    const listed = (await other.list()).find(({ name }) => name === wanted.name)
    expect(listed?.createdAt).toBe(Date.parse(created))
    if (!listed) throw new Error('unreachable')
    await soon(async () => expect(await logOf(listed)).toBe('begun\n'))
    fake.kubelet.play(await podOf(fake, wanted.name), exits(0))
    expect(await completionOf(listed)).toEqual(OK)
    await worker.terminate()
    await other.close()
  },
)

describe('an API server that accepts connections and never answers', () => {
  test('every call ends by itself, and closing takes no time', async () => {
    const sockets = new Set<Socket>()
    const server = createServer((socket) => {
      sockets.add(socket)
      socket.on('error', () => {})
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const address = server.address()
    const port = typeof address === 'object' ? address?.port : 0
    const folder = await mkdtemp(join(tmpdir(), 'kubernetes-hole-'))
    const kubeconfig = join(folder, 'kubeconfig')
    await writeFile(kubeconfig, fake.kubeconfig.text.replace(fake.url, `http://127.0.0.1:${port}`))
    const backend = new KubernetesBackend(kubernetesSettings(kubeconfig, { waits: WAITS }))
    const steps = {
      list: () => backend.list(),
      find: () => backend.find('task-x'),
      check: () => backend.check(),
      provision: () => provision(spec('true'), { backend }),
    }
    for (const [name, step] of Object.entries(steps)) {
      const began = performance.now()
      expect(await errorOf(step()), name).toBeInstanceOf(UnavailableError)
      expect(performance.now() - began, name).toBeLessThan(PATIENT_MS / 2)
    }
    // Under way while it is closed.
    const hanging = [backend.list(), backend.find('task-x'), backend.check()].map(errorOf)
    const began = performance.now()
    await backend.close()
    expect(performance.now() - began).toBeLessThan(WAITS.callMs)
    for (const error of await Promise.all(hanging)) expect(error).toBeInstanceOf(Error)
    expect(performance.now() - began).toBeLessThan(WAITS.callMs)
    for (const socket of sockets) socket.destroy()
    await new Promise((resolve) => server.close(resolve))
    await rm(folder, { recursive: true })
  })
})

describe('a kubeconfig', () => {
  afterEach(() => vi.unstubAllEnvs())

  test('that is nowhere is told with where it was looked for', async () => {
    const home = await mkdtemp(join(tmpdir(), 'kubernetes-home-'))
    vi.stubEnv('KUBECONFIG', '')
    vi.stubEnv('HOME', home)
    expect(() => loadKubeconfig(undefined)).toThrow(
      "no kubeconfig was found: KUBECONFIG, ~/.kube/config or a pod's service account",
    )
    vi.stubEnv('KUBECONFIG', join(home, 'none'))
    expect(() => loadKubeconfig(undefined)).toThrow(/cannot be read \(ENOENT.*KUBECONFIG, /)
    await writeFile(join(home, 'none'), 'users:\n- user: {token: hunter2-is-nowhere\n')
    expect(() => loadKubeconfig(undefined)).toThrow(
      /^the kubeconfig cannot be read \((?!.*hunter2)/,
    )
    await writeFile(join(home, 'none'), 'apiVersion: v1\nkind: Config\n')
    expect(() => loadKubeconfig(undefined)).toThrow(/has no cluster/)
    await rm(home, { recursive: true })
  })
})

test.each([
  [404, { details: { name: 'x', kind: 'jobs' } }, 'not_found'],
  [404, { details: { kind: 'namespaces', name: 'x' } }, 'namespace'],
  [404, { message: 'the server could not find the requested resource', details: {} }, 'other'],
  [409, { reason: 'AlreadyExists' }, 'already_exists'],
  [
    409,
    { message: 'Precondition failed: UID in precondition: a, UID in object meta: b' },
    'replaced',
  ],
  [
    403,
    { message: 'pods "x" is forbidden: failed quota: team: must specify limits.cpu' },
    'admission',
  ],
  [403, { message: 'pods "x" is forbidden: maximum cpu usage per Container is 1' }, 'admission'],
  [
    403,
    { message: 'pods "x" is forbidden: violates PodSecurity "restricted:latest"' },
    'admission',
  ],
  [403, { message: 'admission webhook "a" denied the request: no' }, 'admission'],
  [403, { message: 'error looking up service account workers/x' }, 'forbidden'],
  [503, { message: 'admission webhook "a" denied the request: no' }, 'server_error'],
] as const)('an answer of %i, %j', (code, body, kind) => {
  const error = failureOf(code, JSON.stringify({ kind: 'Status', ...body }))
  expect(error.kind).toBe(kind)
  expect(error).toBeInstanceOf(FAILURES[kind] === 'ours' ? ApiUnavailableError : ApiError)
})
