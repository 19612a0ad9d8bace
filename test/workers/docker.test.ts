import { chmod, mkdir, mkdtemp, readdir, readFile, realpath, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { DockerBackend, type DockerSettings } from '../../src/workers/docker/docker-backend.ts'
import { FIXTURE_TASKS } from '../helpers/app.ts'
import { docker, dockerSocket, newInstance, TEST_IMAGE, whyNoDocker } from '../helpers/docker.ts'
import { QUIET } from '../helpers/stores.ts'
import { type BackendHarness, describeWorkerBackend } from './contract.ts'

const skipped = await whyNoDocker()

interface DockerHarness extends BackendHarness {
  backend: DockerBackend
  settings: DockerSettings
}

async function openDocker(overrides: Partial<DockerSettings> = {}): Promise<DockerHarness> {
  const folder = await realpath(await mkdtemp(join(tmpdir(), 'docker-workers-')))
  const sharedDir = join(folder, 'shared')
  await mkdir(sharedDir)
  // Workers run as a user of their own.
  await chmod(folder, 0o755)
  await chmod(sharedDir, 0o777)
  const settings: DockerSettings = {
    engine: { socketPath: dockerSocket() },
    instance: newInstance(),
    tasksDir: FIXTURE_TASKS,
    images: { default: TEST_IMAGE, prefix: '' },
    network: 'none',
    mounts: [`${sharedDir}:${sharedDir}`],
    terminationGraceMs: 400,
    logBytesKept: 6 * 1024 * 1024,
    log: QUIET,
    ...overrides,
  }
  const harness: DockerHarness = {
    backend: new DockerBackend(settings),
    graceMs: settings.terminationGraceMs,
    sharedDir,
    settings,
    async reopen() {
      const before = harness.backend
      harness.backend = new DockerBackend(settings)
      await before.close()
      return harness.backend
    },
    // Of other users and in other namespaces, but of this machine.
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
      expect(await containers(settings.instance)).toEqual([])
    },
    async dispose() {
      await harness.clean()
      await harness.backend.close()
      await rm(folder, { recursive: true })
    },
  }
  return harness
}

async function containers(instance: string): Promise<string[]> {
  const filter = `label=task-runner.instance=${instance}`
  const names = await docker('ps', '--all', '--filter', filter, '--format', '{{.Names}}')
  return names.split('\n').filter((name) => name !== '')
}

if (skipped === undefined) describeWorkerBackend('DockerBackend', openDocker)
else describe('DockerBackend', () => test.skip(skipped, () => {}))
