/** The ConfigMap with the task files: made once a change, and removed when no worker needs it. */
import { chmod, mkdtemp, rm, utimes, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { PackedTasks } from '../../src/workers/kubernetes/packed-tasks.ts'
import { presets } from '../fakes/kubernetes/presets.ts'
import { openKubernetes } from '../helpers/kubernetes.ts'
import { NEVER, spec } from './contract.ts'

const HOUR_MS = 3_600_000

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-files-'))
  await writeFile(join(folder, 'task.sh'), 'exit 0\n')
})
afterEach(() => rm(folder, { recursive: true }))

describe('the tasks folder is packed', () => {
  beforeEach(() => {
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now() })
  })
  afterEach(() => vi.useRealTimers())

  /** Looks again, when what was there before is surely settled. */
  const later = (tasks: PackedTasks) => {
    vi.advanceTimersByTime(60_000)
    return tasks.current()
  }

  test('once, while nothing in it changes', async () => {
    const tasks = new PackedTasks(folder, 'test')
    const first = await later(tasks)
    expect(await later(tasks)).toBe(first)
    expect(await later(tasks)).toBe(first)
  })

  test.each<[string, (path: string) => Promise<unknown>]>([
    [
      'a file is written, whose size and time stay',
      async (path) => {
        await writeFile(path, 'exit 1\n')
        await utimes(path, 1, 1)
      },
    ],
    ['the mode of a file changes', (path) => chmod(path, 0o755)],
    ['a file is added', (path) => writeFile(`${path}.more`, '')],
    ['a file is removed', (path) => rm(path)],
  ])('again after %s', async (_, change) => {
    const path = join(folder, 'task.sh')
    await writeFile(path, 'exit 0\n')
    await utimes(path, 1, 1)
    const tasks = new PackedTasks(folder, 'test')
    const first = await later(tasks)
    await change(path)
    const second = await later(tasks)
    expect(second.configMap.metadata?.name).not.toBe(first.configMap.metadata?.name)
  })

  test('again while something in it changed just now', async () => {
    const tasks = new PackedTasks(folder, 'test')
    const first = await tasks.current()
    expect(await later(tasks)).not.toBe(first)
  })

  test('again while something in it cannot be read: that may heal at any moment', async () => {
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(join(folder, 'socket'), resolve))
    const tasks = new PackedTasks(folder, 'test')
    const first = await later(tasks)
    expect(first.leftOut).toMatchObject([{ path: 'socket' }])
    expect(await later(tasks)).not.toBe(first)
    await new Promise((resolve) => server.close(resolve))
  })
})

describe('the ConfigMap of earlier task files', () => {
  /** A cluster whose workers run on, and what becomes of ConfigMaps there. */
  async function open(now: () => number) {
    const harness = await openKubernetes({
      settings: { tasksDir: folder, now },
      fake: { behave: () => presets.runs() },
    })
    const { backend, fake } = harness
    const names = () => fake.objects('configmaps').map(({ metadata }) => metadata.name)
    return {
      ...{ backend, fake, names },
      /** Provisions a worker with these task files. */
      async worker(text: string) {
        await writeFile(join(folder, 'task.sh'), text)
        const before = names()
        // They are looked at once a second.
        vi.setSystemTime(Date.now() + 2_000)
        const worker = await backend.provision(spec('true', { taskFileName: 'task.sh' }), NEVER)
        return { worker, files: names().find((name) => !before.includes(name)) ?? '' }
      },
      [Symbol.asyncDispose]: () => harness[Symbol.asyncDispose](),
    }
  }

  beforeEach(() => {
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now(), shouldAdvanceTime: true })
  })
  afterEach(() => vi.useRealTimers())

  test('goes with the next change once no worker names it', async () => {
    await using it = await open(() => Date.now() + 2 * HOUR_MS)
    it.fake.create('configmaps', { metadata: { name: 'of-somebody-else' } })
    const first = await it.worker('exit 1\n')
    const second = await it.worker('exit 2\n')
    expect(it.names()).toEqual(expect.arrayContaining([first.files, second.files]))
    await first.worker.terminate()
    const third = await it.worker('exit 3\n')
    await expect
      .poll(() => it.names().sort())
      .toEqual(['of-somebody-else', second.files, third.files].sort())
  })

  test('stays where the service may not remove it, and the backend works', async () => {
    await using it = await open(() => Date.now() + 2 * HOUR_MS)
    for (const verb of ['list', 'delete']) it.fake.denied.add(`${verb} configmaps`)
    await it.backend.check()
    const first = await it.worker('exit 1\n')
    await first.worker.terminate()
    const second = await it.worker('exit 2\n')
    expect(it.names().sort()).toEqual([first.files, second.files].sort())
  })

  test('stays for an hour: another instance may be about to name it', async () => {
    await using it = await open(() => Date.now())
    const first = await it.worker('exit 1\n')
    await first.worker.terminate()
    const second = await it.worker('exit 2\n')
    const third = await it.worker('exit 3\n')
    // All was done by then that the one before has set off.
    const fourth = await it.worker('exit 4\n')
    const all = [first, second, third, fourth].map(({ files }) => files)
    expect(it.names().sort()).toEqual(all.sort())
  })

  test('is put again by the first task of the next minute, should somebody remove it', async () => {
    await using it = await open(() => Date.now())
    const { files } = await it.worker('exit 1\n')
    it.fake.delete('configmaps', files)
    vi.setSystemTime(Date.now() + 61_000)
    expect((await it.worker('exit 1\n')).files).toBe(files)
  })
})
