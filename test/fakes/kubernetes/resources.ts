/** The kinds the fake knows, typed as far as its controllers and kubelet look into them. */

export interface OwnerReference {
  apiVersion: string
  kind: string
  name: string
  uid: string
  controller?: boolean
  blockOwnerDeletion?: boolean
}

export interface Metadata {
  name: string
  generateName?: string
  namespace?: string
  uid: string
  resourceVersion: string
  generation?: number
  creationTimestamp: string
  deletionTimestamp?: string
  deletionGracePeriodSeconds?: number
  labels?: Record<string, string>
  annotations?: Record<string, string>
  ownerReferences?: OwnerReference[]
  finalizers?: string[]
  managedFields?: unknown[]
}

export interface KubernetesObject {
  apiVersion: string
  kind: string
  metadata: Metadata
  [field: string]: unknown
}

export interface Condition {
  type: string
  status: 'True' | 'False'
  reason?: string
  message?: string
  lastProbeTime?: string | null
  lastTransitionTime?: string
}

export interface KeySelector {
  name: string
  key: string
  optional?: boolean
}

export interface EnvironmentVariable {
  name: string
  value?: string
  valueFrom?: {
    secretKeyRef?: KeySelector
    configMapKeyRef?: KeySelector
    fieldRef?: { fieldPath: string }
  }
}

export interface KeyFile {
  key: string
  path: string
  mode?: number
}

interface KeyFiles {
  items?: KeyFile[]
  defaultMode?: number
  optional?: boolean
}

export interface Volume {
  name: string
  emptyDir?: { sizeLimit?: string }
  configMap?: KeyFiles & { name: string }
  secret?: KeyFiles & { secretName: string }
  [source: string]: unknown
}

export interface SecurityContext {
  runAsNonRoot?: boolean
  runAsUser?: number
  privileged?: boolean
  allowPrivilegeEscalation?: boolean
  capabilities?: { add?: string[]; drop?: string[] }
  seccompProfile?: { type: string }
}

export interface Container {
  name: string
  image: string
  command?: string[]
  args?: string[]
  workingDir?: string
  env?: EnvironmentVariable[]
  envFrom?: { prefix?: string; secretRef?: KeySelector; configMapRef?: KeySelector }[]
  volumeMounts?: { name: string; mountPath: string; subPath?: string; readOnly?: boolean }[]
  resources?: { requests?: Record<string, string>; limits?: Record<string, string> }
  securityContext?: SecurityContext
  terminationMessagePath?: string
  terminationMessagePolicy?: 'File' | 'FallbackToLogsOnError'
  restartPolicy?: string
}

export interface PodSpec {
  containers: Container[]
  initContainers?: Container[]
  volumes?: Volume[]
  nodeName?: string
  restartPolicy?: string
  activeDeadlineSeconds?: number
  terminationGracePeriodSeconds?: number
  schedulingGates?: { name: string }[]
  securityContext?: SecurityContext
  [field: string]: unknown
}

export interface ContainerState {
  waiting?: { reason: string; message?: string }
  running?: { startedAt: string }
  terminated?: {
    exitCode: number
    reason?: string
    message?: string
    startedAt: string | null
    finishedAt: string | null
    containerID?: string
  }
}

export interface ContainerStatus {
  name: string
  image: string
  imageID: string
  ready: boolean
  started?: boolean
  restartCount: number
  containerID?: string
  state: ContainerState
  lastState: ContainerState
}

export type PodPhase = 'Pending' | 'Running' | 'Succeeded' | 'Failed'

export interface PodStatus {
  phase: PodPhase
  reason?: string
  message?: string
  startTime?: string
  conditions?: Condition[]
  initContainerStatuses?: ContainerStatus[]
  containerStatuses?: ContainerStatus[]
  [field: string]: unknown
}

export interface Pod extends KubernetesObject {
  spec: PodSpec
  status: PodStatus
}

export interface PodFailureRule {
  action: 'FailJob' | 'Ignore' | 'Count' | 'FailIndex'
  onExitCodes?: { containerName?: string; operator: 'In' | 'NotIn'; values: number[] }
  onPodConditions?: { type: string; status?: string }[]
}

export interface JobSpec {
  template: { metadata?: Partial<Metadata>; spec: PodSpec }
  selector?: { matchLabels?: Record<string, string> }
  backoffLimit?: number
  completions?: number
  parallelism?: number
  activeDeadlineSeconds?: number
  ttlSecondsAfterFinished?: number
  suspend?: boolean
  podReplacementPolicy?: 'Failed' | 'TerminatingOrFailed'
  podFailurePolicy?: { rules: PodFailureRule[] }
  [field: string]: unknown
}

export interface JobStatus {
  startTime?: string
  completionTime?: string
  active?: number
  ready?: number
  terminating?: number
  succeeded?: number
  failed?: number
  conditions?: Condition[]
  uncountedTerminatedPods?: object
}

export interface Job extends KubernetesObject {
  spec: JobSpec
  status: JobStatus
}

export interface KeyedData extends KubernetesObject {
  data?: Record<string, string>
  binaryData?: Record<string, string>
  stringData?: Record<string, string>
  immutable?: boolean
  type?: string
}

export interface KubernetesEvent extends KubernetesObject {
  involvedObject: { kind: string; name: string; namespace?: string; uid: string }
  reason: string
  message: string
  type: 'Normal' | 'Warning'
  count: number
}

export interface Objects {
  jobs: Job
  pods: Pod
  events: KubernetesEvent
  secrets: KeyedData
  configmaps: KeyedData
  namespaces: KubernetesObject
}
export type Resource = keyof Objects

interface ResourceInfo {
  group: '' | 'batch'
  kind: string
  shortNames?: string[]
  subresources?: string[]
}

export const RESOURCES: Record<Resource, ResourceInfo> = {
  jobs: { group: 'batch', kind: 'Job', subresources: ['status'] },
  pods: { group: '', kind: 'Pod', shortNames: ['po'], subresources: ['status', 'log'] },
  events: { group: '', kind: 'Event', shortNames: ['ev'] },
  secrets: { group: '', kind: 'Secret' },
  configmaps: { group: '', kind: 'ConfigMap', shortNames: ['cm'] },
  namespaces: { group: '', kind: 'Namespace', shortNames: ['ns'] },
}

export const apiVersionOf = (resource: Resource): string =>
  RESOURCES[resource].group === 'batch' ? 'batch/v1' : 'v1'

/** As error messages name it: `jobs.batch`, `pods`. */
export const qualified = (resource: Resource): string =>
  RESOURCES[resource].group ? `${resource}.${RESOURCES[resource].group}` : resource

export const isTerminal = (pod: Pod): boolean =>
  pod.status.phase === 'Succeeded' || pod.status.phase === 'Failed'

/** Sets a condition; its transition time moves only when its status does, as in a cluster. */
export function setCondition(
  status: { conditions?: Condition[] },
  condition: Condition,
  at: string,
): void {
  status.conditions ??= []
  const index = status.conditions.findIndex(({ type }) => type === condition.type)
  const old = status.conditions[index]
  const moved = old?.status === condition.status ? old.lastTransitionTime : at
  const next = { lastProbeTime: null, ...condition, lastTransitionTime: moved ?? at }
  if (old) status.conditions[index] = next
  else status.conditions.push(next)
}

export const hasCondition = (status: { conditions?: Condition[] }, type: string): boolean =>
  status.conditions?.some((condition) => condition.type === type && condition.status === 'True') ??
  false
