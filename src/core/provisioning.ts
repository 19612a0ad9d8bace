import { Deadline } from './deadline.ts'
import { TaskRunnerError } from './errors.ts'
import type { Membership } from './membership.ts'
import type { ClaimedTask, TaskStore, Worker, WorkerBackend } from './ports.ts'
import { WorkerError } from './ports.ts'
import type { Task } from './task.ts'
import { until } from './until.ts'
import type { WorkerSetup } from './worker-setup.ts'

export interface ProvisioningOptions {
  store: TaskStore
  backend: WorkerBackend
  setup: WorkerSetup
  membership: Membership | undefined
  provisioningTimeoutMs: number
}

/** Gets tasks their workers. */
export class Provisioning {
  readonly #options: ProvisioningOptions

  constructor(options: ProvisioningOptions) {
    this.#options = options
  }

  /**
   * The task's worker, if there is one: another task's worker of the same name is none of this one. One that tells no task is
   * this one's, and lost.
   */
  async find({
    taskId,
    workerName,
  }: Pick<Task, 'taskId' | 'workerName'>): Promise<Worker | undefined> {
    const worker = await this.#options.backend.find(workerName)
    return worker && ['', taskId].includes(worker.taskId) ? worker : undefined
  }

  /**
   * Gets the task a worker, or the one that an earlier attempt has begun. Idempotent. Throws a `WorkerError` where the task
   * is to end, and the reason of the one of `ends` that aborts; any other error is a trouble of ours.
   */
  async attempt(
    task: ClaimedTask,
    ends: readonly AbortSignal[],
    mayBeBegun: boolean,
  ): Promise<Worker> {
    const { store, backend, setup, membership, provisioningTimeoutMs } = this.#options
    using deadline = new Deadline(provisioningTimeoutMs, ends)
    const { signal } = deadline
    let isSure = true
    const sure = async () => {
      isSure = false
      await membership?.sure(signal)
      isSure = true
    }
    try {
      const looking = setup.specFor(task)
      const { spec, secretValues } = await until(looking, signal).catch(async (err: unknown) => {
        // What a worker needs may be gone, and the worker there all the same.
        const begun = mayBeBegun ? await this.find(task) : undefined
        if (!begun) throw err
        return { spec: begun, secretValues: [] }
      })
      if (!('environment' in spec)) return spec
      if (secretValues.length > 0) {
        // Before the worker can print one. A worker of an earlier claim may know older values.
        const known = [...new Set([...task.secretValues, ...secretValues])]
        await store.keepSecretValues(task, known)
        task.secretValues = known
      }
      await sure()
      return await backend.provision(spec, signal, sure)
    } catch (err) {
      if (!isSure) {
        const message = 'The database does not answer: no task may begin meanwhile'
        throw new TaskRunnerError('store_unavailable', message, { cause: err })
      }
      if (!(err instanceof DOMException && err.name === 'TimeoutError')) throw err
      // Time in which workers were unavailable does not count.
      await backend.check()
      const seconds = provisioningTimeoutMs / 1000
      const message = `The worker was not ready within ${seconds} seconds`
      throw new WorkerError('provisioning_timeout', message, { cause: err })
    }
  }
}
