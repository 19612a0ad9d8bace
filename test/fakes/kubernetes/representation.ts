import {
  apiVersionOf,
  hasCondition,
  type Job,
  type KubernetesObject,
  type Pod,
  RESOURCES,
  type Resource,
} from './resources.ts'

export interface Representation {
  /** One object, as an answer or within a watch event. */
  object(object: KubernetesObject): unknown
  list(objects: KubernetesObject[], metadata: object): unknown
}

/** What the `Accept` header asks for: whole objects, metadata alone, or the tables that kubectl prints. */
export function representationOf(resource: Resource, accept: string, now: number): Representation {
  if (accept.includes('as=Table')) {
    const table = (objects: KubernetesObject[], metadata: object) => ({
      kind: 'Table',
      apiVersion: 'meta.k8s.io/v1',
      metadata,
      columnDefinitions: columnsOf(resource).map((name) => ({
        name,
        type: 'string',
        format: name === 'Name' ? 'name' : '',
        description: name,
        priority: 0,
      })),
      rows: objects.map((object) => ({ cells: cellsOf(object, now), object: partial(object) })),
    })
    return {
      object: (object) => table([object], { resourceVersion: object.metadata.resourceVersion }),
      list: table,
    }
  }
  if (accept.includes('as=PartialObjectMetadata')) {
    return {
      object: partial,
      list: (objects, metadata) => ({
        kind: 'PartialObjectMetadataList',
        apiVersion: 'meta.k8s.io/v1',
        metadata,
        items: objects.map(partial),
      }),
    }
  }
  return {
    object: (object) => object,
    list: (objects, metadata) => ({
      kind: `${RESOURCES[resource].kind}List`,
      apiVersion: apiVersionOf(resource),
      metadata,
      // Items of a list do not say what they are.
      items: objects.map(({ kind: _, apiVersion: __, ...item }) => item),
    }),
  }
}

const partial = ({ metadata }: KubernetesObject) => ({
  kind: 'PartialObjectMetadata',
  apiVersion: 'meta.k8s.io/v1',
  metadata,
})

function columnsOf(resource: Resource): string[] {
  if (resource === 'pods') return ['Name', 'Ready', 'Status', 'Restarts', 'Age']
  if (resource === 'jobs') return ['Name', 'Status', 'Completions', 'Age']
  if (resource === 'events') return ['Last Seen', 'Type', 'Reason', 'Object', 'Message']
  return ['Name', 'Age']
}

function cellsOf(object: KubernetesObject, now: number): unknown[] {
  const { name, creationTimestamp } = object.metadata
  const age = `${Math.max(0, Math.floor((now - Date.parse(creationTimestamp)) / 1000))}s`
  if (object.kind === 'Pod') {
    const pod = object as Pod
    const statuses = pod.status.containerStatuses ?? []
    const ready = statuses.filter((container) => container.ready).length
    return [name, `${ready}/${pod.spec.containers.length}`, wordFor(pod), '0', age]
  }
  if (object.kind === 'Job') {
    const { status, spec } = object as Job
    const ended = ['Complete', 'Failed'].find((type) => hasCondition(status, type))
    const word = ended ?? (spec.suspend ? 'Suspended' : 'Running')
    return [name, word, `${status.succeeded ?? 0}/${spec.completions}`, age]
  }
  if (object.kind === 'Event') {
    const { kind, name: about } = object.involvedObject as { kind: string; name: string }
    return [age, object.type, object.reason, `${kind.toLowerCase()}/${about}`, object.message]
  }
  return [name, age]
}

function wordFor({ metadata, status }: Pod): string {
  if (metadata.deletionTimestamp) return 'Terminating'
  const [state] = (status.containerStatuses ?? []).map((container) => container.state)
  return (
    status.reason ?? state?.waiting?.reason ?? state?.terminated?.reason ?? String(status.phase)
  )
}
