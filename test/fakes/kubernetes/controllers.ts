import { collectGarbage, release, TRACKING } from './garbage.ts'
import { type Cluster, createObject, deleteObject } from './objects.ts'
import {
  hasCondition,
  isTerminal,
  type Job,
  type JobStatus,
  type Pod,
  type PodFailureRule,
  setCondition,
} from './resources.ts'
import { ApiError } from './status.ts'

const POD_BACKOFF_MS = 10_000
const POD_BACKOFF_MAX_MS = 600_000
const API_BACKOFF_MS = 1000
const API_BACKOFF_MAX_MS = 60_000

export interface Controllers {
  /** Writes no longer set them off; `run` works off what has gathered. */
  pause(): void
  resume(): void
  run(): void
}

/** The Job controller, the TTL controller and the garbage collector, reacting to every change. */
export function startControllers(cluster: Cluster): Controllers {
  const { store, clock } = cluster
  const dirtyJobs = new Set<string>()
  const failedCreates = new Map<string, number>()
  const alarms = new Set<string>()
  const garbage: (() => void)[] = []
  let paused = false
  let scheduled = false

  const schedule = () => {
    if (paused || scheduled) return
    scheduled = true
    // After the request that caused it has taken its answer from the store.
    queueMicrotask(() => {
      scheduled = false
      if (!paused) run()
    })
  }
  const wake = (uid: string) => {
    dirtyJobs.add(uid)
    schedule()
  }
  /** Looks at the Job again at `at`; one alarm per purpose. */
  const wakeAt = (job: Job, purpose: string, at: number) => {
    const { uid } = job.metadata
    const key = `${uid} ${purpose} ${at}`
    if (alarms.has(key)) return
    alarms.add(key)
    clock.after(Math.max(0, at - clock.now()), () => wake(uid))
  }

  store.subscribe((change) => {
    for (const owner of change.object.metadata.ownerReferences ?? []) {
      if (owner.kind === 'Job') dirtyJobs.add(owner.uid)
    }
    if (change.resource === 'jobs') dirtyJobs.add(change.object.metadata.uid)
    garbage.push(() => collectGarbage(cluster, change, garbage))
    schedule()
  })

  function run(): void {
    for (let rounds = 0; garbage.length > 0 || dirtyJobs.size > 0; rounds += 1) {
      if (rounds > 10_000) throw new Error('the fake controllers do not come to rest')
      for (const action of garbage.splice(0)) action()
      for (const uid of [...dirtyJobs]) {
        dirtyJobs.delete(uid)
        const found = store.findByUid(uid)
        if (found?.resource === 'jobs') reconcile(found.object as Job)
      }
    }
  }

  const podsOf = ({ metadata }: Job) =>
    store.dependentsOf(metadata.uid).flatMap(({ resource, object }) =>
      // The resource tells the kind.
      resource === 'pods' ? [object as Pod] : [],
    )

  /** One step of the Job controller: count what ended, decide, then create or delete pods. */
  function reconcile(job: Job): void {
    const pods = podsOf(job)
    const { spec } = job
    const at = clock.timestamp()
    const onlyReplaceFailed = spec.podReplacementPolicy === 'Failed'
    const finished = hasCondition(job.status, 'Complete') || hasCondition(job.status, 'Failed')
    if (job.metadata.deletionTimestamp || finished) {
      for (const pod of pods) release(cluster, pod)
      if (finished && !job.metadata.deletionTimestamp) collectAfterTtl(job)
      return
    }
    const status: JobStatus = structuredClone(job.status)
    const running = pods.filter((pod) => !isTerminal(pod))
    const active = running.filter(({ metadata }) => !metadata.deletionTimestamp)
    const failures = pods.filter(
      ({ metadata, status: { phase } }) =>
        metadata.finalizers?.includes(TRACKING) &&
        (phase === 'Failed' ||
          (!onlyReplaceFailed &&
            metadata.deletionTimestamp !== undefined &&
            phase !== 'Succeeded')),
    )
    const successes = pods.filter(
      ({ metadata, status: { phase } }) =>
        metadata.finalizers?.includes(TRACKING) && phase === 'Succeeded',
    )
    const verdicts = failures.map((pod) => verdictOf(pod, spec.podFailurePolicy?.rules ?? []))
    status.succeeded = (status.succeeded ?? 0) + successes.length
    status.failed = (status.failed ?? 0) + verdicts.filter(({ counts }) => counts).length
    status.active = active.length
    status.terminating = running.length - active.length
    status.ready = active.filter((pod) => hasCondition(pod.status, 'Ready')).length
    status.uncountedTerminatedPods = {}

    if (spec.suspend) {
      if (!hasCondition(status, 'Suspended')) {
        mark('Suspended', 'JobSuspended', 'Job suspended')
        store.event(job, 'job-controller', {
          type: 'Normal',
          reason: 'Suspended',
          message: 'Job suspended',
        })
      }
      delete status.startTime
    } else {
      if (
        status.conditions?.some(({ type, status: is }) => type === 'Suspended' && is === 'True')
      ) {
        const resumed = { type: 'Suspended', reason: 'JobResumed', message: 'Job resumed' }
        setCondition(status, { ...resumed, status: 'False' }, at)
        store.event(job, 'job-controller', {
          type: 'Normal',
          reason: 'Resumed',
          message: 'Job resumed',
        })
      }
      status.startTime ??= at
    }

    const deadline =
      spec.activeDeadlineSeconds !== undefined && status.startTime
        ? Date.parse(status.startTime) + spec.activeDeadlineSeconds * 1000
        : Number.POSITIVE_INFINITY
    const failJob = verdicts.find(({ message }) => message !== undefined)?.message
    if (hasCondition(status, 'SuccessCriteriaMet') || hasCondition(status, 'FailureTarget')) {
      // Decided already; what is left is to wait for the pods.
    } else if (failJob !== undefined) mark('FailureTarget', 'PodFailurePolicy', failJob)
    else if (status.failed > (spec.backoffLimit ?? 6)) {
      mark('FailureTarget', 'BackoffLimitExceeded', 'Job has reached the specified backoff limit')
    } else if (clock.now() >= deadline) {
      mark('FailureTarget', 'DeadlineExceeded', 'Job was active longer than specified deadline')
    } else if (status.succeeded >= (spec.completions ?? 1)) {
      mark('SuccessCriteriaMet', 'CompletionsReached', 'Reached expected number of succeeded pods')
    } else if (Number.isFinite(deadline)) wakeAt(job, 'deadline', deadline)

    const decided = status.conditions?.find(
      ({ type }) => type === 'SuccessCriteriaMet' || type === 'FailureTarget',
    )
    if (decided && running.length === 0) {
      const { reason = '', message = '' } = decided
      const success = decided.type === 'SuccessCriteriaMet'
      // First the target, then, in a write of its own, the verdict: clients see both.
      if (job.status.conditions?.some(({ type }) => type === decided.type)) {
        mark(success ? 'Complete' : 'Failed', reason, message)
        if (success) status.completionTime = at
        store.event(job, 'job-controller', {
          type: success ? 'Normal' : 'Warning',
          reason: success ? 'Completed' : reason,
          message: success ? 'Job completed' : message,
        })
      }
    }
    const counts = ['active', 'terminating', 'ready', 'succeeded', 'failed'] as const
    const stored = store.change('jobs', job, (draft) => {
      draft.status = { ...status }
      for (const field of counts) if (!status[field]) delete draft.status[field]
    })
    for (const pod of [...failures, ...successes]) release(cluster, pod)
    if (decided || spec.suspend) {
      for (const pod of active) {
        deleteObject(cluster, 'pods', pod)
        store.event(job, 'job-controller', {
          type: 'Normal',
          reason: 'SuccessfulDelete',
          message: `Deleted pod: ${pod.metadata.name}`,
        })
      }
      return
    }
    const left = (spec.completions ?? 1) - status.succeeded
    const counted = onlyReplaceFailed ? running.length : active.length
    const wanted = Math.min(spec.parallelism ?? 1, left) - counted
    // The failed pods say when the next may start.
    const latest = Math.max(0, ...pods.filter((pod) => pod.status.phase === 'Failed').map(endOf))
    const backoff = Math.min(POD_BACKOFF_MAX_MS, POD_BACKOFF_MS * 2 ** (status.failed - 1))
    if (status.failed > 0 && latest + backoff > clock.now()) {
      if (wanted > 0) wakeAt(job, 'backoff', latest + backoff)
    } else {
      for (let index = 0; index < wanted; index += 1) createPod(stored)
    }

    function mark(type: string, reason: string, message: string): void {
      setCondition(status, { type, status: 'True', reason, message }, at)
    }
  }

  function endOf({ status, metadata }: Pod): number {
    const ends = (status.containerStatuses ?? []).map(({ state }) =>
      Date.parse(state.terminated?.finishedAt ?? metadata.creationTimestamp),
    )
    return Math.max(Date.parse(metadata.creationTimestamp), ...ends)
  }

  function createPod(job: Job): void {
    const { metadata, spec } = structuredClone(job.spec.template)
    const { name, namespace = 'default', uid } = job.metadata
    if ((failedCreates.get(`${uid} until`) ?? 0) > clock.now()) return
    try {
      const { object } = createObject(cluster, 'pods', namespace, {
        metadata: {
          generateName: `${name}-`,
          ...(metadata?.labels && { labels: metadata.labels }),
          ...(metadata?.annotations && { annotations: metadata.annotations }),
          finalizers: [TRACKING],
          ownerReferences: [
            {
              apiVersion: 'batch/v1',
              kind: 'Job',
              name,
              uid,
              controller: true,
              blockOwnerDeletion: true,
            },
          ],
        },
        spec,
      })
      failedCreates.delete(uid)
      store.event(job, 'job-controller', {
        type: 'Normal',
        reason: 'SuccessfulCreate',
        message: `Created pod: ${object.metadata.name}`,
      })
    } catch (error) {
      if (!(error instanceof ApiError)) throw error
      const message = `Error creating: ${error.message}`
      store.event(job, 'job-controller', { type: 'Warning', reason: 'FailedCreate', message })
      const failures = failedCreates.get(uid) ?? 0
      const wait = Math.min(API_BACKOFF_MAX_MS, API_BACKOFF_MS * 2 ** failures)
      failedCreates.set(uid, failures + 1)
      failedCreates.set(`${uid} until`, clock.now() + wait)
      wakeAt(job, 'create', clock.now() + wait)
    }
  }

  function collectAfterTtl(job: Job): void {
    const ttl = job.spec.ttlSecondsAfterFinished
    const end = job.status.conditions?.find(({ type }) => type === 'Complete' || type === 'Failed')
    if (ttl === undefined || !end?.lastTransitionTime) return
    const at = Date.parse(end.lastTransitionTime) + ttl * 1000
    if (clock.now() < at) wakeAt(job, 'ttl', at)
    else deleteObject(cluster, 'jobs', job, { propagationPolicy: 'Foreground' })
  }

  return {
    pause() {
      paused = true
    },
    resume() {
      paused = false
      schedule()
    },
    run,
  }
}

