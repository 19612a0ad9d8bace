/** What kind of worker a task wants. Optional fields are absent, never null: the wire's nulls end in src/wire/. */
export interface WorkerConfig {
  workerImage?: string
  workerSize?: string
  /** Passed to the task as they are. */
  envVariables?: Record<string, string>
  /** As requests name them: see `secretReference`. */
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
    /** Name of a secret of the cluster. */
    pullSecretName?: string
  }
  logLevel?: string
  modulesLogLevel?: string
  /** Wire names of fields that were set but have no effect in this service; noted in the task's log. */
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
 * What `NAME` or `NAME:VARIABLE` means: the secret's name, and the variable that it becomes. Without one, that is the
 * name with `_` for other characters than letters and digits.
 */
export function secretReference(reference: string): { name: string; variable: string } {
  const at = reference.lastIndexOf(':')
  if (at > 0) return { name: reference.slice(0, at), variable: reference.slice(at + 1) }
  const variable = reference.replace(/[^A-Za-z0-9_]/gu, '_').replace(/^(?=[0-9])/, '_')
  return { name: reference, variable }
}

/** Returns where a repository goes, below the worker's home: `/home/ubuntu` on the workers of Practicus AI. */
export function directoryOf({ remoteUrl, localPath }: GitConfig): string {
  if (localPath === undefined) return `projects/${repositoryName(remoteUrl)}`
  const parts = localPath.replace(/^(~|\/home\/ubuntu)\/+/, '').split('/')
  return parts.filter((part) => part !== '' && part !== '.').join('/')
}

/** `repo` of `https://host/group/repo.git`; empty when the URL has no path. */
export function repositoryName(remoteUrl: string): string {
  const path = decodeURIComponent(new URL(remoteUrl).pathname)
  return path
    .replace(/\/+$/, '')
    .replace(/\.git$/, '')
    .replace(/^.*\//, '')
}

/** Lays `over` on `under`: fields of `over` win, `envVariables` merge name by name. */
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

/** The variables a task is given besides those of its worker: its own names, then what the request sets. */
export function taskEnvironment(task: {
  taskId: string
  taskFileName: string
  workerName: string
  workerConfig: WorkerConfig
  traceparent?: string | null
}): Record<string, string> {
  const { workerConfig } = task
  // The Practicus SDK reads its own names in a task.
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
