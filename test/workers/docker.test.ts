import { describe, expect, onTestFinished, test } from 'vitest'
import { openDocker, whyNoDocker } from '../helpers/docker.ts'
import { describeContained } from './contained.ts'
import { describeWorkerBackend, logOf, NEVER, spec } from './contract.ts'

const skipped = await whyNoDocker()

if (skipped === undefined) {
  describeWorkerBackend('DockerBackend', () => openDocker())
  describe('DockerBackend, with a home elsewhere', () => {
    test('a task has it as HOME, may write there, and finds the usual places', async () => {
      const harness = await openDocker({ home: '/home/ubuntu' })
      onTestFinished(() => harness.dispose())
      const script =
        'echo "$HOME" >~/new && cat ~/new; cd ~/my/projects && pwd -P; cd ~/practicus/task && pwd -P'
      const worker = await harness.backend.provision(spec(script), NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ reason: 'completed' })
      expect(await logOf(worker)).toBe('/home/ubuntu\n/home/ubuntu/projects\n/worker/tasks\n')
    })
  })
  describeContained('DockerBackend', () => openDocker({ terminationGraceMs: 20_000 }))
} else describe('DockerBackend', () => test.skip(skipped, () => {}))
