/** Each kind of failure of the engine, injected between the backend and the real engine. */
import type http from 'node:http'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { UnavailableError } from '../../src/core/errors.ts'
import type { WorkerSpec } from '../../src/core/ports.ts'
import type { EngineError } from '../../src/workers/docker/engine.ts'
import {
  FAILURES,
  type FailureKind,
  kindOfRefusal,
  messageIn,
  type Step,
} from '../../src/workers/docker/failures.ts'
import {
  containers,
  type DockerHarness,
  openDocker,
  refuse,
  startEngineProxy,
  TEST_IMAGE,
  whyNoDocker,
} from '../helpers/docker.ts'
import { fileThere, logOf, marker, NEVER, spec, text, touch } from './contract.ts'

const skipped = await whyNoDocker()

const SLOW_MS = 180_000
/** Time limit of calls, where one is to be reached. */
const SHORT_MS = 1_000

type Answer = (response: http.ServerResponse) => void

const says =
  (status: number, message: string): Answer =>
  (response) =>
    refuse(response, status, message)
const page =
  (status: number, body = '<html><body>Not today</body></html>'): Answer =>
  (response) => {
    response.writeHead(status, { 'content-type': 'text/html' }).end(body)
  }

/** The calls of a provisioning, in their order. */
const STEPS = {
  'the look for the worker': /^GET \S+\/containers\/[^/]+\/json/,
  'the look for the image': /^GET \S+\/images\//,
  'the look at the machine': /^GET \S+\/(info|version)\?/,
  'making the container': /^POST \S+\/containers\/create/,
  'its files': /^PUT \S+\/archive/,
  'its output': /^POST \S+\/attach/,
  'its start': /^POST \S+\/start/,
} as const
type StepName = keyof typeof STEPS
const ALL = Object.keys(STEPS) as StepName[]
const MAKING = ALL.slice(3)

/** What the backend is answered, and where that has this meaning. */
interface Row {
  answers: Answer[]
  at?: StepName[]
  /** Means something else where no container is being made. */
  onlyMaking?: boolean
}

/** Failures that are ours. */
const OURS: Partial<Record<FailureKind, Row>> = {
  unreachable: { answers: [(response) => response.destroy()] },
  timeout: { answers: [() => {}] },
  garbage: {
    answers: [page(200), page(200, 'null'), page(200, '[1]'), page(404), page(409), page(302)],
    at: ALL.filter((step) => step !== 'its output'),
  },
  engine_failed: { answers: [says(500, 'containerd is away'), page(503)] },
  unauthorized: { answers: [says(401, 'who is it'), page(401)] },
  forbidden: { answers: [says(403, 'authorization denied by plugin'), page(403)] },
  too_many_requests: { answers: [says(429, 'slow down'), page(429)] },
  version_refused: {
    answers: [
      says(400, 'client version 1.41 is too new. Maximum supported API version is 1.40'),
      page(400, 'client version 1.41 is too old. Minimum supported API version is 1.44, please'),
    ],
  },
  disk_full: { answers: [says(500, 'mkdir /var/lib/docker/x: no space left on device')] },
  network_missing: {
    answers: [says(404, 'network workers not found')],
    ...{ at: MAKING, onlyMaking: true },
  },
  conflict: { answers: [says(409, 'container is marked for removal')], at: MAKING.slice(1) },
}

/** A backend on the real engine, which answers as `trouble` says where that is the case. */
async function withTrouble(
  use: (
    harness: DockerHarness,
    trouble: {
      answer?: Answer | undefined
      at: RegExp
      /** So many requests were answered like this. */
      hits: number
      requests: readonly string[]
      cut: () => void
    },
  ) => Promise<void>,
  callTimeoutMs = 30_000,
): Promise<void> {
  await using proxy = await startEngineProxy((request, response) => {
    const { answer, at } = trouble
    if (!answer || !at.test(`${request.method} ${request.url}`)) return false
    trouble.hits += 1
    answer(response)
    return true
  })
  const { socketPath, requests } = proxy
  const trouble: Parameters<typeof use>[1] = {
    ...{ at: /./, hits: 0, requests, cut: () => proxy.cut() },
  }
  const harness = await openDocker({ engine: { socketPath }, callTimeoutMs })
  try {
    await use(harness, trouble)
  } finally {
    trouble.answer = undefined
    await harness.dispose()
  }
}

/** What engines and proxies were seen to say. */
const EXAMPLES: Record<
  Exclude<FailureKind, 'unreachable' | 'timeout' | 'own_files'>,
  Array<[Step, number, string]>
