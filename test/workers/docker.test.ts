import { describe, test } from 'vitest'
import { openDocker, whyNoDocker } from '../helpers/docker.ts'
import { describeWorkerBackend } from './contract.ts'

const skipped = await whyNoDocker()

if (skipped === undefined) describeWorkerBackend('DockerBackend', () => openDocker())
else describe('DockerBackend', () => test.skip(skipped, () => {}))
