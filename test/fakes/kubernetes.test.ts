import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { describe, expect, test } from 'vitest'
import { needs } from '../helpers/needs.ts'
import { call, stream } from './kubernetes/client.ts'
import { presets } from './kubernetes/presets.ts'
import type { JobSpec, PodSpec } from './kubernetes/resources.ts'
import { type FakeKubernetes, startFakeKubernetes } from './kubernetes/server.ts'

const JOBS = '/apis/batch/v1/namespaces/default/jobs'
const PODS = '/api/v1/namespaces/default/pods'
const CONFIG_MAPS = '/api/v1/namespaces/default/configmaps'
const SECRETS = '/api/v1/namespaces/default/secrets'
const BACKGROUND = { propagationPolicy: 'Background' }

const RESTRICTED = {
  allowPrivilegeEscalation: false,
  capabilities: { drop: ['ALL'] },
  runAsNonRoot: true,
  seccompProfile: { type: 'RuntimeDefault' },
}

interface JobOptions {
  spec?: Partial<JobSpec>
  pod?: Partial<PodSpec>
  container?: object
  init?: object
}

function jobOf(name: string, { spec, pod, container, init }: JobOptions = {}) {
  const base = { image: 'task:1', securityContext: RESTRICTED }
  return {
    apiVersion: 'batch/v1',
    kind: 'Job',
    metadata: { name, labels: { app: 'runner', task: name } },
    spec: {
      backoffLimit: 0,
      ...spec,
      template: {
        metadata: { labels: { app: 'runner' } },
        spec: {
          restartPolicy: 'Never',
          ...(init && { initContainers: [{ ...base, name: 'init', ...init }] }),
          containers: [{ ...base, name: 'task', ...container }],
          ...pod,
        },
      },
    },
  }
}

const FAIL_JOB: NonNullable<JobSpec['podFailurePolicy']> = {
  rules: [
    { action: 'FailJob', onPodConditions: [{ type: 'DisruptionTarget' }] },
    { action: 'FailJob', onExitCodes: { containerName: 'task', operator: 'NotIn', values: [0] } },
  ],
}

const configMap = (name: string, more: object = {}) => ({
  apiVersion: 'v1',
  kind: 'ConfigMap',
  metadata: { name },
  ...more,
})

const podOf = (fake: FakeKubernetes, job: string) =>
  fake.objects('pods').find(({ metadata }) => metadata.labels?.['job-name'] === job)

const podName = async (fake: FakeKubernetes, job: string) => {
  await expect.poll(() => podOf(fake, job)?.metadata.name).toBeTruthy()
  return podOf(fake, job)?.metadata.name ?? ''
}

const conditionsOf = (fake: FakeKubernetes, job: string) =>
  (fake.object('jobs', job)?.status.conditions ?? []).map(({ type, reason }) => `${type}:${reason}`)

const verdict = (fake: FakeKubernetes, job: string) =>
  expect.poll(() => conditionsOf(fake, job).at(-1), { timeout: 10_000, interval: 10 })

