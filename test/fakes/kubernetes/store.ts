import { randomUUID } from 'node:crypto'
import { isDeepStrictEqual } from 'node:util'
import type { Clock } from './clock.ts'
import type { KubernetesEvent, KubernetesObject, Objects, Resource } from './resources.ts'

export interface Change {
  version: number
  type: 'ADDED' | 'MODIFIED' | 'DELETED'
  resource: Resource
  object: KubernetesObject
  previous?: KubernetesObject
}

export interface Found {
  resource: Resource
  object: KubernetesObject
}

const keyOf = ({ metadata }: KubernetesObject) => `${metadata.namespace ?? ''}/${metadata.name}`

/**
 * All objects, one integer version over all kinds, and the history that watches are served from.
 * A stored object is never changed in place: each write stores a copy, so that history stays true.
 */
export class Store {
  readonly #clock: Clock
  readonly #historySize: number
  readonly #objects = new Map<Resource, Map<string, KubernetesObject>>()
  readonly #byUid = new Map<string, Found>()
  /** By owner's uid, the uids of what it owns. */
  readonly #owned = new Map<string, Set<string>>()
  /** By what they say and about whom, the names of events. */
  readonly #said = new Map<string, string>()
  readonly #listeners = new Set<(change: Change) => void>()
  #history: Change[] = []
  #version = 1
  /** Changes up to this version are forgotten. */
  #forgotten = 1

  constructor(clock: Clock, historySize: number) {
    this.#clock = clock
    this.#historySize = historySize
  }

  get version(): number {
    return this.#version
  }

  get<R extends Resource>(resource: R, namespace: string, name: string): Objects[R] | undefined {
    return this.#of(resource).get(`${namespace}/${name}`)
  }

