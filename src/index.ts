/** The public API of the package: `import … from 'task-runner'`. */
export {
  type Task,
  type TaskList,
  TaskRunnerApiError,
  TaskRunnerClient,
  type TaskRunnerClientOptions,
  type TaskRunnerRequest,
  type Worker,
} from './client/client.ts'
export {
  CallbackVerificationError,
  type TaskRunnerCallback,
  verifyCallback,
} from './client/verify-callback.ts'
export { InvalidRequestError, TaskRunnerError } from './core/errors.ts'
export { WorkerError } from './core/ports.ts'
export { type RunTaskOptions, runTask, type TaskRun } from './run-task.ts'
export {
  decodeWorkerFile,
  encodeWorkerFile,
  type WorkerConfigInput as WorkerConfig,
} from './wire/worker-file.ts'