describe('objects', () => {
  test('are created, read, replaced, patched and deleted', async () => {
    await using fake = await startFakeKubernetes()
    const made = await call(fake, 'POST', CONFIG_MAPS, configMap('a', { data: { k: '1' } }))
    expect(made.status).toBe(201)
    expect(made.body.metadata).toMatchObject({
      name: 'a',
      namespace: 'default',
      uid: expect.stringMatching(/^[0-9a-f-]{36}$/),
      resourceVersion: expect.stringMatching(/^\d+$/),
    })
    const put = await call(fake, 'PUT', `${CONFIG_MAPS}/a`, { ...made.body, data: { k: '2' } })
    expect([put.status, put.body.data]).toEqual([200, { k: '2' }])
    expect(Number(put.body.metadata?.resourceVersion)).toBeGreaterThan(
      Number(made.body.metadata?.resourceVersion),
    )
    const merge = { 'content-type': 'application/merge-patch+json' }
    const patched = await call(
      fake,
      'PATCH',
      `${CONFIG_MAPS}/a`,
      { data: { k: null, l: '3' }, metadata: { labels: { x: 'y' } } },
      merge,
    )
    expect(patched.body).toMatchObject({ data: { l: '3' }, metadata: { labels: { x: 'y' } } })
    expect(patched.body.data).not.toHaveProperty('k')
    const json = await call(
      fake,
      'PATCH',
      `${CONFIG_MAPS}/a`,
      JSON.stringify([{ op: 'replace', path: '/data/l', value: '4' }]),
      { 'content-type': 'application/json-patch+json' },
    )
    expect(json.body.data).toEqual({ l: '4' })
    const same = await call(fake, 'PATCH', `${CONFIG_MAPS}/a`, { data: { l: '4' } }, merge)
    expect(same.body.metadata?.resourceVersion).toBe(json.body.metadata?.resourceVersion)
    expect((await call(fake, 'DELETE', `${CONFIG_MAPS}/a`)).body).toMatchObject({
      kind: 'Status',
      status: 'Success',
    })
    expect((await call(fake, 'GET', `${CONFIG_MAPS}/a`)).status).toBe(404)
    expect(fake.requests.map(({ method, status }) => `${method} ${status}`)).toEqual([
      'POST 201',
      'PUT 200',
      'PATCH 200',
      'PATCH 200',
      'PATCH 200',
      'DELETE 200',
      'GET 404',
    ])
  })

  test('that conflict are refused with the reason that tells why', async () => {
    await using fake = await startFakeKubernetes()
    const { body } = await call(fake, 'POST', CONFIG_MAPS, configMap('a'))
    const again = await call(fake, 'POST', CONFIG_MAPS, configMap('a'))
    expect([again.status, again.body.reason]).toEqual([409, 'AlreadyExists'])
    expect(again.body.message).toBe('configmaps "a" already exists')
    fake.change('configmaps', 'a', (draft) => {
      draft.data = { changed: 'meanwhile' }
    })
    const stale = await call(fake, 'PUT', `${CONFIG_MAPS}/a`, body)
    expect([stale.status, stale.body.reason]).toEqual([409, 'Conflict'])
    const other = await call(fake, 'DELETE', `${CONFIG_MAPS}/a`, {
      preconditions: { uid: 'other' },
    })
    expect([other.status, other.body.reason]).toEqual([409, 'Conflict'])
    const missing = await call(fake, 'GET', `${JOBS}/none`)
    expect(missing.body).toMatchObject({
      kind: 'Status',
      status: 'Failure',
      reason: 'NotFound',
      message: 'jobs.batch "none" not found',
      details: { name: 'none', group: 'batch', kind: 'jobs' },
      code: 404,
    })
    const elsewhere = await call(fake, 'POST', CONFIG_MAPS.replace('default', 'no'), configMap('a'))
    expect(elsewhere.body).toMatchObject({ code: 404, message: 'namespaces "no" not found' })
  })

  test('that break a rule are refused with the field at fault', async () => {
    await using fake = await startFakeKubernetes()
    const causes = async (path: string, body: object) => {
      const answer = await call(fake, 'POST', path, body)
      const details = answer.body.details as { causes?: { field: string }[] } | undefined
      return [answer.status, ...(details?.causes ?? []).map(({ field }) => field)]
    }
    const job = (options: JobOptions) => causes(JOBS, jobOf('a', options))
    expect(await causes(JOBS, jobOf('A_b'))).toContain('metadata.name')
    expect(await causes(JOBS, jobOf('x'.repeat(64)))).toContain('spec.template.labels')
    expect(await job({ pod: { restartPolicy: 'Always' } })).toEqual([
      422,
      'spec.template.spec.restartPolicy',
    ])
    expect(await job({ pod: { containers: [] } })).toEqual([422, 'spec.template.spec.containers'])
    expect(await job({ container: { volumeMounts: [{ name: 'v', mountPath: '/v' }] } })).toEqual([
      422,
      'spec.template.spec.containers[0].volumeMounts[0].name',
    ])
    const resources = { requests: { memory: '2Gi' }, limits: { memory: '1Gi' } }
    expect(await job({ container: { resources } })).toEqual([
      422,
      'spec.template.spec.containers[0].resources.requests',
    ])
    const wrongType = { env: [{ name: 'N', value: 3 }] }
    expect(await job({ container: wrongType })).toEqual([400])
    const policy = {
      podFailurePolicy: FAIL_JOB,
      podReplacementPolicy: 'TerminatingOrFailed' as const,
    }
    expect(await job({ spec: policy })).toEqual([422, 'spec.podReplacementPolicy'])
    const label = { metadata: { name: 'a', labels: { task: 'has space' } } }
    expect(await causes(CONFIG_MAPS, label)).toEqual([422, 'metadata.labels'])
    const big = configMap('big', {
      binaryData: { k: Buffer.alloc(1024 * 1024 + 1).toString('base64') },
    })
    expect(await causes(CONFIG_MAPS, big)).toEqual([422, 'data'])
    const fits = configMap('fits', {
      binaryData: { k: Buffer.alloc(1024 * 1024).toString('base64') },
    })
    expect(await causes(CONFIG_MAPS, fits)).toEqual([201])
  })

  test('marked immutable take owners, and nothing else', async () => {
    await using fake = await startFakeKubernetes()
    const secret = { kind: 'Secret', immutable: true, stringData: { k: 'v' } }
    const { body } = await call(fake, 'POST', SECRETS, { ...configMap('s'), ...secret })
    expect(body.data).toEqual({ k: Buffer.from('v').toString('base64') })
    const merge = { 'content-type': 'application/merge-patch+json' }
    const changed = await call(fake, 'PATCH', `${SECRETS}/s`, { stringData: { k: 'w' } }, merge)
    expect([changed.status, changed.body.reason]).toEqual([422, 'Invalid'])
    const job = fake.create('jobs', jobOf('owner', { spec: { suspend: true } }))
    const ownerReferences = [
      { apiVersion: 'batch/v1', kind: 'Job', name: 'owner', uid: job.metadata.uid },
    ]
    const owned = await call(
      fake,
      'PATCH',
      `${SECRETS}/s`,
      { metadata: { ownerReferences } },
      merge,
    )
    expect(owned.body.metadata).toMatchObject({ ownerReferences })
    await call(fake, 'DELETE', `${JOBS}/owner`, BACKGROUND)
    await expect.poll(() => fake.object('secrets', 's')).toBeUndefined()
  })

  test('lose unknown fields with a warning, and strictly are refused for them', async () => {
    await using fake = await startFakeKubernetes({ behave: () => presets.pending() })
    const job = jobOf('a', { pod: { activeDeadlineSecond: 3 }, container: { comand: ['x'] } })
    const lax = await call(fake, 'POST', JOBS, job)
    expect(lax.status).toBe(201)
    expect(lax.headers.warning).toContain(
      'unknown field \\"spec.template.spec.containers[0].comand\\"',
    )
    expect(JSON.stringify(fake.object('jobs', 'a'))).not.toContain('comand')
    expect(fake.warnings).toEqual([
      'Job a: spec.template.spec.containers[0].comand',
      'Job a: spec.template.spec.activeDeadlineSecond',
    ])
    const strict = await call(fake, 'POST', `${JOBS}?fieldValidation=Strict`, {
      ...job,
      metadata: { name: 'b' },
    })
    expect([strict.status, strict.body.message]).toEqual([
      400,
      expect.stringContaining('strict decoding error: unknown field "spec.template.spec'),
    ])
  })

  test('are selected by labels and fields', async () => {
    await using fake = await startFakeKubernetes()
    for (const [name, labels] of Object.entries({
      a: { tier: 'web', env: 'dev' },
      b: { tier: 'db', env: 'prod' },
      c: { env: 'prod' },
    })) {
      fake.create('configmaps', configMap(name, { metadata: { name, labels } }))
    }
    const names = async (query: Record<string, string>) => {
      const answer = await call(fake, 'GET', `${CONFIG_MAPS}?${new URLSearchParams(query)}`)
      return answer.body.items?.map(({ metadata }) => metadata.name).join('') ?? answer.status
    }
    const label = (labelSelector: string) => names({ labelSelector })
    expect(await label('env=prod')).toBe('bc')
    expect(await label('env==prod,tier!=db')).toBe('c')
    expect(await label('env in (dev, prod),tier')).toBe('ab')
    expect(await label('tier notin (db)')).toBe('ac')
    expect(await label('!tier')).toBe('c')
    expect(await label('=,')).toBe(400)
    expect(await names({ fieldSelector: 'metadata.name=b' })).toBe('b')
    expect(await names({ fieldSelector: 'metadata.name!=b', labelSelector: 'env=prod' })).toBe('c')
    expect(await names({ fieldSelector: 'data.k=v' })).toBe(400)
  })

  test('are listed in pages pinned to the first, until the token expires', async () => {
    await using fake = await startFakeKubernetes()
    for (const name of ['a', 'b', 'c', 'd', 'e']) fake.create('configmaps', configMap(name))
    const page = async (query: string) => (await call(fake, 'GET', `${CONFIG_MAPS}?${query}`)).body
    const first = await page('limit=2')
    expect(first.items?.map(({ metadata }) => metadata.name)).toEqual(['a', 'b'])
    expect(first.items?.[0]).not.toHaveProperty('kind')
    expect(first.metadata).toMatchObject({ remainingItemCount: 3 })
    fake.delete('configmaps', 'c')
    fake.create('configmaps', configMap('f'))
    const second = await page(`limit=2&continue=${first.metadata?.continue}`)
    expect(second.items?.map(({ metadata }) => metadata.name)).toEqual(['c', 'd'])
    expect(second.metadata?.resourceVersion).toBe(first.metadata?.resourceVersion)
    fake.compact()
    const late = await call(fake, 'GET', `${CONFIG_MAPS}?continue=${second.metadata?.continue}`)
    expect([late.status, late.body.reason]).toEqual([410, 'Expired'])
  })

  test('are shown by their metadata alone where asked', async () => {
    await using fake = await startFakeKubernetes()
    fake.create('secrets', { metadata: { name: 's' }, stringData: { k: 'hidden' } })
    const accept =
      'application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json'
    const { body, text } = await call(fake, 'GET', SECRETS, undefined, { accept })
    expect(body).toMatchObject({
      kind: 'PartialObjectMetadataList',
      items: [{ metadata: { name: 's' } }],
    })
    expect(text).not.toContain(Buffer.from('hidden').toString('base64'))
  })
})

