import type { V1Job } from '@kubernetes/client-node'
import { Job } from 'kubernetes-models/batch/v1/Job'
import { ConfigMap } from 'kubernetes-models/v1/ConfigMap'
import { Secret } from 'kubernetes-models/v1/Secret'
import { describe, expect, test } from 'vitest'
import type { WorkerSpec } from '../../src/core/ports.ts'
import { DEFAULT_WORKER_SIZES } from '../../src/core/worker-sizes.ts'
import { imageFor } from '../../src/workers/image.ts'
import {
  filesConfigMap,
  type JobOptions,
  ownSecret,
  pullSecret,
  workerJob,
} from '../../src/workers/kubernetes/manifests.ts'

const SECRET = 'canary-secret-value'
const SPEC: WorkerSpec = {
  name: 'task-nightly-0123456789ab',
  taskId: 'nightly é 1',
  taskFileName: 'jobs/a.py',
  taskFolder: 'tasks',
  repositories: [],
  environment: { TOKEN: SECRET, PLAIN: "it's" },
  keepAfterwards: false,
  maxLogBytes: 1_000_000,
  timeoutSeconds: 3600,
  notes: ['a note'],
}
const OPTIONS: JobOptions = {
  deployment: 'instance-1',
  image: 'example.com/team/image:1',
  filesName: 'task-runner-files-0123456789abcdef',
  serviceAccount: 'task-worker',
  queue: undefined,
  provisioningTimeoutSeconds: 59,
  terminationGraceMs: 9_500,
  keptWorkerSeconds: 86_400,
  createdAt: 1_770_000_000_000,
}

const jobs: Record<string, V1Job> = {
  plain: workerJob(SPEC, OPTIONS),
  ...Object.fromEntries(
    Object.entries(DEFAULT_WORKER_SIZES).map(([size, resources]) => [
      `size-${size.toLowerCase()}`,
      workerJob({ ...SPEC, size, resources }, OPTIONS),
    ]),
  ),
  gpu: workerJob({ ...SPEC, resources: { cpus: 1.5, memoryBytes: 2 ** 30, gpus: 2 } }, OPTIONS),
  kept: workerJob({ ...SPEC, keepAfterwards: true }, OPTIONS),
  queue: workerJob(SPEC, { ...OPTIONS, queue: 'team-a' }),
  repository: workerJob(
    { ...SPEC, taskFolder: 'home/projects/repo', taskFileName: "jobs/it's.sh" },
    OPTIONS,
  ),
  home: workerJob(SPEC, { ...OPTIONS, home: '/home/ubuntu' }),
  'private-image': workerJob(
    {
      ...SPEC,
      imageConfig: { pullPolicy: 'Always', credential: { username: 'me', password: SECRET } },
    },
    OPTIONS,
  ),
}

describe('the Job of a worker', () => {
  test.each(Object.entries(jobs))('%s is as it was agreed on', async (name, job) => {
    const file = `../fixtures/kubernetes/${name}.json`
    await expect(`${JSON.stringify(job, null, 2)}\n`).toMatchFileSnapshot(file)
  })

  test.each(Object.entries(jobs))('%s is one to the schema of Kubernetes', (_, job) => {
    expect(() => new Job(job as never).validate()).not.toThrow()
  })

  test.each(Object.entries(jobs))(
    '%s holds no secret and keeps to the restricted profile',
    (_, job) => {
      expect(JSON.stringify(job)).not.toContain(SECRET)
      expect(job.metadata?.name).toMatch(/^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$/)
      const labels = { ...job.metadata?.labels, ...job.spec?.template.metadata?.labels }
      for (const value of Object.values(labels)) {
        expect(value).toMatch(/^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$/)
      }
      const pod = job.spec?.template.spec
      expect(pod).toMatchObject({
        ...{
          restartPolicy: 'Never',
          automountServiceAccountToken: false,
          enableServiceLinks: false,
        },
        securityContext: { runAsNonRoot: true, seccompProfile: { type: 'RuntimeDefault' } },
      })
      for (const container of [...(pod?.initContainers ?? []), ...(pod?.containers ?? [])]) {
        expect(container.securityContext).toMatchObject({
          ...{ allowPrivilegeEscalation: false, readOnlyRootFilesystem: true },
          capabilities: { drop: ['ALL'] },
        })
      }
      expect(job.spec).toMatchObject({ backoffLimit: 0, completions: 1, parallelism: 1 })
      // The Job's own limit deletes pods with their logs: it must never be the first.
      expect(job.spec?.activeDeadlineSeconds).toBeGreaterThan(
        (pod?.activeDeadlineSeconds ?? 0) + 60,
      )
      expect(pod?.activeDeadlineSeconds).toBeGreaterThan(SPEC.timeoutSeconds)
    },
  )

  test("the grace period is the task's: the bootstrap has a moment after it", () => {
    const pod = jobs.plain?.spec?.template.spec
    expect(pod?.containers[0]?.command).toContain('9500')
    expect(pod?.terminationGracePeriodSeconds).toBe(12)
  })

  test('memory is asked for as it is limited, and the disk always is', () => {
    const { resources } = jobs['size-small']?.spec?.template.spec?.containers[0] ?? {}
    expect(resources).toMatchObject({
      requests: { cpu: '1000m', memory: '2048Mi', 'ephemeral-storage': '100Mi' },
      limits: { cpu: '1000m', memory: '2048Mi', 'ephemeral-storage': '10Gi' },
    })
    expect(jobs.plain?.spec?.template.spec?.containers[0]?.resources?.limits).toEqual({
      'ephemeral-storage': '10Gi',
    })
  })
})

