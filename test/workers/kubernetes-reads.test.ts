/** What reading about workers costs: calls to the API server, however many workers there are. */
import { expect, test } from 'vitest'
import { presets } from '../fakes/kubernetes/presets.ts'
import { openKubernetes, podOf } from '../helpers/kubernetes.ts'
import { NEVER, spec } from './contract.ts'

test('the status of every worker costs one call, and is what the watches told last', async () => {
  await using it = await openKubernetes({ fake: { behave: () => presets.runs() } })
  const wanted = Array.from({ length: 20 }, () => spec('true'))
  const workers = await Promise.all(wanted.map((each) => it.backend.provision(each, NEVER)))
  const [first] = workers
  it.fake.kubelet.play(
    await podOf(it.fake, first?.name ?? ''),
    presets.exits(0, { message: 'task 0\n' }),
  )
  await first?.completion(NEVER)
  const calls = () =>
    it.fake.requests.filter(({ query, path }) => !query.watch && !path.endsWith('/log')).length
  const before = calls()
  const listed = await it.backend.list()
  const told = await Promise.all(
    listed.map(async (worker) => [worker.name, await worker.status()] as const),
  )
  expect(calls() - before).toBe(1)
  expect(new Map(told)).toEqual(
    new Map(wanted.map(({ name }) => [name, name === first?.name ? 'Completed' : 'Running'])),
  )
})
