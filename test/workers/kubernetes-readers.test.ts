import { queryObjects } from 'node:v8'
import { expect, test } from 'vitest'
import { KubernetesBackend } from '../../src/workers/kubernetes/kubernetes-backend.ts'
import { LogRing } from '../../src/workers/log-ring.ts'
import { presets } from '../fakes/kubernetes/presets.ts'
import { openKubernetes } from '../helpers/kubernetes.ts'
import { NEVER, spec } from './contract.ts'

test('an instance that read the log of a worker of another keeps nothing of it once that is gone', async () => {
  await using harness = await openKubernetes({
    fake: { behave: () => presets.runs({ log: 'read\n' }) },
  })
  const reader = new KubernetesBackend(harness.settings)
  const read = async (name: string) => {
    const tail = await (await reader.find(name))?.logs({ maxBytes: 100 })
    return tail?.content.toString()
  }
  const wanted = Array.from({ length: 6 }, () => spec('true'))
  for (const each of wanted) {
    await harness.backend.provision(each, NEVER)
    await expect.poll(() => read(each.name), { timeout: 10_000 }).toBe('read\n')
  }
  // Of either instance.
  expect(queryObjects(LogRing)).toBe(2 * wanted.length)
  // Their Jobs are gone before their pods have ended.
  for (const worker of await harness.backend.list()) await worker.stop()
  await harness.clean()
  // The runtime may have the last one at hand still.
  await expect.poll(() => queryObjects(LogRing), { timeout: 10_000 }).toBeLessThan(2)
  await reader.close()
})
