import { mkdtempSync, realpathSync, renameSync, symlinkSync, writeFileSync } from 'node:fs'
import { chmod, mkdir, rm } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { loadConfig } from '../../src/config.ts'
import { UnavailableError } from '../../src/core/errors.ts'
import { type WorkerBackend, WorkerError } from '../../src/core/ports.ts'
import { Engine } from '../../src/workers/docker/engine.ts'
import { openBackend } from '../../src/workers-from-config.ts'
import { testEnv } from '../helpers/app.ts'
import { openDocker, whyNoDocker } from '../helpers/docker.ts'
import { openKubernetes } from '../helpers/kubernetes.ts'
import { QUIET } from '../helpers/stores.ts'
import { logOf, spec } from './contract.ts'

const NEVER = new AbortController().signal
const noDocker = await whyNoDocker()

let root: string
let tasksDir: string

beforeEach(() => {
  root = realpathSync(mkdtempSync(join(tmpdir(), 'tasks-folder-')))
  tasksDir = join(root, 'tasks')
})
beforeEach(async () => {
  await chmod(root, 0o755)
  await mkdir(tasksDir)
  writeFileSync(join(tasksDir, 'ok.sh'), 'echo innocent\n')
})
afterEach(() => rm(root, { recursive: true, maxRetries: 10 }))

interface Opened extends AsyncDisposable {
  backend: WorkerBackend
}

const BACKENDS: Record<string, { skipped?: string | undefined; open: () => Promise<Opened> }> = {
  local: {
    async open() {
      const config = loadConfig(testEnv({ DATA_DIR: join(root, 'data'), TASKS_DIR: tasksDir }))
      const backend = await openBackend(config, {
        ...{ umask: 0o022, deployment: 'test', legacyInstance: '', now: Date.now, log: QUIET },
        onThreadDeath: (err) => {
          throw err
        },
      })
      return { backend, [Symbol.asyncDispose]: () => backend.close() }
    },
  },
  docker: {
    skipped: noDocker,
    async open() {
      const harness = await openDocker({ tasksDir })
      return { backend: harness.backend, [Symbol.asyncDispose]: () => harness.dispose() }
    },
  },
  kubernetes: {
    open: () => openKubernetes({ settings: { tasksDir }, fake: { runProcesses: true } }),
  },
}

for (const [name, { skipped, open }] of Object.entries(BACKENDS)) {
  describe.skipIf(skipped !== undefined)(`${name} workers${skipped ? ` (${skipped})` : ''}`, () => {
    const ok = () => spec('', { taskFileName: 'ok.sh' })

    test('are unavailable while the tasks folder is away, and there again with it', async () => {
      await using opened = await open()
      renameSync(tasksDir, `${tasksDir}.away`)
      const wanted = ok()
      for (let turn = 0; turn < 2; turn += 1) {
        const failure = await opened.backend.provision(wanted, NEVER).catch((err: unknown) => err)
        expect(failure).toBeInstanceOf(UnavailableError)
        expect(String(failure)).toContain('The tasks folder cannot be read (ENOENT)')
      }
      await expect(opened.backend.check()).rejects.toBeInstanceOf(UnavailableError)
      expect(await opened.backend.list()).toEqual([])
      renameSync(`${tasksDir}.away`, tasksDir)
      await opened.backend.check()
      const worker = await opened.backend.provision(wanted, NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ message: null, exitCode: 0 })
      await worker.terminate()
    })

    test('get what can be read of an odd folder, and a note of what is left out', async () => {
      writeFileSync(Buffer.concat([Buffer.from(`${tasksDir}/caf`), Buffer.from([0xe9])]), '')
      symlinkSync('.', join(tasksDir, 'again'))
      symlinkSync('again/ok.sh', join(tasksDir, 'linked.sh'))
      writeFileSync(join(tasksDir, 'ls.sh'), 'ls; . again/again/linked.sh\n')
      await using opened = await open()
      const worker = await opened.backend.provision(spec('', { taskFileName: 'ls.sh' }), NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ message: null, exitCode: 0 })
      expect((await logOf(worker)).split('\n')).toEqual([
        '[task-runner] Left out of the copy of the tasks folder: caf\uFFFD (its name is not UTF-8)',
        ...['again', 'linked.sh', 'ls.sh', 'ok.sh', 'innocent', ''],
      ])
      await worker.terminate()
    })

    test('are not to be had for a task file that is gone', async () => {
      await using opened = await open()
      const gone = spec('', { taskFileName: 'gone/gone.sh' })
      const failure = await opened.backend.provision(gone, NEVER).catch((err: unknown) => err)
      expect(failure).toBeInstanceOf(WorkerError)
      expect(failure).toMatchObject({
        reason: 'startup_failed',
        message: 'The task file "gone/gone.sh" is no longer in the tasks folder',
      })
      expect(await opened.backend.list()).toEqual([])
    })
  })
}

test('a trouble of ours in the midst of sending files is told as such, not as an engine that is away', async () => {
  const server = createServer((request, response) => {
    if (request.method !== 'PUT') response.setHeader('api-version', '1.47').end()
    else request.resume()
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  const engine = new Engine({ url: `http://127.0.0.1:${port}` })
  const trouble = new UnavailableError('The tasks folder cannot be read (EIO)')
  const body = new ReadableStream<Uint8Array>({
    start: (controller) => controller.enqueue(Buffer.alloc(100_000)),
    pull: (controller) => controller.error(trouble),
  })
  const sending = engine.text('PUT', '/containers/a/archive', { body, signal: NEVER })
  await expect(sending).rejects.toBe(trouble)
  await engine.close()
  server.closeAllConnections()
  server.close()
})
