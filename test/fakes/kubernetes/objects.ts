import { randomInt, randomUUID } from 'node:crypto'
import { type Admission, admit } from './admission.ts'
import type { Clock } from './clock.ts'
import { setDefaults } from './defaults.ts'
import {
  apiVersionOf,
  isTerminal,
  type Job,
  type KeyedData,
  type KubernetesObject,
  type Objects,
  type Pod,
  RESOURCES,
  type Resource,
} from './resources.ts'
import { decode } from './schema.ts'
import {
  alreadyExists,
  badRequest,
  CHANGED_MEANWHILE,
  conflict,
  type Invalid,
  invalid,
  notFound,
} from './status.ts'
import type { Store } from './store.ts'
import {
  problemsOf,
  validateData,
  validateDataUpdate,
  validateJob,
  validateJobUpdate,
  validateMetadata,
  validatePodSpec,
  validatePodUpdate,
} from './validation.ts'

/** What the verbs of the API act on; handlers, controllers and kubelet share it. */
export interface Cluster {
  store: Store
  clock: Clock
  admission: Admission
  /** Unknown fields that clients sent, as `Job tr-1: spec.template.spec.bogus`. */
  warnings: string[]
}

export interface WriteOptions {
  strict?: boolean
  dryRun?: boolean
  manager?: string
}

const SUFFIX = 'bcdfghjklmnpqrstvwxz2456789'
const suffix = () => Array.from({ length: 5 }, () => SUFFIX[randomInt(SUFFIX.length)]).join('')

function parse<R extends Resource>(
  cluster: Cluster,
  resource: R,
  body: unknown,
  strict: boolean,
): { object: Objects[R]; warnings: string[] } {
  const { kind } = RESOURCES[resource]
  if (typeof body !== 'object' || body === null)
    throw badRequest('the object provided is not valid')
  const sent = body as Partial<KubernetesObject>
  if (
    (sent.kind ?? kind) !== kind ||
    (sent.apiVersion ?? apiVersionOf(resource)) !== apiVersionOf(resource)
  ) {
    throw badRequest(`${kind} in version "${sent.apiVersion}" cannot be handled as a ${sent.kind}`)
  }
  const unknown: string[] = []
  // `decode` checked the types, and the defaults follow.
  const object = decode(resource, body, unknown) as Objects[R]
  object.apiVersion = apiVersionOf(resource)
  object.kind = kind
  object.metadata ??= {} as KubernetesObject['metadata']
  cluster.warnings.push(...unknown.map((field) => `${kind} ${sent.metadata?.name}: ${field}`))
  const warnings = unknown.map((field) => `unknown field "${field}"`)
  if (strict && warnings.length > 0)
    throw badRequest(`strict decoding error: ${warnings.join(', ')}`)
  return { object, warnings }
}

export function createObject<R extends Resource>(
  cluster: Cluster,
  resource: R,
  namespace: string,
  body: unknown,
  { strict = false, dryRun = false, manager = 'unknown' }: WriteOptions = {},
): { object: Objects[R]; warnings: string[] } {
  const { store, clock, admission } = cluster
  const { object, warnings } = parse(cluster, resource, body, strict)
  const { metadata } = object
  if (resource !== 'namespaces') {
    if ((metadata.namespace ?? namespace) !== namespace) {
      throw badRequest(
        'the namespace of the provided object does not match the namespace sent on the request',
      )
    }
    if (!store.get('namespaces', '', namespace)) throw notFound('namespaces', namespace)
    metadata.namespace = namespace
  }
  if (!metadata.name && metadata.generateName) metadata.name = `${metadata.generateName}${suffix()}`
  if (metadata.resourceVersion) {
    throw badRequest('resourceVersion should not be set on objects to be created')
  }
  for (const field of ['deletionTimestamp', 'deletionGracePeriodSeconds'] as const) {
    delete metadata[field]
  }
  if (metadata.generateName === undefined && !metadata.name) {
    throw refused(resource, '', [
      {
        field: 'metadata.name',
        problem: 'Required value',
        detail: 'name or generateName is required',
      },
    ])
  }
  metadata.managedFields = [
    { manager, operation: 'Update', apiVersion: object.apiVersion, time: clock.timestamp() },
  ]
  // Validated as it was sent: a default must not hide what is missing.
  const problems = problemsOf((report) => {
    validateMetadata(metadata, 'metadata', report)
    if (resource === 'jobs') {
      const { spec } = object as Job
      if (spec) validateJob(object as Job, report)
      else report('spec.template.spec.containers', 'Required value')
    } else if (resource === 'pods') validatePodSpec((object as Pod).spec ?? {}, 'spec', report)
    else if (resource === 'secrets' || resource === 'configmaps') {
      encodeStringData(object as KeyedData)
      validateData(object as KeyedData, report)
    }
  })
  if (problems.length > 0) throw refused(resource, metadata.name, problems)
  metadata.uid = randomUUID()
  setDefaults(resource, object)
  warnings.push(...admit(admission, store, resource, object))
  if (store.get(resource, metadata.namespace ?? '', metadata.name)) {
    throw alreadyExists(resource, metadata.name)
  }
  if (dryRun) return { object, warnings }
  return { object: store.add(resource, object), warnings }
}

const refused = (resource: Resource, name: string, problems: Invalid[]) =>
  invalid(RESOURCES[resource].kind, RESOURCES[resource].group, name, problems)

