import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { access, constants as fsConstants, mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { constants } from 'node:os'
import { join } from 'node:path'
import type { Logs } from './logs.ts'
import type { Cluster } from './objects.ts'
import { environmentOf, Missing, makeVolumes, replacer } from './pod-files.ts'
import type { PodHandle } from './pod-handle.ts'
import type { Container } from './resources.ts'

const TERMINATION_MESSAGE_BYTES = 4096
const DRAIN_MS = 2000

export interface PodProcesses {
  /** All containers have ended, or the pod was stopped before they started. Never rejects. */
  done: Promise<void>
  /** SIGTERM to every process group, SIGKILL when the grace is over; resolves when all have ended. */
  stop(graceMs: number): Promise<void>
}

interface RunOptions {
  cluster: Cluster
  logs: Logs
  handle: PodHandle
  root: string
}

/** Runs a pod's containers as processes of this machine, whose files and programs stand for the image's. */
export function runPod({ cluster, logs, handle, root }: RunOptions): PodProcesses {
  const { uid, namespace = '' } = handle.pod.metadata
  const { spec } = handle.pod
  const folder = join(root, uid)
  const stopping = new AbortController()
  const children = new Set<ChildProcess>()

  /** Tries again whenever anything in the namespace changes: what was missing may be there now. */
  async function whenThere<T>(
    attempt: () => T | Promise<T>,
    missing: (why: Missing) => void,
  ): Promise<T> {
    for (;;) {
      const changed = Promise.withResolvers<void>()
      const unsubscribe = cluster.store.subscribe(({ resource, object }) => {
        if (object.metadata.namespace !== namespace) return
        if (resource === 'secrets' || resource === 'configmaps') changed.resolve()
      })
      stopping.signal.addEventListener('abort', () => changed.resolve(), { once: true })
      try {
        return await attempt()
      } catch (error) {
        if (!(error instanceof Missing)) throw error
        missing(error)
        await changed.promise
        stopping.signal.throwIfAborted()
      } finally {
        unsubscribe()
      }
    }
  }

  /** Resolves with the exit code, once the container's end has been written to the pod's status. */
  async function runContainer(container: Container): Promise<number> {
    const { name, terminationMessagePath = '/dev/termination-log' } = container
    const messageFile = join(folder, 'termination', name)
    await writeFile(messageFile, '')
    const replace = await replacer(container, folder, { [terminationMessagePath]: messageFile })
    const environment = await whenThere(
      () => environmentOf(cluster.store, handle.pod, container, replace),
      ({ message }) => handle.waiting('CreateContainerConfigError', message, name),
    )
    const [program, ...args] = [...(container.command ?? []), ...(container.args ?? [])].map(
      (word) => replace(environment.expand(word)),
    )
    const cwd = container.workingDir ? replace(container.workingDir) : join(folder, 'root')
    await mkdir(cwd, { recursive: true })
    stopping.signal.throwIfAborted()
    const failStart = (why: string) => {
      const message = `failed to create containerd task: OCI runtime create failed: exec: "${program}": ${why}: unknown`
      handle.exit(128, { reason: 'StartError', message, container: name })
      return 128
    }
    // The image's own entrypoint is not known here.
    if (!program) return failStart('no command specified')
    const isThere = (await commandPath(program)) !== undefined
    // Process and mount namespaces of its own, as containers have: what signals or lists all it sees must not
    // see this machine.
    const isolated = [
      ...['--pid', '--fork', '--kill-child=KILL', '--mount-proc', '--'],
      ...[program, ...args],
    ]
    const child = spawn(isThere ? 'unshare' : program, isThere ? isolated : args, {
      cwd,
      detached: true,
      env: { PATH: process.env.PATH, ...environment.values },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    try {
      await once(child, 'spawn')
    } catch {
      return failStart('executable file not found in $PATH')
    }
    children.add(child)
    if (stopping.signal.aborted) signalGroup(child, 'SIGKILL')
    handle.container(name, { running: { startedAt: cluster.clock.timestamp() } })
    handle.event('Normal', 'Started', `Started container ${name}`)
    for (const stream of ['stdout', 'stderr'] as const) {
      child[stream].on('data', (bytes) => logs.append(uid, name, bytes, stream))
    }
    const closed = once(child, 'close')
    const [code, signal] = (await once(child, 'exit')) as [number | null, NodeJS.Signals | null]
    // A container's other processes go with its first one.
    signalGroup(child, 'SIGKILL')
    children.delete(child)
    // One that left the group may hold the pipes open for good.
    const late = setTimeout(() => {
      child.stdout.destroy()
      child.stderr.destroy()
    }, DRAIN_MS)
    await closed
    clearTimeout(late)
    const exitCode = code ?? 128 + constants.signals[signal ?? 'SIGKILL']
    const path = replace(terminationMessagePath)
    let message = (await readFile(path).catch(() => Buffer.alloc(0)))
      .subarray(-TERMINATION_MESSAGE_BYTES)
      .toString()
    if (!message && exitCode && container.terminationMessagePolicy === 'FallbackToLogsOnError') {
      message = logs.tail(uid, name, 80, 2048)
    }
    handle.exit(exitCode, { container: name, ...(message && { message }) })
    return exitCode
  }

  async function run(): Promise<void> {
    handle.schedule()
    for (const name of ['termination', 'root']) await mkdir(join(folder, name), { recursive: true })
    await whenThere(
      () => makeVolumes(cluster.store, handle.pod, folder),
      ({ message, volume }) =>
        handle.event(
          'Warning',
          'FailedMount',
          `MountVolume.SetUp failed for volume "${volume}" : ${message}`,
        ),
    )
    for (const container of spec.initContainers ?? []) {
      if ((await runContainer(container)) !== 0) return
    }
    await Promise.all(spec.containers.map(runContainer))
  }

  const done = run()
    .catch((error) => {
      if (!stopping.signal.aborted) handle.event('Warning', 'FakeKubeletError', String(error))
    })
    .finally(() => {
      if (cluster.store.findByUid(uid)) return
      return rm(folder, { recursive: true, force: true })
    })

  return {
    done,
    async stop(graceMs) {
      stopping.abort()
      for (const child of children) signalGroup(child, graceMs > 0 ? 'SIGTERM' : 'SIGKILL')
      const cancel = cluster.clock.after(graceMs, () => {
        for (const child of children) signalGroup(child, 'SIGKILL')
      })
      await done
      cancel()
      if (!cluster.store.findByUid(uid)) await rm(folder, { recursive: true, force: true })
    },
  }
}

/** Where a command is; undefined when there is none. */
async function commandPath(command: string): Promise<string | undefined> {
  const folders = command.includes('/') ? [''] : (process.env.PATH ?? '').split(':')
  for (const folder of folders) {
    const path = folder === '' ? command : join(folder, command)
    const isExecutable = await access(path, fsConstants.X_OK).then(
      () => true,
      () => false,
    )
    if (isExecutable) return path
  }
  return undefined
}

function signalGroup(child: ChildProcess, signal: NodeJS.Signals): void {
  try {
    if (child.pid) process.kill(-child.pid, signal)
  } catch {
    // Gone already.
  }
}
