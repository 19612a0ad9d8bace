/** The objects of one worker. Pure: the same spec gives the same objects. */
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
  /** Which service it belongs to: several may share a namespace. */
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
/** What Kubernetes takes in a ConfigMap or Secret, all keys together (core/v1 MaxSecretSize). */
export const OBJECT_BYTES_MAX = 900 * 1024
const SHOWS_NODE_LOSS_SECONDS = 60
const JOB_DEADLINE_SLACK_SECONDS = 120
const TTL_SECONDS = 3600
/** Of a Date, https://tc39.es/ecma262/#sec-time-values-and-time-range */
const TIME_MAX = 8.64e15

export interface JobOptions {
  /** The service that the worker belongs to. */
  deployment: string
  image: string
  /** Of the ConfigMap with the task files. */
  filesName: string
  serviceAccount: string
  /** Kueue's; undefined: none. */
  queue: string | undefined
  provisioningTimeoutSeconds: number
  /** Between TERM and KILL. */
  terminationGraceMs: number
  /** Workers kept for a look inside are removed after this, should we never come back. */
  keptWorkerSeconds: number
  createdAt: number
  /** Home of the worker; undefined: in its folder. */
  home?: string | undefined
}

/** The task files, shared by all workers that have the same. `files`: a tar, compressed with gzip. */
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

/** Returns the name of the ConfigMap that a worker gets its task files from. */
export function filesNameOf({ spec }: V1Job): string {
  const volumes = spec?.template.spec?.volumes ?? []
  return volumes.find(({ configMap }) => configMap)?.configMap?.name ?? ''
}

/** What is the worker's alone, its secrets among it. It goes with its Job. */
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

/** Credentials for the registry; undefined when there are none. */
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

/** One attempt, whose verdict stays readable after its pod has gone; nothing secret is in it. */
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
  // The pod's own limit counts from its start; the Job's, which deletes pods and their logs, must never be first.
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
  // The same folder by another path.
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
      ...{ backoffLimit: 0, completions: 1, parallelism: 1, podReplacementPolicy: 'Failed' },
      ...(options.queue ? { suspend: true } : {}),
      activeDeadlineSeconds: jobSeconds,
      ttlSecondsAfterFinished: spec.keepAfterwards ? options.keptWorkerSeconds : TTL_SECONDS,
      // Not for more attempts: so the Job itself names a disruption, also when the pod has gone.
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
            ...{ runAsUser: WORKER_USER, runAsGroup: WORKER_USER, fsGroup: WORKER_USER },
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
              // The task does not see the Secret: what it holds is copied, and removed when it has served.
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
              // For a worker that stays there is nothing to hold: pod and log stay as they are.
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

/** In epoch ms; by the API server's clock where the annotation is missing or broken. */
export function createdAtOf({ metadata }: V1Job): number {
  const at = Number(metadata?.annotations?.[ANNOTATIONS.createdAt] ?? Number.NaN)
  const isTime = at > 0 && at <= TIME_MAX
  return isTime ? at : Date.parse(String(metadata?.creationTimestamp ?? '')) || 0
}

/** Nobody knows the limit of a worker whose annotation is missing or broken: it has none. */
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
