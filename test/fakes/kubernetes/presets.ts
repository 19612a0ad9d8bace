import type { PodHandle } from './pod-handle.ts'

/** Steps taken one after the other; a number waits as many milliseconds of the server's clock. */
export type PodScript = (number | ((pod: PodHandle) => void))[]

const run = (pod: PodHandle) => pod.run()
const schedule = (pod: PodHandle) => pod.schedule()

/** Images are pulled and configs looked up for init containers first. */
const firstContainer = ({ pod }: PodHandle) => pod.spec.initContainers?.[0]?.name

function waits(reason: string, message: string, event = 'Failed'): PodScript {
  return [
    schedule,
    (pod) => {
      pod.waiting(reason, message, firstContainer(pod))
      pod.event('Warning', event, `Error: ${message}`)
    },
  ]
}

function disrupted(reason: string, message: string, exitCode = 143): PodScript {
  return [
    run,
    (pod) => {
      pod.disrupt(reason, message)
      pod.onTerm = { exitCode, ignored: false }
      pod.delete()
    },
  ]
}

const rejected = (reason: string, message: string): PodScript => [
  (pod) => {
    pod.status((status) => {
      Object.assign(status, {
        phase: 'Failed',
        reason,
        message,
        startTime: pod.pod.metadata.creationTimestamp,
      })
    })
    pod.event('Warning', reason, message)
  },
]

/** The SIGKILLed container: with `reason` OOMKilled, or with nothing that says why. */
const ended = (exitCode: number, reason: string): PodScript => [
  run,
  (pod) => pod.exit(exitCode, { reason }),
]

/**
 * Every way a pod goes, from Pending on. On a pod that already runs (`kubelet.play`) the first steps have no
 * effect, so that a preset is also an ending.
 */
