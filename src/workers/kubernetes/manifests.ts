/** Builds the objects of one worker. Pure. */
import { createHash } from 'node:crypto'
import type {
  V1ConfigMap,
  V1Job,
  V1OwnerReference,
  V1ResourceRequirements,
  V1Secret,
} from '@kubernetes/client-node'
import type { WorkerSpec } from '../../core/ports.ts'
import {
  BOOTSTRAP_END_MS,
  ownFiles,
  WORKER_FOLDER,
  WORKER_USER,
  workerCommand,
} from '../worker-files.ts'

export const LABELS = {
  /** Deployment that the worker belongs to: several may share a namespace. */
  instance: 'task-runner.io/instance',
  managedBy: 'app.kubernetes.io/managed-by',
  name: 'app.kubernetes.io/name',
} as const
export const ANNOTATIONS = {
  taskId: 'task-runner.io/task-id',
  size: 'task-runner.io/size',
  image: 'task-runner.io/image',
  createdAt: 'task-runner.io/created-at',
  maxLogBytes: 'task-runner.io/max-log-bytes',
} as const
export const TASK_CONTAINER = 'task'

const MESSAGE_FILE = '/dev/termination-log'
const FILES_FOLDER = '/files'
const OWN_FOLDER = '/own'
const EPHEMERAL_REQUEST = '100Mi'
const EPHEMERAL_LIMIT = '10Gi'
/** Maximum bytes of a ConfigMap or Secret, below the limit of core/v1 MaxSecretSize. */
export const OBJECT_BYTES_MAX = 900 * 1024
const SHOWS_NODE_LOSS_SECONDS = 60
const JOB_DEADLINE_SLACK_SECONDS = 120
const TTL_SECONDS = 3600
/** Latest time of a Date, https://tc39.es/ecma262/#sec-time-values-and-time-range */
const TIME_MAX = 8.64e15

export interface JobOptions {
  /** Deployment that the worker belongs to. */
  deployment: string
  image: string
  /** Name of the ConfigMap with the task files. */
  filesName: string
  serviceAccount: string
  /** Name of a Kueue queue. */
  queue: string | undefined
  provisioningTimeoutSeconds: number
  /** Time between TERM and KILL. */
  terminationGraceMs: number
  /** Time after which Kubernetes removes workers kept for debugging. */
  keptWorkerSeconds: number
  createdAt: number
  /** Home of the worker; undefined: in its folder. */
  home?: string | undefined
}

/** Returns the ConfigMap of task files, which workers share. `files`: a gzipped tar. */
export function filesConfigMap(files: Buffer, deployment: string): V1ConfigMap {
  const hash = createHash('sha256').update(files).digest('hex').slice(0, 16)
  return {
    apiVersion: 'v1',
    kind: 'ConfigMap',
    metadata: { name: `task-runner-files-${hash}`, labels: labelsOf(deployment) },
    immutable: true,
    binaryData: { 'files.tgz': files.toString('base64') },
  }
}

/** Returns the name of the ConfigMap that holds a worker's task files. */
export function filesNameOf({ spec }: V1Job): string {
  const volumes = spec?.template.spec?.volumes ?? []
  return volumes.find(({ configMap }) => configMap)?.configMap?.name ?? ''
}

/** Returns the Secret with the worker's own files, including its secrets. Its Job owns it. */
export function ownSecret(
  spec: WorkerSpec,
  { deployment, home }: Pick<JobOptions, 'deployment' | 'home'>,
  jobUid: string,
): V1Secret {
  const data = ownFiles(spec, home).map(({ name, content }) => [
    name,
    Buffer.from(content).toString('base64'),
  ])
  return {
    apiVersion: 'v1',
    kind: 'Secret',
    metadata: {
      name: spec.name,
      labels: labelsOf(deployment),
      ownerReferences: [ownedBy(spec.name, jobUid)],
    },
    type: 'Opaque',
    immutable: true,
    data: Object.fromEntries(data),
  }
}

