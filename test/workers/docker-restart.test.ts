/** The engine goes down and comes back, in the middle of tasks. It is one of this test alone. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { READ_AGAIN } from '../../src/workers/docker/container-log.ts'
import { END_UNSEEN } from '../../src/workers/docker/container-watch.ts'
import type { DockerBackend } from '../../src/workers/docker/docker-backend.ts'
import { EngineError } from '../../src/workers/docker/engine.ts'
import {
  busyboxRoot,
  type Dockerd,
  type DockerHarness,
  importImage,
  openDocker,
  provisionPatiently,
  startDockerd,
  whyNoDocker,
} from '../helpers/docker.ts'
import { fileThere, logOf, marker, NEVER, spec, touch } from './contract.ts'

const skipped = await whyNoDocker()
const IMAGE = 'task-runner-busybox'
const SLOW_MS = 90_000

function withEngine(
  flags: string[],
  tests: (opened: () => { dockerd: Dockerd; harness: DockerHarness }) => void,
): void {
  let dockerd: Dockerd
  let harness: DockerHarness
  beforeAll(async () => {
    dockerd = await startDockerd(...flags)
    const folder = await mkdtemp(join(tmpdir(), 'docker-images-'))
    await busyboxRoot(folder)
    await importImage(folder, IMAGE, ['--host', `unix://${dockerd.socketPath}`])
    await rm(folder, { recursive: true })
    const engine = { socketPath: dockerd.socketPath }
    harness = await openDocker({ engine, images: { default: IMAGE, prefix: '' } })
  }, SLOW_MS)
  afterAll(async () => {
    await harness.dispose()
    await dockerd[Symbol.asyncDispose]()
  }, SLOW_MS)
  tests(() => ({ dockerd, harness }))
}

/** A task that runs until the file is there, and is known to have begun. */
async function begun({ backend, sharedDir }: DockerHarness, after: string, before = 'true') {
  const [ready, go] = [join(sharedDir, marker()), join(sharedDir, marker())]
  const waiting = `${before}; : >${ready}; until [ -e ${go} ]; do sleep 0.02; done; ${after}`
  const worker = await backend.provision(spec(waiting), NEVER)
  await fileThere(ready)
  return { worker, go }
}

async function textOf(pieces: AsyncIterable<Buffer>): Promise<string> {
  let seen = ''
  for await (const piece of pieces) seen += piece
  return seen
}

const unreachable = (backend: DockerBackend) =>
  expect(backend.check()).rejects.toMatchObject({ code: 'workers_unavailable' })

