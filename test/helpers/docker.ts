import { execFile } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { promisify } from 'node:util'

/** The image that workers of tests run; `.ci/docker` makes it. */
export const TEST_IMAGE = 'task-runner-test'

export const docker = async (...args: string[]) =>
  (await promisify(execFile)('docker', args, { maxBuffer: 2 ** 28 })).stdout

/** Why there are no tests with Docker here; undefined when there are. In continuous integration there have to be. */
export async function whyNoDocker(): Promise<string | undefined> {
  try {
    await docker('image', 'inspect', TEST_IMAGE)
    return undefined
  } catch (err) {
    if (process.env.CI) throw new Error('no Docker engine with the test image', { cause: err })
    return 'no Docker engine with the image task-runner-test: run .ci/docker and export what it prints'
  }
}

/** Where the engine of the tests listens. */
export function dockerSocket(): string {
  return (process.env.DOCKER_HOST ?? 'unix:///var/run/docker.sock').replace('unix://', '')
}

/** Keeps the containers of one test file from those of others. */
export function newInstance(): string {
  return `test-${randomBytes(6).toString('hex')}`
}
