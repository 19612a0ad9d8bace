/** Creates the backend and the worker setup from the configuration. */
import { access, constants } from 'node:fs/promises'
import { delimiter, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Config } from './config.ts'
import type { Logger, WorkerBackend } from './core/ports.ts'
import type { TaskFiles } from './core/task-files.ts'
import { LOG_BYTES_KEPT } from './core/task-runner.ts'
import { WorkerSetup } from './core/worker-setup.ts'
import type { AddressGuard } from './net/address-guard.ts'
import { GuardedGitHosts } from './net/git-hosts.ts'
import { FileSecretSource } from './secrets/source.ts'
import type { BackendRules } from './wire/worker-config.ts'
import { LocalBackend } from './workers/local/local-backend.ts'
import { openFilesAtStart } from './workers/local/open-files.ts'

/** Extra bytes read of a log: a secret may begin before the part that is shown. */
const MASKING_OVERLAP_BYTES = 256 * 1024
const LOG_BYTES_READ = LOG_BYTES_KEPT + MASKING_OVERLAP_BYTES

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

/** Returns what the configured backend accepts in a `worker_config`. */
export function backendRules(config: Config): BackendRules {
  return { backend: config.workerBackend, sizes: config.workerSizes }
}

/** Opens the configured backend, and imports only its modules. */
export function openBackend(
  config: Config,
  options: {
    /** File mode mask of local tasks. */
    umask: number
    /** Id that distinguishes this service's workers from those of others. */
    deployment: string
    /** Id that earlier versions gave to container workers instead. */
    legacyInstance: string
    /** Called if the thread of local workers ends unexpectedly. */
    onThreadDeath: (err: Error) => void
    /** Clock shared by all instances, for the age of workers. */
    now: () => number
    log: Logger
  },
): Promise<WorkerBackend> {
  const { deployment, legacyInstance, onThreadDeath, now, log } = options
  const common = {
    now,
    log,
    tasksDir: config.tasksDir,
    images: { default: config.workerImage, prefix: config.workerImagePrefix },
    home: config.workerHome,
    terminationGraceMs: config.terminationGraceMs,
    logBytesKept: LOG_BYTES_READ,
  }
  const open = {
    local: () => openLocal(config, options.umask, { onThreadDeath, log }),
    docker: async () => {
      const { DockerBackend } = await import('./workers/docker/docker-backend.ts')
      return new DockerBackend({
        ...common,
        deployment,
        legacyInstance,
        engine: config.dockerEngine,
        network: config.dockerNetwork,
        mounts: config.workerMounts,
      })
    },
    kubernetes: async () => {
      const { KubernetesBackend } = await import('./workers/kubernetes/kubernetes-backend.ts')
      return new KubernetesBackend({
        ...common,
        deployment,
        legacyInstance,
        namespace: config.kubernetesNamespace,
        serviceAccount: config.kubernetesServiceAccount,
        queue: config.kubernetesQueue,
        provisioningTimeoutMs: config.provisioningTimeoutMs,
        keptWorkerMs: config.keptWorkerMs,
      })
    },
  } satisfies Record<Config['workerBackend'], () => Promise<WorkerBackend>>
  return open[config.workerBackend]()
}

/** Opens the backend of this machine; tasks get `umask`. Throws if the data folder is unusable. */
export async function openLocal(
  config: Config,
  umask: number,
  options: { onThreadDeath?: (err: Error) => void; log?: Logger } = {},
): Promise<WorkerBackend> {
  const find = (command: string) => findCommand(command, config.path)
  const settings = {
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
    openFiles: openFilesAtStart(),
    terminationGraceMs: config.terminationGraceMs,
    logBytesKept: LOG_BYTES_READ,
  }
  const backend = new LocalBackend(settings, options)
  await backend.ready
  return backend
}

/** Returns the path of a command, which is looked up once and not at every start of a task. */
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
