/** Setup of a task's worker: environment, secrets, repositories. */
import { type FieldError, InvalidRequestError, UnavailableError } from './errors.ts'
import {
  type GitHosts,
  type ImageConfig,
  type Repository,
  type SecretSource,
  UnusableSecretError,
  WorkerError,
  type WorkerSpec,
} from './ports.ts'
import type { Task } from './task.ts'
import type { TaskFiles } from './task-files.ts'
import {
  directoryOf,
  type GitConfig,
  repositoryName,
  secretReference,
  taskEnvironment,
  type WorkerConfig,
} from './worker-config.ts'
import type { WorkerSizes } from './worker-sizes.ts'

/** Username that GitHub, GitLab, Gitea and Azure DevOps accept with any owner's token. */
const USERNAME_DEFAULT = 'x-access-token'

export interface WorkerSetupOptions {
  secrets: SecretSource
  gitHosts: GitHosts
  files: Pick<TaskFiles, 'has'>
  sizes: WorkerSizes
  /** A task that logs more is ended with reason `log_limit`. */
  maxLogBytes: number
}

export class WorkerSetup {
  readonly #options: WorkerSetupOptions

  constructor(options: WorkerSetupOptions) {
    this.#options = options
  }

  /**
   * Throws `invalid_request`, which names each missing secret and each host that is not allowed,
   * and `workers_unavailable` while the service cannot read a secret.
   */
  async check(config: WorkerConfig): Promise<void> {
    const { secrets, gitHosts } = this.#options
    const missing = await Promise.all(
      namedSecrets(config).map(async ({ path, name }) => {
        const why = await secrets
          .read(name)
          .then((value) => (value === undefined ? 'does not exist' : undefined), whyUnusable)
          .catch((err: Error) => {
            throw new UnavailableError(err.message, { cause: err })
          })
        return why === undefined ? [] : [{ path, message: `the secret "${name}" ${why}` }]
      }),
    )
    const refused = (config.gitConfigs ?? []).flatMap(({ remoteUrl }, index): FieldError[] => {
      const message = gitHosts.refusal(new URL(remoteUrl))
      const path = `worker_config.git_configs.${index}.remote_url`
      return message === undefined ? [] : [{ path, message }]
    })
    const errors = [...missing.flat(), ...variableClashes(config), ...refused]
    if (errors.length > 0) throw new InvalidRequestError(errors)
  }

  /**
   * Returns the worker's spec with current secrets and addresses, and the values to mask in its
   * log. Throws a `WorkerError` with `startup_failed` when a secret has gone or a host is not
   * allowed, and another error while the service cannot read a secret or look a host up.
   */
  async specFor(
    task: Pick<
      Task,
      | 'taskId'
      | 'taskFileName'
      | 'workerName'
      | 'workerConfig'
      | 'terminateOnCompletion'
      | 'timeoutSeconds'
    > & { traceparent?: string | null },
  ): Promise<{ spec: WorkerSpec; secretValues: string[] }> {
    const { workerConfig } = task
    const gitConfigs = workerConfig.gitConfigs ?? []
    const values = await this.#secretValues(workerConfig)
    const variables = (references: readonly string[] = []) =>
      Object.fromEntries(
        references
          .map(secretReference)
          .map(({ name, variable }) => [variable, values.get(name) ?? '']),
      )
    const { password } = workerConfig.imageConfig ?? {}
    const repositories = await Promise.all(
      gitConfigs.map((config) => this.#repository(config, values)),
    )
    return {
      spec: {
        name: task.workerName,
        taskId: task.taskId,
        ...(await this.#location(task.taskFileName, gitConfigs)),
        repositories,
        environment: {
          ...variables(workerConfig.sharedSecrets),
          ...variables(workerConfig.personalSecrets),
          ...taskEnvironment(task),
        },
        startupScript: workerConfig.startupScript,
        image: workerConfig.workerImage,
        imageConfig: imageConfigOf(workerConfig, values),
        size: workerConfig.workerSize,
        resources:
          workerConfig.workerSize === undefined
            ? undefined
            : this.#options.sizes[workerConfig.workerSize],
        keepAfterwards: !task.terminateOnCompletion,
        timeoutSeconds: task.timeoutSeconds,
        maxLogBytes: this.#options.maxLogBytes,
        notes: (workerConfig.withoutEffect ?? []).map((field) => `${field} has no effect here`),
      },
      secretValues: [...new Set([...values.values(), ...(password ? [password] : [])])],
    }
  }

  async #secretValues(config: WorkerConfig): Promise<Map<string, string>> {
    const names = new Set(namedSecrets(config).map(({ name }) => name))
    const read = async (name: string): Promise<[string, string]> => {
      const failed = (why: string) =>
        new WorkerError('startup_failed', `The secret "${name}" ${why}`)
      try {
        const value = await this.#options.secrets.read(name)
        if (value === undefined) throw failed('does not exist any more')
        return [name, value]
      } catch (err) {
        throw err instanceof WorkerError ? err : failed(whyUnusable(err))
      }
    }
    return new Map(await Promise.all([...names].map(read)))
  }

  async #repository(config: GitConfig, secrets: Map<string, string>): Promise<Repository> {
    const url = new URL(config.remoteUrl)
    const password = config.secretName === undefined ? undefined : secrets.get(config.secretName)
    const username = config.username ?? USERNAME_DEFAULT
    return {
      url: config.remoteUrl,
      directory: directoryOf(config),
      branch: config.branch,
      depth: config.fetchDepth,
      sparseFolders: config.sparseCheckoutFolders ?? [],
      addresses: await this.#options.gitHosts.addresses(url),
      credential: password === undefined ? undefined : { username, password },
      // As in the Practicus SDK. An ssh key is never kept: it may open other repositories, too.
      keepCredential:
        password !== undefined && url.protocol !== 'ssh:' && config.saveSecret !== false,
    }
  }

