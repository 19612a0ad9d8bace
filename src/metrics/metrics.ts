import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client'
import type { DeliveryStore, TaskStore, WorkerBackend } from '../core/ports.ts'

/** Buckets up to a day: tasks may run for milliseconds or for hours. */
const LONG_SECONDS = [0.01, 0.1, 1, 5, 15, 60, 300, 1_800, 3_600, 21_600, 86_400]
const SHORT_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5]
/** Maximum outcomes remembered before their first attempt, which another instance may make. */
const AWAITED_MAX = 10_000

/**
 * Collects the metrics for Prometheus by wrapping the ports of the core. Names and units follow
 * https://prometheus.io/docs/practices/naming/; labels have a small, known number of values.
 */
export class Metrics {
  readonly #registry = new Registry()
  /** When tasks ended whose first callback attempt is still to come, in epoch ms. */
  readonly #finishedAt = new Map<string, number>()

  readonly #finished = this.#counter('tasks_finished_total', 'Tasks that ended', [
    'status',
    'reason',
  ])
  readonly #queueWait = this.#histogram(
    'queue_wait_seconds',
    'From accepting a task to its first claim',
  )
  readonly #provisioning = this.#histogram('provisioning_seconds', 'Time to provision a worker')
  readonly #run = this.#histogram('run_seconds', 'From the start of a task to its end')
  readonly #callbackDelay = this.#histogram(
    'callback_delay_seconds',
    'From the end of a task to its first callback attempt',
  )
  readonly #attempts = this.#counter('callback_attempts_total', 'Callback attempts', ['outcome'])
  readonly #logBytes = this.#counter('log_bytes_total', 'Bytes that tasks logged')
  readonly #logBytesCut = this.#counter('log_bytes_cut_total', 'Bytes of logs that were not kept')
  readonly #leaked = this.#counter('workers_leaked_total', 'Workers found without a task')
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

  /** Returns the metrics as Prometheus text. Throws if the store or the backend is unavailable. */
  async text(): Promise<string> {
    await this.#collect()
    return this.#registry.metrics()
  }

  /** Returns the names of all metrics. */
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
      if (delivery) this.#awaitAttempt(task.taskId, finishedAt)
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

  /** Remembers when a task ended; forgets the oldest when there are too many. */
  #awaitAttempt(taskId: string, finishedAt: number): void {
    this.#finishedAt.set(taskId, finishedAt)
    const [oldest] = this.#finishedAt.keys()
    if (this.#finishedAt.size > AWAITED_MAX && oldest !== undefined) {
      this.#finishedAt.delete(oldest)
    }
  }

  /** Returns the port with some methods replaced, and the duration of each call measured. */
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
    const registers = [this.#registry]
    const buckets = labelNames.length > 0 ? SHORT_SECONDS : LONG_SECONDS
    return new Histogram({ name: `task_runner_${name}`, help, labelNames, registers, buckets })
  }
}

type Method = (...args: unknown[]) => unknown

/** Returns the port with some methods replaced, each wrapped when it is first used. */
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
