/** What a Job, its pod and its events tell about a worker. Pure. */
import type { CoreV1Event, V1ContainerStatus, V1Job, V1Pod } from '@kubernetes/client-node'
import type { Completion, WorkerStatus } from '../../core/ports.ts'
import type { Reason } from '../../core/task.ts'
import { completionOf, lost, parseExit } from '../completion.ts'
import { ANNOTATIONS, TASK_CONTAINER } from './manifests.ts'

export type Observation =
  /** Not running yet. `isHopeless`: waiting changes nothing. */
  | { phase: 'waiting'; reason: Reason; message: string; isHopeless: boolean }
  | { phase: 'queued' }
  | { phase: 'running' }
  | { phase: 'ended'; completion: Completion }

/** Registries answer so when trying again is in vain. */
const FINAL_PULL_WORDS =
  /not found|manifest unknown|unauthorized|denied|authentication required|no basic auth/i

/** `pod` undefined: there is none (yet, or any more). `job` undefined: it was deleted. */
export function observe(job: V1Job | undefined, pod: V1Pod | undefined): Observation {
  const ended = pod && endOf(pod, job)
  if (ended) return { phase: 'ended', completion: ended }
  // Its pod may have a while to end in.
  if (!job && pod) return taskStatus(pod)?.state?.running ? { phase: 'running' } : waitingFor(pod)
  if (!job) return { phase: 'ended', completion: lost('The worker was deleted from outside') }
  const failure = conditionOf(job, 'Failed')
  if (!pod && failure) return { phase: 'ended', completion: ofFailedJob(failure) }
  if (!pod && conditionOf(job, 'Complete')) {
    const message = 'The Job completed, but how its task ended is not known any more'
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

/** The warning that says most about why there is no running pod; undefined when there is none. */
export function warningOf(events: readonly CoreV1Event[]): string | undefined {
  const warnings = events.filter(({ type }) => type === 'Warning')
  const last = warnings.toSorted((a, b) => timeOf(a) - timeOf(b)).at(-1)
  return last && `${last.reason}: ${last.message}`
}

function timeOf({ lastTimestamp, eventTime, metadata }: CoreV1Event): number {
  return Date.parse(String(lastTimestamp ?? eventTime ?? metadata.creationTimestamp ?? 0))
}

function endOf(pod: V1Pod, job: V1Job | undefined): Completion | undefined {
  const { status } = pod
  const terminated = taskStatus(pod)?.state?.terminated
  const disruption = conditionOf(pod, 'DisruptionTarget')
  if (terminated) {
    if (terminated.reason === 'OOMKilled') return outOfMemory(terminated.exitCode, pod, job)
    if (terminated.reason === 'StartError' || terminated.reason === 'ContainerCannotRun') {
      return {
        ...{ reason: 'startup_failed', exitCode: null, signal: null },
        message: `The container could not be started: ${terminated.message ?? terminated.reason}`,
      }
    }
    const exit = parseExit(terminated.message ?? '')
    if (status?.reason === 'DeadlineExceeded') return deadline(status.message)
    // What the task itself ended with counts, also when something was about to end it.
    if (exit && !(disruption && exit.code > 128)) return completionOf(exit)
    if (status?.reason === 'Evicted') return evicted(status.message)
    if (disruption) return disrupted(disruption)
    return lost(
      `The container ended with exit code ${terminated.exitCode} (${terminated.reason ?? 'unknown'}), and not by its task: it was killed from outside, or ran out of memory`,
    )
  }
  const failedInit = status?.initContainerStatuses?.find(
    ({ state }) => (state?.terminated?.exitCode ?? 0) !== 0,
  )
  if (status?.phase === 'Failed') {
    if (status.reason === 'Evicted') return evicted(status.message)
    if (status.reason === 'DeadlineExceeded') return deadline(status.message)
    if (disruption) return disrupted(disruption)
    if (failedInit) {
      const { exitCode, message, reason } = failedInit.state?.terminated ?? {}
      const words = message ?? reason ?? 'no words'
      return {
        ...{ reason: 'startup_failed', exitCode: null, signal: null },
        message: `The task files could not be unpacked (exit code ${exitCode}: ${words}); the image needs sh, tar and gzip`,
      }
    }
    const words = [status.reason, status.message].filter(Boolean).join(': ')
    return lost(`The pod failed before its task ran: ${words || 'no reason given'}`)
  }
  if (status?.phase === 'Succeeded') {
    return lost('The pod is said to have succeeded, but its task was not seen to end')
  }
  return undefined
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
    const text = `The image ${image} could not be pulled: ${message}`
    return waiting('image_pull_failed', text, FINAL_PULL_WORDS.test(message))
  }
  if (reason === 'InvalidImageName' || reason === 'ErrImageNeverPull') {
    return waiting(
      'image_pull_failed',
      `The image ${image} cannot be had: ${message || reason}`,
      true,
    )
  }
  if (reason !== '') {
    return waiting('startup_failed', `The container cannot be started: ${reason}: ${message}`)
  }
  const scheduled = pod.status?.conditions?.find(({ type }) => type === 'PodScheduled')
  if (scheduled?.status === 'False') {
    const words = scheduled.message ?? scheduled.reason
    return waiting('unschedulable', `The cluster has no place for the worker: ${words}`)
  }
  return waiting('provisioning_timeout', 'The pod is being started')
}

function waiting(reason: Reason, message: string, isHopeless = false): Observation {
  return { phase: 'waiting', reason, message, isHopeless }
}

function ofFailedJob({
  reason = '',
  message = '',
}: {
  reason?: string
  message?: string
}): Completion {
  if (reason === 'DeadlineExceeded') return deadline(message)
  if (/DisruptionTarget/.test(message)) {
    return {
      reason: 'evicted',
      exitCode: null,
      signal: null,
      message: `The worker was disrupted: ${message}`,
    }
  }
  return lost(`The pod has gone, and with it how its task ended. Kubernetes said: "${message}"`)
}

function disrupted({
  reason = '',
  message = '',
}: {
  reason?: string
  message?: string
}): Completion {
  const isLost = reason === 'DeletionByTaintManager' || reason === 'DeletionByPodGC'
  if (isLost) {
    return lost(
      `The worker's node was lost; the task may still run there. Kubernetes said: "${message}"`,
    )
  }
  const what =
    reason === 'PreemptionByScheduler'
      ? 'The worker had to make room for a pod of higher priority'
      : 'The worker was evicted from its node'
  return {
    reason: 'evicted',
    exitCode: null,
    signal: null,
    message: `${what}. Kubernetes said: "${message}"`,
  }
}

function evicted(message = ''): Completion {
  return {
    ...{ reason: 'evicted', exitCode: null, signal: null },
    message: `The worker was evicted from its node; its log ends with what was read until then. Kubernetes said: "${message}"`,
  }
}

function deadline(message = ''): Completion {
  return {
    ...{ reason: 'timed_out', exitCode: null, signal: null },
    message: `Ran longer than its limit. Kubernetes said: "${message}"`,
  }
}

function outOfMemory(exitCode: number, pod: V1Pod, job: V1Job | undefined): Completion {
  const container = pod.spec?.containers.find(({ name }) => name === TASK_CONTAINER)
  const limit = container?.resources?.limits?.memory
  const size = job?.metadata?.annotations?.[ANNOTATIONS.size]
  const named = size ? ` of worker_size ${size}` : ''
  return {
    ...{ reason: 'oom_killed', exitCode, signal: 'SIGKILL' },
    message: `Ran out of memory: the limit${named} is ${limit ?? 'that of the node'}; ask for a larger worker_size`,
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
