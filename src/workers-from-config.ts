/** What the service and `runTask` both make of a configuration: the backend, and what its workers are given. */
import { access, constants } from 'node:fs/promises'
import { delimiter, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { AddressGuard } from './callbacks/address-guard.ts'
import { GuardedGitHosts } from './callbacks/git-hosts.ts'
import type { Config } from './config.ts'
import type { LogCursors, Logger, WorkerBackend } from './core/ports.ts'
import type { TaskFiles } from './core/task-files.ts'
import { LOG_BYTES_KEPT } from './core/task-runner.ts'
import { WorkerSetup } from './core/worker-setup.ts'
import { FileSecretSource } from './secrets/source.ts'
import { LocalBackend } from './workers/local/local-backend.ts'

/** Of a log, beyond what is told: a secret may lie across the border. */
const MASKING_OVERLAP_BYTES = 256 * 1024

export function newWorkerSetup(
  config: Config,
  files: TaskFiles,
  gitGuard: AddressGuard,
): WorkerSetup {
  return new WorkerSetup({
    secrets: new FileSecretSource({ folder: config.secretsDir, variables: config.secretVariables }),
    gitHosts: new GuardedGitHosts(gitGuard),
    files,
    sizes: config.workerSizes,
    maxLogBytes: config.maxLogBytes,
  })
}

/** The backend that the configuration names; what it needs is loaded only then. */
export function openBackend(
  config: Config,
  options: {
    /** Of local tasks. */
    umask: number
    /** Tells this service's workers from those of others. */
    instance: string
    logCursors: LogCursors
    /** By which the age of workers is judged: that of all instances together. */
    now: () => number
    log: Logger
  },
): Promise<WorkerBackend> {
  const { instance, logCursors, now, log } = options
  const common = {
    ...{ instance, now, log, tasksDir: config.tasksDir },
    images: { default: config.workerImage, prefix: config.workerImagePrefix },
    terminationGraceMs: config.terminationGraceMs,
    logBytesKept: LOG_BYTES_KEPT + MASKING_OVERLAP_BYTES,
  }
  const open = {
    local: async () => openLocal(config, options.umask),
    docker: async () => {
      const { DockerBackend } = await import('./workers/docker/docker-backend.ts')
      return new DockerBackend({
        ...common,
        engine: config.dockerEngine,
        network: config.dockerNetwork,
        mounts: config.workerMounts,
      })
    },
    kubernetes: async () => {
      const { KubernetesBackend } = await import('./workers/kubernetes/kubernetes-backend.ts')
      return new KubernetesBackend({
        ...{ ...common, ...config.kubernetes, logCursors },
        provisioningTimeoutMs: config.provisioningTimeoutMs,
        keptWorkerMs: config.keptWorkerMs,
      })
    },
  } satisfies Record<Config['workerBackend'], () => Promise<WorkerBackend>>
  return open[config.workerBackend]()
}

/** Workers of this machine. `umask` is that of the tasks. */
export async function openLocal(config: Config, umask: number): Promise<WorkerBackend> {
  const find = (command: string) => findCommand(command, config.path)
  return new LocalBackend({
    workersDir: join(config.dataDir, 'workers'),
    tasksDir: config.tasksDir,
    bootstrap: fileURLToPath(new URL('./workers/bootstrap.sh', import.meta.url)),
    interpreters: {
      python: (await find(config.pythonCommand)) ?? config.pythonCommand,
      shell: config.shellCommand ?? (await find('bash')) ?? '/bin/sh',
      node: process.execPath,
    },
    environment: { PATH: config.path, ...config.locale },
    umask,
    terminationGraceMs: config.terminationGraceMs,
  })
}

/** Looked up once instead of at every start of a task. */
async function findCommand(command: string, path: string): Promise<string | undefined> {
  if (command.includes('/')) return command
  for (const folder of path.split(delimiter)) {
    const candidate = join(folder, command)
    const found = await access(candidate, constants.X_OK).then(
      () => true,
      () => false,
    )
    if (found) return candidate
  }
  return undefined
}
