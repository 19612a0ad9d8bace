import type { Logger, TaskStore, Worker, WorkerBackend } from './ports.ts'
import { isFinal } from './task.ts'

export interface ReaperOptions {
  store: TaskStore
  backend: WorkerBackend
  /** Time that workers with `terminate_on_completion=false` are kept. */
  keptWorkerMs: number
  /** Workers that are in Provisioning for longer are stuck. */
  provisioningTimeoutMs: number
  retentionMs: number
  /** The only instance whose workers this one can list; undefined: it can list all. */
  instance?: string | undefined
  intervalMs: number
  /** Called with the number of workers found without a task. */
  onLeaked?: (workers: number) => void
  now: () => number
  log: Logger
}

/** Compares workers with the store, and terminates workers that are left over. */
export class Reaper {
  readonly #options: ReaperOptions
  #lastLeaked: number | undefined
  #timer: NodeJS.Timeout | undefined
  #sweep: Promise<unknown> = Promise.resolve()
  #cleanupOfStuck: Promise<void> | undefined

  constructor(options: ReaperOptions) {
    this.#options = options
  }

  /** Calls `sweep` now and every `intervalMs`. */
  start(sweep: () => Promise<unknown> = () => this.sweep()): void {
    const turn = () => {
      this.#sweep = sweep().catch((err: unknown) =>
        this.#options.log.error({ err }, 'sweep failed'),
      )
    }
    turn()
    this.#timer = setInterval(turn, this.#options.intervalMs)
    this.#timer.unref()
  }

  async close(): Promise<void> {
    clearInterval(this.#timer)
    await this.#sweep
  }

  /** Sweeps workers and tasks. Returns the number of leaked workers found. Safe to repeat. */
  async sweep(): Promise<number> {
    const leaked = await this.sweepWorkers()
    await this.sweepTasks()
    return leaked
  }

  /** Removes tasks past their retention. Safe to repeat. */
  async sweepTasks(): Promise<void> {
    const { store, retentionMs, now, log } = this.#options
    let removed = 0
    // Batch by batch: more tasks may expire between two sweeps than one batch holds.
    for (let batch = -1; batch !== 0; removed += batch) {
      batch = await store.removeFinishedBefore(now() - retentionMs)
    }
    if (removed > 0) log.info({ removed }, 'removed tasks past their retention')
  }

  /**
   * Terminates workers without a task (leaks), workers of ended tasks unless they are still kept,
   * and workers stuck in Provisioning. Returns the number of leaks. Safe to repeat.
   */
  async sweepWorkers(): Promise<number> {
    const { store, backend, keptWorkerMs, now, log } = this.#options
    let leaked = 0
    const workers = await backend.list()
    await this.#noteGone(workers)
    for (const worker of workers) {
      const owner = await store.workerOwner(worker.taskId)
      if (!owner && worker.mayBeForeign) continue
      if (owner && !isFinal(owner.status)) continue
      if (owner?.kept && (owner.finishedAt ?? 0) + keptWorkerMs > now()) continue
      // The run of a task that has just ended delivers its callback, then terminates the worker.
      if (owner && !owner.kept && (owner.finishedAt ?? 0) + this.#options.intervalMs > now())
        continue
      if (!owner) leaked += 1
      log.warn({ worker: worker.name, taskId: worker.taskId }, 'terminating a worker left behind')
      await this.#terminate(worker)
    }
    this.#options.onLeaked?.(leaked)
    const level = leaked > 0 ? 'warn' : leaked === this.#lastLeaked ? 'debug' : 'info'
    this.#lastLeaked = leaked
    log[level]({ leaked }, 'workers leaked')
    await this.cleanUpStuck()
    return leaked
  }

  /** Notes workers that a crashed process removed but did not note: else their tasks stay. */
  async #noteGone(workers: readonly Worker[]): Promise<void> {
    const { store, retentionMs, instance, now } = this.#options
    const present = new Set(workers.map(({ taskId }) => taskId))
    for (const taskId of await store.workersRemembered(now() - retentionMs, instance)) {
      if (!present.has(taskId)) await store.workerTerminated(taskId)
    }
  }

  /** Terminates stuck workers, unless their task waits for the service. Never rejects. */
  cleanUpStuck(): Promise<void> {
    const { log, provisioningTimeoutMs } = this.#options
    // Many tasks may fail at the same moment, for the same cause.
    this.#cleanupOfStuck ??= this.cleanup(provisioningTimeoutMs, { exceptHindered: true })
      .then(
        (workers) => {
          if (workers.length > 0) log.warn({ workers }, 'terminated workers stuck in Provisioning')
        },
        (err: unknown) => log.error({ err }, 'cleaning up workers failed'),
      )
      .finally(() => {
        this.#cleanupOfStuck = undefined
      })
    return this.#cleanupOfStuck
  }

  /**
   * Terminates workers that have been in Provisioning for longer than `olderThanMs`, and returns
   * their names. `exceptHindered`: not if their task waits for the service.
   */
  async cleanup(
    olderThanMs: number,
    { exceptHindered = false }: { exceptHindered?: boolean } = {},
  ): Promise<string[]> {
    const { store, backend, now } = this.#options
    const ended: string[] = []
    for (const worker of await backend.list()) {
      if ((await worker.status()) !== 'Provisioning') continue
      if (worker.createdAt + olderThanMs > now()) continue
      const owner = await store.workerOwner(worker.taskId)
      if (worker.mayBeForeign && !owner) continue
      if (exceptHindered && owner?.isHindered) continue
      if (await this.#terminate(worker)) ended.push(worker.name)
    }
    return ended
  }

  /** False: terminating it failed, which is logged, so that the sweep goes on. */
  async #terminate(worker: Worker): Promise<boolean> {
    try {
      await worker.terminate()
      await this.#options.store.workerTerminated(worker.taskId)
      return true
    } catch (err) {
      this.#options.log.error({ err, worker: worker.name }, 'terminating a worker failed')
      return false
    }
  }
}
