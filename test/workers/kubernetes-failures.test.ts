/** Each way a worker fails on a cluster, as the user is told of it. */
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { type Completion, type Worker, WorkerError, type WorkerSpec } from '../../src/core/ports.ts'
import type { PodHandle } from '../fakes/kubernetes/pod-handle.ts'
import { type PodScript, presets } from '../fakes/kubernetes/presets.ts'
import type { Pod } from '../fakes/kubernetes/resources.ts'
import type { FakeKubernetes } from '../fakes/kubernetes/server.ts'
import { type KubernetesHarness, openKubernetes, podOf } from '../helpers/kubernetes.ts'
import { logOf, NEVER, spec } from './contract.ts'

const TIMEOUT_MS = 2_000
/** For what is to come up: this machine may be busy. */
const PATIENT_MS = 20_000
const CONFIG_GRACE_MS = 400
const SECRET = 'hunter2-is-nowhere'
const OK = { reason: 'completed', exitCode: 0, signal: null, message: null }
/** What the bootstrap of a task that ends so leaves as its container's last words. */
const exits = (code: number, log = '') => presets.exits(code, { log, message: `task ${code}\n` })
const MEBIBYTE = 2 ** 20
const SIZED = {
  size: 'Small',
  resources: { cpus: 1, memoryBytes: 512 * MEBIBYTE, gpus: 0 },
} as const

let harness: KubernetesHarness
let fake: FakeKubernetes
/** What becomes of the pods of each worker. */
const scripts = new Map<string, PodScript>()

beforeAll(async () => {
  harness = await openKubernetes({
    settings: {
      provisioningTimeoutMs: TIMEOUT_MS,
      waits: {
        lookMs: 50,
        configGraceMs: CONFIG_GRACE_MS,
        lastLogMs: 500,
        goneMs: 300,
        nodeReportMs: 0,
      },
    },
    fake: { behave: (pod: Pod) => scripts.get(pod.metadata.labels?.['job-name'] ?? '') },
  })
  fake = harness.fake
})
afterAll(() => harness.dispose())

function scripted(script: PodScript, overrides: Partial<WorkerSpec> = {}): WorkerSpec {
  const wanted = spec('true', {
    image: 'registry.example/x:1',
    environment: { SCRIPT: 'true', TOKEN: SECRET },
    ...overrides,
  })
  scripts.set(wanted.name, script)
  return wanted
}

function provision(
  wanted: WorkerSpec,
  { backend = harness.backend, timeoutMs = PATIENT_MS } = {},
): Promise<Worker> {
  return backend.provision(wanted, AbortSignal.timeout(timeoutMs))
}

/** As core does it after a refusal: what there is of the worker is ended. */
async function terminateNamed(name: string): Promise<void> {
  await (await harness.backend.find(name))?.terminate()
  expect(fake.object('jobs', name)).toBeUndefined()
  expect(fake.object('secrets', name)).toBeUndefined()
  expect(
    fake.objects('pods').filter(({ metadata }) => metadata.labels?.['job-name'] === name),
  ).toEqual([])
}

/** Why a worker could not be had, and after how long. Nothing may be left of it. */
async function refusal(
  wanted: WorkerSpec,
): Promise<{ reason: string; message: string; tookMs: number }> {
  const began = performance.now()
  const error = await provision(wanted, { timeoutMs: TIMEOUT_MS }).then(
    () => undefined,
    (err: unknown) => err,
  )
  const tookMs = performance.now() - began
  await terminateNamed(wanted.name)
  expect(error).toBeInstanceOf(WorkerError)
  const { reason, message } = error as WorkerError
  expect(message).not.toContain(SECRET)
  return { reason, message, tookMs }
}

async function completion(wanted: WorkerSpec): Promise<Completion & { log: string }> {
  const worker = await provision(wanted)
  const end = await worker.completion(AbortSignal.timeout(10_000))
  const log = await logOf(worker)
  await worker.terminate()
  await terminateNamed(wanted.name)
  return { ...end, log }
}

