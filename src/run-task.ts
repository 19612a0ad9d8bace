import { randomUUID } from 'node:crypto'
import { mkdtemp } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, posix, resolve } from 'node:path'
import { type Config, loadConfig } from './config.ts'
import { TaskRunnerError } from './core/errors.ts'
import { Masker, maskedTail } from './core/masking.ts'
import type { Completion, Worker } from './core/ports.ts'
import { workerNameFor } from './core/task.ts'
import { TaskFiles } from './core/task-files.ts'
import { LOG_BYTES_KEPT } from './core/task-runner.ts'
import { mergeWorkerConfigs } from './core/worker-config.ts'
import { locateInRepository } from './core/worker-setup.ts'
import { AddressGuard } from './net/address-guard.ts'
import { parseWith } from './wire/fields.ts'
import { logText } from './wire/log-text.ts'
import { taskFileName } from './wire/task-request.ts'
import { parseWorkerFile, toWorkerConfig, workerConfigSchema } from './wire/worker-config.ts'
import type { WorkerConfigInput } from './wire/worker-file.ts'
import { removeTree } from './workers/local/removal.ts'
import { backendRules, newWorkerSetup, openLocal } from './workers-from-config.ts'

export interface RunTaskOptions {
  /** Path of the script in `filesPath`, or in a repository: `<repository>/task.py`. */
  fileName: string
  /** Folder to copy to the worker, with its worker defaults. Default: the working directory. */
  filesPath?: string | undefined
  /** Configuration of the worker, as in worker files and requests. */
  workerConfig?: WorkerConfigInput | undefined
  /** Default true. False keeps the worker for debugging, until `worker.terminate()`. */
  terminateOnCompletion?: boolean | undefined
  /** Called with the log as it is written; secrets in it are masked. */
  onLog?: ((text: string) => void) | undefined
  /** Aborting it ends the task and its worker. */
  signal?: AbortSignal | undefined
}

export interface TaskRun {
  worker: {
    name: string
    /** Returns the last 5 MB of the log. */
    logs(): Promise<string>
    /** Terminates a kept worker. Safe to repeat. */
    terminate(): Promise<void>
  }
  success: boolean
  /** Null if the task did not exit by itself. */
  exitCode: number | null
  /** Why the task ended, as in the API: `completed`, `exit_code`, `startup_failed`, … */
  reason: Completion['reason']
  message: string | null
}

/**
 * Runs a script on a worker of this machine, without a server, and waits until it has ended. A
 * script that fails is a result, not an error. Reads the settings of the service from environment
 * variables (`SECRETS_DIR`, `PYTHON_COMMAND`, …). Throws `TaskRunnerError` (`invalid_request`,
 * `task_file_not_found`), `WorkerError` if no worker could be started, or the signal's reason.
 */
export async function runTask(options: RunTaskOptions): Promise<TaskRun> {
  const { onLog, terminateOnCompletion = true } = options
  const taskId = `run-${randomUUID()}`
  const name = workerNameFor(taskId)
  const signal = options.signal ?? new AbortController().signal
  const settings = loadConfig(undefined, { serves: false })
  const dataDir = await mkdtemp(join(tmpdir(), 'task-runner-'))
  const config = { ...settings, dataDir, tasksDir: resolve(options.filesPath ?? '.') }
  const backend = await openLocal(config, process.umask())
  let isKept = false
  try {
    const { spec, secretValues } = await prepare(options, config, { taskId, workerName: name })
    const masker = new Masker(secretValues)
    const worker = await backend.provision(spec, signal)
    const [end] = await Promise.all([
      worker.completion(signal),
      onLog && follow(worker, masker, onLog, signal),
    ])
    const log = logText((await maskedTail(worker, masker, LOG_BYTES_KEPT)).log)
    isKept = !terminateOnCompletion
    return {
      worker: { name, logs: async () => log, terminate: () => terminate(config, name) },
      success: end.reason === 'completed' && end.exitCode === 0,
      exitCode: end.exitCode,
      reason: end.reason,
      message: end.message && masker.mask(Buffer.from(end.message)).toString(),
    }
  } finally {
    // Found by name: an aborted `provision` may have created a worker, too.
    if (!isKept) await (await backend.find(name))?.terminate()
    await backend.close()
    if (!isKept) await removeTree(dataDir)
  }
}

/** Validates the options and returns the worker's spec, like the service does for a request. */
async function prepare(
  options: RunTaskOptions,
  config: Config,
  names: { taskId: string; workerName: string },
) {
  const fileName = posix.normalize(parseWith(taskFileName, options.fileName, ['fileName']))
  const path = ['workerConfig']
  const rules = backendRules(config)
  const given = parseWith(workerConfigSchema, options.workerConfig ?? {}, path)
  const files = new TaskFiles(config.tasksDir, (content) => parseWorkerFile(content, rules))
  const defaults = await files.defaultsFor(fileName)
  const workerConfig = mergeWorkerConfigs(defaults, toWorkerConfig(given, { path, rules }))
  const isKnown =
    (await files.has(fileName)) || locateInRepository(fileName, workerConfig.gitConfigs)
  if (!isKnown) {
    const message = `There is no file "${fileName}" in ${config.tasksDir}`
    throw new TaskRunnerError('task_file_not_found', message)
  }
  const setup = newWorkerSetup(
    config,
    files,
    new AddressGuard(config.gitAllowedNetworks, { setting: 'GIT_ALLOWED_NETWORKS' }),
  )
  await setup.check(workerConfig)
  const { terminateOnCompletion = true } = options
  return setup.specFor({
    ...names,
    taskFileName: fileName,
    workerConfig,
    terminateOnCompletion,
    timeoutSeconds: config.taskTimeoutSeconds,
  })
}

async function follow(
  worker: Worker,
  masker: Masker,
  onLog: (text: string) => void,
  signal: AbortSignal,
): Promise<void> {
  const decoder = new TextDecoder()
  const masked = masker.stream()
  const pass = (text: string) => text !== '' && onLog(text)
  for await (const bytes of worker.follow({ from: 0, signal })) {
    pass(decoder.decode(masked.push(bytes), { stream: true }))
  }
  // After an abort, the bytes held back may be half a secret.
  if (!signal.aborted) pass(decoder.decode(masked.flush()))
}

/** Terminates a kept worker with a new backend, since the one that started it was closed. */
async function terminate(config: Config, name: string): Promise<void> {
  const backend = await openLocal(config, process.umask())
  try {
    await (await backend.find(name))?.terminate()
  } finally {
    await backend.close()
  }
  await removeTree(config.dataDir)
}