/** Returns the Secret with the credential for the registry, if there is one. */
export function pullSecret(
  spec: WorkerSpec,
  options: JobOptions,
  jobUid: string,
): V1Secret | undefined {
  const credential = spec.imageConfig?.credential
  if (!credential) return undefined
  const [host = ''] = options.image.split('/')
  const server = /[.:]|^localhost$/.test(host) ? host : 'https://index.docker.io/v1/'
  const config = JSON.stringify({ auths: { [server]: credential } })
  return {
    apiVersion: 'v1',
    kind: 'Secret',
    metadata: {
      name: pullSecretName(spec.name),
      labels: labelsOf(options.deployment),
      ownerReferences: [ownedBy(spec.name, jobUid)],
    },
    type: 'kubernetes.io/dockerconfigjson',
    immutable: true,
    data: { '.dockerconfigjson': Buffer.from(config).toString('base64') },
  }
}

function pullSecretName(workerName: string): string {
  return `${workerName}-pull`
}

/** Returns the Job: one attempt, no secrets, and failures that stay visible without the pod. */
export function workerJob(spec: WorkerSpec, options: JobOptions): V1Job {
  const labels = labelsOf(options.deployment)
  const { credential, pullSecretName: existing } = spec.imageConfig ?? {}
  const pullSecrets = [
    ...(credential ? [{ name: pullSecretName(spec.name) }] : []),
    ...(existing === undefined ? [] : [{ name: existing }]),
  ]
  const annotations = {
    [ANNOTATIONS.taskId]: spec.taskId,
    [ANNOTATIONS.size]: spec.size ?? '',
    [ANNOTATIONS.image]: options.image,
    [ANNOTATIONS.createdAt]: String(options.createdAt),
    [ANNOTATIONS.maxLogBytes]: String(spec.maxLogBytes),
  }
  // The Job's deadline deletes the pod and its log, so the pod's, counted from its start, is first.
  const podSeconds = spec.timeoutSeconds + options.provisioningTimeoutSeconds
  const graceSeconds = Math.ceil((options.terminationGraceMs + BOOTSTRAP_END_MS) / 1000)
  const jobSeconds = podSeconds + graceSeconds + JOB_DEADLINE_SLACK_SECONDS
  const container = {
    image: options.image,
    imagePullPolicy: spec.imageConfig?.pullPolicy ?? 'IfNotPresent',
    resources: resourcesOf(spec),
    securityContext: {
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ['ALL'] },
    },
  }
  const worker = { name: 'worker', mountPath: WORKER_FOLDER }
  const temporary = { name: 'tmp', mountPath: '/tmp' }
  // The same folder at another path.
  const home = options.home ? [{ name: 'worker', mountPath: options.home, subPath: 'home' }] : []
  return {
    apiVersion: 'batch/v1',
    kind: 'Job',
    metadata: {
      name: spec.name,
      labels: {
        ...labels,
        ...(options.queue ? { 'kueue.x-k8s.io/queue-name': options.queue } : {}),
      },
      annotations,
    },
    spec: {
      backoffLimit: 0,
      completions: 1,
      parallelism: 1,
      podReplacementPolicy: 'Failed',
      ...(options.queue ? { suspend: true } : {}),
      activeDeadlineSeconds: jobSeconds,
      ttlSecondsAfterFinished: spec.keepAfterwards ? options.keptWorkerSeconds : TTL_SECONDS,
      // Not for retries: this makes the Job record a disruption, even after the pod is gone.
      podFailurePolicy: {
        rules: [
          { action: 'FailJob', onPodConditions: [{ type: 'DisruptionTarget', status: 'True' }] },
          {
            action: 'FailJob',
            onExitCodes: { containerName: TASK_CONTAINER, operator: 'NotIn', values: [0] },
          },
        ],
      },
      template: {
        metadata: {
          labels,
          annotations: {
            [ANNOTATIONS.taskId]: spec.taskId,
            'cluster-autoscaler.kubernetes.io/safe-to-evict': 'false',
            'karpenter.sh/do-not-disrupt': 'true',
            'sidecar.istio.io/inject': 'false',
          },
        },
        spec: {
          restartPolicy: 'Never',
          activeDeadlineSeconds: podSeconds,
          terminationGracePeriodSeconds: graceSeconds,
          serviceAccountName: options.serviceAccount,
          automountServiceAccountToken: false,
          enableServiceLinks: false,
          ...(pullSecrets.length > 0 && { imagePullSecrets: pullSecrets }),
          tolerations: ['not-ready', 'unreachable'].map((condition) => ({
            key: `node.kubernetes.io/${condition}`,
            operator: 'Exists',
            effect: 'NoExecute',
            tolerationSeconds: SHOWS_NODE_LOSS_SECONDS,
          })),
          securityContext: {
            runAsNonRoot: true,
            runAsUser: WORKER_USER,
            runAsGroup: WORKER_USER,
            fsGroup: WORKER_USER,
            fsGroupChangePolicy: 'OnRootMismatch',
            seccompProfile: { type: 'RuntimeDefault' },
          },
          volumes: [
            { name: 'worker', emptyDir: {} },
            { name: 'tmp', emptyDir: {} },
            { name: 'files', configMap: { name: options.filesName } },
            { name: 'own', secret: { secretName: spec.name, defaultMode: 0o440 } },
          ],
          initContainers: [
            {
              ...container,
              name: 'files',
              // The task cannot read the Secret: its files are copied, and removed after use.
              command: ['/bin/sh', '-c', unpackCommand()],
              volumeMounts: [
                worker,
                { name: 'files', mountPath: FILES_FOLDER, readOnly: true },
                { name: 'own', mountPath: OWN_FOLDER, readOnly: true },
              ],
            },
          ],
          containers: [
            {
              ...container,
              name: TASK_CONTAINER,
              // A kept worker need not keep running: its pod and log stay.
              command: workerCommand(
                { ...spec, keepAfterwards: false },
                { terminationGraceMs: options.terminationGraceMs, messageFile: MESSAGE_FILE },
              ),
              terminationMessagePath: MESSAGE_FILE,
              volumeMounts: [worker, temporary, ...home],
            },
          ],
        },
      },
    },
  }
}

