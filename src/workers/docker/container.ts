/** What the engine is asked for, and what it tells. Pure. */
import type { WorkerSpec } from '../../core/ports.ts'
import { WORKER_USER, workerCommand } from '../worker-files.ts'

export const LABELS = {
  /** Which service it belongs to: several may share an engine. */
  instance: 'task-runner.instance',
  taskId: 'task-runner.task-id',
  size: 'task-runner.size',
  createdAt: 'task-runner.created-at',
  maxLogBytes: 'task-runner.max-log-bytes',
  keeps: 'task-runner.keeps',
} as const

/** Processes and threads of one worker: what a fork bomb is stopped at. */
const PIDS_MAX = 4096
const NANO = 1e9

export interface ContainerOptions {
  instance: string
  image: string
  network: string
  /** `source:target[:ro]` of this machine, or volumes. */
  mounts: readonly string[]
  /** CPUs of the engine's machine: it refuses to be asked for more. */
  cpusMax: number
  /** Docker's `local` driver keeps every byte; Podman has none of that name. */
  logDriver: 'local' | 'json-file'
  createdAt: number
}

/** `POST /containers/create`. Nothing secret is in it: whoever may ask the engine can read it. */
export function containerRequest(spec: WorkerSpec, options: ContainerOptions): object {
  const { resources } = spec
  return {
    Image: options.image,
    Entrypoint: workerCommand(spec),
    Cmd: [],
    User: `${WORKER_USER}:${WORKER_USER}`,
    WorkingDir: '/',
    Labels: {
      [LABELS.instance]: options.instance,
      [LABELS.taskId]: spec.taskId,
      [LABELS.size]: spec.size ?? '',
      [LABELS.createdAt]: String(options.createdAt),
      [LABELS.maxLogBytes]: String(spec.maxLogBytes),
      [LABELS.keeps]: spec.keepAfterwards ? 'yes' : '',
    },
    // An image's own check would only cost.
    Healthcheck: { Test: ['NONE'] },
    HostConfig: {
      AutoRemove: false,
      RestartPolicy: { Name: 'no' },
      Init: true,
      NetworkMode: options.network,
      Binds: options.mounts,
      PidsLimit: PIDS_MAX,
      CapDrop: ['ALL'],
      SecurityOpt: ['no-new-privileges'],
      // A line costs the driver 28 bytes besides its own: this holds 5 MB of empty ones. Old files are compressed.
      LogConfig: { Type: options.logDriver, Config: { 'max-size': '20m', 'max-file': '9' } },
      ...(resources
        ? {
            Memory: resources.memoryBytes,
            MemorySwap: resources.memoryBytes,
            NanoCpus: Math.round(Math.min(resources.cpus, options.cpusMax) * NANO),
            ...(resources.gpus > 0
              ? { DeviceRequests: [{ Count: resources.gpus, Capabilities: [['gpu']] }] }
              : {}),
          }
        : {}),
    },
  }
}

/** `GET /containers/{id}/json`, as far as it is read here. */
export interface Inspected {
  Id: string
  Name: string
  Config: { Labels: Record<string, string>; Image: string }
  HostConfig: { Memory: number; LogConfig: { Type: string } }
  State: {
    Status: 'created' | 'running' | 'paused' | 'restarting' | 'removing' | 'exited' | 'dead'
    ExitCode: number
    OOMKilled: boolean
    Error: string
    StartedAt: string
    FinishedAt: string
  }
}
