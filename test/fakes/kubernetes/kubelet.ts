import type { Logs } from './logs.ts'
import { type Cluster, deleteObject } from './objects.ts'
import { createPodHandle, type PodHandle, statusesOf } from './pod-handle.ts'
import { LOST_STATE, type PodScript, presets } from './presets.ts'
import { type PodProcesses, runPod } from './processes.ts'
import { isTerminal, type Pod } from './resources.ts'

export interface KubeletOptions {
  /** What becomes of a pod: a script, or `processes` to run it for real. */
  behave?: ((pod: Pod) => PodScript | 'processes' | undefined) | undefined
  /** Pods that `behave` says nothing about run as processes; else they exit 0 at once. */
  runProcesses?: boolean | undefined
  /** Where the volumes of processes are made. */
  root: string
}

export interface Kubelet {
  /** Settable: what pods created from now on do. */
  behave: KubeletOptions['behave']
  handle(podName: string): PodHandle
  /** Gives up what is left of the pod's script for this one. */
  play(podName: string, script: PodScript): void
  /** A lost node answers again: the pod it should have ended, it ends now. */
  revive(podName: string): void
  /** Kills what runs. */
  close(): Promise<void>
}

interface Placed {
  handle: PodHandle
  steps: PodScript
  cancel: () => void
  processes?: PodProcesses
  /** The grace under which the pod is being ended. */
  ending?: number
  deadline?: () => void
}

/** Scheduler, kubelet and container runtime in one. */
export function startKubelet(cluster: Cluster, logs: Logs, options: KubeletOptions): Kubelet {
  const { store, clock } = cluster
  const placed = new Map<string, Placed>()
  const ended = new Set<Promise<void>>()

  store.subscribe(({ type, resource, object }) => {
    if (resource !== 'pods') return
    // In a microtask: whoever else listens hears of this change before those that it leads to.
    queueMicrotask(() => {
      const pod = object as Pod
      if (type === 'ADDED') place(pod)
      const one = placed.get(pod.metadata.uid)
      if (!one) return
      if (type === 'DELETED') forget(one)
      else look(one)
    })
  })

  function place(pod: Pod): void {
    const handle = createPodHandle(cluster, logs, pod)
    const one: Placed = { handle, steps: [], cancel: () => {} }
    placed.set(pod.metadata.uid, one)
    if (handle.pod.metadata.deletionTimestamp) return
    const script =
      kubelet.behave?.(pod) ?? (options.runProcesses ? 'processes' : presets.exits(0, {}))
    if (script !== 'processes') proceed(one, script)
    else {
      one.processes = runPod({ cluster, logs, handle, root: options.root })
      track(one.processes.done)
    }
  }

  function track(work: Promise<void>): void {
    const settled = work.finally(() => ended.delete(settled))
    ended.add(settled)
  }

  function proceed(one: Placed, script: PodScript): void {
    one.cancel()
    one.steps = [...script]
    for (let step = one.steps.shift(); step !== undefined; step = one.steps.shift()) {
      if (typeof step === 'function') step(one.handle)
      else if (step > 0) {
        one.cancel = clock.after(step, () => proceed(one, one.steps))
        return
      }
    }
  }

  /** Reacts to the pod as it is now: a deadline to keep, a deletion to carry out. */
  function look(one: Placed): void {
    const { pod, lost } = one.handle
    const { activeDeadlineSeconds } = pod.spec
    if (activeDeadlineSeconds && pod.status.startTime && !one.deadline && !isTerminal(pod)) {
      const at = Date.parse(pod.status.startTime) + activeDeadlineSeconds * 1000
      one.deadline = clock.after(Math.max(0, at - clock.now()), () => {
        if (one.handle.lost || isTerminal(one.handle.pod)) return
        one.handle.verdict = {
          reason: 'DeadlineExceeded',
          message: 'Pod was active on the node longer than the specified deadline',
        }
        track(end(one, pod.spec.terminationGracePeriodSeconds ?? 30))
      })
    }
    if (isTerminal(pod)) one.deadline?.()
    if (pod.metadata.deletionTimestamp && !lost) {
      track(end(one, pod.metadata.deletionGracePeriodSeconds ?? 0))
    }
  }

  async function end(one: Placed, graceSeconds: number): Promise<void> {
    const { handle } = one
    if (!isTerminal(handle.pod)) {
      if (one.ending !== undefined && one.ending <= graceSeconds) return
      one.ending = graceSeconds
      one.cancel()
      if (one.processes) await one.processes.stop(graceSeconds * 1000)
      else if (handle.onTerm.ignored && graceSeconds > 0) {
        const over = Promise.withResolvers<void>()
        const unset = clock.after(graceSeconds * 1000, over.resolve)
        // Whatever calls it off must not leave this waiting: a shorter grace, the end of the fake.
        one.cancel = () => {
          unset()
          over.resolve()
        }
        await over.promise
        handle.exit(137)
      } else if (statusesOf(handle.pod.status).some(({ state }) => state.running)) {
        handle.exit(graceSeconds === 0 ? 137 : handle.onTerm.exitCode)
      }
    }
    const { pod } = handle
    if (!isTerminal(pod)) {
      handle.status((status) => {
        for (const container of statusesOf(status)) {
          if (!container.state.terminated) container.state = LOST_STATE
        }
        Object.assign(status, { phase: 'Failed' }, handle.verdict)
      })
    }
    if (handle.pod.metadata.deletionTimestamp) {
      deleteIfThere(handle.pod)
    }
  }

  function deleteIfThere(pod: Pod): void {
    const { namespace = '', name, uid } = pod.metadata
    const stored = store.get('pods', namespace, name)
    if (stored?.metadata.uid === uid) {
      deleteObject(cluster, 'pods', stored, { gracePeriodSeconds: 0 })
    }
  }

  function forget(one: Placed): void {
    const { uid } = one.handle.pod.metadata
    one.cancel()
    one.deadline?.()
    placed.delete(uid)
    logs.drop(uid)
    if (one.processes) track(one.processes.stop(0))
  }

  const find = (podName: string) => {
    const one = [...placed.values()].find(({ handle }) => handle.pod.metadata.name === podName)
    if (!one) throw new Error(`the fake kubelet has no pod "${podName}"`)
    return one
  }
  const kubelet: Kubelet = {
    behave: options.behave,
    handle: (podName) => find(podName).handle,
    play: (podName, script) => proceed(find(podName), script),
    revive(podName) {
      const one = find(podName)
      one.handle.lost = false
      logs.unreachable.delete(podName)
      look(one)
    },
    async close() {
      for (const one of placed.values()) {
        one.cancel()
        if (one.processes) track(one.processes.stop(0))
      }
      await Promise.all(ended)
    },
  }
  return kubelet
}
