import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, readdir, readFile, realpath, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, vi } from 'vitest'
import type { WorkerSpec } from '../../src/core/ports.ts'
import { LocalBackend } from '../../src/workers/local/local-backend.ts'
import type { LocalSettings } from '../../src/workers/local/local-workers.ts'
import type { BackendHarness } from '../workers/contract.ts'
import { FIXTURE_TASKS } from './app.ts'
import { processesWith } from './processes.ts'

const BOOTSTRAP = fileURLToPath(new URL('../../src/workers/bootstrap.sh', import.meta.url))
const BACKEND_MODULE = fileURLToPath(
  new URL('../../src/workers/local/local-backend.ts', import.meta.url),
)
export const GRACE_MS = 400
const CLOSE_MS_MAX = 10_000

/** Slot shells that this process started and that have not ended. */
export async function slotShells(): Promise<string[]> {
  const found: string[] = []
  for (const pid of (await readdir('/proc')).filter((entry) => /^\d+$/.test(entry))) {
    const [stat = '', command = ''] = await Promise.all(
      ['stat', 'cmdline'].map((file) => readFile(`/proc/${pid}/${file}`, 'latin1').catch(() => '')),
    )
    const parent = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1]
    if (parent === String(process.pid) && command === '/bin/sh\0-s\0') found.push(pid)
  }
  return found
}

export interface LocalHarness extends BackendHarness {
  backend: LocalBackend
  readonly settings: LocalSettings
  reopen(): Promise<LocalBackend>
  /** A service in a process of its own that has provisioned the worker, to be killed. */
  service(wanted: WorkerSpec): Promise<ChildProcess>
}

export async function openLocal(overrides: Partial<LocalSettings> = {}): Promise<LocalHarness> {
  const folder = await realpath(await mkdtemp(join(tmpdir(), 'local-workers-')))
  const sharedDir = join(folder, 'shared')
  await mkdir(sharedDir)
  const settings: LocalSettings = {
    workersDir: join(folder, 'workers'),
    tasksDir: FIXTURE_TASKS,
    bootstrap: BOOTSTRAP,
    interpreters: {
      python: '/nonexistent/missing-python',
      shell: '/bin/bash',
      node: process.execPath,
    },
    environment: { PATH: '/usr/bin:/bin', LANG: 'C.UTF-8' },
    umask: 0o22,
    terminationGraceMs: GRACE_MS,
    logBytesKept: 5_500_000,
    ...overrides,
  }
  const services: ChildProcess[] = []
  const shellsOfOthers = await slotShells()
  const ownShells = async () => (await slotShells()).filter((pid) => !shellsOfOthers.includes(pid))
  const opened: LocalBackend[] = [new LocalBackend(settings)]
  const close = async (backend: LocalBackend) => {
    const inTime = await Promise.race([
      backend.close().then(() => true),
      new Promise((resolve) => setTimeout(resolve, CLOSE_MS_MAX, false)),
    ])
    if (!inTime) throw new Error(`close took longer than ${CLOSE_MS_MAX} ms`)
  }
  const harness: LocalHarness = {
    backend: opened[0] as LocalBackend,
    graceMs: GRACE_MS,
    sharedDir,
    settings,
    async reopen() {
      const before = harness.backend
      harness.backend = new LocalBackend(settings)
      opened.push(harness.backend)
      await close(before)
      return harness.backend
    },
    async clean() {
      for (const worker of await harness.backend.list()) await worker.terminate()
      expect(await readdir(settings.workersDir)).toEqual([])
      expect(await processesWith(settings.workersDir)).toEqual([])
    },
    async service(wanted) {
      const script = `
        const { LocalBackend } = await import(${JSON.stringify(BACKEND_MODULE)})
        const backend = new LocalBackend(${JSON.stringify(settings)})
        const worker = await backend.provision(${JSON.stringify(wanted)}, new AbortController().signal)
        worker.completion(new AbortController().signal)
        console.log('provisioned')`
      // A file: what is given with -e makes threads fail (they inherit --input-type).
      const file = join(folder, `service-${services.length}.mjs`)
      await writeFile(file, script)
      const child = spawn(process.execPath, [file], { stdio: ['ignore', 'pipe', 'inherit'] })
      services.push(child)
      await once(child.stdout, 'data')
      return child
    },
    processes: processesWith,
    async dispose() {
      for (const service of services) await kill(service)
      try {
        await harness.backend.list().catch(() => {
          // The test's own is closed.
          harness.backend = new LocalBackend(settings)
          opened.push(harness.backend)
        })
        await harness.clean()
        await Promise.all(opened.map(close))
        await vi.waitFor(async () => expect(await ownShells()).toEqual([]), 10_000)
        expect(await processesWith(folder)).toEqual([])
      } finally {
        for (const left of await ownShells()) process.kill(Number(left), 'SIGKILL')
        for (const left of await processesWith(folder)) process.kill(Number.parseInt(left, 10), 9)
        await rm(folder, { recursive: true, force: true })
      }
    },
  }
  // With the thread, the folder is there.
  await harness.backend.ready
  return harness
}

export async function kill(service: ChildProcess): Promise<void> {
  if (service.exitCode !== null || service.signalCode !== null) return
  const exited = once(service, 'exit')
  service.kill('SIGKILL')
  await exited
}

export async function openDisposable(
  overrides: Partial<LocalSettings>,
): Promise<LocalHarness & AsyncDisposable> {
  const harness = await openLocal(overrides)
  return Object.assign(harness, { [Symbol.asyncDispose]: () => harness.dispose() })
}
