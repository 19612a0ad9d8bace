import { mkdir, mkdtemp, realpath, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, vi } from 'vitest'
import {
  KubernetesBackend,
  type KubernetesSettings,
} from '../../src/workers/kubernetes/kubernetes-backend.ts'
import {
  type FakeKubernetes,
  type FakeKubernetesOptions,
  startFakeKubernetes,
} from '../fakes/kubernetes/server.ts'
import type { BackendHarness } from '../workers/contract.ts'
import { FIXTURE_TASKS } from './app.ts'
import { processesWith } from './processes.ts'
import { QUIET } from './stores.ts'

export interface KubernetesHarness extends BackendHarness, AsyncDisposable {
  backend: KubernetesBackend
  settings: KubernetesSettings
  fake: FakeKubernetes
}

export interface KubernetesHarnessOptions {
  settings?: Partial<KubernetesSettings>
  fake?: FakeKubernetesOptions
}

/** What the tests' backends are opened with; calls are not throttled where that is not what is tested. */
export function kubernetesSettings(
  kubeconfig: string,
  overrides: Partial<KubernetesSettings> = {},
): KubernetesSettings {
  return {
    kubeconfig,
    namespace: undefined,
    deployment: 'test',
    tasksDir: FIXTURE_TASKS,
    images: { default: 'image', prefix: '' },
    serviceAccount: 'task-worker',
    queue: undefined,
    provisioningTimeoutMs: 20_000,
    terminationGraceMs: 1_000,
    keptWorkerMs: 3_600_000,
    logBytesKept: 6 * 1024 * 1024,
    now: Date.now,
    log: QUIET,
    callsPerSecond: 1_000,
    callsAtOnce: 1_000,
    ...overrides,
  }
}

/** A backend on a fake cluster of its own. */
export async function openKubernetes({
  settings: overrides,
  fake: options,
}: KubernetesHarnessOptions = {}): Promise<KubernetesHarness> {
  const folder = await realpath(await mkdtemp(join(tmpdir(), 'kubernetes-workers-')))
  const sharedDir = join(folder, 'shared')
  await mkdir(sharedDir)
  const fake = await startFakeKubernetes({ tls: true, namespace: 'workers', ...options })
  const settings = kubernetesSettings(fake.kubeconfig.path, overrides)
  const harness: KubernetesHarness = {
    backend: new KubernetesBackend(settings),
    graceMs: settings.terminationGraceMs,
    sharedDir,
    settings,
    fake,
    async reopen() {
      const before = harness.backend
      harness.backend = new KubernetesBackend(settings)
      await before.close()
      return harness.backend
    },
    processes: processesWith,
    async clean() {
      for (const worker of await harness.backend.list()) await worker.terminate()
      for (const kind of ['jobs', 'pods', 'secrets'] as const) {
        expect(fake.objects(kind), kind).toEqual([])
      }
      expect(fake.warnings).toEqual([])
    },
    async dispose() {
      await harness.clean()
      await harness[Symbol.asyncDispose]()
    },
    async [Symbol.asyncDispose]() {
      await harness.backend.close()
      await fake[Symbol.asyncDispose]()
      await rm(folder, { recursive: true })
    },
  }
  return harness
}

/** The pod of the worker's Job, once it is there. */
export async function podOf(fake: FakeKubernetes, worker: string): Promise<string> {
  const find = () =>
    fake.objects('pods').find(({ metadata }) => metadata.labels?.['job-name'] === worker)
  await vi.waitFor(() => expect(find()).toBeDefined(), { timeout: 10_000, interval: 10 })
  return find()?.metadata.name ?? ''
}
