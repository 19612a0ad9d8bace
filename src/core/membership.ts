import type { Cluster, Logger, OrphanedTask, SeenTask } from './ports.ts'
import { until } from './until.ts'

/** Interval of heartbeats, and of looking for tasks of dead instances. */
const BEAT_MS = 2_000

/** Runs of this instance, as membership changes them. */
export interface Runs {
  /** Returns the tasks that this instance runs, each with its claim. */
  held(): Map<string, number>
  /** Releases a task if it is run by that claim: another instance has it now. */
  release(taskId: string, claim: number): void
  /** Resumes a running task, unless this instance runs it already. */
  resume(task: SeenTask): void
  /** Fails a task whose worker is lost, unless that is under way. */
  fail(orphan: OrphanedTask): void
  /** Cancels the task if this instance runs it. */
  cancel(taskId: string): void
}

/** Sends this instance's heartbeats, and takes over the tasks of instances that have died. */
export class Membership {
  readonly #cluster: Cluster
  readonly #runs: Runs
  readonly #log: Logger
  /** Settles once a heartbeat is stored and the claims of this instance were checked. */
  #confirmed = Promise.withResolvers<void>()
  /** Other instances may have claimed our tasks since the last check. */
  #isUnsure = false
  #isClosed = false
  #timer: NodeJS.Timeout | undefined
  #turn: Promise<void> = Promise.resolve()

  constructor(cluster: Cluster, runs: Runs, log: Logger) {
    this.#cluster = cluster
    this.#runs = runs
    this.#log = log
  }

  start(): void {
    this.#turn = this.#beat()
  }

  /**
   * Waits until this instance knows which tasks are still its own: before that it must not start or
   * stop a worker, since others may have considered it dead. Rejects when `signal` aborts.
   */
  async confirmed(signal: AbortSignal): Promise<void> {
    if (this.#cluster.isMember() && !this.#isUnsure) return
    await until(this.#confirmed.promise, signal)
  }

  /** Stops the heartbeats; takes over no more tasks. */
  stop(): void {
    this.#isClosed = true
    clearTimeout(this.#timer)
  }

  /** Lets other instances take over our tasks at once. Never rejects. */
  async leave(): Promise<void> {
    await this.#turn
    await this.#cluster.leave().catch((err: unknown) => {
      this.#log.warn({ err }, 'announcing the shutdown failed: others notice it later')
    })
  }

  async #beat(): Promise<void> {
    try {
      await this.#confirm()
    } catch (err) {
      this.#log.error({ err }, 'heartbeat or takeover failed, trying again')
    }
    if (this.#isClosed) return
    this.#timer = setTimeout(() => this.start(), BEAT_MS)
  }

  async #confirm(): Promise<void> {
    const cluster = this.#cluster
    if (!cluster.isMember()) this.#isUnsure = true
    if (!(await cluster.beat())) this.#isUnsure = true
    await this.#reconcile()
    // The check itself may have taken longer than a heartbeat is valid.
    if (cluster.isMember()) {
      this.#isUnsure = false
      this.#confirmed.resolve()
      this.#confirmed = Promise.withResolvers()
    }
    for (const taskId of await cluster.cancelRequests()) this.#runs.cancel(taskId)
    for (const orphan of await cluster.orphans()) {
      if (this.#isClosed) return
      if (orphan.isLost) this.#runs.fail(orphan)
      else this.#runs.resume(orphan)
    }
  }

  /**
   * Releases tasks that others have claimed. Resumes claimed tasks that this instance does not run:
   * it had released them, or the reply to its claim was lost.
   */
  async #reconcile(): Promise<void> {
    // Before the query: a task claimed during it is ours, and missing in its result.
    const held = this.#runs.held()
    const ours = await this.#cluster.ours()
    const claims = new Map(ours.map(({ taskId, claim }) => [taskId, claim]))
    for (const [taskId, claim] of held) {
      if (claims.get(taskId) !== claim) this.#runs.release(taskId, claim)
    }
    for (const task of ours) this.#runs.resume(task)
  }
}