export const presets = {
  /** Nothing happens: no scheduler has seen it. */
  pending: (): PodScript => [],
  creating: (): PodScript => [schedule],
  runs: ({ log = '', ignoresSigterm = false } = {}): PodScript => [
    run,
    (pod) => {
      pod.onTerm = { exitCode: 143, ignored: ignoresSigterm }
      pod.log(log)
    },
  ],
  exits: (
    exitCode: number,
    {
      log = '',
      afterMs = 0,
      message = '',
    }: { log?: string; afterMs?: number; message?: string } = {},
  ): PodScript => [
    run,
    (pod) => pod.log(log),
    afterMs,
    (pod) => pod.exit(exitCode, { ...(message && { message }) }),
  ],
  initFails: (exitCode = 1): PodScript => [
    schedule,
    (pod) => pod.exit(exitCode, { container: pod.pod.spec.initContainers?.[0]?.name ?? '' }),
  ],
  unschedulable: (
    message = '0/3 nodes are available: 3 Insufficient memory. preemption: 0/3 nodes are available: 3 No preemption victims found for incoming pod.',
  ): PodScript => [
    (pod) => {
      pod.condition('PodScheduled', 'False', 'Unschedulable', message)
      pod.event('Warning', 'FailedScheduling', message, 'default-scheduler')
    },
  ],
  schedulingGated: (): PodScript => [
    (pod) =>
      pod.condition(
        'PodScheduled',
        'False',
        'SchedulingGated',
        'Scheduling is blocked due to non-empty scheduling gates',
      ),
  ],
  scaleUp: (): PodScript => [
    ...presets.unschedulable(),
    (pod) => {
      const message = 'pod triggered scale-up: [{workers 1->2 (max: 5)}]'
      pod.event('Normal', 'TriggeredScaleUp', message, 'cluster-autoscaler')
    },
  ],
  /** ErrImagePull and ImagePullBackOff in turn; heals when `healsAfterMs` is over, or never. */
  imagePullBackOff: ({
    message = 'rpc error: code = Unavailable desc = failed to pull and unpack image: connection refused',
    turns = 3,
    everyMs = 10_000,
    heals = false,
  } = {}): PodScript => {
    const backOff = (pod: PodHandle) =>
      pod.waiting(
        'ImagePullBackOff',
        `Back-off pulling image: ErrImagePull: ${message}`,
        firstContainer(pod),
      )
    const turn: PodScript = [...waits('ErrImagePull', message), everyMs, backOff, everyMs]
    return [...Array.from({ length: turns }, () => turn).flat(), ...(heals ? [run] : [])]
  },
  imageNotFound: (): PodScript =>
    presets.imagePullBackOff({
      message:
        'rpc error: code = NotFound desc = failed to pull and unpack image "registry.example/x:1": failed to resolve reference: not found',
    }),
  imageUnauthorized: (): PodScript =>
    presets.imagePullBackOff({
      message:
        'failed to authorize: failed to fetch anonymous token: unexpected status: 401 Unauthorized',
    }),
  imageInvalidName: (): PodScript =>
    waits(
      'InvalidImageName',
      "couldn't parse image name: invalid reference format",
      'InspectFailed',
    ),
  imageNeverPull: (): PodScript =>
    waits(
      'ErrImageNeverPull',
      'Container image is not present with pull policy of Never',
      'ErrImageNeverPull',
    ),
  configError: (message = 'secret "tr-1" not found'): PodScript =>
    waits('CreateContainerConfigError', message),
  runAsRoot: (): PodScript =>
    presets.configError('container has runAsNonRoot and image will run as root'),
  createError: (message = 'failed to reserve container name'): PodScript =>
    waits('CreateContainerError', message),
  startError: (
    message = 'exec: "/bin/nothing": stat /bin/nothing: no such file or directory',
  ): PodScript => [schedule, (pod) => pod.exit(128, { reason: 'StartError', message })],
  volumeMount: (
    message = 'MountVolume.SetUp failed for volume "bundle" : configmap "tr-1" not found',
  ): PodScript => [schedule, (pod) => pod.event('Warning', 'FailedMount', message)],
  /** `OutOfcpu`, `OutOfmemory`, `OutOfpods`, `UnexpectedAdmissionError`, `NodeAffinity`. */
  nodeRejected: (reason = 'OutOfcpu'): PodScript =>
    rejected(reason, `Pod was rejected: Node didn't have enough resource: ${reason}`),
  oomKilled: (): PodScript => ended(137, 'OOMKilled'),
  /** The main process outlived the one that was killed. */
  oomKilledYetZero: (): PodScript => ended(0, 'OOMKilled'),
  /** SIGKILL, cause unknown. */
  killed: (): PodScript => ended(137, 'Error'),
  evicted: ({ statuses = 'empty' as 'empty' | 'unknown' } = {}): PodScript => [
    run,
    (pod) => {
      const message =
        'The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 900Mi.'
      pod.disrupt('TerminationByKubelet', message)
      pod.status((status) => {
        Object.assign(status, { phase: 'Failed', reason: 'Evicted', message })
        for (const container of status.containerStatuses ?? []) container.state = LOST_STATE
        if (statuses === 'empty') delete status.containerStatuses
      })
      pod.event('Warning', 'Evicted', message)
    },
  ],
  /** Tainted as unreachable: the pod is told to go, and nobody is there to end it. */
  nodeLost: (): PodScript => [
    run,
    (pod) => {
      pod.lost = true
      pod.disrupt('DeletionByTaintManager', 'Taint manager: deleting due to NoExecute taint')
      pod.condition('Ready', 'False')
      pod.status((status) => {
        Object.assign(status, {
          reason: 'NodeLost',
          message: 'Node node-1 which was running pod is unresponsive',
        })
      })
      pod.delete()
    },
  ],
  /** Its node is gone for good: the pod garbage collector ends it. */
  nodeCollected: (): PodScript => [
    run,
    (pod) => {
      pod.disrupt('DeletionByPodGC', 'PodGC: node no longer exists')
      pod.status((status) => {
        status.phase = 'Failed'
      })
      pod.delete({ gracePeriodSeconds: 0 })
    },
  ],
  nodeShutdown: (): PodScript => [
    run,
    (pod) => {
      const message = 'Pod was terminated in response to imminent node shutdown.'
      pod.disrupt('TerminationByKubelet', message)
      pod.verdict = { reason: 'Terminated', message }
      pod.exit(143)
    },
  ],
  preempted: (): PodScript =>
    disrupted(
      'PreemptionByScheduler',
      'default-scheduler: preempting to accommodate a higher priority pod',
    ),
  drained: (): PodScript => disrupted('EvictionByEvictionAPI', 'Eviction API: evicting'),
  /** Someone deletes the pod: no condition says why. */
  deleted: (): PodScript => [run, (pod) => pod.delete()],
  /** Phase Succeeded, and no container that says so: never a success. */
  succeededWithoutContainers: (): PodScript => [
    run,
    (pod) =>
      pod.status((status) => {
        status.phase = 'Succeeded'
        delete status.containerStatuses
      }),
  ],
}

export const LOST_STATE = {
  terminated: {
    exitCode: 137,
    reason: 'ContainerStatusUnknown',
    message: 'The container could not be located when the pod was terminated',
    startedAt: null,
    finishedAt: null,
  },
}
