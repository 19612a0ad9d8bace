/** Derives the state of a worker from its Job, its pod and its events. Pure. */
import type {
  CoreV1Event,
  V1ContainerStateTerminated,
  V1ContainerStatus,
  V1Job,
  V1Pod,
} from '@kubernetes/client-node'
import type { Completion, WorkerStatus } from '../../core/ports.ts'
import type { Reason } from '../../core/task.ts'
import { completionOf, lost, parseExit } from '../completion.ts'
import { FAILURES, kindOfRefusal } from './failures.ts'
import { ANNOTATIONS, TASK_CONTAINER } from './manifests.ts'

export type Observation =
  /** Not running yet. `isHopeless`: waiting cannot help. */
  | { phase: 'waiting'; reason: Reason; message: string; isHopeless: boolean }
  | { phase: 'queued' }
  | { phase: 'running' }
  | { phase: 'ended'; completion: Completion }

/** Messages of registries that a retry does not change. */
const FINAL_PULL_WORDS =
  /not found|manifest unknown|unauthorized|denied|authentication required|no basic auth/i
/** Time after a pod's grace period until its node counts as lost. */
const NODE_LOSS_SLACK_MS = 30_000
/** Reasons that kubelets give for rejected pods. */
const REJECTED = /^(OutOf\w+|NodeAffinity|UnexpectedAdmissionError|TopologyAffinityError)$/
const NODE_SHUTDOWN = ['Terminated', 'NodeShutdown', 'Shutdown']
/** Reasons of warnings about volumes, which users can fix. */
const MOUNT_WARNINGS = ['FailedMount', 'FailedAttachVolume']

/**
 * Returns the state of a worker. `pod` undefined: there is none yet, or it is gone. `job`
 * undefined: it was deleted. `now` decides whether the pod's node is lost.
 */
export function observe(
  job: V1Job | undefined,
  pod: V1Pod | undefined,
  now = Date.now(),
): Observation {
  const ended = pod && endOf(pod, job)
  if (ended) return { phase: 'ended', completion: ended }
  if (pod && isOverdue(pod, now)) return { phase: 'ended', completion: nodeLost('no answer') }
  // The pod of a deleted Job may still be in its grace period.
  if (!job && pod) return taskStatus(pod)?.state?.running ? { phase: 'running' } : waitingFor(pod)
  if (!job) return { phase: 'ended', completion: deletedOutside() }
  const failure = conditionOf(job, 'Failed')
  if (!pod && failure) return { phase: 'ended', completion: ofFailedJob(failure) }
  if (!pod && conditionOf(job, 'Complete')) {
    const message = 'The Job completed, but its pod is gone, and the outcome of its task is unknown'
    return { phase: 'ended', completion: lost(message) }
  }
  if (job.spec?.suspend) return { phase: 'queued' }
  if (!pod) return waiting('provisioning_timeout', 'The Job has no pod yet')
  if (taskStatus(pod)?.state?.running) return { phase: 'running' }
  return waitingFor(pod)
}

export function statusOf(job: V1Job | undefined, pod: V1Pod | undefined): WorkerStatus {
  if (!job || job.metadata?.deletionTimestamp) return 'Terminating'
  const { phase } = observe(job, pod)
  if (phase === 'ended') return 'Completed'
  return phase === 'running' ? 'Running' : 'Provisioning'
}

/**
 * Returns why there is no running pod, if events show it. `reason`: set if more precise than the
 * reason from the pod and Job; `unavailable`: no pod of any task would be created.
 */
export function warningOf(
  events: readonly CoreV1Event[],
): { reason: Reason | 'unavailable' | undefined; message: string } | undefined {
  const byTime = events.toSorted((a, b) => timeOf(a) - timeOf(b))
  const last = byTime.findLast(({ type }) => type === 'Warning')
  const grows = events.some(({ reason }) => reason === 'TriggeredScaleUp')
  const growing = grows ? 'The cluster is adding a node' : undefined
  if (!last) return growing === undefined ? undefined : { reason: undefined, message: growing }
  const { reason = '', message: words = '' } = last
  const warning = `${reason}: ${words}`
  const refusal = / is invalid: /.test(words) ? 'invalid' : kindOfRefusal(words)
  if (reason === 'FailedCreate' && refusal === 'quota') {
    const message = `The namespace has no quota left: ${warning}. Hint: raise the quota, or run fewer tasks at once`
    return { reason: 'unschedulable', message }
  }
  if (reason === 'FailedCreate' && FAILURES[refusal] === 'ours') {
    return { reason: 'unavailable', message: `The cluster makes no pods: ${warning}` }
  }
  if (reason === 'FailedCreate') {
    const message = `The cluster rejected the pod: ${warning}. Hint: ask who runs the cluster about its admission rules`
    return { reason: 'startup_failed', message }
  }
  if (MOUNT_WARNINGS.includes(reason)) {
    return { reason: 'startup_failed', message: `A volume could not be mounted: ${warning}` }
  }
  return { reason: undefined, message: growing === undefined ? warning : `${warning}. ${growing}` }
}