function encodeStringData(object: KeyedData): void {
  for (const [key, value] of Object.entries(object.stringData ?? {})) {
    object.data = { ...object.data, [key]: Buffer.from(value).toString('base64') }
  }
  delete object.stringData
}

/** PUT and PATCH: `next` replaces the stored object, or only its status. */
export function replaceObject<R extends Resource>(
  cluster: Cluster,
  resource: R,
  current: Objects[R],
  body: unknown,
  { strict = false, dryRun = false, status = false }: WriteOptions & { status?: boolean } = {},
): { object: Objects[R]; warnings: string[] } {
  const { object: next, warnings } = parse(cluster, resource, body, strict)
  const { name, namespace, uid, resourceVersion } = current.metadata
  const sent = next.metadata
  if ((sent.name ?? name) !== name || (sent.namespace ?? namespace) !== namespace) {
    throw badRequest(
      `the name of the object (${sent.name}) does not match the name on the URL (${name})`,
    )
  }
  if (sent.resourceVersion && sent.resourceVersion !== resourceVersion) {
    throw conflict(resource, name, CHANGED_MEANWHILE)
  }
  if (sent.uid && sent.uid !== uid) {
    const why = `Precondition failed: UID in precondition: ${sent.uid}, UID in object meta: ${uid}`
    throw conflict(resource, name, why)
  }
  if (resource === 'secrets') encodeStringData(next as KeyedData)
  const settled = structuredClone(current) as KubernetesObject
  if (status) settled.status = next.status
  else {
    // What only the server sets stays; so does the status, which has a path of its own.
    for (const key of Object.keys(settled)) if (key !== 'status') delete settled[key]
    Object.assign(settled, next, current.status === undefined ? {} : { status: current.status })
    settled.metadata = { ...current.metadata }
    for (const field of ['labels', 'annotations', 'ownerReferences', 'finalizers'] as const) {
      delete settled.metadata[field]
      if (sent[field]) Object.assign(settled.metadata, { [field]: sent[field] })
    }
  }
  const problems = problemsOf((report) => {
    validateMetadata(settled.metadata, 'metadata', report)
    if (resource === 'jobs') validateJobUpdate(settled as Job, current as unknown as Job, report)
    if (resource === 'pods') validatePodUpdate(settled as Pod, current as unknown as Pod, report)
    if (resource === 'secrets' || resource === 'configmaps') {
      validateData(settled, report)
      validateDataUpdate(settled, current, report)
    }
  })
  if (problems.length > 0) throw refused(resource, name, problems)
  if (dryRun) return { object: settled as Objects[R], warnings }
  const object = cluster.store.change(resource, current, (draft) =>
    Object.assign(wipe(draft), settled),
  )
  return { object, warnings }
}

function wipe<T extends object>(draft: T): T {
  for (const key of Object.keys(draft)) delete draft[key as keyof T]
  return draft
}

export interface DeleteOptions {
  propagationPolicy?: string
  gracePeriodSeconds?: number
  preconditions?: { uid?: string; resourceVersion?: string }
}

/** Removes the object, or marks it: a pod has its grace, finalizers hold the rest. */
export function deleteObject<R extends Resource>(
  { store, clock }: Cluster,
  resource: R,
  current: Objects[R],
  { propagationPolicy, gracePeriodSeconds, preconditions = {} }: DeleteOptions = {},
): { object: Objects[R]; gone: boolean } {
  const { metadata } = current
  for (const field of ['uid', 'resourceVersion'] as const) {
    const wanted = preconditions[field]
    if (wanted && wanted !== metadata[field]) {
      const label = field === 'uid' ? 'UID' : 'ResourceVersion'
      const why = `Precondition failed: ${label} in precondition: ${wanted}, ${label} in object meta: ${metadata[field]}`
      throw conflict(resource, metadata.name, why)
    }
  }
  let grace = 0
  if (resource === 'pods') {
    const { spec } = current as unknown as Pod
    const started = spec.nodeName && !isTerminal(current as unknown as Pod)
    if (started) grace = gracePeriodSeconds ?? spec.terminationGracePeriodSeconds ?? 30
  }
  const before = metadata.deletionGracePeriodSeconds
  // A second delete can shorten the grace, never extend it.
  const noSooner = metadata.deletionTimestamp && before !== undefined && grace >= before
  if (noSooner && (grace > 0 || metadata.finalizers?.length)) {
    return { object: current, gone: false }
  }
  const policy = propagationPolicy ?? (resource === 'jobs' ? 'Orphan' : 'Background')
  const held = policy === 'Orphan' ? 'orphan' : policy === 'Foreground' ? 'foregroundDeletion' : ''
  const others = (metadata.finalizers ?? []).filter(
    (finalizer) => finalizer !== 'orphan' && finalizer !== 'foregroundDeletion',
  )
  const finalizers = held && resource === 'jobs' ? [...others, held] : others
  if (grace === 0 && finalizers.length === 0) {
    store.remove(resource, current)
    return { object: current, gone: true }
  }
  const object = store.change(resource, current, (draft) => {
    draft.metadata.deletionTimestamp = clock.timestamp(clock.now() + grace * 1000)
    draft.metadata.deletionGracePeriodSeconds = grace
    if (finalizers.length > 0) draft.metadata.finalizers = finalizers
    else delete draft.metadata.finalizers
  })
  return { object, gone: false }
}
