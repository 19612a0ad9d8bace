import { type Cluster, deleteObject } from './objects.ts'
import type { Metadata, Pod } from './resources.ts'
import type { Change } from './store.ts'

/** Holds a pod until its Job's controller has counted it. */
export const TRACKING = 'batch.kubernetes.io/job-tracking'

export function release({ store }: Cluster, pod: Pod): void {
  if (!pod.metadata.finalizers?.includes(TRACKING)) return
  store.change('pods', pod, (draft) => {
    const others = draft.metadata.finalizers?.filter((finalizer) => finalizer !== TRACKING) ?? []
    if (others.length > 0) draft.metadata.finalizers = others
    else delete draft.metadata.finalizers
  })
}

/** The garbage collector, for one change. What must wait for another change is pushed to `later`. */
export function collectGarbage(cluster: Cluster, change: Change, later: (() => void)[]): void {
  const { store } = cluster
  const { uid, finalizers = [], ownerReferences = [] } = change.object.metadata
  if (change.type === 'DELETED') {
    for (const { object } of store.dependentsOf(uid)) collectOwnerless(cluster, object.metadata.uid)
    // A dependent going away may be what an owner was waiting for.
    for (const owner of ownerReferences) {
      const found = store.findByUid(owner.uid)
      if (!found?.object.metadata.finalizers?.includes('foregroundDeletion')) continue
      later.push(() => collectGarbage(cluster, { ...change, type: 'MODIFIED', ...found }, later))
    }
    return
  }
  if (ownerReferences.length > 0) collectOwnerless(cluster, uid)
  // Nobody else would let go of a pod whose Job is gone.
  if (
    change.resource === 'pods' &&
    !ownerReferences.some(({ uid: owner }) => store.findByUid(owner))
  ) {
    release(cluster, change.object as Pod)
  }
  const current = store.findByUid(uid)
  if (!current?.object.metadata.deletionTimestamp) return
  const mutate = (found: typeof current, action: (metadata: Metadata) => void) =>
    store.change(found.resource, found.object as never, ({ metadata }) => action(metadata))
  const drop = (finalizer: string) =>
    mutate(current, (metadata) => {
      metadata.finalizers = metadata.finalizers?.filter((other) => other !== finalizer) ?? []
    })
  if (finalizers.includes('orphan')) {
    for (const dependent of store.dependentsOf(uid)) {
      mutate(dependent, (metadata) => {
        const others = metadata.ownerReferences?.filter((owner) => owner.uid !== uid) ?? []
        if (others.length > 0) metadata.ownerReferences = others
        else delete metadata.ownerReferences
      })
    }
    drop('orphan')
  } else if (finalizers.includes('foregroundDeletion')) {
    for (const { resource, object } of store.dependentsOf(uid)) {
      if (!object.metadata.deletionTimestamp) deleteObject(cluster, resource, object as never)
    }
    const blocked = store
      .dependentsOf(uid)
      .some(({ object }) =>
        object.metadata.ownerReferences?.some(
          (owner) => owner.uid === uid && owner.blockOwnerDeletion,
        ),
      )
    if (!blocked) drop('foregroundDeletion')
  }
}

function collectOwnerless(cluster: Cluster, uid: string): void {
  const found = cluster.store.findByUid(uid)
  if (!found || found.object.metadata.deletionTimestamp) return
  const owners = found.object.metadata.ownerReferences ?? []
  if (owners.length === 0 || owners.some((owner) => cluster.store.findByUid(owner.uid))) return
  deleteObject(cluster, found.resource, found.object as never, { propagationPolicy: 'Background' })
}