/** Returns the creation time in epoch ms; by the API server if the annotation is invalid. */
export function createdAtOf({ metadata }: V1Job): number {
  const at = Number(metadata?.annotations?.[ANNOTATIONS.createdAt] ?? Number.NaN)
  const isTime = at > 0 && at <= TIME_MAX
  return isTime ? at : Date.parse(String(metadata?.creationTimestamp ?? '')) || 0
}

/** Returns the log limit; there is none if the annotation is missing or invalid. */
export function maxLogBytesOf({ metadata }: V1Job): number {
  const bytes = Number(metadata?.annotations?.[ANNOTATIONS.maxLogBytes])
  return bytes > 0 ? bytes : Number.POSITIVE_INFINITY
}

function ownedBy(jobName: string, uid: string): V1OwnerReference {
  return { apiVersion: 'batch/v1', kind: 'Job', name: jobName, uid }
}

function unpackCommand(): string {
  return [
    'umask 077',
    `mkdir -p ${WORKER_FOLDER}/home ${WORKER_FOLDER}/tmp`,
    `tar -xzf ${FILES_FOLDER}/files.tgz -C ${WORKER_FOLDER}`,
    `cp ${OWN_FOLDER}/* ${WORKER_FOLDER}/`,
  ].join(' && ')
}

function resourcesOf({ resources }: WorkerSpec): V1ResourceRequirements {
  const disk = { requests: EPHEMERAL_REQUEST, limits: EPHEMERAL_LIMIT }
  const sized = resources && {
    cpu: `${Math.round(resources.cpus * 1000)}m`,
    memory: `${Math.round(resources.memoryBytes / 2 ** 20)}Mi`,
    ...(resources.gpus > 0 ? { 'nvidia.com/gpu': String(resources.gpus) } : {}),
  }
  return {
    requests: { ...sized, 'ephemeral-storage': disk.requests },
    limits: { ...sized, 'ephemeral-storage': disk.limits },
  }
}

function labelsOf(deployment: string): Record<string, string> {
  return {
    [LABELS.name]: 'task-runner-worker',
    [LABELS.managedBy]: 'task-runner',
    [LABELS.instance]: deployment,
  }
}