function keptAlive(): void {
  withEngine(['--live-restore'], (opened) => {
    test(
      'a task that ends while the engine is down has its true exit code, and a log that tells of what may be missing',
      async () => {
        const { dockerd, harness } = opened()
        const ended = join(harness.sharedDir, marker())
        const { worker, go } = await begun(
          harness,
          `echo after; : >${ended}; exit 11`,
          'seq 1 20000',
        )
        const long = await begun(harness, 'echo late; exit 12', 'echo early')
        const ends = [worker, long.worker].map((each) => each.completion(NEVER))
        await dockerd.kill('SIGKILL')
        await unreachable(harness.backend)
        await touch(go)
        await fileThere(ended)
        // Somebody asks in the meantime, and is told no lie.
        await expect(worker.status()).rejects.toThrow(EngineError)
        const wanted = spec('echo new; exit 13')
        await expect(harness.backend.provision(wanted, NEVER)).rejects.toThrow(EngineError)
        const asked = provisionPatiently(harness.backend, wanted)
        await dockerd.start()
        expect(await ends[0]).toMatchObject({ reason: 'exit_code', exitCode: 11 })
        const lines = Array.from({ length: 20_000 }, (_, index) => `${index + 1}\n`)
        const log = await logOf(worker)
        // Its last words, which waited for the engine in a pipe, went with the container.
        expect(log.replace('after\n', '')).toBe(lines.join('') + END_UNSEEN)
        expect(log).toBe((await dockerd.docker('logs', worker.name)) + END_UNSEEN)
        await touch(long.go)
        expect(await ends[1]).toMatchObject({ reason: 'exit_code', exitCode: 12 })
        expect(await logOf(long.worker)).toBe('early\nlate\n')
        // What was asked for while it was down was made when it was back.
        const made = await asked
        expect(await made.completion(NEVER)).toMatchObject({ exitCode: 13 })
        expect(await logOf(made)).toBe('new\n')
      },
      SLOW_MS,
    )

    test(
      'the log of a task that outlives its engine, twice, is all that the engine has; followers see what it lost, too',
      async () => {
        const { dockerd, harness } = opened()
        const gate = () => join(harness.sharedDir, marker())
        const [go, again, end] = [gate(), gate(), gate()]
        const until = (file: string) => `until [ -e ${file} ]; do sleep 0.02; done`
        const script = [
          ...['echo 1; printf 2a', until(go), 'echo 2b; echo 3', until(again), 'echo 4'],
          ...[until(end), 'echo 5'],
        ].join('; ')
        const worker = await harness.backend.provision(spec(script), NEVER)
        const following = textOf(worker.follow({ from: 0, signal: NEVER }))
        for (const [seen, file] of [
          ['1\n2a', go],
          ['1\n2b\n3\n', again],
        ] as const) {
          await expect.poll(() => logOf(worker), { timeout: 10_000 }).toBe(seen)
          await dockerd.kill('SIGKILL')
          await touch(file)
          await dockerd.start()
        }
        await touch(end)
        expect((await worker.completion(NEVER)).reason).toBe('completed')
        expect(await logOf(worker)).toBe('1\n2b\n3\n4\n5\n')
        expect(await dockerd.docker('logs', worker.name)).toBe('1\n2b\n3\n4\n5\n')
        expect(await following).toBe(`1\n2a\n${READ_AGAIN}2b\n3\n4\n5\n`)
      },
      SLOW_MS,
    )

    test('another engine knows nothing of its workers', async () => {
      const { harness } = opened()
      const { worker, go } = await begun(harness, 'exit 5')
      const { deployment } = harness.settings
      const elsewhere = await openDocker({ deployment })
      try {
        expect(await elsewhere.backend.find(worker.name)).toBeUndefined()
        expect(await elsewhere.backend.list()).toEqual([])
      } finally {
        await elsewhere.dispose()
      }
      await touch(go)
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
    })
  })
}

function ended(): void {
  withEngine([], (opened) => {
    test(
      'a task that died with its engine is lost: never a success',
      async () => {
        const { dockerd, harness } = opened()
        const { worker } = await begun(harness, 'exit 0', 'printf before')
        await expect.poll(() => logOf(worker)).toBe('before')
        const end = worker.completion(NEVER)
        const pid = await dockerd.docker('inspect', '--format', '{{.State.Pid}}', worker.name)
        await dockerd.kill('SIGKILL')
        process.kill(Number(pid), 'SIGKILL')
        await unreachable(harness.backend)
        await dockerd.start()
        expect(await end).toMatchObject({ reason: 'worker_lost', exitCode: null })
        expect(await logOf(worker)).toBe(`before\n${END_UNSEEN}`)
        expect(await worker.status()).toBe('Completed')
      },
      SLOW_MS,
    )

    test(
      'a task whose engine was shut down ended by TERM, which is told',
      async () => {
        const { dockerd, harness } = opened()
        const { worker } = await begun(harness, 'exit 0', 'echo before')
        const end = worker.completion(NEVER)
        await dockerd.kill('SIGTERM')
        await dockerd.start()
        expect(await end).toMatchObject({ reason: 'signal', signal: 'SIGTERM' })
        const log = await logOf(worker)
        expect(log).toMatch(/^before\n/)
        // The engine saw it end.
        expect(log).not.toContain(END_UNSEEN)
      },
      SLOW_MS,
    )
  })
}

if (skipped === undefined) {
  describe('DockerBackend, on an engine that keeps containers while it is down', keptAlive)
  describe('DockerBackend, on an engine that ends them', ended)
} else {
  describe('DockerBackend, when its engine restarts', () => test.skip(skipped, () => {}))
}