/** Whether a failed pod counts, and the message of the FailJob rule that it matches. */
function verdictOf(pod: Pod, rules: PodFailureRule[]): { counts: boolean; message?: string } {
  const { name, namespace } = pod.metadata
  for (const [index, { action, onExitCodes, onPodConditions = [] }] of rules.entries()) {
    const statuses = [
      ...(pod.status.containerStatuses ?? []),
      ...(pod.status.initContainerStatuses ?? []),
    ]
    const container = statuses.find(({ name: container, state: { terminated } }) => {
      if (!onExitCodes || !terminated || terminated.exitCode === 0) return false
      if ((onExitCodes.containerName ?? container) !== container) return false
      return onExitCodes.values.includes(terminated.exitCode) === (onExitCodes.operator === 'In')
    })
    const condition = pod.status.conditions?.find((condition) =>
      onPodConditions.some(
        ({ type, status = 'True' }) => type === condition.type && status === condition.status,
      ),
    )
    if (!container && !condition) continue
    if (action === 'Ignore') return { counts: false }
    if (action !== 'FailJob') return { counts: true }
    const matching = `matching ${action} rule at index ${index}`
    const code = container?.state.terminated?.exitCode
    const message = container
      ? `Container ${container.name} for pod ${namespace}/${name} failed with exit code ${code} ${matching}`
      : `Pod ${namespace}/${name} has condition ${condition?.type} ${matching}`
    return { counts: true, message }
  }
  return { counts: true }
}
