import {
  isTerminal,
  type Job,
  type KubernetesObject,
  type Pod,
  type PodSpec,
  qualified,
  type Resource,
  type SecurityContext,
} from './resources.ts'
import { ApiError, forbidden } from './status.ts'
import type { Store } from './store.ts'

export interface Quota {
  name: string
  /** `pods` counts those not ended; `count/jobs.batch`, `count/secrets`, `count/configmaps` all there are. */
  hard: Record<string, number>
}

export interface Admission {
  /** Settable while the server runs. */
  quota: Quota | undefined
  podSecurity: 'privileged' | 'restricted'
  /** Pod Security Admission only warns about Jobs; policy webhooks refuse these too (`job`). */
  podSecurityAt: 'pod' | 'job'
  /** Returns why a webhook refuses the object. */
  webhook: ((resource: Resource, object: KubernetesObject) => string | undefined) | undefined
  /** Namespaces where nothing can be created any more. */
  terminatingNamespaces: Set<string>
}

/** What stands between a valid object and the store. Throws the 403; returns warnings for the client. */
export function admit(
  admission: Admission,
  store: Store,
  resource: Resource,
  object: KubernetesObject,
): string[] {
  const { name, namespace = '' } = object.metadata
  if (admission.terminatingNamespaces.has(namespace)) {
    const why = `unable to create new content in namespace ${namespace} because it is being terminated`
    throw forbidden(resource, name, why, [
      {
        reason: 'NamespaceTerminating',
        message: `namespace ${namespace} is being terminated`,
        field: 'metadata.namespace',
      },
    ])
  }
  const warnings: string[] = []
  if (admission.podSecurity === 'restricted') {
    const violations = restrictedViolations(
      resource === 'jobs'
        ? (object as Job).spec.template.spec
        : resource === 'pods'
          ? (object as Pod).spec
          : undefined,
    ).join(', ')
    if (violations && (resource === 'pods' || admission.podSecurityAt === 'job')) {
      throw forbidden(resource, name, `violates PodSecurity "restricted:latest": ${violations}`)
    }
    if (violations) warnings.push(`would violate PodSecurity "restricted:latest": ${violations}`)
  }
  const refusal = admission.webhook?.(resource, object)
  if (refusal) {
    const message = `admission webhook "policy.example.com" denied the request: ${refusal}`
    throw new ApiError(403, 'Forbidden', message)
  }
  if (admission.quota) checkQuota(admission.quota, store, resource, object)
  return warnings
}

function checkQuota(
  { name, hard }: Quota,
  store: Store,
  resource: Resource,
  object: KubernetesObject,
): void {
  const counted = [`count/${qualified(resource)}`, ...(resource === 'pods' ? ['pods'] : [])]
  for (const limit of counted) {
    const most = hard[limit]
    if (most === undefined) continue
    const there = store.list(resource, object.metadata.namespace)
    const used = limit === 'pods' ? there.filter((pod) => !isTerminal(pod as Pod)) : there
    if (used.length < most) continue
    throw forbidden(
      resource,
      object.metadata.name,
      `exceeded quota: ${name}, requested: ${limit}=1, used: ${limit}=${used.length}, limited: ${limit}=${most}`,
    )
  }
}

const RESTRICTED_VOLUMES = [
  'configMap',
  'csi',
  'downwardAPI',
  'emptyDir',
  'ephemeral',
  'persistentVolumeClaim',
  'projected',
  'secret',
]

/** The Restricted profile, https://kubernetes.io/docs/concepts/security/pod-security-standards/ */
function restrictedViolations(spec: PodSpec | undefined): string[] {
  if (!spec) return []
  const containers = [...(spec.initContainers ?? []), ...spec.containers]
  const pod: SecurityContext = spec.securityContext ?? {}
  const violations: string[] = []
  const check = (what: string, must: string, broken: (context: SecurityContext) => boolean) => {
    const names = containers
      .filter(({ securityContext = {} }) => broken(securityContext))
      .map(({ name }) => `"${name}"`)
    if (names.length === 0) return
    const who = `${names.length > 1 ? 'containers' : 'container'} ${names.join(', ')}`
    violations.push(
      `${what} (${must.startsWith('pod or ') ? 'pod or ' : ''}${who} ${must.replace('pod or ', '')})`,
    )
  }
  for (const field of ['hostNetwork', 'hostPID', 'hostIPC']) {
    if (spec[field]) violations.push(`host namespaces (${field}=true)`)
  }
  check('privileged', 'must not set securityContext.privileged=true', (context) => {
    return context.privileged === true
  })
  check(
    'allowPrivilegeEscalation != false',
    'must set securityContext.allowPrivilegeEscalation=false',
    (context) => context.allowPrivilegeEscalation !== false,
  )
  check(
    'unrestricted capabilities',
    'must set securityContext.capabilities.drop=["ALL"]',
    ({ capabilities }) =>
      !capabilities?.drop?.includes('ALL') ||
      (capabilities.add ?? []).some((added) => added !== 'NET_BIND_SERVICE'),
  )
  const volumes = (spec.volumes ?? []).filter(({ name: _, ...source }) =>
    Object.keys(source).some((type) => !RESTRICTED_VOLUMES.includes(type)),
  )
  if (volumes.length > 0) {
    violations.push(`restricted volume types (${volumes.map(({ name }) => `volume "${name}"`)})`)
  }
  check(
    'runAsNonRoot != true',
    'pod or must set securityContext.runAsNonRoot=true',
    ({ runAsNonRoot = pod.runAsNonRoot }) => runAsNonRoot !== true,
  )
  check('runAsUser=0', 'pod or must not set runAsUser=0', ({ runAsUser = pod.runAsUser }) => {
    return runAsUser === 0
  })
  check(
    'seccompProfile',
    'pod or must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"',
    ({ seccompProfile = pod.seccompProfile }) =>
      !['RuntimeDefault', 'Localhost'].includes(seccompProfile?.type ?? ''),
  )
  return violations
}