  /** Returns where the task file is: in the tasks folder, or else in a cloned repository. */
  async #location(
    name: string,
    gitConfigs: readonly GitConfig[],
  ): Promise<Pick<WorkerSpec, 'taskFolder' | 'taskFileName'>> {
    const inRepository = locateInRepository(name, gitConfigs)
    if (!inRepository || (await this.#options.files.has(name))) {
      return { taskFolder: 'tasks', taskFileName: name }
    }
    const { config, path } = inRepository
    return { taskFolder: `home/${directoryOf(config)}`, taskFileName: path }
  }
}

/** Returns the repository and path that `<repository>/path/task.py` names, if it is configured. */
export function locateInRepository(
  taskFileName: string,
  gitConfigs: readonly GitConfig[] = [],
): { config: GitConfig; path: string } | undefined {
  const [first, ...rest] = taskFileName.split('/')
  const config = gitConfigs.find(({ remoteUrl }) => repositoryName(remoteUrl) === first)
  return config && rest.length > 0 ? { config, path: rest.join('/') } : undefined
}

function imageConfigOf(
  { imageConfig }: WorkerConfig,
  secrets: Map<string, string>,
): ImageConfig | undefined {
  if (!imageConfig) return undefined
  const { pullPolicy, username = '', secretName, pullSecretName } = imageConfig
  const named = secretName === undefined ? undefined : secrets.get(secretName)
  const password = imageConfig.password ?? named
  return {
    ...(pullPolicy === undefined ? {} : { pullPolicy }),
    ...(password === undefined ? {} : { credential: { username, password } }),
    ...(pullSecretName === undefined ? {} : { pullSecretName }),
  }
}

/** Percent-encodes as git does when it stores credentials. */
export function encodedForGit(text: string): string {
  const bytes = [...Buffer.from(text)].map((byte) => {
    const character = String.fromCharCode(byte)
    return /[\w.~-]/.test(character) ? character : `%${byte.toString(16).padStart(2, '0')}`
  })
  return bytes.join('')
}

function namedSecrets(config: WorkerConfig): Array<{ path: string; name: string }> {
  const listed = (field: string, references: readonly string[] = []) =>
    references.map((reference, index) => {
      return { path: `worker_config.${field}.${index}`, name: secretReference(reference).name }
    })
  const optional = (path: string, name: string | undefined) =>
    name === undefined ? [] : [{ path: `worker_config.${path}.secret_name`, name }]
  return [
    ...listed('personal_secrets', config.personalSecrets),
    ...listed('shared_secrets', config.sharedSecrets),
    ...(config.gitConfigs ?? []).flatMap(({ secretName }, index) =>
      optional(`git_configs.${index}`, secretName),
    ),
    ...optional('image_config', config.imageConfig?.secretName),
  ]
}

/** Returns an error for each secret whose environment variable another secret has already. */
function variableClashes(config: WorkerConfig): FieldError[] {
  const names = new Map<string, string>()
  const clashes = (field: string, references: readonly string[] = []) =>
    references.flatMap((reference, index): FieldError[] => {
      const { name, variable } = secretReference(reference)
      const other = names.get(variable) ?? name
      names.set(variable, other)
      if (other === name) return []
      const message = `is the variable "${variable}", as the secret "${other}" is; give it another: NAME:VARIABLE`
      return [{ path: `worker_config.${field}.${index}`, message }]
    })
  return [
    ...clashes('personal_secrets', config.personalSecrets),
    ...clashes('shared_secrets', config.sharedSecrets),
  ]
}

function whyUnusable(err: unknown): string {
  if (err instanceof UnusableSecretError) return err.message
  throw err
}