  /** In the order of etcd's keys. */
  list<R extends Resource>(resource: R, namespace?: string): Objects[R][] {
    const all = [...this.#of(resource)].sort(([a], [b]) => (a < b ? -1 : 1))
    const objects = all.map(([, object]) => object)
    return namespace === undefined
      ? objects
      : objects.filter(({ metadata }) => metadata.namespace === namespace)
  }

  findByUid(uid: string): Found | undefined {
    return this.#byUid.get(uid)
  }

  /** Whatever names the object with this uid as an owner. */
  dependentsOf(uid: string): Found[] {
    return [...(this.#owned.get(uid) ?? [])].flatMap((dependent) => this.findByUid(dependent) ?? [])
  }

  add<R extends Resource>(resource: R, object: Objects[R]): Objects[R] {
    const added = structuredClone(object)
    added.metadata = {
      ...added.metadata,
      uid: object.metadata.uid || randomUUID(),
      creationTimestamp: this.#clock.timestamp(),
      resourceVersion: '',
    }
    this.#of(resource).set(keyOf(added), added)
    this.#record('ADDED', resource, added)
    return added
  }

  /**
   * Applies `mutate` to a copy of the stored object and stores it. Without effect where nothing changes, or
   * where the object is gone. Removes what was only waiting for its last finalizer.
   */
  change<R extends Resource>(
    resource: R,
    current: Objects[R],
    mutate: (draft: Objects[R]) => void,
  ): Objects[R] {
    const stored = this.#of(resource).get(keyOf(current))
    if (stored?.metadata.uid !== current.metadata.uid) return current
    const draft = structuredClone(stored) as Objects[R]
    mutate(draft)
    if (isDeepStrictEqual(draft, stored)) return draft
    if (stored.metadata.generation && !isDeepStrictEqual(draft.spec, stored.spec)) {
      draft.metadata.generation = stored.metadata.generation + 1
    }
    const { deletionTimestamp, deletionGracePeriodSeconds, finalizers } = draft.metadata
    if (deletionTimestamp && !deletionGracePeriodSeconds && !finalizers?.length) {
      this.remove(resource, draft)
      return draft
    }
    this.#of(resource).set(keyOf(draft), draft)
    this.#record('MODIFIED', resource, draft, stored)
    return draft
  }

  remove<R extends Resource>(resource: R, current: Objects[R]): void {
    const stored = this.#of(resource).get(keyOf(current))
    if (stored?.metadata.uid !== current.metadata.uid) return
    this.#of(resource).delete(keyOf(current))
    this.#record('DELETED', resource, structuredClone(current), stored)
  }

  /** Everything newer than `version`; undefined when history does not reach back that far. */
  since(version: number): Change[] | undefined {
    if (version < this.#forgotten) return undefined
    return this.#history.filter((change) => change.version > version)
  }

  /** Forgets all history, as etcd's compaction does: older watches and `continue` tokens get 410. */
  compact(): void {
    this.#history = []
    // A version of its own, so that even what was read just before is too old.
    this.#version += 1
    this.#forgotten = this.#version
  }

  subscribe(listener: (change: Change) => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  /** Writes an Event about an object, or counts one that repeats itself. */
  event(
    about: KubernetesObject,
    component: string,
    event: { type: 'Normal' | 'Warning'; reason: string; message: string },
  ): void {
    const { name, namespace = 'default', uid } = about.metadata
    const at = this.#clock.timestamp()
    const said = `${uid} ${event.reason} ${event.message}`
    const same = this.get('events', namespace, this.#said.get(said) ?? '')
    if (same) {
      this.change('events', same, (draft) => {
        draft.count += 1
        draft.lastTimestamp = at
      })
      return
    }
    const object: Omit<KubernetesEvent, 'metadata'> = {
      apiVersion: 'v1',
      kind: 'Event',
      involvedObject: { apiVersion: about.apiVersion, kind: about.kind, name, namespace, uid },
      ...event,
      count: 1,
      firstTimestamp: at,
      lastTimestamp: at,
      eventTime: null,
      source: { component },
      reportingComponent: component,
      reportingInstance: '',
    } as Omit<KubernetesEvent, 'metadata'>
    const suffix = randomUUID().replaceAll('-', '').slice(0, 16)
    this.#said.set(said, `${name}.${suffix}`)
    this.add('events', {
      ...object,
      metadata: { name: `${name}.${suffix}`, namespace },
    } as KubernetesEvent)
  }

  #of<R extends Resource>(resource: R): Map<string, Objects[R]> {
    const objects = this.#objects.get(resource) ?? new Map<string, KubernetesObject>()
    this.#objects.set(resource, objects)
    // One map per resource, filled only through the typed methods above.
    return objects as Map<string, Objects[R]>
  }

  #index(
    type: Change['type'],
    resource: Resource,
    object: KubernetesObject,
    previous?: KubernetesObject,
  ): void {
    const { uid } = object.metadata
    for (const owner of previous?.metadata.ownerReferences ?? []) {
      this.#owned.get(owner.uid)?.delete(uid)
    }
    if (type === 'DELETED') {
      this.#byUid.delete(uid)
      return
    }
    this.#byUid.set(uid, { resource, object })
    for (const owner of object.metadata.ownerReferences ?? []) {
      const owned = this.#owned.get(owner.uid) ?? new Set()
      this.#owned.set(owner.uid, owned.add(uid))
    }
  }

  #record(
    type: Change['type'],
    resource: Resource,
    object: KubernetesObject,
    previous?: KubernetesObject,
  ): void {
    this.#version += 1
    object.metadata.resourceVersion = String(this.#version)
    this.#index(type, resource, object, previous)
    const change: Change = {
      version: this.#version,
      type,
      resource,
      object,
      ...(previous && { previous }),
    }
    this.#history.push(change)
    while (this.#history.length > this.#historySize) {
      this.#forgotten = this.#history.shift()?.version ?? this.#forgotten
    }
    for (const listener of this.#listeners) listener(change)
  }
}