function timeOf({ lastTimestamp, eventTime, metadata }: CoreV1Event): number {
  return Date.parse(String(lastTimestamp ?? eventTime ?? metadata?.creationTimestamp ?? 0))
}

function endOf(pod: V1Pod, job: V1Job | undefined): Completion | undefined {
  const { status } = pod
  const terminated = taskStatus(pod)?.state?.terminated
  const isOver = terminated || ['Failed', 'Succeeded'].includes(status?.phase ?? '')
  if (!isOver) return undefined
  if (terminated?.reason === 'OOMKilled') return outOfMemory(terminated.exitCode, pod, job)
  if (status?.reason === 'DeadlineExceeded') return deadline(status.message)
  const exit = parseExit(terminated?.message ?? '')
  // An exit by the task itself counts, even if the platform was about to end it.
  if (exit && exit.code <= 128) return completionOf(exit)
  const byPlatform = disrupted(pod, job)
  if (byPlatform) return byPlatform
  if (exit) return completionOf(exit)
  if (terminated) return withoutExit(terminated)
  const failedInit = status?.initContainerStatuses?.find(
    ({ state }) => (state?.terminated?.exitCode ?? 0) !== 0,
  )
  if (failedInit) {
    const { exitCode, message, reason } = failedInit.state?.terminated ?? {}
    const words = message ?? reason ?? 'no words'
    return ended(
      'startup_failed',
      `The task files could not be unpacked (exit code ${exitCode}: ${words}). Hint: the image needs sh, tar and gzip`,
    )
  }
  if (status?.phase === 'Succeeded') {
    return lost('The pod succeeded, but its task was not seen to end')
  }
  const words = [status?.reason, status?.message].filter(Boolean).join(': ')
  if (REJECTED.test(status?.reason ?? '')) {
    return ended(
      'unschedulable',
      `The node rejected the worker before its task ran: ${words}. Hint: try again, or ask for a smaller worker_size`,
    )
  }
  return lost(`The pod failed, and its task was not seen to end: ${words || 'no reason given'}`)
}

/** Returns the completion of a container whose bootstrap reported no exit. */
function withoutExit({ exitCode, reason, message }: V1ContainerStateTerminated): Completion {
  if (reason === 'StartError' || reason === 'ContainerCannotRun') {
    return ended(
      'startup_failed',
      `The container could not be started: ${message ?? reason}. Hint: the image needs /bin/sh`,
    )
  }
  return lost(
    `The container ended with exit code ${exitCode} (${reason ?? 'unknown'}), not by its task: it was killed from outside, or ran out of memory`,
  )
}

/** Returns the completion if the platform ended the worker. */
function disrupted(pod: V1Pod, job: V1Job | undefined): Completion | undefined {
  const { status } = pod
  const { reason = '', message = '' } = conditionOf(pod, 'DisruptionTarget') ?? {}
  const said = status?.message ?? message
  if (reason === 'DeletionByTaintManager' || reason === 'DeletionByPodGC') return nodeLost(message)
  if (status?.reason === 'NodeLost') return nodeLost(said)
  if (status?.reason === 'Evicted') {
    return evicted('evicted from its node', said, 'its log ends with what was read until then')
  }
  if (NODE_SHUTDOWN.includes(status?.reason ?? ''))
    return evicted('ended: its node shut down', said)
  if (reason === 'PreemptionByScheduler') {
    return evicted('ended to make room for a pod of higher priority', message)
  }
  if (reason === 'EvictionByEvictionAPI') return evicted('evicted: its node is drained', message)
  if (reason) return evicted('evicted from its node', said)
  if (job?.spec?.suspend) return evicted('ended by its queue, which suspended the Job', 'suspended')
  return undefined
}

/** Returns whether the pod is still there long after its grace period: its node may be lost. */
export function isOverdue({ metadata }: V1Pod, now: number): boolean {
  const at = Date.parse(String(metadata?.deletionTimestamp ?? ''))
  return now - at > NODE_LOSS_SLACK_MS
}

