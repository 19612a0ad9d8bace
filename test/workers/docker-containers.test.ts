/** What tasks, people and other services do to containers. */
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import type { Completion, TaskStore, WorkerSpec, WorkerStatus } from '../../src/core/ports.ts'
import { Reaper } from '../../src/core/reaper.ts'
import { DockerBackend } from '../../src/workers/docker/docker-backend.ts'
import {
  containers,
  type DockerHarness,
  docker,
  openDocker,
  startEngineProxy,
  whyNoDocker,
} from '../helpers/docker.ts'
import { ODD_EXIT_CODE, ODD_THINGS, oddScript } from '../helpers/odd-worker-folders.ts'
import { fileThere, logOf, marker, NEVER, spec, touch } from './contract.ts'

const skipped = await whyNoDocker()
const MEGABYTE = 2 ** 20
const SLOW_MS = 90_000
/** So many containers at a time keep the engine busy. */
const AT_ONCE = 6

function tests(): void {
  let harness: DockerHarness
  beforeAll(async () => {
    harness = await openDocker()
  })
  afterEach(() => harness.clean())
  afterAll(() => harness.dispose())

  const provision = (wanted: WorkerSpec) => harness.backend.provision(wanted, NEVER)

  /** A task that runs until the file is there, and is known to have begun. */
  async function begun(script = 'exit 5', overrides: Partial<WorkerSpec> = {}) {
    const [ready, go] = [join(harness.sharedDir, marker()), join(harness.sharedDir, marker())]
    const waiting = `: >${ready}; until [ -e ${go} ]; do sleep 0.02; done; ${script}`
    const wanted = spec(waiting, overrides)
    const worker = await provision(wanted)
    await fileThere(ready)
    return { worker, wanted, go: () => touch(go) }
  }

  const label = (name: string, value: string) => ['--label', `task-runner.${name}=${value}`]

  /** A container as a version before made it, which runs. */
  async function legacy(taskId: string, name: string): Promise<void> {
    const marks = [
      ...label('instance', harness.settings.legacyInstance),
      ...label('task-id', taskId),
      ...[...label('created-at', '1700000000000'), ...label('max-log-bytes', '1000000')],
    ]
    const image = harness.settings.images.default
    await docker('run', '--detach', '--init', '--name', name, ...marks, image, 'sleep', '1000')
  }

  test('a task costs a fixed number of engine calls', async () => {
    await using proxy = await startEngineProxy(() => false)
    const other = await openDocker({ engine: { socketPath: proxy.socketPath } })
    const run = async () => {
      const worker = await other.backend.provision(spec('sleep 0.3; exit 5'), NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
      await worker.terminate()
    }
    // The first one asks about the machine and the version, too.
    await run()
    const before = proxy.requests.length
    await run()
    // Making it: inspect, image, create, inspect, files, attach, start. Its end: inspect, wait,
    // inspect, exit; once more after its log. Removing it: inspect, delete, and a second delete.
    expect(proxy.requests.slice(before)).toHaveLength(15)
    await other.dispose()
  })

  describe('a look at all workers', () => {
    /** Statuses by name, and what the look cost. */
    async function look(backend: DockerBackend, requests: string[]) {
      const before = requests.length
      const listed = await backend.list()
      const statuses = await Promise.all(
        listed.map(async (worker) => [worker.name, await worker.status()] as const),
      )
      return { statuses: new Map(statuses), calls: requests.slice(before) }
    }
    const CALLS = [expect.stringMatching(/^GET \S+\/containers\/json/)]

    test('costs one engine call, however many there are', async () => {
      await using proxy = await startEngineProxy(() => false)
      const engine = { socketPath: proxy.socketPath }
      const other = new DockerBackend({ ...harness.settings, engine })
      // The first call of all asks for the version, too.
      await other.list()
      const expected = new Map<string, WorkerStatus>()
      for (let round = 0; round < 3; round += 1) {
        const { worker: running } = await begun()
        const ended = await provision(spec('exit 5'))
        await ended.completion(NEVER)
        const made = `made-${marker()}`
        const { deployment, images } = harness.settings
        const marks = ['--name', made, ...label('instance', deployment)]
        await docker('create', ...marks, images.default, 'true')
        expected.set(running.name, 'Running').set(ended.name, 'Completed').set(made, 'Provisioning')
        const { statuses, calls } = await look(other, proxy.requests)
        expect(statuses).toEqual(expected)
        expect(calls).toEqual(CALLS)
      }
      // A sweep looks twice: for workers left behind, and for those stuck in Provisioning.
      const store = {
        workerOwner: async () => ({ status: 'running' }),
        workersRemembered: async () => [],
      } as unknown as TaskStore
      const times = { keptWorkerMs: 0, provisioningTimeoutMs: 60_000, retentionMs: 0 }
      const others = { intervalMs: 1_000, now: Date.now, log: harness.settings.log }
      const before = proxy.requests.length
      await new Reaper({ store, backend: other, ...times, ...others }).sweepWorkers()
      expect(proxy.requests.slice(before)).toEqual([...CALLS, ...CALLS])
      await other.close()
    })

    test('reads the exit file of a worker that stays until its task is known to be over', async () => {
      await using proxy = await startEngineProxy(() => false)
      const engine = { socketPath: proxy.socketPath }
      const other = new DockerBackend({ ...harness.settings, engine })
      const { worker, go } = await begun('exit 5', { keepAfterwards: true })
      const read = expect.stringMatching(/^GET \S+\/containers\/[^/]+\/archive/)
      expect((await look(other, [])).statuses).toEqual(new Map([[worker.name, 'Running']]))
      await go()
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
      for (const calls of [[...CALLS, read], CALLS, CALLS]) {
        expect(await look(other, proxy.requests)).toEqual({
          ...{ statuses: new Map([[worker.name, 'Completed']]), calls },
        })
      }
      await other.close()
    })
  })

  describe('an exit file', () => {
    /** A task cannot remove the folder itself: it can only empty it, and change its mode. */
    const OF_THE_FOLDER = [
      'nothing',
      'a folder that nobody may enter',
      'a file that nobody may read',
    ]
    const rows = ODD_THINGS.flatMap((thing) =>
      (['exit', '.'] as const)
        .filter((place) => place === 'exit' || OF_THE_FOLDER.includes(thing.name))
        .map((place) => ({ thing, place })),
    )

    test(
      'that the task made into anything else costs its own outcome at most',
      async () => {
        const bystander = await begun('echo unharmed')
        const ends = new Map<string, Completion>()
        const left = [...rows]
        const next = async (): Promise<void> => {
          const row = left.shift()
          if (!row) return
          const worker = await provision(spec(oddScript(row.thing, row.place)))
          ends.set(`${row.place}: ${row.thing.name}`, await worker.completion(NEVER))
          await worker.terminate()
          return next()
        }
        await Promise.all(Array.from({ length: AT_ONCE }, next))
        for (const [row, { reason, exitCode, message }] of ends) {
          expect(['exit_code', 'worker_lost'], row).toContain(reason)
          expect(exitCode, row).toBe(reason === 'exit_code' ? ODD_EXIT_CODE : null)
          if (reason === 'worker_lost') expect(message, row).toMatch(/exit/)
        }
        expect(ends.size).toBe(rows.length)
        await bystander.go()
        expect((await bystander.worker.completion(NEVER)).reason).toBe('completed')
        expect(await logOf(bystander.worker)).toBe('unharmed\n')
      },
      SLOW_MS,
    )

    test('of gigabytes is not read by the service, now or after a restart', async () => {
      const before = process.memoryUsage().rss
      // With an end that could be taken for one, after which the file goes on.
      const script = `printf 'task 0\\n' >../exit; truncate -s 4G ../exit; exit 3`
      const worker = await provision(spec(script))
      const end = { reason: 'worker_lost', exitCode: null }
      expect(await worker.completion(NEVER)).toMatchObject(end)
      const found = await (await harness.reopen()).find(worker.name)
      expect(await found?.completion(NEVER)).toMatchObject(end)
      expect(process.memoryUsage().rss - before).toBeLessThan(100 * MEGABYTE)
    })

    test('of a worker that stays may be odd, too: it ends', async () => {
      const make = `rm -f ../exit; mkdir ../exit`
      const worker = await provision(spec(`${make}; exit 3`, { keepAfterwards: true }))
      expect(await worker.completion(NEVER)).toMatchObject({ reason: 'worker_lost' })
      expect(await worker.status()).toBe('Completed')
    })

    test('of a worker that stays does not end its task while that runs', async () => {
      const odd = await begun('rmdir ../exit; exit 7', { keepAfterwards: true })
      await docker('exec', odd.worker.name, 'mkdir', '/worker/exit')
      expect(await odd.worker.status()).toBe('Running')
      await odd.go()
      expect(await odd.worker.completion(NEVER)).toMatchObject({ exitCode: 7 })
    })
  })

  test('a task that ignores TERM and logs on is killed long before its grace period is over', async () => {
    const other = await openDocker({ terminationGraceMs: 60_000 })
    const script = `trap '' TERM; while :; do head -c 100000 /dev/zero | tr '\\0' x; done`
    const worker = await other.backend.provision(spec(script, { maxLogBytes: MEGABYTE }), NEVER)
    expect(await worker.completion(NEVER)).toMatchObject({ reason: 'log_limit' })
    await other.dispose()
  })

  describe('a worker whose container is renamed', () => {
    test('ends as it did, is seen under its own name, and is removed', async () => {
      const { worker, go } = await begun('echo whole; exit 5')
      const end = worker.completion(NEVER)
      await docker('rename', worker.name, `other-${marker()}`)
      const listed = await harness.backend.list()
      expect(listed.map(({ name }) => name)).toEqual([worker.name])
      expect(await worker.status()).toBe('Running')
      await go()
      expect(await end).toMatchObject({ reason: 'exit_code', exitCode: 5 })
      expect(await logOf(worker)).toBe('whole\n')
      await worker.terminate()
      expect(await containers(harness.settings.deployment)).toEqual([])
    })

    test('is found by its name after a restart, also when another container took that', async () => {
      const { worker, go } = await begun()
      await docker('rename', worker.name, `other-${marker()}`)
      await docker('create', '--name', worker.name, harness.settings.images.default, 'true')
      const found = await (await harness.reopen()).find(worker.name)
      expect(found).toMatchObject({ name: worker.name, taskId: worker.taskId })
      await go()
      expect(await found?.completion(NEVER)).toMatchObject({ exitCode: 5 })
      await found?.terminate()
      expect(await containers(harness.settings.deployment)).toEqual([])
      await docker('rm', worker.name)
    })
  })

  describe('a label', () => {
    test.each([[], ['created-at', ''], ['created-at', 'yesterday'], ['created-at', '1e300']])(
      'that is missing or broken hides no worker: %s %s',
      async (...given) => {
        const [name, value] = given as [string?, string?]
        const { deployment, images } = harness.settings
        const own = name === undefined ? [] : label(name, value ?? '')
        const marks = [...label('instance', deployment), ...own]
        const id = `labels-${marker()}`
        const before = Date.now()
        await docker('create', '--name', id, ...marks, images.default, 'true')
        for (const worker of [...(await harness.backend.list()), await harness.backend.find(id)]) {
          expect(worker).toMatchObject({ name: id, taskId: '' })
          // The engine tells it in seconds.
          expect(worker?.createdAt).toBeGreaterThan(before - 2_000)
          expect(worker?.createdAt).toBeLessThan(Date.now() + 1_000)
        }
      },
    )
  })

  test('a container under the name that is the worker of another task is none of this one', async () => {
    const { worker, wanted, go } = await begun()
    const other = { ...spec('exit 9'), name: wanted.name }
    await expect(provision(other)).rejects.toMatchObject({
      name: 'WorkerError',
      reason: 'startup_failed',
      message: `The container ${wanted.name} is the worker of another task`,
    })
    await go()
    expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
  })

  describe('two services with one sealing key on one engine', () => {
    let other: DockerBackend
    beforeAll(() => {
      other = new DockerBackend({ ...harness.settings, deployment: `test-${marker()}` })
    })
    afterAll(() => other.close())

    test('never see workers of each other', async () => {
      const { worker, wanted, go } = await begun()
      expect(await other.list()).toEqual([])
      expect(await other.find(worker.name)).toBeUndefined()
      await expect(other.provision(wanted, NEVER)).rejects.toMatchObject({
        reason: 'startup_failed',
        message: `A container of another service has the name ${worker.name}`,
      })
      await go()
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
    })

    test('take a worker of a version before for their own only by its name and task', async () => {
      const wanted = spec('exit 5')
      await legacy(wanted.taskId, wanted.name)
      for (const backend of [harness.backend, other]) {
        const listed = await backend.list()
        expect(listed).toMatchObject([{ name: wanted.name, mayBeForeign: true }])
      }
      const stranger = { ...spec('exit 9'), name: wanted.name }
      await expect(provision(stranger)).rejects.toMatchObject({ reason: 'startup_failed' })
      // The task's own service goes on with it.
      const worker = await provision(wanted)
      expect(worker.taskId).toBe(wanted.taskId)
      const end = worker.completion(NEVER)
      await worker.stop()
      expect(await end).toMatchObject({ reason: 'worker_lost' })
      await worker.terminate()
      expect(await harness.backend.find(wanted.name)).toBeUndefined()
    })

    test('know their own for theirs', async () => {
      const { worker } = await begun()
      expect((await harness.backend.find(worker.name))?.mayBeForeign).toBeUndefined()
      await worker.terminate()
    })
  })
}

if (skipped === undefined) describe('DockerBackend and its containers', tests)
else describe('DockerBackend and its containers', () => test.skip(skipped, () => {}))