/** As `expect.poll`, which tests that run together cannot use. */
const soon = (check: () => Promise<void>) => vi.waitFor(check, { timeout: 10_000, interval: 10 })

async function running(script: PodScript = presets.runs({ log: 'begun\n' })) {
  const wanted = scripted(script)
  const worker = await provision(wanted)
  const pod = await podOf(fake, wanted.name)
  await soon(async () => expect(await logOf(worker)).toBe('begun\n'))
  const ended = () => worker.completion(AbortSignal.timeout(10_000))
  return { name: wanted.name, worker, pod, ended }
}

describe.concurrent('before the task runs', () => {
  test('a pull that fails for a moment is waited for', async () => {
    const pull = presets.imagePullBackOff({ turns: 2, everyMs: 50, heals: true })
    const end = await completion(scripted([...pull, ...exits(0, 'hello\n')]))
    expect(end).toEqual({ ...OK, log: 'hello\n' })
  })

  test('one that keeps failing is told in the words of the registry when the time is over', async () => {
    const { reason, message, tookMs } = await refusal(
      scripted(presets.imagePullBackOff({ turns: 100, everyMs: 50 })),
    )
    expect(reason).toBe('image_pull_failed')
    expect(message).toMatch(
      /^The worker was not ready within 2 seconds. The image registry.example\/x:1 /,
    )
    expect(message).toMatch(/connection refused.*Hint: check its name/)
    expect(tookMs).toBeGreaterThanOrEqual(TIMEOUT_MS - 20)
  })

  test.each([
    ['an image that is not there', presets.imageNotFound(), 'image_pull_failed', /not found.*Hint/],
    [
      'an image that we may not have',
      presets.imageUnauthorized(),
      'image_pull_failed',
      /401 Unauthorized.*image_config.credential/,
    ],
    [
      'an image with a name that is none',
      presets.imageInvalidName(),
      'image_pull_failed',
      /invalid reference format.*correct the image/,
    ],
    [
      'an image that must not be pulled',
      presets.imageNeverPull(),
      'image_pull_failed',
      /pull policy of Never.*image_config.pull_policy/,
    ],
  ] as const)('%s is told at once', async (_, script, expected, words) => {
    const { reason, message, tookMs } = await refusal(scripted([...script]))
    expect({ reason, message }).toEqual({ reason: expected, message: expect.stringMatching(words) })
    expect(tookMs).toBeLessThan(TIMEOUT_MS - 200)
  })

  test('a configuration that heals within its grace', async () => {
    const script = [...presets.configError(), CONFIG_GRACE_MS / 2, ...exits(0)]
    expect(await completion(scripted(script))).toMatchObject(OK)
  })

  test.each([
    [
      'a key that is missing',
      presets.configError(`couldn't find key TOKEN in Secret workers/tr-1`),
      /CreateContainerConfigError: couldn't find key TOKEN/,
    ],
    [
      'an image that runs as root',
      presets.runAsRoot(),
      /runAsNonRoot.*Hint: the image must be able to run as another user/,
    ],
    [
      'a container that cannot be made',
      presets.createError(),
      /CreateContainerError: failed to reserve/,
    ],
  ] as const)('%s is told after its grace', async (_, script, words) => {
    const { reason, message, tookMs } = await refusal(scripted([...script]))
    expect({ reason, message }).toEqual({
      reason: 'startup_failed',
      message: expect.stringMatching(words),
    })
    expect(tookMs).toBeGreaterThanOrEqual(CONFIG_GRACE_MS - 20)
    expect(tookMs).toBeLessThan(TIMEOUT_MS - 100)
  })

  test('a container that cannot be started', async () => {
    expect(await completion(scripted(presets.startError()))).toMatchObject({
      ...{ reason: 'startup_failed', exitCode: null },
      message:
        'The container could not be started: exec: "/bin/nothing": stat /bin/nothing: no such file or directory. Hint: the image needs /bin/sh',
    })
  })

  test('task files that cannot be unpacked', async () => {
    expect(await completion(scripted(presets.initFails(127)))).toMatchObject({
      reason: 'startup_failed',
      message: expect.stringMatching(
        /could not be unpacked \(exit code 127.*Hint: the image needs/,
      ),
    })
  })

  test('a volume that cannot be mounted, told from events', async () => {
    const { reason, message } = await refusal(scripted(presets.volumeMount()))
    expect(reason).toBe('startup_failed')
    expect(message).toMatch(/FailedMount: MountVolume.SetUp failed .* configmap "tr-1" not found/)
  })

  test('no room, in the words of the scheduler', async () => {
    const { reason, message } = await refusal(scripted(presets.unschedulable()))
    expect(reason).toBe('unschedulable')
    expect(message).toMatch(/0\/3 nodes are available: 3 Insufficient memory.*smaller worker_size/)
  })

  test('no room, and a node that is on its way', async () => {
    const { reason, message } = await refusal(scripted(presets.scaleUp()))
    expect(reason).toBe('unschedulable')
    expect(message).toMatch(/Insufficient memory.*The cluster is adding a node/)
  })

  test('gates that hold it back', async () => {
    const { reason, message } = await refusal(scripted(presets.schedulingGated()))
    expect({ reason, message }).toEqual({
      reason: 'unschedulable',
      message: expect.stringMatching(/Scheduling is blocked due to non-empty scheduling gates/),
    })
  })

  test.each(['OutOfcpu', 'OutOfmemory', 'OutOfpods', 'UnexpectedAdmissionError', 'NodeAffinity'])(
    'a node that refuses it: %s',
    async (reason) => {
      const end = await completion(scripted(presets.nodeRejected(reason)))
      expect(end).toMatchObject({
        ...{ reason: 'unschedulable', exitCode: null },
        message: expect.stringMatching(
          `^The node rejected the worker before its task ran: ${reason}: .*Hint: try again`,
        ),
      })
    },
  )

  test('a pod that nobody looks at', async () => {
    expect(await refusal(scripted(presets.pending()))).toMatchObject({
      reason: 'provisioning_timeout',
      message: 'The worker was not ready within 2 seconds. The pod is being started',
    })
  })
})

describe.concurrent('while it runs', () => {
  test('an exit code', async () => {
    expect(await completion(scripted(exits(7, 'said\n')))).toEqual({
      ...{ reason: 'exit_code', exitCode: 7, signal: null, message: 'Exit code 7' },
      log: 'said\n',
    })
  })

  test('a signal', async () => {
    expect(await completion(scripted(exits(139)))).toMatchObject({
      ...{ reason: 'signal', exitCode: 139, signal: 'SIGSEGV' },
    })
  })

  test.each([
    [137, 'SIGKILL'],
    [0, null],
  ])('memory that runs out, with exit code %i', async (exitCode, signal) => {
    const end = await completion(
      scripted(exitCode === 0 ? presets.oomKilledYetZero() : presets.oomKilled(), SIZED),
    )
    expect(end).toMatchObject({
      ...{ reason: 'oom_killed', exitCode, signal },
      message:
        'Ran out of memory: the limit of worker_size Small is 512Mi. Hint: ask for a larger worker_size',
    })
  })

  test.each([137, 0, 1])('exit code %i without a word of the task', async (code) => {
    expect(await completion(scripted(presets.exits(code)))).toMatchObject({
      ...{ reason: 'worker_lost', exitCode: null },
      message: expect.stringMatching(`^The container ended with exit code ${code} `),
    })
  })

  test.each(['empty', 'unknown'] as const)('an eviction, statuses %s', async (statuses) => {
    const script = [...presets.runs({ log: 'until then\n' }), 300, ...presets.evicted({ statuses })]
    expect(await completion(scripted(script))).toMatchObject({
      ...{ reason: 'evicted', exitCode: null, log: 'until then\n' },
      message: expect.stringMatching(/its log ends with what was read until then.*low on resource/),
    })
  })

  test.each([
    ['preempted', presets.preempted(), 'evicted', /make room for a pod of higher priority/],
    ['drained', presets.drained(), 'evicted', /its node is drained/],
    ['node shut down', presets.nodeShutdown(), 'evicted', /its node shut down/],
    [
      'node collected',
      presets.nodeCollected(),
      'worker_lost',
      /node was lost; the task may still run/,
    ],
    [
      'succeeded without a container',
      presets.succeededWithoutContainers(),
      'worker_lost',
      /was not seen to end/,
    ],
  ] as const)('%s', async (_, script, reason, words) => {
    expect(await completion(scripted([...script]))).toMatchObject({
      ...{ reason, exitCode: null },
      message: expect.stringMatching(words),
    })
  })

  test('a disruption that came too late: what the task ended with counts', async () => {
    const script: PodScript = [
      ...presets.runs(),
      (pod) => pod.disrupt('EvictionByEvictionAPI', 'Eviction API: evicting'),
      (pod) => pod.exit(0, { message: 'task 0\n' }),
    ]
    expect(await completion(scripted(script))).toMatchObject(OK)
  })

  test('a disruption that the task died of is no signal of its own', async () => {
    const script: PodScript = [
      ...presets.runs(),
      (pod) => pod.disrupt('EvictionByEvictionAPI', 'Eviction API: evicting'),
      (pod) => pod.exit(143, { message: 'task 143\n' }),
    ]
    expect(await completion(scripted(script))).toMatchObject({ reason: 'evicted', exitCode: null })
  })

  test('a deadline of the pod’s own, with the log', async () => {
    const script: PodScript = [
      ...presets.runs({ log: 'still here\n' }),
      (pod) => {
        pod.verdict = { reason: 'DeadlineExceeded', message: 'Pod was active too long' }
        pod.exit(143, { message: 'task 143\n' })
      },
    ]
    expect(await completion(scripted(script))).toMatchObject({
      ...{ reason: 'timed_out', log: 'still here\n' },
      message: expect.stringMatching(/Pod was active too long.*Hint: raise timeout_seconds/),
    })
  })

  test('a node that is lost is told when the grace period is long over; what comes later is ignored', async () => {
    const { name, worker, pod, ended } = await running()
    fake.kubelet.play(pod, presets.nodeLost())
    expect(await worker.status()).toBe('Running')
    fake.change('pods', pod, ({ metadata }) => {
      metadata.deletionTimestamp = new Date(Date.now() - 60_000).toISOString()
    })
    const end = await ended()
    expect(end).toMatchObject({
      ...{ reason: 'worker_lost', exitCode: null },
      message: expect.stringMatching(/node was lost; the task may still run there/),
    })
    await expect(worker.terminate()).rejects.toThrow(/is its node lost\?/)
    fake.kubelet.revive(pod)
    expect(await ended()).toEqual(end)
    await worker.terminate()
    await terminateNamed(name)
  })

  test.each([
    ['the pod', (_: string, pod: string) => fake.delete('pods', pod)],
    [
      'the pod, at once',
      (_: string, pod: string) => fake.delete('pods', pod, { gracePeriodSeconds: 0 }),
    ],
    ['the Job', (name: string) => fake.delete('jobs', name, { propagationPolicy: 'Background' })],
    [
      'the Job, its pod last',
      (name: string) => fake.delete('jobs', name, { propagationPolicy: 'Foreground' }),
    ],
  ])('somebody deletes %s', async (_, remove) => {
    const { name, worker, pod, ended } = await running()
    remove(name, pod)
    const end = await ended()
    expect(end).toMatchObject({ reason: 'worker_lost', exitCode: null })
    expect(end.message).toMatch(/deleted from outside|The pod has gone|not by its task/)
    expect(await logOf(worker)).toBe('begun\n')
    await worker.terminate()
    await terminateNamed(name)
  })

  test('a task that is ended by TERM because somebody deletes its pod', async () => {
    const dies = (pod: PodHandle) => {
      pod.exit(143, { message: 'task 143\n' })
    }
    const { name, worker, pod, ended } = await running()
    fake.change('pods', pod, ({ metadata }) => {
      metadata.deletionTimestamp = new Date().toISOString()
    })
    fake.kubelet.play(pod, [dies])
    expect(await ended()).toMatchObject({
      reason: 'worker_lost',
      message: expect.stringMatching(/deleted from outside|not by its task/),
    })
    await worker.terminate()
    await terminateNamed(name)
  })

  test('a Job that somebody makes anew under the same name is not ours', async () => {
    const { name, worker, ended } = await running()
    const { metadata, spec: jobSpec } = structuredClone(fake.object('jobs', name)) ?? {}
    if (!metadata || !jobSpec) throw new Error('unreachable')
    fake.delete('jobs', name, { propagationPolicy: 'Background' })
    scripts.set(name, exits(0, 'an impostor\n'))
    const { labels, annotations } = metadata
    const { selector: _, template, ...others } = jobSpec
    for (const label of Object.keys(template.metadata?.labels ?? {})) {
      if (/controller-uid|job-name/.test(label)) delete template.metadata?.labels?.[label]
    }
    fake.create('jobs', { metadata: { name, labels, annotations }, spec: { ...others, template } })
    expect(await ended()).toMatchObject({ reason: 'worker_lost' })
    expect(await logOf(worker)).toBe('begun\n')
    const uid = fake.object('jobs', name)?.metadata.uid
    await worker.terminate()
    expect(fake.object('jobs', name)?.metadata.uid).toBe(uid)
    await terminateNamed(name)
  })

  test('nothing that the user is told or that others can read holds a secret', () => {
    const readable = (['jobs', 'pods', 'events', 'configmaps'] as const).map((kind) =>
      fake.objects(kind),
    )
    expect(JSON.stringify(readable)).not.toContain(SECRET)
  })
})

describe('what the API server refuses', () => {
  test('a quota for Jobs is waited for', async () => {
    fake.admission.quota = { name: 'team', hard: { 'count/jobs.batch': 0 } }
    const wanted = scripted(exits(0))
    const end = completion(wanted)
    const refused = () => fake.requests.some(({ status }) => status === 403)
    await soon(async () => expect(refused()).toBe(true))
    fake.admission.quota = undefined
    expect(await end).toMatchObject(OK)
  })

  test('one that stays full is told', async () => {
    fake.admission.quota = { name: 'team', hard: { 'count/jobs.batch': 0 } }
    const { reason, message } = await refusal(scripted(exits(0)))
    fake.admission.quota = undefined
    expect(reason).toBe('unschedulable')
    expect(message).toMatch(/The namespace has no quota left: .*exceeded quota: team/)
  })

  test('a quota for pods is told by events, and waited for', async () => {
    fake.admission.quota = { name: 'team', hard: { pods: 0 } }
    const { reason, message } = await refusal(scripted(exits(0)))
    expect(reason).toBe('unschedulable')
    expect(message).toMatch(/FailedCreate: .*exceeded quota: team.*Hint: raise the quota/)
    const end = completion(scripted(exits(0)))
    const refused = () =>
      fake.objects('events').some(({ reason, involvedObject }) => {
        return reason === 'FailedCreate' && fake.object('jobs', String(involvedObject.name))
      })
    await soon(async () => expect(refused()).toBe(true))
    fake.admission.quota = undefined
    expect(await end).toMatchObject(OK)
  })

  test('a webhook that refuses the pod is told by events', async () => {
    fake.admission.webhook = (kind) => (kind === 'pods' ? 'images must be signed' : undefined)
    const { reason, message } = await refusal(scripted(exits(0)))
    fake.admission.webhook = undefined
    expect(reason).toBe('startup_failed')
    expect(message).toMatch(/The cluster rejected the pod: .*images must be signed.*Hint: ask/)
  })

  test('a webhook that refuses the Job', async () => {
    fake.admission.webhook = (kind) => (kind === 'jobs' ? 'no Jobs on Fridays' : undefined)
    const { reason, message, tookMs } = await refusal(scripted(exits(0)))
    fake.admission.webhook = undefined
    expect({ reason, message }).toEqual({
      reason: 'startup_failed',
      message: expect.stringMatching(/Kubernetes rejected .*no Jobs on Fridays/),
    })
    expect(tookMs).toBeLessThan(TIMEOUT_MS - 200)
  })

  test('a profile that the worker violates', async () => {
    fake.faults.inject({
      ...{ method: 'POST', path: /\/jobs$/, times: 1 },
      status: {
        code: 403,
        reason: 'Forbidden',
        message: 'violates PodSecurity "restricted:latest"',
      },
    })
    expect(await refusal(scripted(exits(0)))).toMatchObject({
      reason: 'startup_failed',
      message: expect.stringContaining('violates PodSecurity "restricted:latest"'),
    })
  })

  test('a field that is not valid', async () => {
    const { reason, message } = await refusal(scripted(exits(0), { timeoutSeconds: -1_000_000 }))
    expect(reason).toBe('startup_failed')
    expect(message).toMatch(/Kubernetes rejected .*spec.*activeDeadlineSeconds: Invalid value/)
  })

  test('a webhook that is down is not a refusal', async () => {
    const message = 'failed calling webhook "policy": connection refused'
    fake.faults.inject({
      ...{ method: 'POST', path: /\/jobs$/, times: 2 },
      status: { code: 500, reason: 'InternalError', message },
    })
    expect(await completion(scripted(exits(0)))).toMatchObject(OK)
  })
})

describe('a queue (Kueue)', () => {
  const QUEUE_TIMEOUT_MS = 1_000
  let queued: KubernetesHarness

  beforeAll(async () => {
    queued = await openKubernetes({
      settings: {
        ...{ queue: 'team-a', provisioningTimeoutMs: QUEUE_TIMEOUT_MS },
        waits: { lookMs: 50, lastLogMs: 500 },
      },
      fake: { behave: (pod) => scripts.get(pod.metadata.labels?.['job-name'] ?? '') },
    })
  })
  afterAll(() => queued.dispose())

  const resume = (name: string, suspend = false) =>
    queued.fake.change('jobs', name, (draft) => {
      draft.spec.suspend = suspend
    })

  test('a suspended worker waits for longer than a start may take, then runs', async () => {
    const wanted = scripted(exits(0, 'at last\n'))
    const worker = await provision(wanted, { backend: queued.backend })
    const waited = worker.completion(AbortSignal.timeout(QUEUE_TIMEOUT_MS * 2))
    await expect(waited).rejects.toMatchObject({ name: 'TimeoutError' })
    expect(await worker.status()).toBe('Provisioning')
    resume(wanted.name)
    expect(await worker.completion(NEVER)).toEqual(OK)
    expect(await logOf(worker)).toBe('at last\n')
    await worker.terminate()
  })

  test('one that does not come up once it may is told as any other', async () => {
    const wanted = scripted(presets.unschedulable())
    const worker = await provision(wanted, { backend: queued.backend })
    resume(wanted.name)
    expect(await worker.completion(AbortSignal.timeout(10_000))).toMatchObject({
      reason: 'unschedulable',
      message: expect.stringContaining('0/3 nodes are available'),
    })
    await worker.terminate()
  })

  test('one that the queue takes back while it runs was evicted, and does not run again', async () => {
    const wanted = scripted(presets.runs({ log: 'begun\n' }))
    const worker = await provision(wanted, { backend: queued.backend })
    resume(wanted.name)
    await soon(async () => expect(await logOf(worker)).toBe('begun\n'))
    resume(wanted.name, true)
    expect(await worker.completion(AbortSignal.timeout(10_000))).toMatchObject({
      reason: 'evicted',
      message: expect.stringContaining('its queue, which suspended the Job'),
    })
    await worker.terminate()
  })
})
