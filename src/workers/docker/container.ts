/** What the engine is asked for, and what it tells. Pure. */
import { z } from 'zod'
import type { WorkerSpec } from '../../core/ports.ts'
import type { Exit } from '../completion.ts'
import { WORKER_USER, workerCommand } from '../worker-files.ts'

export const LABELS = {
  /** Id of the deployment that it belongs to, as several may share an engine. */
  deployment: 'task-runner.instance',
  /** Name of the worker, which the container keeps when it is renamed. */
  worker: 'task-runner.worker',
  taskId: 'task-runner.task-id',
  size: 'task-runner.size',
  createdAt: 'task-runner.created-at',
  maxLogBytes: 'task-runner.max-log-bytes',
  keeps: 'task-runner.keeps',
} as const

/** Its bootstrap says in the exit file when the task is over. `yes`, of the version before: it does not. */
const KEEPS = 'over'
/** Processes and threads of one worker: what a fork bomb is stopped at. */
const PIDS_MAX = 4096
const NANO = 1e9
/** Latest instant that a Date can hold. */
const TIME_MAX = 8.64e15

export interface ContainerOptions {
  deployment: string
  image: string
  network: string
  /** `source:target[:ro]` of this machine, or volumes. */
  mounts: readonly string[]
  /** CPUs of the engine's machine: it refuses to be asked for more. */
  cpusMax: number
  /** Docker's `local` driver keeps every byte; Podman has none of that name. */
  logDriver: 'local' | 'json-file'
  /** Between TERM and KILL. */
  terminationGraceMs: number
  createdAt: number
}

/** `POST /containers/create`. Nothing secret is in it: whoever may ask the engine can read it. */
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

const labels = z
  .record(z.string(), z.string())
  .nullish()
  .transform((given) => given ?? {})

/** `GET /containers/{id}/json`, as far as it is read here. */
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
    /** See `stateOf`; Podman has others. */
    Status: z.string().min(1),
    ExitCode: z.number(),
    OOMKilled: z.boolean().default(false),
    Error: z.string().default(''),
    StartedAt: z.string(),
    FinishedAt: z.string(),
  }),
})
export type Inspected = z.output<typeof inspected>

/** `GET /containers/json`, as far as it is read here. */
export const listed = z.array(
  z.object({
    Id: z.string().min(1),
    Names: z.array(z.string()).nullish(),
    Image: z.string(),
    /** As `Status` of an inspected one. */
    State: z.string().min(1),
    Labels: labels,
    /** Seconds since 1970. */
    Created: z.number(),
  }),
)

/** `POST /containers/{id}/wait`. */
export const waited = z.object({ StatusCode: z.number() })

export type Listed = z.output<typeof listed>[number]

/** Facts about a worker's container, from either kind of answer. */
export interface Known {
  id: string
  /** Name of its worker. */
  name: string
  taskId: string
  image: string
  size: string | null
  createdAt: number
}

/** What the engine calls it: created, running, paused, restarting, removing, exited, dead. */
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
    // A container without this label comes from an older version, and has its worker's name.
    name: labels[LABELS.worker] ?? name.replace(/^\//, ''),
    taskId: labels[LABELS.taskId] ?? '',
    image: isInspected ? container.Config.Image : container.Image,
    size: labels[LABELS.size] || null,
    createdAt: [createdAt, engineTime].find((time) => time > 0 && time < TIME_MAX) ?? 0,
  }
}

/** Whether the exit file of a container that stays says that its task is over. */
export function isOver(container: Inspected | Listed, exit: Exit): boolean {
  return exit.isOver || labelsOf(container)[LABELS.keeps] !== KEEPS
}

/** Maximum bytes that the container's task may log. Without a usable label there is no limit. */
export function logLimitOf({ Config }: Inspected): number {
  return Number(Config.Labels[LABELS.maxLogBytes]) || Infinity
}