describe('what goes with it', () => {
  test('task files are named by their content, and cannot be changed', () => {
    const one = filesConfigMap(Buffer.from('one'), 'i')
    expect(() => new ConfigMap(one as never).validate()).not.toThrow()
    expect(one).toMatchObject({ immutable: true })
    expect(filesConfigMap(Buffer.from('one'), 'j').metadata?.name).toBe(one.metadata?.name)
    expect(filesConfigMap(Buffer.from('two'), 'i').metadata?.name).not.toBe(one.metadata?.name)
  })

  test('the worker’s own Secret holds its environment, and cannot be changed', () => {
    const secret = ownSecret(SPEC, { deployment: 'i' }, 'uid-1')
    expect(() => new Secret(secret as never).validate()).not.toThrow()
    const environment = Buffer.from(secret.data?.['environment.sh'] ?? '', 'base64').toString()
    expect(environment).toContain(`export TOKEN='${SECRET}'\nexport PLAIN='it'\\''s'\n`)
    const ownerReferences = [{ apiVersion: 'batch/v1', kind: 'Job', name: SPEC.name, uid: 'uid-1' }]
    expect(secret).toMatchObject({
      immutable: true,
      metadata: { name: SPEC.name, ownerReferences },
    })
  })

  test('pull secrets are the one made for a password, and the one that is named', () => {
    const named = (imageConfig: WorkerSpec['imageConfig']) =>
      workerJob({ ...SPEC, imageConfig }, OPTIONS).spec?.template.spec?.imagePullSecrets
    const credential = { username: 'me', password: SECRET }
    const [own, theirs] = [{ name: `${SPEC.name}-pull` }, { name: 'regcred' }]
    expect(named({})).toBeUndefined()
    expect(named({ pullSecretName: 'regcred' })).toEqual([theirs])
    expect(named({ credential, pullSecretName: 'regcred' })).toEqual([own, theirs])
  })

  test('a home elsewhere is the HOME of its environment', () => {
    const { data } = ownSecret(SPEC, { ...OPTIONS, home: '/home/ubuntu' }, 'uid-1')
    const environment = Buffer.from(data?.['environment.sh'] ?? '', 'base64').toString()
    expect(environment).toContain("export HOME='/home/ubuntu' TMPDIR=")
  })

  test('registry credentials are a Secret of their own, for the registry of the image', () => {
    expect(pullSecret(SPEC, OPTIONS, 'uid-1')).toBeUndefined()
    const imageConfig = { credential: { username: 'me', password: SECRET } }
    const configOf = (image: string) => {
      const secret = pullSecret({ ...SPEC, imageConfig }, { ...OPTIONS, image }, 'uid-1')
      expect(secret?.type).toBe('kubernetes.io/dockerconfigjson')
      return JSON.parse(Buffer.from(secret?.data?.['.dockerconfigjson'] ?? '', 'base64').toString())
    }
    expect(configOf('example.com/a/b:1')).toEqual({
      auths: { 'example.com': { username: 'me', password: SECRET } },
    })
    expect(Object.keys(configOf('a/b').auths)).toEqual(['https://index.docker.io/v1/'])
  })
})

test.each([
  [undefined, 'standard:latest'],
  ['practicus', 'example.com/team/practicus:latest'],
  ['practicus:24', 'example.com/team/practicus:24'],
  ['other/image', 'other/image:latest'],
  ['localhost:5000/image', 'localhost:5000/image:latest'],
  ['image@sha256:abc', 'example.com/team/image@sha256:abc'],
])('the image %s is %s', (name, image) => {
  expect(imageFor(name, { default: 'standard', prefix: 'example.com/team/' })).toBe(image)
})