function waitingFor(pod: V1Pod): Observation {
  const statuses = [
    ...(pod.status?.initContainerStatuses ?? []),
    ...(pod.status?.containerStatuses ?? []),
  ]
  const stuck = statuses.find(({ state }) => {
    const reason = state?.waiting?.reason
    return reason !== undefined && !['ContainerCreating', 'PodInitializing'].includes(reason)
  })
  const { reason = '', message = '' } = stuck?.state?.waiting ?? {}
  const image = stuck?.image ?? ''
  if (reason === 'ErrImagePull' || reason === 'ImagePullBackOff') {
    const hint = 'Hint: check its name, and that the cluster may pull it (image_config.credential)'
    const text = `The image ${image} could not be pulled: ${message}. ${hint}`
    return waiting('image_pull_failed', text, FINAL_PULL_WORDS.test(message))
  }
  if (reason === 'InvalidImageName' || reason === 'ErrImageNeverPull') {
    const hint =
      reason === 'InvalidImageName'
        ? "Hint: correct the image's name"
        : 'Hint: put it on the nodes, or allow pulling it (image_config.pull_policy)'
    const text = `The image ${image} is unavailable: ${message || reason}. ${hint}`
    return waiting('image_pull_failed', text, true)
  }
  if (reason !== '') {
    const hint = /runAsNonRoot/.test(message)
      ? '. Hint: the image must be able to run as another user than root'
      : ''
    return waiting(
      'startup_failed',
      `The container cannot be started: ${reason}: ${message}${hint}`,
    )
  }
  const scheduled = pod.status?.conditions?.find(({ type }) => type === 'PodScheduled')
  if (scheduled?.status === 'False') {
    const words = scheduled.message ?? scheduled.reason
    return waiting(
      'unschedulable',
      `The cluster has no place for the worker: ${words}. Hint: try again later, or with a smaller worker_size`,
    )
  }
  return waiting('provisioning_timeout', 'The pod is being started')
}

function waiting(reason: Reason, message: string, isHopeless = false): Observation {
  return { phase: 'waiting', reason, message, isHopeless }
}

function ofFailedJob({ reason = '', message = '' }: { reason?: string; message?: string }) {
  if (reason === 'DeadlineExceeded') return deadline(message)
  if (/DisruptionTarget/.test(message)) return evicted('disrupted', message)
  return lost(
    `The pod has gone, and the outcome of its task is unknown. Kubernetes said: "${message}"`,
  )
}

export function deletedOutside(): Completion {
  return lost('The worker was deleted from outside. Hint: run the task again')
}

function nodeLost(message: string): Completion {
  return lost(
    `The worker's node was lost; the task may still run there. Kubernetes said: "${message}". Hint: run it again only if it may run twice`,
  )
}

function evicted(what: string, message = '', more = ''): Completion {
  const also = more && `; ${more}`
  return ended(
    'evicted',
    `The worker was ${what}${also}. Kubernetes said: "${message}". Hint: run the task again`,
  )
}

function deadline(message = ''): Completion {
  return ended(
    'timed_out',
    `Ran longer than its limit. Kubernetes said: "${message}". Hint: raise timeout_seconds`,
  )
}

function ended(reason: Completion['reason'], message: string): Completion {
  return { reason, exitCode: null, signal: null, message }
}

function outOfMemory(exitCode: number, pod: V1Pod, job: V1Job | undefined): Completion {
  const container = pod.spec?.containers.find(({ name }) => name === TASK_CONTAINER)
  const limit = container?.resources?.limits?.memory
  const size = job?.metadata?.annotations?.[ANNOTATIONS.size]
  const named = size ? ` of worker_size ${size}` : ''
  return {
    reason: 'oom_killed',
    exitCode,
    // With another exit code, a child process was killed.
    signal: exitCode === 137 ? 'SIGKILL' : null,
    message: `Ran out of memory: the limit${named} is ${limit ?? 'that of the node'}. Hint: ask for a larger worker_size`,
  }
}

function taskStatus(pod: V1Pod): V1ContainerStatus | undefined {
  return pod.status?.containerStatuses?.find(({ name }) => name === TASK_CONTAINER)
}

function conditionOf(
  object: {
    status?: {
      conditions?: Array<{ type: string; status: string; reason?: string; message?: string }>
    }
  },
  type: string,
) {
  return object.status?.conditions?.find((each) => each.type === type && each.status === 'True')
}
