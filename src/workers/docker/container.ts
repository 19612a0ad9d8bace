/** Requests and answers of the engine about containers. Pure. */
import { z } from 'zod'
import type { WorkerSpec } from '../../core/ports.ts'
import type { Exit } from '../completion.ts'
import { WORKER_USER, workerCommand } from '../worker-files.ts'

export const LABELS = {
  /** Deployment that the container belongs to: several may share an engine. */
  deployment: 'task-runner.instance',
  /** Name of the worker, which survives a rename of the container. */
  worker: 'task-runner.worker',
  taskId: 'task-runner.task-id',
  size: 'task-runner.size',
  createdAt: 'task-runner.created-at',
  maxLogBytes: 'task-runner.max-log-bytes',
  keeps: 'task-runner.keeps',
} as const

/** Kept, and its bootstrap marks the exit file when the task is over. Earlier versions: `yes`. */
const KEEPS = 'over'
/** Maximum processes and threads of a worker, against fork bombs. */
const PIDS_MAX = 4096
const NANO = 1e9
/** Latest instant that a Date can hold. */
const TIME_MAX = 8.64e15

export interface ContainerOptions {
  deployment: string
  image: string
  network: string
  /** `source:target[:ro]`, with a path or a volume as source. */
  mounts: readonly string[]
  /** CPUs of the engine's machine: it rejects requests for more. */
  cpusMax: number
  /** Docker's `local` driver keeps every byte; Podman has no such driver. */
  logDriver: 'local' | 'json-file'
  /** Time between TERM and KILL. */
  terminationGraceMs: number
  createdAt: number
}

/** Returns the body of `POST /containers/create`. It has no secrets: engine users can read it. */
export function containerRequest(spec: WorkerSpec, options: ContainerOptions): object {
  const { resources } = spec
  return {
    Image: options.image,
    Entrypoint: workerCommand(spec, options),
    Cmd: [],
    User: `${WORKER_USER}:${WORKER_USER}`,
    WorkingDir: '/',
    Labels: {
      [LABELS.deployment]: options.deployment,
      [LABELS.worker]: spec.name,
      [LABELS.taskId]: spec.taskId,
      [LABELS.size]: spec.size ?? '',
      [LABELS.createdAt]: String(options.createdAt),
      [LABELS.maxLogBytes]: String(spec.maxLogBytes),
      [LABELS.keeps]: spec.keepAfterwards ? KEEPS : '',
    },
    // The image's own health check is not used.
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
      // The driver adds 28 bytes per line, so this holds 5 MB even of empty lines.
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

const labels = z
  .record(z.string(), z.string())
  .nullish()
  .transform((given) => given ?? {})

/** Fields read of `GET /containers/{id}/json`. */
export const inspected = z.object({
  Id: z.string().min(1),
  Name: z.string(),
  Created: z.string(),
  Config: z.object({ Labels: labels, Image: z.string() }),
  HostConfig: z.object({
    Memory: z.number().default(0),
    LogConfig: z.object({ Type: z.string() }),
  }),
  State: z.object({
    /** One of those of `stateOf`; Podman has more. */
    Status: z.string().min(1),
    ExitCode: z.number(),
    OOMKilled: z.boolean().default(false),
    Error: z.string().default(''),
    StartedAt: z.string(),
    FinishedAt: z.string(),
  }),
})
export type Inspected = z.output<typeof inspected>

/** Fields read of `GET /containers/json`. */
export const listed = z.array(
  z.object({
    Id: z.string().min(1),
    Names: z.array(z.string()).nullish(),
    Image: z.string(),
    /** Same as `Status` of an inspected container. */
    State: z.string().min(1),
    Labels: labels,
    /** Seconds since 1970. */
    Created: z.number(),
  }),
)

/** Answer of `POST /containers/{id}/wait`. */
export const waited = z.object({ StatusCode: z.number() })

export type Listed = z.output<typeof listed>[number]

/** Data of a worker's container, from either kind of answer. */
export interface Known {
  id: string
  /** Name of its worker. */
  name: string
  taskId: string
  image: string
  size: string | null
  createdAt: number
}

/** Returns the state: created, running, paused, restarting, removing, exited or dead. */
export function stateOf(container: Inspected | Listed): string {
  return 'Config' in container ? container.State.Status : container.State
}

export function labelsOf(container: Inspected | Listed): Record<string, string> {
  return 'Config' in container ? container.Config.Labels : container.Labels
}

export function knownOf(container: Inspected | Listed): Known {
  const isInspected = 'Config' in container
  const labels = labelsOf(container)
  const name = isInspected ? container.Name : (container.Names?.[0] ?? container.Id)
  const engineTime = isInspected ? Date.parse(container.Created) : container.Created * 1000
  const createdAt = Number(labels[LABELS.createdAt])
  return {
    id: container.Id,
    // Containers of earlier versions have no such label, but the worker's name.
    name: labels[LABELS.worker] ?? name.replace(/^\//, ''),
    taskId: labels[LABELS.taskId] ?? '',
    image: isInspected ? container.Config.Image : container.Image,
    size: labels[LABELS.size] || null,
    createdAt: [createdAt, engineTime].find((time) => time > 0 && time < TIME_MAX) ?? 0,
  }
}

/** Returns whether the exit file of a kept container says that its task is over. */
export function isOver(container: Inspected | Listed, exit: Exit): boolean {
  return exit.isOver || labelsOf(container)[LABELS.keeps] !== KEEPS
}

/** Returns the log limit in bytes; there is none without a valid label. */
export function logLimitOf({ Config }: Inspected): number {
  return Number(Config.Labels[LABELS.maxLogBytes]) || Infinity
}
