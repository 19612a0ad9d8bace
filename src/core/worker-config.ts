/** The worker that a task requests. Unset fields are absent; src/wire/ drops the wire's nulls. */
export interface WorkerConfig {
  workerImage?: string
  workerSize?: string
  /** Passed to the task as they are. */
  envVariables?: Record<string, string>
  /** References such as `NAME:VARIABLE`; see `secretReference`. */
  personalSecrets?: string[]
  sharedSecrets?: string[]
  gitConfigs?: GitConfig[]
  startupScript?: string
  imageConfig?: {
    pullPolicy?: 'Always' | 'IfNotPresent' | 'Never'
    username?: string
    password?: string
    /** Name of the secret that is the password. */
    secretName?: string
    /** Name of a Kubernetes secret. */
    pullSecretName?: string
  }
  logLevel?: string
  modulesLogLevel?: string
  /** Wire names of fields that have no effect in this service; the task's log lists them. */
  withoutEffect?: string[]
}

export interface GitConfig {
  remoteUrl: string
  secretName?: string
  saveSecret?: boolean
  username?: string
  localPath?: string
  branch?: string
  sparseCheckoutFolders?: string[]
  fetchDepth?: number
}

/**
 * Parses `NAME` or `NAME:VARIABLE`: a secret's name and its environment variable. Default: the name
 * with `_` for all characters but letters and digits.
 */
export function secretReference(reference: string): { name: string; variable: string } {
  const at = reference.lastIndexOf(':')
  if (at > 0) return { name: reference.slice(0, at), variable: reference.slice(at + 1) }
  const variable = reference.replace(/[^A-Za-z0-9_]/gu, '_').replace(/^(?=[0-9])/, '_')
  return { name: reference, variable }
}

/** Returns a repository's folder below the worker's home (`/home/ubuntu` in Practicus AI). */
export function directoryOf({ remoteUrl, localPath }: GitConfig): string {
  if (localPath === undefined) return `projects/${repositoryName(remoteUrl)}`
  const parts = localPath.replace(/^(~|\/home\/ubuntu)\/+/, '').split('/')
  return parts.filter((part) => part !== '' && part !== '.').join('/')
}

/** Returns `repo` of `https://host/group/repo.git`; empty if the URL has no path. */
export function repositoryName(remoteUrl: string): string {
  const path = decodeURIComponent(new URL(remoteUrl).pathname)
  return path
    .replace(/\/+$/, '')
    .replace(/\.git$/, '')
    .replace(/^.*\//, '')
}

/** Merges two configs: fields of `over` win; `envVariables` are merged by name. */
export function mergeWorkerConfigs(under: WorkerConfig, over: WorkerConfig): WorkerConfig {
  const merged: WorkerConfig = { ...under, ...over }
  if (under.envVariables && over.envVariables) {
    merged.envVariables = { ...under.envVariables, ...over.envVariables }
  }
  if (under.withoutEffect && over.withoutEffect) {
    merged.withoutEffect = [...new Set([...under.withoutEffect, ...over.withoutEffect])]
  }
  return merged
}

/** Returns a task's own environment variables and those of its request. */
export function taskEnvironment(task: {
  taskId: string
  taskFileName: string
  workerName: string
  workerConfig: WorkerConfig
  traceparent?: string | null
}): Record<string, string> {
  const { workerConfig } = task
  // In a task, the Practicus SDK reads the PRT_ names.
  const underBothNames = (name: string, value: string | undefined) =>
    value === undefined ? {} : { [name]: value, [`PRT_${name}`]: value }
  return {
    ...underBothNames('LOG_LEVEL', workerConfig.logLevel),
    ...underBothNames('MODULES_LOG_LEVEL', workerConfig.modulesLogLevel),
    ...(task.traceparent == null ? {} : { TRACEPARENT: task.traceparent }),
    ...workerConfig.envVariables,
    TASK_ID: task.taskId,
    TASK_FILE_NAME: task.taskFileName,
    WORKER_NAME: task.workerName,
  }
}
