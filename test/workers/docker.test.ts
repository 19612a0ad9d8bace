import { describe, test } from 'vitest'
import { openDocker, whyNoDocker } from '../helpers/docker.ts'
import { describeContained } from './contained.ts'
import { describeWorkerBackend } from './contract.ts'

const skipped = await whyNoDocker()

if (skipped === undefined) {
  describeWorkerBackend('DockerBackend', () => openDocker())
  describeContained('DockerBackend', () => openDocker({ terminationGraceMs: 20_000 }))
} else describe('DockerBackend', () => test.skip(skipped, () => {}))
