import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { Deployment } from 'kubernetes-models/apps/v1/Deployment'
import { NetworkPolicy } from 'kubernetes-models/networking.k8s.io/v1/NetworkPolicy'
import { PodDisruptionBudget } from 'kubernetes-models/policy/v1/PodDisruptionBudget'
import { Role } from 'kubernetes-models/rbac.authorization.k8s.io/v1/Role'
import { RoleBinding } from 'kubernetes-models/rbac.authorization.k8s.io/v1/RoleBinding'
import { Namespace } from 'kubernetes-models/v1/Namespace'
import { PersistentVolumeClaim } from 'kubernetes-models/v1/PersistentVolumeClaim'
import { Service } from 'kubernetes-models/v1/Service'
import { ServiceAccount } from 'kubernetes-models/v1/ServiceAccount'
import { describe, expect } from 'vitest'
import { parseAllDocuments } from 'yaml'
import { loadConfig } from '../../src/config.ts'
import { CLEAN_UP_RIGHTS, RIGHTS } from '../../src/workers/kubernetes/kubernetes-backend.ts'
import { needs } from '../helpers/needs.ts'

const test = needs('kubectl')

const ROOT = new URL('../../deploy/kubernetes/', import.meta.url).pathname
const MODELS = {
  ...{ Deployment, Namespace, NetworkPolicy, PersistentVolumeClaim, PodDisruptionBudget },
  ...{ Role, RoleBinding, Service, ServiceAccount },
}

interface Rendered {
  kind: keyof typeof MODELS
  metadata: { name: string; namespace?: string }
  [field: string]: unknown
}

async function render(folder: string): Promise<Rendered[]> {
  const { stdout } = await promisify(execFile)('kubectl', ['kustomize', ROOT + folder])
  return parseAllDocuments(stdout).map((document) => document.toJS() as Rendered)
}

describe.each(['base', 'overlays/example', 'overlays/replicas'])('%s', (folder) => {
  test('renders, and each object is one to the schema of Kubernetes', async () => {
    const objects = await render(folder)
    expect(objects.length).toBeGreaterThanOrEqual(10)
    for (const object of objects) {
      const Model = MODELS[object.kind]
      expect(Model, object.kind).toBeDefined()
      // Holds: it is looked up by the object's own kind.
      expect(() => new Model(object as never).validate(), object.kind).not.toThrow()
      if (object.kind !== 'Namespace') expect(object.metadata.namespace).toBe('task-runner')
    }
  })
})

test('the role grants what the service asks for, and nothing else', async () => {
  const role = (await render('base')).find(({ kind }) => kind === 'Role')
  const granted = role?.rules as Array<{
    apiGroups: string[]
    resources: string[]
    verbs: string[]
  }>
  const flat = granted.flatMap(({ apiGroups, resources, verbs }) =>
    verbs.map((verb) => `${apiGroups} ${verb} ${resources}`),
  )
  const asked = [...RIGHTS, ...CLEAN_UP_RIGHTS].flatMap(({ group, resource, verbs }) =>
    verbs.map((verb) => `${group} ${verb} ${resource}`),
  )
  expect(flat.sort()).toEqual(asked.sort())
})

test('the service takes every variable that it is given', async () => {
  const deployment = (await render('overlays/example')).find(({ kind }) => kind === 'Deployment')
  const spec = deployment?.spec as {
    template: { spec: { containers: Array<{ env: Array<{ name: string; value?: string }> }> } }
  }
  const env = spec.template.spec.containers[0]?.env ?? []
  const given = env.map(({ name, value }) => [name, value ?? Buffer.alloc(32).toString('base64')])
  const config = loadConfig({ ...Object.fromEntries(given), API_TOKENS_FILE: '', API_TOKENS: 'a' })
  expect(config).toMatchObject({
    ...{ workerBackend: 'kubernetes', workerImagePrefix: 'example.com/team/' },
    kubernetesServiceAccount: 'task-worker',
    sampleCallbacks: false,
  })
})

test('instances over one Postgres share no volume, and take what they are given', async () => {
  const objects = await render('overlays/replicas')
  expect(objects.map(({ kind }) => kind)).not.toContain('PersistentVolumeClaim')
  const deployment = objects.find(({ kind }) => kind === 'Deployment')
  expect(deployment?.spec).toMatchObject({
    replicas: 3,
    strategy: { type: 'RollingUpdate' },
    template: { spec: { volumes: [{ name: 'data', emptyDir: {} }, {}, {}] } },
  })
  expect(JSON.stringify(deployment)).not.toContain('persistentVolumeClaim')
  const names = JSON.stringify(deployment).match(/"name":"[A-Z_]+"/g)
  expect(names).toContain('"name":"DATABASE_URL"')
  expect(names).toContain('"name":"SEALING_KEY"')
})