> = {
  garbage: [
    ['look', 404, '<html>404</html>'],
    ['look', 404, '{"message":"page not found"}'],
    ['look', 404, 'null'],
    ['make', 400, '{"message":""}'],
  ],
  engine_failed: [
    ['look', 500, '{"message":"containerd is away"}'],
    ['make', 500, '{"message":"error creating overlay mount: input/output error"}'],
    ['pull', 502, 'Bad Gateway'],
    ['exit', 500, '{"message":"error while creating mount source path"}'],
  ],
  unauthorized: [['look', 401, 'Unauthorized']],
  forbidden: [
    ['make', 403, '<html>403 Forbidden</html>'],
    ['pull', 403, '{"message":"authorization denied by plugin opa: no"}'],
    ['pull', 403, 'denied'],
  ],
  too_many_requests: [['make', 429, '{"message":"slow down"}']],
  version_refused: [
    ['make', 400, 'client version 1.10 is too old. Minimum supported API version is 1.12, please'],
    ['look', 400, '{"message":"client version 1.99 is too new. Maximum supported API version is"}'],
  ],
  disk_full: [
    ['make', 500, '{"message":"mkdir /var/lib/docker/overlay2/x: no space left on device"}'],
    ['pull', 500, '{"message":"write /tmp/GetImageBlob1: no space left on device"}'],
    ['make', 500, '{"message":"mkdir /var/lib/docker/overlay2/x: disk quota exceeded"}'],
  ],
  network_missing: [['make', 404, '{"message":"network no-such-network not found"}']],
  conflict: [
    ['look', 409, '{"message":"removal of container x is already in progress"}'],
    ['look', 500, '{"message":"can only kill running containers: container state improper"}'],
  ],
  pull_failed: [
    ['pull', 500, '{"message":"Get \\"https://x/v2/\\": dial tcp: lookup x: no such host"}'],
    ['pull', 500, '{"message":"received unexpected HTTP status: 503 Service Unavailable"}'],
    ['pull', 500, '{"message":"open /var/lib/docker/tmp/x: permission denied"}'],
  ],
  pull_refused: [
    ['pull', 500, '{"message":"manifest unknown"}'],
    ['pull', 404, '{"message":"pull access denied for x, repository does not exist"}'],
    ['pull', 500, '{"message":"Head \\"http://x\\": no basic auth credentials"}'],
  ],
  no_device: [['make', 500, '{"message":"could not select device driver \\"\\" with [[gpu]]"}']],
  invalid_request: [
    ['make', 400, '{"message":"Minimum memory limit allowed is 6MB"}'],
    ['make', 400, '{"message":"no such image: A: invalid reference format"}'],
  ],
  not_found: [
    ['look', 404, '{"message":"No such container: x"}'],
    ['make', 404, '{"message":"No such image: x:latest"}'],
    ['exit', 404, '{"message":"Could not find the file /worker/exit in container x"}'],
  ],
  exit_broken: [['exit', 500, '{"message":"evalSymlinksInScope: too many links in /x/exit"}']],
}

describe('a failure of the engine', () => {
  const examples = Object.entries(EXAMPLES).flatMap(([kind, given]) =>
    given.map(([step, status, body]) => ({ kind, step, status, body })),
  )

  test.each(examples)('$status $body at $step is of the kind $kind', (example) => {
    const { kind, step, status, body } = example
    expect(kindOfRefusal({ status, words: messageIn(body), body }, step)).toBe(kind)
  })
})

