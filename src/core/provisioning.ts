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

/** Provisions the workers of tasks. */
export class Provisioning {
  readonly #options: ProvisioningOptions

  constructor(options: ProvisioningOptions) {
    this.#options = options
  }

  /** Returns the task's worker: by name, unless its task id is known and another one. */
  async find({
    taskId,
    workerName,
  }: Pick<Task, 'taskId' | 'workerName'>): Promise<Worker | undefined> {
    const worker = await this.#options.backend.find(workerName)
    return worker && ['', taskId].includes(worker.taskId) ? worker : undefined
  }

  /**
   * Provisions a worker, or finds the one that an earlier attempt has made. Idempotent. Throws a
   * `WorkerError` that ends the task, the reason of the signal of `ends` that aborts, or an error
   * of the service, after which the caller retries.
   */
  async attempt(
    task: ClaimedTask,
    ends: readonly AbortSignal[],
    mayExist: boolean,
  ): Promise<Worker> {
    const { store, backend, setup, membership, provisioningTimeoutMs } = this.#options
    using deadline = new Deadline(provisioningTimeoutMs, ends)
    const { signal } = deadline
    let isConfirmed = true
    const confirm = async () => {
      isConfirmed = false
      await membership?.confirmed(signal)
      isConfirmed = true
    }
    try {
      const setUp = setup.specFor(task)
      const { spec, secretValues } = await until(setUp, signal).catch(async (err: unknown) => {
        // A worker made before needs no spec: a secret of it may be gone by now.
        const existing = mayExist ? await this.find(task) : undefined
        if (!existing) throw err
        return { spec: existing, secretValues: [] }
      })
      if (!('environment' in spec)) return spec
      if (secretValues.length > 0) {
        // Stored before the worker can print one. An earlier worker may have older values.
        const known = [...new Set([...task.secretValues, ...secretValues])]
        await store.keepSecretValues(task, known)
        task.secretValues = known
      }
      await confirm()
      return await backend.provision(spec, signal, confirm)
    } catch (err) {
      if (!isConfirmed) {
        const message = 'The database is unavailable: no task starts until it responds'
        throw new TaskRunnerError('store_unavailable', message, { cause: err })
      }
      if (!(err instanceof DOMException && err.name === 'TimeoutError')) throw err
      // While workers are unavailable, this throws instead: the task waits.
      await backend.check()
      const seconds = provisioningTimeoutMs / 1000
      const message = `The worker was not ready within ${seconds} seconds`
      throw new WorkerError('provisioning_timeout', message, { cause: err })
    }
  }
}
