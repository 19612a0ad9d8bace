import { mkdir, mkdtemp, readdir, readFile, realpath, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect } from 'vitest'
import {
  KubernetesBackend,
  type KubernetesSettings,
} from '../../src/workers/kubernetes/kubernetes-backend.ts'
import { type FakeKubernetes, startFakeKubernetes } from '../fakes/kubernetes/server.ts'
import { FIXTURE_TASKS } from '../helpers/app.ts'
import { QUIET } from '../helpers/stores.ts'
import { type BackendHarness, describeWorkerBackend } from './contract.ts'

interface KubernetesHarness extends BackendHarness {
  backend: KubernetesBackend
  settings: KubernetesSettings
  fake: FakeKubernetes
}

async function openKubernetes(
  overrides: Partial<KubernetesSettings> = {},
): Promise<KubernetesHarness> {
  const folder = await realpath(await mkdtemp(join(tmpdir(), 'kubernetes-workers-')))
  const sharedDir = join(folder, 'shared')
  await mkdir(sharedDir)
  const fake = await startFakeKubernetes({ tls: true, runProcesses: true, namespace: 'workers' })
  const settings: KubernetesSettings = {
    kubeconfig: fake.kubeconfig.path,
    namespace: undefined,
    instance: 'test',
    tasksDir: FIXTURE_TASKS,
    images: { default: 'image', prefix: '' },
    serviceAccount: 'task-worker',
    queue: undefined,
    workersMax: 1000,
    provisioningTimeoutMs: 20_000,
    terminationGraceMs: 1_000,
    keptWorkerMs: 3_600_000,
    logBytesKept: 6 * 1024 * 1024,
    log: QUIET,
    ...overrides,
  }
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
    async processes(wanted) {
      const pids = (await readdir('/proc')).filter((entry) => /^\d+$/.test(entry))
      const lines = await Promise.all(
        pids.map(async (pid) => {
          const read = (name: string) => readFile(`/proc/${pid}/${name}`, 'latin1').catch(() => '')
          const [command, environment] = await Promise.all([read('cmdline'), read('environ')])
          const isIt = command.includes(wanted) || environment.includes(wanted)
          return isIt && Number(pid) !== process.pid ? [`${pid} ${command}`] : []
        }),
      )
      return lines.flat()
    },
    async clean() {
      for (const worker of await harness.backend.list()) await worker.terminate()
      for (const kind of ['jobs', 'pods', 'secrets'] as const) {
        expect(fake.objects(kind), kind).toEqual([])
      }
      expect(fake.warnings).toEqual([])
    },
    async dispose() {
      await harness.clean()
      await harness.backend.close()
      await fake[Symbol.asyncDispose]()
      await rm(folder, { recursive: true })
    },
  }
  return harness
}

describeWorkerBackend('KubernetesBackend', openKubernetes)