function tests(): void {
  const ours = (Object.keys(FAILURES) as FailureKind[]).filter(
    (kind) => FAILURES[kind].verdict === 'ours',
  )

  test.each(ours.filter((kind) => kind !== 'own_files'))(
    'a failure of the kind %s is no outcome of a task that is waiting or running',
    async (kind) => {
      const row = OURS[kind]
      if (!row) throw new Error(`nothing is tested of ${kind}`)
      await withTrouble(
        async ({ backend, sharedDir, settings }, trouble) => {
          const [runs, go] = [join(sharedDir, marker()), join(sharedDir, marker())]
          const wanted = spec(
            `echo ran | tee -a ${runs}; until [ -e ${go} ]; do sleep 0.02; done; exit 5`,
          )
          for (const step of row.at ?? ALL) {
            for (const answer of row.answers) {
              Object.assign(trouble, { answer, at: STEPS[step], hits: 0 })
              // A slow machine may be out of time at an earlier step.
              while (trouble.hits === 0) {
                const failure = await backend.provision(wanted, NEVER).catch((err: unknown) => err)
                expect(failure, step).toBeInstanceOf(UnavailableError)
                expect((failure as EngineError).kind, step).toBe(kind)
              }
            }
          }
          trouble.answer = undefined
          const patient = await openDocker({ ...settings, callTimeoutMs: 30_000 })
          const worker = await patient.backend.provision(wanted, NEVER)
          await fileThere(runs)
          const end = worker.completion(NEVER)
          for (const answer of row.onlyMaking ? [] : row.answers) {
            Object.assign(trouble, { answer, at: /./, hits: 0 })
            trouble.cut()
            await expect.poll(() => trouble.hits, { timeout: 15_000 }).toBeGreaterThan(1)
          }
          await touch(go)
          trouble.answer = undefined
          trouble.cut()
          expect(await end).toMatchObject({ reason: 'exit_code', exitCode: 5 })
          expect(await logOf(worker)).toBe('ran\n')
          expect(await text(runs)).toBe('ran\n')
          await patient.dispose()
        },
        kind === 'timeout' ? SHORT_MS : undefined,
      )
    },
    SLOW_MS,
  )

  test('task files that cannot be read are no outcome either', async () => {
    const { settings, ...harness } = await openDocker()
    const away = await openDocker({ ...settings, tasksDir: join(harness.sharedDir, 'away') })
    const wanted = spec('exit 5')
    await expect(away.backend.provision(wanted, NEVER)).rejects.toBeInstanceOf(UnavailableError)
    expect(await containers(settings.deployment)).toEqual([])
    const worker = await harness.backend.provision(wanted, NEVER)
    expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
    await away.dispose()
    await harness.dispose()
  })

  describe('an image', () => {
    /** An engine without the image. Pulls get these answers; `undefined` is a success. */
    async function pulling(answers: Array<Answer | undefined>, use: UsePulling): Promise<void> {
      let isThere = false
      let pulls = 0
      await using proxy = await startEngineProxy((request, response) => {
        if (/\/images\/[^?]*\/json/.test(request.url ?? '')) {
          if (isThere) response.writeHead(200).end('{}')
          else refuse(response, 404, 'No such image: x')
          return true
        }
        if (!request.url?.includes('/images/create')) return false
        const answer = answers[Math.min(pulls, answers.length - 1)]
        pulls += 1
        isThere = answer === undefined
        if (answer) answer(response)
        else response.writeHead(200).end('{"status":"Downloaded"}\n')
        return true
      })
      const harness = await openDocker({ engine: { socketPath: proxy.socketPath } })
      try {
        await use(harness, () => pulls)
      } finally {
        await harness.dispose()
      }
    }
    type UsePulling = (harness: DockerHarness, pulls: () => number) => Promise<void>

    const told =
      (words: string): Answer =>
      (response) => {
        const progress = JSON.stringify({ status: 'Pulling from team/none' })
        response.writeHead(200).end(`${progress}\r\n${JSON.stringify({ error: words })}\r\n`)
      }
    const provision = ({ backend }: DockerHarness, signal = NEVER, overrides = {}) =>
      backend.provision(spec('exit 5', { image: TEST_IMAGE, ...overrides }), signal)

    test.each([
      'manifest for team/none:latest not found: manifest unknown: manifest unknown',
      'manifest unknown',
      'denied',
      'Head "http://127.0.0.1:1/v2/x/manifests/latest": no basic auth credentials',
      'unauthorized: authentication required',
      'no matching manifest for linux/arm64 in the manifest list entries',
      "pull access denied for none, repository does not exist or may require 'docker login'",
    ])('that the registry does not give fails the task at once: %s', async (words) => {
      for (const answer of [says(500, words), says(404, words), told(words)]) {
        await pulling([answer], async (harness, pulls) => {
          await expect(provision(harness)).rejects.toMatchObject({
            name: 'WorkerError',
            reason: 'image_pull_failed',
            message: `The image ${TEST_IMAGE}:latest could not be pulled: ${words}`,
          })
          expect(pulls()).toBe(1)
        })
      }
    })

    const PASSING = [
      'received unexpected HTTP status: 503 Service Unavailable',
      'Get "http://127.0.0.1:1/v2/": dial tcp 127.0.0.1:1: connect: connection refused',
      'Get "https://x.invalid/v2/": dial tcp: lookup x.invalid: no such host',
      'Get "https://x.invalid/v2/": net/http: request canceled (Client.Timeout exceeded)',
      'toomanyrequests: slow down',
    ]

    test('whose registry fails in passing is pulled again, and the task runs', async () => {
      const answers = [says(500, PASSING[0] as string), told(PASSING[4] as string), undefined]
      await pulling(answers, async (harness, pulls) => {
        const worker = await provision(harness)
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
        expect(await logOf(worker)).toMatch(/^\[task-runner\] pulled /)
        expect(pulls()).toBe(3)
      })
    })

    test.each(PASSING)(
      "whose registry fails until the time is over fails the task in the registry's words: %s",
      async (words) => {
        await pulling([says(500, words)], async (harness, pulls) => {
          await expect(provision(harness, AbortSignal.timeout(700))).rejects.toMatchObject({
            reason: 'image_pull_failed',
            message: `The image ${TEST_IMAGE}:latest could not be pulled: ${words}`,
          })
          expect(pulls()).toBeGreaterThan(1)
          expect(await containers(harness.settings.deployment)).toEqual([])
        })
      },
    )

    test('that is not pulled any more for a cancelled task says so', async () => {
      await pulling([says(500, PASSING[0] as string)], async (harness, pulls) => {
        const cancel = new AbortController()
        const made = provision(harness, cancel.signal)
        made.catch(() => {})
        await expect.poll(pulls).toBeGreaterThan(0)
        cancel.abort(new Error('not wanted'))
        await expect(made).rejects.toThrow('not wanted')
      })
    })

    test.each([
      ['disk_full', told('failed to register layer: write /x: no space left on device')],
      ['garbage', page(200)],
      ['forbidden', page(403)],
      ['unreachable', ((response) => response.destroy()) satisfies Answer],
    ] as const)('whose pull fails for us (%s) does not fail the task', async (kind, answer) => {
      await pulling([answer, undefined], async (harness) => {
        await expect(provision(harness)).rejects.toMatchObject({ kind })
        const worker = await provision(harness)
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
      })
    })

    test('whose pull ends with the engine is not what fails the task when the time is over', async () => {
      await withTrouble(async (harness, trouble) => {
        const image = '127.0.0.1:1/team/none'
        const deadline = new AbortController()
        const pulled = provision(harness, deadline.signal, { image })
        pulled.catch(() => {})
        const pulls = () => trouble.requests.filter((request) => request.includes('/images/create'))
        // It has failed in passing.
        await expect.poll(() => pulls().length, { timeout: 10_000 }).toBeGreaterThan(1)
        Object.assign(trouble, { answer: page(503), at: /\/containers\b/ })
        deadline.abort(new DOMException('The time is up', 'TimeoutError'))
        await expect(pulled).rejects.toBeInstanceOf(UnavailableError)
      })
    })
  })

  describe('what the task asked for and the engine cannot give', () => {
    const refusal = async (wanted: WorkerSpec, at: StepName, answer: Answer) => {
      let failure: unknown
      await withTrouble(async ({ backend, settings }, trouble) => {
        Object.assign(trouble, { answer, at: STEPS[at] })
        failure = await backend.provision(wanted, NEVER).catch((err: unknown) => err)
        trouble.answer = undefined
        expect(await containers(settings.deployment)).toEqual([])
      })
      return failure
    }

    test.each([
      ['making the container', says(400, 'Minimum memory limit allowed is 6MB')],
      ['making the container', says(400, 'invalid volume specification: x')],
      ['its start', says(500, 'could not select device driver "" with capabilities: [[gpu]]')],
      ['its files', says(400, 'invalid tar')],
    ] as const)('fails the task at %s', async (at, answer) => {
      expect(await refusal(spec('true'), at, answer)).toMatchObject({
        name: 'WorkerError',
        reason: 'startup_failed',
      })
    })

    test.each(['UPPER', 'a b', 'x/../y', '??'])('is told of the image name %s', async (image) => {
      const harness = await openDocker()
      await expect(harness.backend.provision(spec('true', { image }), NEVER)).rejects.toMatchObject(
        {
          name: 'WorkerError',
          reason: expect.stringMatching(/startup_failed|image_pull_failed/),
          message: expect.stringContaining('invalid reference format'),
        },
      )
      await harness.dispose()
    })
  })

  describe('a container that is not found', () => {
    test('is a lost worker when the engine says so, and never when something before it does', async () => {
      await withTrouble(async ({ backend, sharedDir }, trouble) => {
        const ready = join(sharedDir, marker())
        const worker = await backend.provision(spec(`: >${ready}; exec sleep 1000`), NEVER)
        await fileThere(ready)
        const other = await openDocker()
        const end = worker.completion(NEVER)
        Object.assign(trouble, { answer: page(404), hits: 0 })
        trouble.cut()
        await expect.poll(() => trouble.hits, { timeout: 15_000 }).toBeGreaterThan(2)
        trouble.answer = says(404, `No such container: ${worker.name}`)
        expect(await end).toMatchObject({ reason: 'worker_lost', exitCode: null })
        await other.dispose()
      })
    })
  })

  describe('check', () => {
    const seen = (Object.keys(OURS) as FailureKind[]).filter((kind) => !OURS[kind]?.onlyMaking)

    test.each(seen)('tells of %s', async (kind) => {
      await withTrouble(async ({ backend }, trouble) => {
        trouble.answer = OURS[kind]?.answers[0]
        const failure = await backend.check().catch((err: unknown) => err)
        expect(failure).toBeInstanceOf(UnavailableError)
        expect((failure as EngineError).kind).toBe(kind)
        trouble.answer = undefined
        await backend.check()
      })
    })

    test('asks once for all who ask at the same time, and leaves nothing', async () => {
      await using proxy = await startEngineProxy(() => false)
      const harness = await openDocker({ engine: { socketPath: proxy.socketPath } })
      await Promise.all(Array.from({ length: 20 }, () => harness.backend.check()))
      expect(proxy.requests).toHaveLength(2)
      expect(await containers(harness.settings.deployment)).toEqual([])
      await harness.dispose()
    })

    test('ends in bounded time when the engine takes the question and says nothing', async () => {
      await using proxy = await startEngineProxy(() => true)
      const harness = await openDocker({ engine: { socketPath: proxy.socketPath } })
      const startedAt = performance.now()
      await expect(harness.backend.check()).rejects.toMatchObject({ kind: 'timeout' })
      expect(performance.now() - startedAt).toBeLessThan(10_000)
      await harness.backend.close()
    })
  })

  test('a ping that is none does not spoil the version for later', async () => {
    await withTrouble(async ({ backend }, trouble) => {
      Object.assign(trouble, { answer: page(200, 'OK'), at: /_ping/ })
      await expect(backend.check()).rejects.toMatchObject({ kind: 'garbage' })
      trouble.answer = undefined
      await backend.check()
    })
  })

  test('an answer without an end is given up after a bound', async () => {
    const endless: Answer = (response) => {
      response.writeHead(200, { 'content-type': 'application/json' })
      const piece = Buffer.alloc(1024 * 1024, '[')
      const more = () => {
        while (!response.destroyed && response.write(piece));
      }
      response.on('drain', more)
      more()
    }
    await using proxy = await startEngineProxy((request, response) => {
      if (!request.url?.includes('/containers/json')) return false
      endless(response)
      return true
    })
    const harness = await openDocker({ engine: { socketPath: proxy.socketPath } })
    await expect(harness.backend.list()).rejects.toMatchObject({ kind: 'garbage' })
    await harness.backend.close()
  })

  test('output that is none of a container is not logged: the log is read from the engine', async () => {
    await withTrouble(async ({ backend }, trouble) => {
      Object.assign(trouble, { answer: page(200), at: STEPS['its output'] })
      const worker = await backend.provision(spec('echo ran; exit 5'), NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
      expect(await logOf(worker)).toBe('ran\n')
    })
  })

  describe('a container that is never quite removed', () => {
    const removing = (use: (harness: DockerHarness, ended: Promise<void>) => Promise<void>) =>
      withTrouble(async (harness, trouble) => {
        const worker = await harness.backend.provision(spec('exit 5'), NEVER)
        await worker.completion(NEVER)
        const answer = says(409, 'removal of container x is already in progress')
        Object.assign(trouble, { answer, at: /^DELETE /, hits: 0 })
        const ended = worker.terminate()
        ended.catch(() => {})
        await expect.poll(() => trouble.hits).toBeGreaterThan(1)
        await use(harness, ended)
        expect(trouble.hits).toBeLessThan(30)
        trouble.answer = undefined
        await (await harness.backend.find(worker.name))?.terminate()
        expect(await containers(harness.settings.deployment)).toEqual([])
      })

    test('is given up for now', () =>
      removing(async (_, ended) => {
        await expect(ended).rejects.toBeInstanceOf(UnavailableError)
      }))

    test('does not keep the service from closing', () =>
      removing(async (harness, ended) => {
        const closedAt = performance.now()
        await harness.reopen()
        await expect(ended).rejects.toThrow()
        expect(performance.now() - closedAt).toBeLessThan(5_000)
      }))
  })
}

if (skipped === undefined) describe('DockerBackend, when its engine fails', tests)
else describe('DockerBackend, when its engine fails', () => test.skip(skipped, () => {}))
