import type { Logger, TaskStore, Worker, WorkerBackend } from './ports.ts'
import { isFinal } from './task.ts'

export interface ReaperOptions {
  store: TaskStore
  backend: WorkerBackend
  /** Workers kept by `terminate_on_completion=false` end after this. */
  keptWorkerMs: number
  /** Workers in Provisioning for longer than this are stuck. */
  provisioningTimeoutMs: number
  retentionMs: number
  /** Whose workers alone can be seen here; undefined: all. */
  instance?: string | undefined
  intervalMs: number
  /** So many workers were found that no task knew. */
  onLeaked?: (workers: number) => void
  now: () => number
  log: Logger
}

/** Compares what exists with what is remembered, and ends what should not be there. */
export class Reaper {
  readonly #options: ReaperOptions
  #lastLeaked: number | undefined
  #timer: NodeJS.Timeout | undefined
  #sweep: Promise<unknown> = Promise.resolve()
  #cleanupOfStuck: Promise<void> | undefined

  constructor(options: ReaperOptions) {
    this.#options = options
  }

  /** Calls `sweep` now, and every `intervalMs` from then on. */
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

  /** Of workers and of tasks. Returns the number of leaked workers found. Safe to repeat. */
  async sweep(): Promise<number> {
    const leaked = await this.sweepWorkers()
    await this.sweepTasks()
    return leaked
  }

  /** Removes tasks past their retention. Safe to repeat. */
  async sweepTasks(): Promise<void> {
    const { store, retentionMs, now, log } = this.#options
    let removed = 0
    // A batch at a time, until none is left: there may be more in a minute than one batch holds.
    for (let batch = -1; batch !== 0; removed += batch) {
      batch = await store.removeFinishedBefore(now() - retentionMs)
    }
    if (removed > 0) log.info({ removed }, 'removed tasks past their retention')
  }

  /**
   * Ends workers that no task knows (leaks), that outlived their task, were kept long enough, or are stuck in
   * Provisioning. Returns the number of leaked workers found. Safe to repeat.
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
      // One that was just finished is being told about and terminated by its run.
      if (owner && !owner.kept && (owner.finishedAt ?? 0) + this.#options.intervalMs > now())
        continue
      if (!owner) leaked += 1
      log.warn({ worker: worker.name, taskId: worker.taskId }, 'terminating a worker left behind')
      await this.#end(worker)
    }
    this.#options.onLeaked?.(leaked)
    const level = leaked > 0 ? 'warn' : leaked === this.#lastLeaked ? 'debug' : 'info'
    this.#lastLeaked = leaked
    log[level]({ leaked }, 'workers leaked')
    await this.cleanUpStuck()
    return leaked
  }

  /** Whoever removed a worker may have been killed before it was noted, and its task would stay past its retention. */
  async #noteGone(workers: readonly Worker[]): Promise<void> {
    const { store, retentionMs, instance, now } = this.#options
    const there = new Set(workers.map(({ taskId }) => taskId))
    for (const taskId of await store.workersRemembered(now() - retentionMs, instance)) {
      if (!there.has(taskId)) await store.workerTerminated(taskId)
    }
  }

  /**
   * Ends workers stuck in Provisioning, at once instead of at the next sweep; never those whose task waits for what is ours to
   * mend. Never rejects.
   */
  cleanUpStuck(): Promise<void> {
    const { log, provisioningTimeoutMs } = this.#options
    // Many tasks may fail at the same moment for the same want.
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
   * Ends workers that have been in Provisioning for longer than `olderThanMs`. Returns their names. `exceptHindered`: leaves
   * those alone whose task waits for what is ours to mend.
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
      if (await this.#end(worker)) ended.push(worker.name)
    }
    return ended
  }

  /** False: it could not be ended, which must not keep the others. */
  async #end(worker: Worker): Promise<boolean> {
    try {
      await worker.terminate()
      await this.#options.store.workerTerminated(worker.taskId)
      return true
    } catch (err) {
      this.#options.log.error({ err, worker: worker.name }, 'a worker could not be terminated')
      return false
    }
  }
}
