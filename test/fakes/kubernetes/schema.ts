import type { Resource } from './resources.ts'
import { badRequest } from './status.ts'

/**
 * The fields a server of today knows, with their JSON types. Where nothing we send goes, `any`. A real server
 * drops unknown fields with a mere warning, so that a typo vanishes; here each one is recorded.
 */
type Shape =
  | 'string'
  | 'integer'
  | 'boolean'
  | 'strings'
  | 'any'
  | [Shape]
  | { [field: string]: Shape }

const time = 'string'
const quantities = 'strings'
const metadata: Shape = {
  name: 'string',
  generateName: 'string',
  namespace: 'string',
  uid: 'string',
  resourceVersion: 'string',
  generation: 'integer',
  creationTimestamp: time,
  deletionTimestamp: time,
  deletionGracePeriodSeconds: 'integer',
  labels: 'strings',
  annotations: 'strings',
  finalizers: ['string'],
  ownerReferences: [
    {
      apiVersion: 'string',
      kind: 'string',
      name: 'string',
      uid: 'string',
      controller: 'boolean',
      blockOwnerDeletion: 'boolean',
    },
  ],
  managedFields: 'any',
  selfLink: 'string',
}
const keyRef: Shape = { name: 'string', key: 'string', optional: 'boolean' }
const sourceRef: Shape = { name: 'string', optional: 'boolean' }
const fieldRef: Shape = { apiVersion: 'string', fieldPath: 'string' }
const resourceFieldRef: Shape = { containerName: 'string', resource: 'string', divisor: 'string' }
const items: Shape = [{ key: 'string', path: 'string', mode: 'integer' }]
const seccompProfile: Shape = { type: 'string', localhostProfile: 'string' }
const seLinuxOptions: Shape = { level: 'string', role: 'string', type: 'string', user: 'string' }
const windowsOptions: Shape = 'any'
const container: Shape = {
  name: 'string',
  image: 'string',
  imagePullPolicy: 'string',
  command: ['string'],
  args: ['string'],
  workingDir: 'string',
  ports: 'any',
  env: [
    {
      name: 'string',
      value: 'string',
      valueFrom: { secretKeyRef: keyRef, configMapKeyRef: keyRef, fieldRef, resourceFieldRef },
    },
  ],
  envFrom: [{ prefix: 'string', secretRef: sourceRef, configMapRef: sourceRef }],
  volumeMounts: [
    {
      name: 'string',
      mountPath: 'string',
      subPath: 'string',
      subPathExpr: 'string',
      readOnly: 'boolean',
      recursiveReadOnly: 'string',
      mountPropagation: 'string',
    },
  ],
  volumeDevices: 'any',
  resources: { requests: quantities, limits: quantities, claims: 'any' },
  resizePolicy: 'any',
  securityContext: {
    allowPrivilegeEscalation: 'boolean',
    capabilities: { add: ['string'], drop: ['string'] },
    privileged: 'boolean',
    procMount: 'string',
    readOnlyRootFilesystem: 'boolean',
    runAsGroup: 'integer',
    runAsNonRoot: 'boolean',
    runAsUser: 'integer',
    seLinuxOptions,
    seccompProfile,
    appArmorProfile: seccompProfile,
    windowsOptions,
  },
  livenessProbe: 'any',
  readinessProbe: 'any',
  startupProbe: 'any',
  lifecycle: 'any',
  restartPolicy: 'string',
  stdin: 'boolean',
  stdinOnce: 'boolean',
  tty: 'boolean',
  terminationMessagePath: 'string',
  terminationMessagePolicy: 'string',
}
const podSpec: Shape = {
  activeDeadlineSeconds: 'integer',
  affinity: 'any',
  automountServiceAccountToken: 'boolean',
  containers: [container],
  initContainers: [container],
  ephemeralContainers: 'any',
  dnsConfig: 'any',
  dnsPolicy: 'string',
  enableServiceLinks: 'boolean',
  hostAliases: 'any',
  hostIPC: 'boolean',
  hostNetwork: 'boolean',
  hostPID: 'boolean',
  hostUsers: 'boolean',
  hostname: 'string',
  imagePullSecrets: [{ name: 'string' }],
  nodeName: 'string',
  nodeSelector: 'strings',
  os: { name: 'string' },
  overhead: quantities,
  preemptionPolicy: 'string',
  priority: 'integer',
  priorityClassName: 'string',
  readinessGates: 'any',
  resourceClaims: 'any',
  resources: 'any',
  restartPolicy: 'string',
  runtimeClassName: 'string',
  schedulerName: 'string',
  schedulingGates: [{ name: 'string' }],
  securityContext: {
    fsGroup: 'integer',
    fsGroupChangePolicy: 'string',
    runAsGroup: 'integer',
    runAsNonRoot: 'boolean',
    runAsUser: 'integer',
    seLinuxOptions,
    seLinuxChangePolicy: 'string',
    seccompProfile,
    appArmorProfile: seccompProfile,
    supplementalGroups: ['integer'],
    supplementalGroupsPolicy: 'string',
    sysctls: 'any',
    windowsOptions,
  },
  serviceAccount: 'string',
  serviceAccountName: 'string',
  setHostnameAsFQDN: 'boolean',
  shareProcessNamespace: 'boolean',
  subdomain: 'string',
  terminationGracePeriodSeconds: 'integer',
  tolerations: [
    {
      key: 'string',
      operator: 'string',
      value: 'string',
      effect: 'string',
      tolerationSeconds: 'integer',
    },
  ],
  topologySpreadConstraints: 'any',
  volumes: [
    {
      name: 'string',
      emptyDir: { medium: 'string', sizeLimit: 'string' },
      configMap: { name: 'string', items, defaultMode: 'integer', optional: 'boolean' },
      secret: { secretName: 'string', items, defaultMode: 'integer', optional: 'boolean' },
      persistentVolumeClaim: { claimName: 'string', readOnly: 'boolean' },
      projected: 'any',
      downwardAPI: 'any',
      ephemeral: 'any',
      csi: 'any',
      hostPath: { path: 'string', type: 'string' },
      nfs: { server: 'string', path: 'string', readOnly: 'boolean' },
    },
  ],
}
const object = (fields: { [field: string]: Shape }): Shape => ({
  apiVersion: 'string',
  kind: 'string',
  metadata,
  ...fields,
})
const SHAPES: Record<Resource, Shape> = {
  jobs: object({
    spec: {
      activeDeadlineSeconds: 'integer',
      backoffLimit: 'integer',
      backoffLimitPerIndex: 'integer',
      completionMode: 'string',
      completions: 'integer',
      managedBy: 'string',
      manualSelector: 'boolean',
      maxFailedIndexes: 'integer',
      parallelism: 'integer',
      podFailurePolicy: {
        rules: [
          {
            action: 'string',
            onExitCodes: { containerName: 'string', operator: 'string', values: ['integer'] },
            onPodConditions: [{ type: 'string', status: 'string' }],
          },
        ],
      },
      podReplacementPolicy: 'string',
      selector: { matchLabels: 'strings', matchExpressions: 'any' },
      successPolicy: 'any',
      suspend: 'boolean',
      template: { metadata, spec: podSpec },
      ttlSecondsAfterFinished: 'integer',
    },
    status: 'any',
  }),
  pods: object({ spec: podSpec, status: 'any' }),
  events: 'any',
  secrets: object({ data: 'strings', stringData: 'strings', immutable: 'boolean', type: 'string' }),
  configmaps: object({ data: 'strings', binaryData: 'strings', immutable: 'boolean' }),
  namespaces: object({ spec: 'any', status: 'any' }),
}

