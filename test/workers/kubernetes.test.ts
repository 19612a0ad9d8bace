import { mkdtemp, realpath, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect } from 'vitest'
import { KubernetesBackend } from '../../src/workers/kubernetes/kubernetes-backend.ts'
import { kubernetesSettings, openKubernetes } from '../helpers/kubernetes.ts'
import { processesWith } from '../helpers/processes.ts'
import { describeContained } from './contained.ts'
import { type BackendHarness, describeWorkerBackend, marker } from './contract.ts'

describeWorkerBackend('KubernetesBackend', () => openKubernetes({ fake: { runProcesses: true } }))

describeContained('KubernetesBackend', () =>
  openKubernetes({ fake: { runProcesses: true }, settings: { terminationGraceMs: 20_000 } }),
)

/**
 * A real cluster whose one node is this machine: tests and tasks share a folder and the process table. Its namespace
 * is that of the kubeconfig's context, its service account `default`.
 */
async function openRealKubernetes(kubeconfig: string): Promise<BackendHarness> {
  const sharedDir = await realpath(await mkdtemp(join(tmpdir(), 'kubernetes-e2e-')))
  const settings = kubernetesSettings(kubeconfig, {
    deployment: `test-${marker()}`,
    images: { default: process.env.WORKER_IMAGE_E2E ?? 'task-runner', prefix: '' },
    serviceAccount: 'default',
    provisioningTimeoutMs: 60_000,
  })
  const harness = {
    backend: new KubernetesBackend(settings),
    graceMs: settings.terminationGraceMs,
    ...{ sharedDir, processes: processesWith },
    async reopen() {
      const before = harness.backend
      harness.backend = new KubernetesBackend(settings)
      await before.close()
      return harness.backend
    },
    async clean() {
      for (const worker of await harness.backend.list()) await worker.terminate()
      expect(await harness.backend.list()).toEqual([])
    },
    async dispose() {
      await harness.clean()
      await harness.backend.close()
      await rm(sharedDir, { recursive: true })
    },
  }
  return harness
}

const { KUBECONFIG_E2E } = process.env
// No machine of ours can hold a cluster: the suite is there when one is named.
if (KUBECONFIG_E2E) {
  describeWorkerBackend('KubernetesBackend on a real cluster', () =>
    openRealKubernetes(KUBECONFIG_E2E),
  )
}
