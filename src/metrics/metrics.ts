import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client'
import type { DeliveryStore, TaskStore, WorkerBackend } from '../core/ports.ts'

/** From a glance to a day: a task may be over in milliseconds, or run for hours. */
const LONG_SECONDS = [0.01, 0.1, 1, 5, 15, 60, 300, 1_800, 3_600, 21_600, 86_400]
const SHORT_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5]
/**
 * Maximum outcomes remembered whose first attempt has not been recorded here: others may make it.
 */
const AWAITED_MAX = 10_000

/**
 * What Prometheus is told, gathered at the doors of the core, which knows nothing of it. Names and units by
 * https://prometheus.io/docs/practices/naming/; labels have a known, small number of values.
 */
export class Metrics {
  readonly #registry = new Registry()
  /** When tasks ended whose first attempt is still to come, in epoch ms. */
  readonly #finishedAt = new Map<string, number>()

  readonly #finished = this.#counter('tasks_finished_total', 'Tasks that ended', [
    'status',
    'reason',
  ])
  readonly #queueWait = this.#histogram('queue_wait_seconds', 'From accepted to claimed')
  readonly #provisioning = this.#histogram('provisioning_seconds', 'Until a worker ran its task')
  readonly #run = this.#histogram('run_seconds', 'From the start of a task to its end')
  readonly #callbackDelay = this.#histogram(
    'callback_delay_seconds',
    'From the end of a task to its first callback attempt',
  )
  readonly #attempts = this.#counter('callback_attempts_total', 'Callback attempts', ['outcome'])
  readonly #logBytes = this.#counter('log_bytes_total', 'Bytes that tasks logged')
  readonly #logBytesCut = this.#counter('log_bytes_cut_total', 'Bytes of logs that were not kept')
  readonly #leaked = this.#counter('workers_leaked_total', 'Workers found that no task knew')
  readonly #store = this.#histogram('store_seconds', 'Calls of the store', ['operation'])

  constructor(options: { tasks: TaskStore; backend: WorkerBackend; now: () => number }) {
    const { tasks, backend, now } = options
    collectDefaultMetrics({ register: this.#registry })
    const live = this.#gauge('tasks', 'Tasks that have not ended', ['status'])
    const oldest = this.#gauge('oldest_queued_seconds', 'How long the oldest waiting task waits')
    const workers = this.#gauge('workers', 'Workers that exist', ['status'])
    const unremovable = this.#gauge(
      'unremovable_folders',
      'Folders of ended workers that cannot be removed',
    )
    this.#collect = async () => {
      unremovable.set(backend.leftBehind?.() ?? 0)
      const [counts, exist] = await Promise.all([tasks.countLive(), statusesOf(backend)])
      live.reset()
      for (const { status, count } of counts) live.set({ status }, count)
      const since = counts.find(({ status }) => status === 'queued')?.oldestCreatedAt
      oldest.set(since === undefined ? 0 : Math.max(0, now() - since) / 1000)
      workers.reset()
      for (const status of exist) workers.inc({ status })
    }
  }

  readonly #collect: () => Promise<void>

  get contentType(): string {
    return this.#registry.contentType
  }

  /** In Prometheus' text format. Throws when the store or the workers cannot be asked. */
  async text(): Promise<string> {
    await this.#collect()
    return this.#registry.metrics()
  }

  /** Every name there is. */
  names(): string[] {
    return this.#registry.getMetricsAsArray().map(({ name }) => name)
  }

  leaked(workers: number): void {
    this.#leaked.inc(workers)
  }

  tasks(store: TaskStore): TaskStore {
    const claimNext: TaskStore['claimNext'] = async (options) => {
      const tasks = await store.claimNext(options)
      for (const { createdAt } of tasks) this.#queueWait.observe((options.at - createdAt) / 1000)
      return tasks
    }
    const finish: TaskStore['finish'] = async (task, end) => {
      const committed = await store.finish(task, end)
      if (!committed) return committed
      const { outcome, log, logBytes, delivery, finishedAt } = end
      this.#finished.inc({ status: outcome.status, reason: outcome.reason })
      if (task.startedAt !== null) this.#run.observe((finishedAt - task.startedAt) / 1000)
      this.#logBytes.inc(logBytes)
      this.#logBytesCut.inc(Math.max(0, log.totalBytes - log.content.length))
      if (delivery) this.#await(task.taskId, finishedAt)
      return committed
    }
    return this.#timed(store, { claimNext, finish })
  }

  deliveries(store: DeliveryStore): DeliveryStore {
    const recordAttempt: DeliveryStore['recordAttempt'] = async (
      taskId,
      attempt,
      next,
      leaseUntil,
    ) => {
      await store.recordAttempt(taskId, attempt, next, leaseUntil)
      this.#attempts.inc({ outcome: next.status === 'pending' ? 'failed' : next.status })
      const finishedAt = this.#finishedAt.get(taskId)
      this.#finishedAt.delete(taskId)
      if (finishedAt !== undefined && attempt.number === 1) {
        this.#callbackDelay.observe(Math.max(0, attempt.startedAt - finishedAt) / 1000)
      }
    }
    return this.#timed(store, { recordAttempt })
  }

  backend(backend: WorkerBackend): WorkerBackend {
    const provision: WorkerBackend['provision'] = async (...args) => {
      const done = this.#provisioning.startTimer()
      const worker = await backend.provision(...args)
      done()
      return worker
    }
    return wrapped(backend, { provision })
  }

  /** Forgets the oldest for it, where there is no more room. */
  #await(taskId: string, finishedAt: number): void {
    this.#finishedAt.set(taskId, finishedAt)
    const [oldest] = this.#finishedAt.keys()
    if (this.#finishedAt.size > AWAITED_MAX && oldest !== undefined) {
      this.#finishedAt.delete(oldest)
    }
  }

  /** The port with these methods instead of its own, and the time of each call told. */
  #timed<Port extends object>(port: Port, instead: Partial<Port>): Port {
    return wrapped(port, instead, (method, operation) => {
      const seconds = this.#store.labels(operation)
      return async (...args) => {
        const startedAt = performance.now()
        try {
          return await method(...args)
        } finally {
          seconds.observe((performance.now() - startedAt) / 1000)
        }
      }
    })
  }

  #counter(name: string, help: string, labelNames: string[] = []) {
    const registers = [this.#registry]
    return new Counter({ name: `task_runner_${name}`, help, labelNames, registers })
  }

  #gauge(name: string, help: string, labelNames: string[] = []) {
    const registers = [this.#registry]
    return new Gauge({ name: `task_runner_${name}`, help, labelNames, registers })
  }

  #histogram(name: string, help: string, labelNames: string[] = []) {
    return new Histogram({
      ...{ name: `task_runner_${name}`, help, labelNames, registers: [this.#registry] },
      buckets: labelNames.length > 0 ? SHORT_SECONDS : LONG_SECONDS,
    })
  }
}

type Method = (...args: unknown[]) => unknown

/** The port with these methods instead of its own; each is wrapped when it is first called. */
function wrapped<Port extends object>(
  port: Port,
  instead: Partial<Port>,
  wrap = (method: Method, _name: string) => method,
): Port {
  const methods = new Map<PropertyKey, Method>()
  return new Proxy(port, {
    get: (target, name) => {
      const known = methods.get(name)
      if (known) return known
      const value = (Reflect.get(instead, name) ?? Reflect.get(target, name)) as unknown
      if (typeof value !== 'function' || typeof name !== 'string') return value
      const method = wrap(value.bind(target), name)
      methods.set(name, method)
      return method
    },
  })
}

async function statusesOf(backend: WorkerBackend): Promise<string[]> {
  return Promise.all((await backend.list()).map((worker) => worker.status()))
}