describe('watches', () => {
  test('tell what is there, then what changes, as the selector sees it', async () => {
    await using fake = await startFakeKubernetes()
    fake.create('configmaps', configMap('a', { metadata: { name: 'a', labels: { on: 'yes' } } }))
    const watch = await stream(fake, `${CONFIG_MAPS}?watch=true&labelSelector=on%3Dyes`)
    fake.create('configmaps', configMap('b'))
    const label = (labels: Record<string, string>) => (draft: { metadata: object }) =>
      Object.assign(draft.metadata, { labels })
    fake.change('configmaps', 'b', label({ on: 'yes' }))
    fake.change('configmaps', 'a', label({ on: 'no' }))
    fake.change('configmaps', 'b', label({ on: 'yes', more: 'x' }))
    fake.delete('configmaps', 'b')
    await expect
      .poll(() => watch.events.map(({ type, object }) => `${type} ${object.metadata.name}`))
      .toEqual(['ADDED a', 'ADDED b', 'DELETED a', 'MODIFIED b', 'DELETED b'])
    const versions = watch.events.map(({ object }) => Number(object.metadata.resourceVersion))
    expect(versions).toEqual(versions.toSorted((a, b) => a - b))
    expect(watch.events[1]?.object.kind).toBe('ConfigMap')
    watch.close()
    await expect.poll(() => fake.watches.open.size).toBe(0)
  })

  test('resume after a version, and are told when it is too old, in three ways', async () => {
    await using fake = await startFakeKubernetes()
    fake.create('configmaps', configMap('a'))
    const { body } = await call(fake, 'GET', CONFIG_MAPS)
    fake.create('configmaps', configMap('b'))
    const from = `${CONFIG_MAPS}?watch=1&resourceVersion=${body.metadata?.resourceVersion}`
    const watch = await stream(fake, from)
    await expect.poll(() => watch.events.map(({ object }) => object.metadata.name)).toEqual(['b'])
    fake.compact()
    const http = await call(fake, 'GET', from)
    expect([http.status, http.body.reason]).toEqual([410, 'Expired'])
    fake.watches.whenExpired = 'stream'
    const late = await stream(fake, from)
    await expect.poll(() => late.ended).toBe('end')
    expect(late.status).toBe(200)
    expect(late.events).toMatchObject([{ type: 'ERROR', object: { code: 410, reason: 'Expired' } }])
    fake.watches.whenExpired = 'close'
    const closed = await stream(fake, from)
    await expect.poll(() => closed.ended).toBe('end')
    expect(closed.events).toEqual([])
  })

  test('forget what the history has no room for', async () => {
    await using fake = await startFakeKubernetes({ historySize: 3 })
    const { body } = await call(fake, 'GET', CONFIG_MAPS)
    const from = `${CONFIG_MAPS}?watch=1&resourceVersion=${body.metadata?.resourceVersion}`
    for (const name of ['a', 'b', 'c']) fake.create('configmaps', configMap(name))
    const watch = await stream(fake, from)
    await expect.poll(() => watch.events.length).toBe(3)
    fake.create('configmaps', configMap('d'))
    expect((await call(fake, 'GET', from)).status).toBe(410)
  })

  test('carry bookmarks where asked, and end after timeoutSeconds', async () => {
    await using fake = await startFakeKubernetes({ clock: 'manual' })
    const asked = await stream(
      fake,
      `${CONFIG_MAPS}?watch=1&resourceVersion=0&allowWatchBookmarks=true&timeoutSeconds=100`,
    )
    const plain = await stream(fake, `${CONFIG_MAPS}?watch=1&resourceVersion=0`)
    fake.create('secrets', { metadata: { name: 's' } })
    await fake.clock.advance(61_000)
    const version = fake.object('secrets', 's')?.metadata.resourceVersion
    await expect
      .poll(() => asked.events)
      .toMatchObject([
        { type: 'BOOKMARK', object: { kind: 'ConfigMap', metadata: { resourceVersion: version } } },
      ])
    expect(asked.ended).toBeUndefined()
    await fake.clock.advance(40_000)
    await expect.poll(() => asked.ended).toBe('end')
    expect([plain.events, plain.ended]).toEqual([[], undefined])
  })

  test('come in pieces, in one chunk, frozen or cut, as a test wants them', async () => {
    await using fake = await startFakeKubernetes()
    fake.watches.pieceBytes = 1
    const watch = await stream(fake, `${CONFIG_MAPS}?watch=1`)
    fake.create('configmaps', configMap('a', { data: { k: 'naïve ☃' } }))
    await expect.poll(() => watch.text.endsWith('\n')).toBe(true)
    expect(watch.chunks.length).toBeGreaterThan(100)
    expect(watch.events[0]?.object.data).toEqual({ k: 'naïve ☃' })
    fake.watches.pieceBytes = Number.POSITIVE_INFINITY
    fake.watches.hold()
    const chunks = watch.chunks.length
    for (let index = 0; index < 500; index += 1) fake.create('configmaps', configMap(`m${index}`))
    await call(fake, 'GET', '/readyz')
    expect(watch.events.length).toBe(1)
    fake.watches.release()
    await expect.poll(() => watch.events.length).toBe(501)
    expect(watch.chunks.length - chunks).toBeLessThan(20)
    const [open] = fake.watches.open
    open?.freeze()
    fake.create('configmaps', configMap('unseen'))
    const other = await stream(fake, `${CONFIG_MAPS}?watch=1`)
    await expect.poll(() => other.events.length).toBe(502)
    expect([watch.events.length, watch.ended]).toEqual([501, undefined])
    open?.cut()
    await expect.poll(() => watch.ended).toBe('cut')
  })
})

describe('access', () => {
  test('needs the token, and what is denied is denied in deed and in review', async () => {
    await using fake = await startFakeKubernetes()
    const wrong = await call({ ...fake, token: 'wrong' }, 'GET', PODS)
    expect([wrong.status, wrong.body.kind, wrong.body.reason]).toEqual([
      401,
      'Status',
      'Unauthorized',
    ])
    fake.denied.add('get pods/log').add('create jobs')
    const refused = await call(fake, 'POST', JOBS, jobOf('a'))
    expect(refused.body).toMatchObject({ code: 403, reason: 'Forbidden' })
    expect(refused.body.message).toMatch(
      /^jobs.batch is forbidden: User ".+" cannot create resource/,
    )
    const allowed = async (resourceAttributes: object) => {
      const path = '/apis/authorization.k8s.io/v1/selfsubjectaccessreviews'
      const { body } = await call(fake, 'POST', path, { spec: { resourceAttributes } })
      return (body.status as { allowed: boolean }).allowed
    }
    expect(await allowed({ verb: 'get', resource: 'pods', subresource: 'log' })).toBe(false)
    expect(await allowed({ verb: 'get', resource: 'pods' })).toBe(true)
    fake.token = 'rotated'
    expect((await call(fake, 'GET', PODS)).status).toBe(200)
  })

  test('over TLS is trusted by the CA of this server alone', async () => {
    await using fake = await startFakeKubernetes({ tls: true })
    await using other = await startFakeKubernetes({ tls: true })
    expect(fake.url).toMatch(/^https:/)
    expect((await call(fake, 'GET', '/version')).body.gitVersion).toMatch(/^v1\./)
    const local = fake.url.replace('127.0.0.1', 'localhost')
    expect((await call({ ...fake, url: local }, 'GET', PODS)).status).toBe(200)
    await expect(call({ ...fake, caData: other.caData }, 'GET', PODS)).rejects.toThrow(
      /certificate/,
    )
    await expect(call({ ...fake, caData: '' }, 'GET', PODS)).rejects.toThrow(/certificate/)
  })
})