const NAMES: Record<string, string> = {
  integer: 'int32',
  boolean: 'bool',
  strings: 'map[string]string',
}

/** Returns the object without its unknown fields, whose paths it appends to `unknown`. 400 on a wrong type. */
export function decode(resource: Resource, value: unknown, unknown: string[]): unknown {
  return walk(value, SHAPES[resource], '', unknown)
}

function walk(value: unknown, shape: Shape, path: string, unknown: string[]): unknown {
  const wrong = (wanted: string) => {
    const got = Array.isArray(value) ? 'array' : value === Object(value) ? 'object' : typeof value
    return badRequest(
      `json: cannot unmarshal ${got} into Go struct field ${path} of type ${NAMES[wanted] ?? wanted}`,
    )
  }
  // JSON null is an absent field, as in Go.
  if (shape === 'any' || value === null || value === undefined) return value ?? undefined
  if (Array.isArray(shape)) {
    if (!Array.isArray(value)) throw wrong('slice')
    const [item = 'any'] = shape
    return value.map((element, index) => walk(element, item, `${path}[${index}]`, unknown))
  }
  if (typeof shape === 'string' && shape !== 'strings') {
    const fits = shape === 'integer' ? Number.isInteger(value) : typeof value === shape
    if (!fits) throw wrong(shape)
    return value
  }
  if (typeof value !== 'object' || Array.isArray(value)) throw wrong('struct')
  const known: Record<string, unknown> = {}
  for (const [field, inner] of Object.entries(value)) {
    const at = path ? `${path}.${field}` : field
    const fieldShape =
      shape === 'strings' ? 'string' : Object.hasOwn(shape, field) ? shape[field] : undefined
    if (!fieldShape) unknown.push(at)
    else {
      const kept = walk(inner, fieldShape, at, unknown)
      if (kept !== undefined) known[field] = kept
    }
  }
  return known
}
