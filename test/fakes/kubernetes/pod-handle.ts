import { randomUUID } from 'node:crypto'
import type { Logs } from './logs.ts'
import { type Cluster, type DeleteOptions, deleteObject } from './objects.ts'
import {
  type Condition,
  type Container,
  type ContainerState,
  type ContainerStatus,
  isTerminal,
  type Pod,
  type PodStatus,
  setCondition,
} from './resources.ts'

export interface ExitOptions {
  reason?: string
  message?: string
  container?: string
}

/** What a script does to its pod: each call writes the status as scheduler, kubelet or a controller would. */
export interface PodHandle {
  /** As stored now; as last seen once it is gone. */
  readonly pod: Pod
  /** What deleting the running pod does; a container that ignores SIGTERM is killed when its grace is over. */
  onTerm: { exitCode: number; ignored: boolean }
  /** The node has stopped answering: nothing ends or removes the pod any more. */
  lost: boolean
  /** The node's reason for ending the pod: makes it Failed once its containers have ended, whatever their codes. */
  verdict: { reason: string; message: string } | undefined
  schedule(): void
  /** Init containers done, main containers running. Schedules first where that is still to come. */
  run(): void
  waiting(reason: string, message?: string, container?: string): void
  log(output: string | Buffer, container?: string): void
  /** Ends one container, or all main ones; the phase follows once all have ended. */
  exit(exitCode: number, options?: ExitOptions): void
  container(name: string, state: ContainerState): void
  status(change: (status: PodStatus) => void): void
  condition(type: string, status: 'True' | 'False', reason?: string, message?: string): void
  disrupt(reason: string, message: string): void
  event(type: 'Normal' | 'Warning', reason: string, message: string, component?: string): void
  delete(options?: DeleteOptions): void
}

export const NODE = 'node-1'

export function createPodHandle(cluster: Cluster, logs: Logs, first: Pod): PodHandle {
  const { store, clock } = cluster
  const { name, namespace = '', uid } = first.metadata
  let seen = first
  const current = () => {
    const stored = store.get('pods', namespace, name)
    if (stored?.metadata.uid === uid) seen = stored
    return seen
  }
  const status = (change: (status: PodStatus) => void) => {
    seen = store.change('pods', current(), (draft) => change(draft.status))
  }
  const condition: PodHandle['condition'] = (type, is, reason, message) =>
    status((draft) => {
      const next: Condition = { type, status: is }
      if (reason) next.reason = reason
      if (message) next.message = message
      setCondition(draft, next, clock.timestamp())
    })
  const mainNames = () => first.spec.containers.map((container) => container.name)

  const handle: PodHandle = {
    get pod() {
      return current()
    },
    onTerm: { exitCode: 143, ignored: false },
    lost: false,
    verdict: undefined,
    schedule() {
      const pod = current()
      if (pod.spec.nodeName) return
      seen = store.change('pods', pod, (draft) => {
        draft.spec.nodeName = NODE
      })
      condition('PodScheduled', 'True')
      handle.event(
        'Normal',
        'Scheduled',
        `Successfully assigned ${namespace}/${name} to ${NODE}`,
        'default-scheduler',
      )
      const { containers, initContainers = [] } = pod.spec
      const waiting = initContainers.length > 0 ? 'PodInitializing' : 'ContainerCreating'
      status((draft) => {
        draft.startTime = clock.timestamp()
        draft.hostIP = '10.0.0.1'
        draft.containerStatuses = containers.map((container) => fresh(container, waiting))
        if (initContainers.length > 0) {
          draft.initContainerStatuses = initContainers.map((container) => fresh(container, waiting))
        }
      })
    },
    run() {
      handle.schedule()
      for (const init of first.spec.initContainers ?? []) {
        const done = current().status.initContainerStatuses?.some(
          (container) => container.name === init.name && container.state.terminated,
        )
        if (!done) handle.exit(0, { container: init.name })
      }
      for (const container of mainNames()) {
        const states = current().status.containerStatuses
        if (!states?.some(({ name, state }) => name === container && state.waiting)) continue
        handle.event('Normal', 'Started', `Started container ${container}`)
        handle.container(container, { running: { startedAt: clock.timestamp() } })
      }
    },
    waiting(reason, message, container = mainNames()[0] ?? '') {
      handle.container(container, { waiting: { reason, ...(message && { message }) } })
    },
    log(output, container = mainNames()[0] ?? '') {
      logs.append(uid, container, output)
    },
    exit(exitCode, { reason, message, container } = {}) {
      const at = clock.timestamp()
      for (const one of container ? [container] : mainNames()) {
        const old = statusesOf(current().status).find(({ name }) => name === one)
        if (!old || old.state.terminated) continue
        handle.container(one, {
          terminated: {
            exitCode,
            reason: reason ?? (exitCode === 0 ? 'Completed' : 'Error'),
            ...(message && { message }),
            startedAt: old.state.running?.startedAt ?? at,
            finishedAt: at,
            containerID: old.containerID ?? newId(),
          },
        })
      }
    },
    container(container, state) {
      if (state.terminated) logs.close(uid, container)
      // One write, as a kubelet's: container, phase and reason never disagree.
      status((draft) => {
        for (const one of statusesOf(draft)) {
          if (one.name !== container) continue
          one.state = state
          one.started = state.running !== undefined
          one.ready = one.started
          if (state.waiting) continue
          one.containerID ??= state.terminated?.containerID ?? newId()
          one.imageID ||= `${one.image}@sha256:${'0'.repeat(64)}`
        }
        settle(draft)
      })
    },
    status,
    condition,
    disrupt: (reason, message) => condition('DisruptionTarget', 'True', reason, message),
    event(type, reason, message, component = 'kubelet') {
      store.event(current(), component, { type, reason, message })
    },
    delete(options = {}) {
      if (store.get('pods', namespace, name)?.metadata.uid === uid) {
        deleteObject(cluster, 'pods', current(), options)
      }
    },
  }

  /** What follows for the pod from the states of its containers. */
  function settle(draft: PodStatus): void {
    if (isTerminal({ ...seen, status: draft })) return
    const at = clock.timestamp()
    const main = draft.containerStatuses ?? []
    const inits = draft.initContainerStatuses ?? []
    const codes = (all: ContainerStatus[]) => all.map(({ state }) => state.terminated?.exitCode)
    const initFailed = first.spec.restartPolicy === 'Never' && codes(inits).some((code) => code)
    const ended = initFailed || codes(main).every((code) => code !== undefined)
    const initialized = codes(inits).every((code) => code === 0)
    const ready = main.every(({ state }) => state.running)
    setCondition(draft, { type: 'Initialized', status: initialized ? 'True' : 'False' }, at)
    setCondition(draft, { type: 'Ready', status: ready ? 'True' : 'False' }, at)
    if (ended) {
      const succeeded = !handle.verdict && !initFailed && codes(main).every((code) => code === 0)
      draft.phase = succeeded ? 'Succeeded' : 'Failed'
      Object.assign(draft, handle.verdict)
    } else if (main.some(({ state }) => state.running)) draft.phase = 'Running'
  }
  return handle
}

export const statusesOf = (status: PodStatus): ContainerStatus[] => [
  ...(status.containerStatuses ?? []),
  ...(status.initContainerStatuses ?? []),
]

const newId = () => `containerd://${randomUUID().replaceAll('-', '')}`

const fresh = ({ name, image }: Container, reason: string): ContainerStatus => ({
  name,
  image,
  imageID: '',
  ready: false,
  started: false,
  restartCount: 0,
  state: { waiting: { reason } },
  lastState: {},
})