describe('admission', () => {
  test('a quota on Jobs refuses the Job, one on pods only says so in an event, and frees', async () => {
    await using fake = await startFakeKubernetes({
      clock: 'manual',
      behave: () => presets.runs(),
      admission: { quota: { name: 'few', hard: { 'count/jobs.batch': 2, pods: 1 } } },
    })
    fake.create('jobs', jobOf('one'))
    await podName(fake, 'one')
    expect((await call(fake, 'POST', JOBS, jobOf('two'))).status).toBe(201)
    const third = await call(fake, 'POST', JOBS, jobOf('three'))
    expect([third.status, third.body.message]).toEqual([
      403,
      'jobs.batch "three" is forbidden: exceeded quota: few, requested: count/jobs.batch=1, used: count/jobs.batch=2, limited: count/jobs.batch=2',
    ])
    await expect
      .poll(() => fake.objects('events').find(({ reason }) => reason === 'FailedCreate'))
      .toMatchObject({
        type: 'Warning',
        involvedObject: { kind: 'Job', name: 'two' },
        message: expect.stringMatching(
          /^Error creating: pods "two-.{5}" is forbidden: exceeded quota: few, requested: pods=1/,
        ),
      })
    expect(podOf(fake, 'two')).toBeUndefined()
    fake.admission.quota = undefined
    await fake.clock.advance(60_000)
    await podName(fake, 'two')
  })

  test('Pod Security warns about the Job and refuses the pod; a policy can refuse the Job', async () => {
    await using fake = await startFakeKubernetes()
    const loose = jobOf('loose', { container: { securityContext: {} } })
    const { status, headers } = await call(fake, 'POST', JOBS, loose)
    expect(status).toBe(201)
    expect(headers.warning).toContain('would violate PodSecurity')
    await expect
      .poll(() => fake.objects('events').map(({ message }) => message))
      .toEqual([
        expect.stringMatching(
          /violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false \(container "task" must set .+capabilities.+runAsNonRoot.+seccompProfile/,
        ),
      ])
    expect(fake.objects('pods')).toEqual([])
    fake.admission.podSecurityAt = 'job'
    const refused = await call(fake, 'POST', JOBS, { ...loose, metadata: { name: 'refused' } })
    expect([refused.status, refused.body.message]).toEqual([
      403,
      expect.stringContaining('jobs.batch "refused" is forbidden: violates PodSecurity'),
    ])
    fake.admission.terminatingNamespaces.add('default')
    const ending = await call(fake, 'POST', JOBS, jobOf('late'))
    expect(ending.body).toMatchObject({
      code: 403,
      details: { causes: [{ reason: 'NamespaceTerminating' }] },
    })
  })
})

describe('controllers', () => {
  test('a Job makes one pod, counts it and completes', async () => {
    await using fake = await startFakeKubernetes({
      behave: () => presets.exits(0, { log: 'hi\n' }),
    })
    fake.create('jobs', jobOf('a'))
    await verdict(fake, 'a').toBe('Complete:CompletionsReached')
    const job = fake.object('jobs', 'a')
    expect(conditionsOf(fake, 'a')[0]).toBe('SuccessCriteriaMet:CompletionsReached')
    expect(job?.status).toMatchObject({ succeeded: 1, completionTime: expect.any(String) })
    expect(job?.status).not.toHaveProperty('active')
    const pod = podOf(fake, 'a')
    expect(pod?.metadata).toMatchObject({
      name: expect.stringMatching(/^a-[a-z0-9]{5}$/),
      labels: { 'job-name': 'a', 'batch.kubernetes.io/job-name': 'a', app: 'runner' },
      ownerReferences: [{ kind: 'Job', name: 'a', uid: job?.metadata.uid, controller: true }],
    })
    expect(pod?.metadata).not.toHaveProperty('finalizers')
    expect(pod?.status).toMatchObject({
      phase: 'Succeeded',
      containerStatuses: [{ state: { terminated: { exitCode: 0, reason: 'Completed' } } }],
    })
  })

  test('the failure policy names the exit code or the disruption in the Job', async () => {
    await using fake = await startFakeKubernetes({
      behave: ({ metadata }) =>
        metadata.labels?.['job-name'] === 'code' ? presets.exits(3) : presets.evicted(),
    })
    const spec = { podFailurePolicy: FAIL_JOB }
    fake.create('jobs', jobOf('code', { spec }))
    fake.create('jobs', jobOf('evicted', { spec }))
    await verdict(fake, 'code').toBe('Failed:PodFailurePolicy')
    await verdict(fake, 'evicted').toBe('Failed:PodFailurePolicy')
    const message = (job: string) => fake.object('jobs', job)?.status.conditions?.at(-1)?.message
    expect(message('code')).toBe(
      `Container task for pod default/${podOf(fake, 'code')?.metadata.name} failed with exit code 3 matching FailJob rule at index 1`,
    )
    expect(message('evicted')).toMatch(
      /has condition DisruptionTarget matching FailJob rule at index 0$/,
    )
    expect(conditionsOf(fake, 'code')[0]).toBe('FailureTarget:PodFailurePolicy')
  })

  test('a backoff limit of 1 tries a second pod, ten seconds later', async () => {
    await using fake = await startFakeKubernetes({
      clock: 'manual',
      behave: () => presets.exits(1),
    })
    fake.create('jobs', jobOf('a', { spec: { backoffLimit: 1 } }))
    await expect.poll(() => fake.object('jobs', 'a')?.status.failed).toBe(1)
    expect(fake.objects('pods').length).toBe(1)
    await fake.clock.advance(11_000)
    await verdict(fake, 'a').toBe('Failed:BackoffLimitExceeded')
    expect(fake.objects('pods').length).toBe(2)
  })

  test("the Job's deadline deletes the pod; the pod's own keeps it", async () => {
    await using fake = await startFakeKubernetes({ clock: 'manual', behave: () => presets.runs() })
    fake.create('jobs', jobOf('job', { spec: { activeDeadlineSeconds: 60 } }))
    fake.create('jobs', jobOf('pod', { pod: { activeDeadlineSeconds: 30 } }))
    await podName(fake, 'job')
    await podName(fake, 'pod')
    await fake.clock.advance(31_000)
    await verdict(fake, 'pod').toBe('Failed:BackoffLimitExceeded')
    expect(podOf(fake, 'pod')?.status).toMatchObject({
      phase: 'Failed',
      reason: 'DeadlineExceeded',
      containerStatuses: [{ state: { terminated: { exitCode: 143 } } }],
    })
    expect(podOf(fake, 'job')?.status.phase).toBe('Running')
    await fake.clock.advance(30_000)
    await verdict(fake, 'job').toBe('Failed:DeadlineExceeded')
    expect(podOf(fake, 'job')).toBeUndefined()
    expect(podOf(fake, 'pod')).toBeDefined()
  })

  test('a finished Job and its pod go when their time is over', async () => {
    await using fake = await startFakeKubernetes({ clock: 'manual' })
    fake.create('jobs', jobOf('a', { spec: { ttlSecondsAfterFinished: 100 } }))
    await verdict(fake, 'a').toBe('Complete:CompletionsReached')
    await fake.clock.advance(99_000)
    expect(fake.object('jobs', 'a')).toBeDefined()
    await fake.clock.advance(2000)
    await expect.poll(() => fake.object('jobs', 'a')).toBeUndefined()
    expect(fake.objects('pods')).toEqual([])
  })

  test('deleting a Job orphans its pod by default, with a warning, and takes it along when asked', async () => {
    await using fake = await startFakeKubernetes({ behave: () => presets.runs() })
    for (const policy of ['', 'Background', 'Foreground']) {
      const name = `job-${policy.toLowerCase() || 'default'}`
      fake.create('jobs', jobOf(name))
      const pod = await podName(fake, name)
      const query = policy && `?propagationPolicy=${policy}`
      const { headers } = await call(fake, 'DELETE', `${JOBS}/${name}${query}`)
      await expect.poll(() => fake.object('jobs', name)).toBeUndefined()
      if (policy) {
        await expect.poll(() => fake.object('pods', pod)).toBeUndefined()
      } else {
        expect(headers.warning).toContain('child pods are preserved by default')
        expect(fake.object('pods', pod)?.metadata).not.toHaveProperty('ownerReferences')
        expect(fake.object('pods', pod)?.status.phase).toBe('Running')
      }
    }
  })

  test('a suspended Job has no pod until it is resumed', async () => {
    await using fake = await startFakeKubernetes({ behave: () => presets.runs() })
    fake.create('jobs', jobOf('a', { spec: { suspend: true } }))
    await expect.poll(() => conditionsOf(fake, 'a')).toEqual(['Suspended:JobSuspended'])
    expect(fake.object('jobs', 'a')?.status).not.toHaveProperty('startTime')
    fake.change('jobs', 'a', (draft) => {
      draft.spec.suspend = false
    })
    await podName(fake, 'a')
    expect(fake.object('jobs', 'a')?.status.startTime).toBeTruthy()
    fake.change('jobs', 'a', (draft) => {
      draft.spec.suspend = true
    })
    await expect.poll(() => fake.objects('pods')).toEqual([])
  })

  test('paused, they leave a Job without a pod until they are run by hand', async () => {
    await using fake = await startFakeKubernetes()
    fake.controllers.pause()
    await call(fake, 'POST', JOBS, jobOf('a'))
    expect((await call(fake, 'GET', `${JOBS}/a`)).body.status).toEqual({})
    fake.controllers.run()
    expect(fake.objects('pods').length).toBe(1)
  })
})

describe('the kubelet', () => {
  test.each([
    ['ImagePullBackOff', presets.imagePullBackOff({ everyMs: 0 }), 'Pending'],
    ['InvalidImageName', presets.imageInvalidName(), 'Pending'],
    ['ErrImageNeverPull', presets.imageNeverPull(), 'Pending'],
    ['CreateContainerConfigError', presets.configError(), 'Pending'],
    ['CreateContainerError', presets.createError(), 'Pending'],
    ['StartError', presets.startError(), 'Failed'],
    ['FailedMount', presets.volumeMount(), 'Pending'],
    ['Unschedulable', presets.unschedulable(), 'Pending'],
    ['TriggeredScaleUp', presets.scaleUp(), 'Pending'],
    ['SchedulingGated', presets.schedulingGated(), 'Pending'],
    ['OutOfcpu', presets.nodeRejected(), 'Failed'],
    ['OOMKilled', presets.oomKilled(), 'Failed'],
    ['OOMKilled', presets.oomKilledYetZero(), 'Succeeded'],
    ['"exitCode":137', presets.killed(), 'Failed'],
    ['Evicted', presets.evicted(), 'Failed'],
    ['ContainerStatusUnknown', presets.evicted({ statuses: 'unknown' }), 'Failed'],
    ['DeletionByTaintManager', presets.nodeLost(), 'Running'],
    ['"reason":"Terminated"', presets.nodeShutdown(), 'Failed'],
    ['"phase":"Succeeded"', presets.succeededWithoutContainers(), 'Succeeded'],
  ])('shows %s where a cluster does', async (word, script, phase) => {
    await using fake = await startFakeKubernetes({ behave: () => script })
    fake.create('pods', { metadata: { name: 'p' }, spec: jobOf('p').spec.template.spec })
    await expect
      .poll(() => JSON.stringify([fake.object('pods', 'p')?.status, fake.objects('events')]))
      .toContain(word)
    expect(fake.object('pods', 'p')?.status.phase).toBe(phase)
  })

  test.each([
    ['PreemptionByScheduler', presets.preempted()],
    ['EvictionByEvictionAPI', presets.drained()],
    ['DeletionByPodGC', presets.nodeCollected()],
    [undefined, presets.deleted()],
  ])('removes a pod disrupted by %s, and its Job fails', async (reason, script) => {
    await using fake = await startFakeKubernetes({ behave: () => script })
    const watch = await stream(fake, `${PODS}?watch=1`)
    fake.create('jobs', jobOf('a', { spec: { podFailurePolicy: FAIL_JOB } }))
    await verdict(fake, 'a').toBe('Failed:PodFailurePolicy')
    await expect.poll(() => watch.events.at(-1)?.type).toBe('DELETED')
    const last = watch.events.at(-1)?.object
    expect(last).toMatchObject({ status: { phase: 'Failed' } })
    expect(JSON.stringify(last?.status).includes('DisruptionTarget')).toBe(reason !== undefined)
    if (reason) expect(JSON.stringify(last?.status)).toContain(`"reason":"${reason}"`)
  })

  test('a lost node keeps its pod until it answers again', async () => {
    await using fake = await startFakeKubernetes({ behave: () => presets.nodeLost() })
    fake.create('jobs', jobOf('a', { spec: { podFailurePolicy: FAIL_JOB } }))
    const pod = await podName(fake, 'a')
    await expect.poll(() => fake.object('pods', pod)?.metadata.deletionTimestamp).toBeTruthy()
    expect(conditionsOf(fake, 'a')).toEqual([])
    fake.kubelet.revive(pod)
    await verdict(fake, 'a').toBe('Failed:PodFailurePolicy')
    expect(fake.object('pods', pod)).toBeUndefined()
  })

  test('plays a pod on by hand; one that ignores SIGTERM is killed after its grace', async () => {
    await using fake = await startFakeKubernetes({
      clock: 'manual',
      behave: () => presets.imagePullBackOff(),
    })
    fake.create('pods', { metadata: { name: 'p' }, spec: jobOf('p').spec.template.spec })
    const waiting = () =>
      fake.object('pods', 'p')?.status.containerStatuses?.[0]?.state.waiting?.reason
    await expect.poll(waiting).toBe('ErrImagePull')
    await fake.clock.advance(10_000)
    expect(waiting()).toBe('ImagePullBackOff')
    fake.kubelet.play('p', presets.runs({ ignoresSigterm: true }))
    expect(fake.object('pods', 'p')?.status.phase).toBe('Running')
    const watch = await stream(fake, `${PODS}?watch=1&resourceVersion=0`)
    await call(fake, 'DELETE', `${PODS}/p`)
    await fake.clock.advance(29_000)
    expect(fake.object('pods', 'p')?.metadata.deletionGracePeriodSeconds).toBe(30)
    await fake.clock.advance(2000)
    await expect.poll(() => fake.object('pods', 'p')).toBeUndefined()
    await expect.poll(() => watch.text).toContain('"exitCode":137')
  })

  test('closing the fake does not wait for a grace', async () => {
    const fake = await startFakeKubernetes({
      clock: 'manual',
      behave: () => presets.runs({ ignoresSigterm: true }),
    })
    fake.create('pods', { metadata: { name: 'p' }, spec: jobOf('p').spec.template.spec })
    await expect.poll(() => fake.object('pods', 'p')?.status.phase).toBe('Running')
    await call(fake, 'DELETE', `${PODS}/p`)
    expect(fake.object('pods', 'p')?.metadata.deletionTimestamp).toBeTruthy()
    const hanging = await stream(fake, `${PODS}?watch=1`)
    await fake[Symbol.asyncDispose]()
    await expect.poll(() => hanging.ended).toBe('cut')
    await expect(call(fake, 'GET', PODS)).rejects.toThrow(/ECONNREFUSED/)
    expect(existsSync(fake.kubeconfig.path)).toBe(false)
  })
})

describe('logs', () => {
  const running = async (clock: 'real' | 'manual' = 'real') => {
    const fake = await startFakeKubernetes({ clock, behave: () => presets.runs() })
    fake.create('pods', { metadata: { name: 'p' }, spec: jobOf('p').spec.template.spec })
    await expect.poll(() => fake.object('pods', 'p')?.status.phase).toBe('Running')
    const read = async (query = '') => (await call(fake, 'GET', `${PODS}/p/log?${query}`)).text
    return { fake, read, write: (text: string | Buffer) => fake.kubelet.handle('p').log(text) }
  }

  test('are read whole, by lines, by bytes and by time', async () => {
    const { fake, read, write } = await running('manual')
    await using _ = fake
    write('one\ntwo\n')
    await fake.clock.advance(10_000)
    const since = new Date(fake.clock.now()).toISOString()
    write('three\n')
    write('no end')
    expect(await read()).toBe('one\ntwo\nthree\n')
    expect(await read('tailLines=2')).toBe('two\nthree\n')
    expect(await read('tailLines=0')).toBe('')
    expect(await read('limitBytes=5')).toBe('one\nt')
    expect(await read('sinceSeconds=5')).toBe('three\n')
    expect(await read(`sinceTime=${since}`)).toBe('three\n')
    const stamped = await read('timestamps=true&tailLines=1')
    expect(stamped).toMatch(/^\d{4}-\d\d-\d\dT[\d:]{8}(\.\d{1,9})?Z three\n$/)
    // The fraction is lost on the way to the node: what came earlier in that second comes again.
    const [at = ''] = stamped.split(' ')
    expect(await read(`sinceTime=${at.replace('Z', at.includes('.') ? '9Z' : '.999Z')}`)).toContain(
      'three',
    )
    const both = await call(fake, 'GET', `${PODS}/p/log?sinceSeconds=1&sinceTime=${since}`)
    expect([both.status, both.body.kind]).toEqual([422, 'Status'])
    fake.kubelet.handle('p').exit(0)
    expect(await read('tailLines=1')).toBe('no end')
  })

  test('are followed to the end of the container, byte by byte as written', async () => {
    const { fake, write } = await running()
    await using _ = fake
    write('before\n')
    const follow = await stream(fake, `${PODS}/p/log?follow=true`)
    await expect.poll(() => follow.text).toBe('before\n')
    const long = Buffer.concat([Buffer.alloc(40_000, 'x'), Buffer.from([0, 0xff, 0x0a])])
    write(long)
    write('tail without newline')
    await expect.poll(() => Buffer.concat(follow.chunks).length).toBe(7 + long.length)
    expect(follow.ended).toBeUndefined()
    fake.kubelet.handle('p').exit(0)
    await expect.poll(() => follow.ended).toBe('end')
    expect(Buffer.concat(follow.chunks)).toEqual(
      Buffer.concat([Buffer.from('before\n'), long, Buffer.from('tail without newline')]),
    )
    const stamped = await call(fake, 'GET', `${PODS}/p/log?timestamps=true`)
    expect(stamped.text.match(/\dZ /g)?.length).toBe(3)
  })

  test('are refused while the container is not there, and gone with the pod', async () => {
    await using fake = await startFakeKubernetes({ behave: () => presets.creating() })
    fake.create('jobs', jobOf('a', { pod: { terminationGracePeriodSeconds: 1 } }))
    const pod = await podName(fake, 'a')
    await expect.poll(() => fake.object('pods', pod)?.spec.nodeName).toBeTruthy()
    const early = await call(fake, 'GET', `${PODS}/${pod}/log?container=task`)
    expect(early.body).toMatchObject({
      code: 400,
      message: `container "task" in pod "${pod}" is waiting to start: ContainerCreating`,
    })
    const unknown = await call(fake, 'GET', `${PODS}/${pod}/log?container=bogus`)
    expect(unknown.body.message).toBe(`container bogus is not valid for pod ${pod}`)
    await call(fake, 'DELETE', `${JOBS}/a`, BACKGROUND)
    await expect.poll(() => fake.object('pods', pod)).toBeUndefined()
    expect((await call(fake, 'GET', `${PODS}/${pod}/log`)).status).toBe(404)
  })

  test('need the container named where there are two', async () => {
    await using fake = await startFakeKubernetes({ behave: () => presets.runs() })
    const { spec } = jobOf('a').spec.template
    const [container] = spec.containers
    fake.create('pods', {
      metadata: { name: 'p' },
      spec: { ...spec, containers: [container, { ...container, name: 'side' }] },
    })
    await expect.poll(() => fake.object('pods', 'p')?.status.phase).toBe('Running')
    const { status, body } = await call(fake, 'GET', `${PODS}/p/log`)
    expect([status, body.message]).toEqual([
      400,
      'a container name must be specified for pod p, choose one of: [task side]',
    ])
  })

  test('rotate, stall, break off and end early', async () => {
    const { fake, read, write } = await running()
    await using _ = fake
    const path = `${PODS}/p/log?follow=true`
    const [stalled, cut, early] = [
      await stream(fake, path),
      await stream(fake, path),
      await stream(fake, path),
    ]
    const [first, second, third] = fake.logs.streams
    first?.stall()
    second?.cut()
    third?.end()
    write('later\n')
    await expect.poll(() => [cut.ended, early.ended]).toEqual(['cut', 'end'])
    expect([stalled.text, stalled.ended]).toEqual(['', undefined])
    fake.logs.rotateAtBytes = 20
    const whole = await stream(fake, path)
    for (let line = 0; line < 10; line += 1) write(`line ${line}\n`)
    await expect.poll(() => whole.text).toContain('line 0\nline 1\n')
    await expect.poll(() => whole.text).toContain('line 9\n')
    expect((await read()).length).toBeLessThanOrEqual(20)
    expect(await read()).toMatch(/line 9\n$/)
    fake.logs.unavailable.add('p')
    expect(await read()).toMatch(/^unable to retrieve container logs for containerd:/)
  })
})

describe('faults', () => {
  test('a create takes effect though its answer is lost', async () => {
    await using fake = await startFakeKubernetes()
    const fault = fake.faults.inject({ method: 'POST', path: JOBS, times: 1, drop: 'answer' })
    await expect(call(fake, 'POST', JOBS, jobOf('a'))).rejects.toThrow(/socket hang up|ECONNRESET/)
    expect(fault.hits).toBe(1)
    expect((await call(fake, 'POST', JOBS, jobOf('a'))).body.reason).toBe('AlreadyExists')
  })

  test('answers of all kinds come where they are put', async () => {
    await using fake = await startFakeKubernetes()
    const limited = fake.faults.inject({
      path: /configmaps$/,
      status: { code: 429, retryAfterSeconds: 2 },
    })
    const busy = await call(fake, 'GET', CONFIG_MAPS)
    expect([busy.status, busy.headers['retry-after'], busy.body.reason]).toEqual([
      429,
      '2',
      'TooManyRequests',
    ])
    expect((await call(fake, 'GET', PODS)).status).toBe(200)
    limited.remove()
    expect((await call(fake, 'GET', CONFIG_MAPS)).status).toBe(200)
    fake.faults.inject({ times: 1, html: '<h1>Bad gateway</h1>' })
    expect(await call(fake, 'GET', PODS)).toMatchObject({
      status: 502,
      text: '<h1>Bad gateway</h1>',
    })
    fake.faults.inject({ times: 1, drop: 'request', method: 'POST' })
    await expect(call(fake, 'POST', CONFIG_MAPS, configMap('a'))).rejects.toThrow()
    expect(fake.object('configmaps', 'a')).toBeUndefined()
    fake.faults.inject({ times: 1, reset: 'request' })
    await expect(call(fake, 'GET', PODS)).rejects.toThrow(/ECONNRESET/)
    fake.faults.inject({ times: 1, after: 1, status: { code: 503 } })
    expect((await call(fake, 'GET', PODS)).status).toBe(200)
    expect((await call(fake, 'GET', PODS)).status).toBe(503)
  })

  test('an answer breaks off, ends early or says no more after so many bytes', async () => {
    await using fake = await startFakeKubernetes()
    fake.faults.inject({ times: 1, cutAfterBytes: 10 })
    const cut = await stream(fake, PODS)
    await expect.poll(() => cut.ended).toBe('cut')
    fake.faults.inject({ times: 1, endAfterBytes: 10 })
    const early = await stream(fake, PODS)
    await expect.poll(() => early.ended).toBe('end')
    expect(early.text.length).toBe(10)
    fake.faults.inject({ times: 1, stallAfterBytes: 10 })
    const stalled = await stream(fake, PODS)
    await expect.poll(() => stalled.text.length).toBe(10)
    await call(fake, 'GET', PODS)
    expect(stalled.ended).toBeUndefined()
  })

  test('latency counts on the clock, and a server that is down refuses connections', async () => {
    await using fake = await startFakeKubernetes({ clock: 'manual' })
    fake.faults.inject({ times: 1, latencyMs: 5000 })
    const slow = call(fake, 'GET', PODS)
    await expect.poll(() => fake.requests.length).toBe(1)
    expect(fake.requests[0]?.status).toBeUndefined()
    await fake.clock.advance(5000)
    expect((await slow).status).toBe(200)
    await fake.down()
    await expect(call(fake, 'GET', PODS)).rejects.toThrow(/ECONNREFUSED/)
    await fake.up()
    expect((await call(fake, 'GET', PODS)).status).toBe(200)
  })
})

describe('process mode', () => {
  const workspace = {
    volumes: [
      { name: 'work', emptyDir: {} },
      { name: 'files', configMap: { name: 'files', defaultMode: 0o555 } },
    ],
  }
  const mounts = [
    { name: 'work', mountPath: '/work' },
    { name: 'files', mountPath: '/files' },
  ]

  test('runs init container and task for real, with files, secrets, output, message and exit code', async () => {
    await using fake = await startFakeKubernetes({ runProcesses: true })
    fake.create(
      'configmaps',
      configMap('files', { data: { 'unpack.sh': 'echo unpacked >"$1"\n' } }),
    )
    fake.create('secrets', { metadata: { name: 'keys' }, stringData: { token: 's3cret' } })
    const script =
      'cat /work/out; echo "$TOKEN for $POD in $PLACE" >&2; echo failed on purpose >"$MESSAGE"; test "$NOT_MINE" = "" && exit 3'
    process.env.NOT_MINE = 'leaks'
    fake.create(
      'jobs',
      jobOf('a', {
        pod: workspace,
        init: { command: ['sh', '/files/unpack.sh', '/work/out'], volumeMounts: mounts },
        container: {
          command: ['/bin/sh', '-c'],
          args: [script],
          volumeMounts: mounts,
          env: [
            { name: 'TOKEN', valueFrom: { secretKeyRef: { name: 'keys', key: 'token' } } },
            { name: 'POD', valueFrom: { fieldRef: { fieldPath: 'metadata.name' } } },
            { name: 'PLACE', value: '/work' },
            { name: 'MESSAGE', value: '/dev/termination-log' },
          ],
        },
      }),
    )
    await verdict(fake, 'a').toBe('Failed:BackoffLimitExceeded')
    delete process.env.NOT_MINE
    const pod = podOf(fake, 'a')
    expect(pod?.status.containerStatuses?.[0]?.state.terminated).toMatchObject({
      exitCode: 3,
      reason: 'Error',
      message: 'failed on purpose\n',
    })
    expect(pod?.status.initContainerStatuses?.[0]?.state.terminated?.exitCode).toBe(0)
    const log = fake.logOf(pod?.metadata.name ?? '')
    expect(log).toContain('unpacked\n')
    expect(log).toMatch(new RegExp(`s3cret for ${pod?.metadata.name} in /.+/volumes/work\\n`))
    expect(fake.warnings).toEqual([])
  })

  test('a failing init container fails the pod, and the task never starts', async () => {
    await using fake = await startFakeKubernetes({ runProcesses: true })
    const init = { command: ['sh', '-c', 'echo no; exit 7'] }
    fake.create('jobs', jobOf('a', { init, container: { command: ['sh', '-c', 'echo never'] } }))
    await verdict(fake, 'a').toBe('Failed:BackoffLimitExceeded')
    const pod = podOf(fake, 'a')
    expect(pod?.status.initContainerStatuses?.[0]?.state.terminated?.exitCode).toBe(7)
    expect(pod?.status.containerStatuses?.[0]?.state).toEqual({
      waiting: { reason: 'PodInitializing' },
    })
    expect(fake.logOf(pod?.metadata.name ?? '', 'init')).toBe('no\n')
  })

  test('waits for a Secret, naming the key that is missing, and starts once it is there', async () => {
    await using fake = await startFakeKubernetes({ runProcesses: true })
    const env = [{ name: 'K', valueFrom: { secretKeyRef: { name: 'late', key: 'k' } } }]
    fake.create('jobs', jobOf('a', { container: { command: ['sh', '-c', 'echo "got $K"'], env } }))
    const pod = await podName(fake, 'a')
    const waiting = () =>
      fake.object('pods', pod)?.status.containerStatuses?.[0]?.state.waiting?.message
    await expect.poll(waiting).toBe('secret "late" not found')
    fake.create('secrets', { metadata: { name: 'late' }, stringData: { other: 'x' } })
    await expect.poll(waiting).toBe("couldn't find key k in Secret default/late")
    fake.change('secrets', 'late', (draft) => {
      draft.data = { k: Buffer.from('it').toString('base64') }
    })
    await verdict(fake, 'a').toBe('Complete:CompletionsReached')
    expect(fake.logOf(pod)).toBe('got it\n')
  })

  test('a program that is not there is a StartError', async () => {
    await using fake = await startFakeKubernetes({ runProcesses: true })
    fake.create('jobs', jobOf('a', { container: { command: ['/no/such/program'] } }))
    await verdict(fake, 'a').toBe('Failed:BackoffLimitExceeded')
    expect(podOf(fake, 'a')?.status.containerStatuses?.[0]?.state.terminated).toMatchObject({
      reason: 'StartError',
      exitCode: 128,
    })
  })

  /** A zombie is dead, too: nobody in a container may be there to collect it. */
  const alive = (seconds: string) =>
    readdirSync('/proc').some((entry) => {
      try {
        return readFileSync(`/proc/${entry}/cmdline`, 'latin1') === `sleep\0${seconds}\0`
      } catch {
        return false
      }
    })
  const pidIn = async (fake: FakeKubernetes, job: string) => {
    const pod = await podName(fake, job)
    await expect.poll(() => fake.logOf(pod), { timeout: 10_000 }).toMatch(/^\d+ ready\n/)
    return { pod, pid: fake.logOf(pod).split(' ')[0] ?? '' }
  }
  let sleepers = 0
  /** Starts a child that must go as well. Printed is how long it sleeps, by which it is known: pods have pids of their own. */
  const sleeping = () => {
    sleepers += 1
    const seconds = 1_000_000_000 + process.pid * 100 + sleepers
    return `sleep ${seconds} & echo "${seconds} ready"`
  }
  const sleeper = (trap: string) => ({
    command: ['sh', '-c', `trap '${trap}' TERM; ${sleeping()}; wait; wait`],
  })

  test('what a task leaves running ends with its container', async () => {
    await using fake = await startFakeKubernetes({ runProcesses: true })
    const command = ['sh', '-c', sleeping()]
    fake.create('jobs', jobOf('a', { container: { command } }))
    const { pid } = await pidIn(fake, 'a')
    await verdict(fake, 'a').toBe('Complete:CompletionsReached')
    await expect.poll(() => alive(pid)).toBe(false)
  })

  test('deleting the pod terminates the process group; one that ignores it is killed', async () => {
    await using fake = await startFakeKubernetes({ runProcesses: true })
    const watch = await stream(fake, `${PODS}?watch=1`)
    fake.create('jobs', jobOf('polite', { container: sleeper('echo bye; exit 9') }))
    const polite = await pidIn(fake, 'polite')
    await call(fake, 'DELETE', `${JOBS}/polite`, BACKGROUND)
    await expect.poll(() => fake.object('pods', polite.pod)).toBeUndefined()
    await expect.poll(() => watch.text).toContain('"exitCode":9')
    expect(alive(polite.pid)).toBe(false)
    const container = { command: ['sh', '-c', `trap "" TERM; ${sleeping()}; wait`] }
    const pod = { terminationGracePeriodSeconds: 1 }
    fake.create('jobs', jobOf('stubborn', { container, pod }))
    const stubborn = await pidIn(fake, 'stubborn')
    await call(fake, 'DELETE', `${JOBS}/stubborn`, BACKGROUND)
    await expect.poll(() => fake.object('pods', stubborn.pod), { timeout: 10_000 }).toBeUndefined()
    await expect.poll(() => watch.text).toContain('"exitCode":137')
    await expect.poll(() => alive(stubborn.pid)).toBe(false)
  })

  test('the deadline of the pod ends its processes and keeps its log; so does closing the fake', async () => {
    let pid = ''
    {
      await using fake = await startFakeKubernetes({ runProcesses: true })
      const pod = { activeDeadlineSeconds: 100 }
      fake.create('jobs', jobOf('a', { container: sleeper('exit 0'), pod }))
      const late = await pidIn(fake, 'a')
      await fake.clock.advance(101_000)
      await expect
        .poll(() => fake.object('pods', late.pod)?.status)
        .toMatchObject({ phase: 'Failed', reason: 'DeadlineExceeded' })
      expect(fake.logOf(late.pod)).toMatch(/ready/)
      fake.create('jobs', jobOf('b', { container: sleeper('') }))
      pid = (await pidIn(fake, 'b')).pid
      expect(alive(pid)).toBe(true)
    }
    await expect.poll(() => alive(pid)).toBe(false)
  })
})

const execute = promisify(execFile)

describe('stock kubectl', () => {
  needs('kubectl')(
    'creates, lists, watches, reads logs, describes, asks and deletes, over TLS',
    async () => {
      await using fake = await startFakeKubernetes({ tls: true, behave: () => presets.runs() })
      const cache = join(fake.kubeconfig.path, '..', 'cache')
      const options = [`--kubeconfig=${fake.kubeconfig.path}`, `--cache-dir=${cache}`]
      const kubectl = async (...args: string[]) =>
        (await execute('kubectl', [...options, ...args])).stdout
      const background = (...args: string[]) => {
        const child = spawn('kubectl', [...options, ...args], { stdio: ['ignore', 'pipe', 'pipe'] })
        const seen = { text: '', ended: once(child, 'close'), stop: () => child.kill() }
        for (const output of [child.stdout, child.stderr]) {
          output.on('data', (bytes) => {
            seen.text += bytes
          })
        }
        return seen
      }
      const watch = background('get', 'pods', '-w')
      const file = join(fake.kubeconfig.path, '..', 'job.json')
      await writeFile(file, JSON.stringify(jobOf('a')))
      expect(await kubectl('create', '-f', file)).toBe('job.batch/a created\n')
      await expect(kubectl('create', '-f', file)).rejects.toThrow(/AlreadyExists/)
      const pod = await podName(fake, 'a')
      expect(await kubectl('get', 'jobs')).toMatch(
        /NAME +STATUS +COMPLETIONS +AGE\na +Running +0\/1 /,
      )
      const list = JSON.parse(await kubectl('get', 'pods', '-l', 'job-name=a', '-o', 'json'))
      expect(list.items).toMatchObject([{ kind: 'Pod', metadata: { name: pod } }])
      fake.kubelet.handle(pod).log('hello\n')
      expect(await kubectl('logs', pod)).toBe('hello\n')
      const follow = background('logs', '-f', 'job/a')
      await expect.poll(() => follow.text, { timeout: 10_000 }).toContain('hello\n')
      fake.kubelet.handle(pod).log('more\n')
      await expect.poll(() => follow.text).toContain('more\n')
      fake.kubelet.play(pod, presets.exits(3))
      await follow.ended
      expect(follow.text).toBe('hello\nmore\n')
      const described = await kubectl('describe', 'pod', pod)
      expect(described).toMatch(/Exit Code: +3/)
      expect(described).toMatch(/Normal +Scheduled +.* default-scheduler +Successfully assigned/)
      expect(await kubectl('describe', 'job', 'a')).toMatch(/BackoffLimitExceeded/)
      fake.denied.add('create pods')
      expect(await kubectl('auth', 'can-i', 'create', 'jobs')).toBe('yes\n')
      await expect(kubectl('auth', 'can-i', 'create', 'pods')).rejects.toMatchObject({
        stdout: 'no\n',
      })
      expect(await kubectl('delete', 'job', 'a')).toContain('job.batch "a" deleted')
      await expect.poll(() => fake.objects('pods')).toEqual([])
      await expect
        .poll(() => watch.text)
        .toMatch(new RegExp(`${pod} +1/1 +Running[^]*${pod} +0/1 +Error`))
      watch.stop()
      await watch.ended
      expect(fake.warnings).toEqual([])
    },
  )
})
