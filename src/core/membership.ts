import type { Cluster, Logger, OrphanedTask, SeenTask } from './ports.ts'
import { until } from './until.ts'

/** How often others hear that we live, and we look for what they left. */
const BEAT_MS = 2_000

/** What membership does to the tasks of this instance. */
export interface Runs {
  /** Tasks that are run here, with the claim each is held by. */
  held(): Map<string, number>
  /** The task is not ours by that claim: nothing more is decided here. */
  letGo(taskId: string, claim: number): void
  /** Takes a running task on; one that is run here already stays as it is. */
  resume(task: SeenTask): void
  /** Ends a task whose worker is out of reach for good, however long that takes; one that is being ended stays as it is. */
  giveUp(orphan: OrphanedTask): void
  /** Someone wants the task ended. */
  cancel(taskId: string): void
}

/** Keeps this instance one of several: it tells that it lives, learns what is still its own, and goes on for the dead. */
export class Membership {
  readonly #cluster: Cluster
  readonly #runs: Runs
  readonly #log: Logger
  /** Settles when others know that we live, and we know which tasks are still ours. */
  #confirmed = Promise.withResolvers<void>()
  /** Others may have taken tasks of ours since we last knew. */
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
   * What is done to a worker waits for this: an instance that may have been thought dead does nothing until it knows.
   * Throws when `signal` aborts.
   */
  async sure(signal: AbortSignal): Promise<void> {
    if (this.#cluster.isMember() && !this.#isUnsure) return
    await until(this.#confirmed.promise, signal)
  }

  /** Takes on nothing more. */
  stop(): void {
    this.#isClosed = true
    clearTimeout(this.#timer)
  }

  /** Others may take what is left, at once. Never rejects. */
  async leave(): Promise<void> {
    await this.#turn
    await this.#cluster.leave().catch((err: unknown) => {
      this.#log.warn({ err }, 'leaving could not be told: others find out')
    })
  }

  async #beat(): Promise<void> {
    try {
      await this.#confirm()
    } catch (err) {
      this.#log.error({ err }, 'talking to the other instances failed, trying again')
    }
    if (this.#isClosed) return
    this.#timer = setTimeout(() => this.start(), BEAT_MS)
  }

  async #confirm(): Promise<void> {
    const cluster = this.#cluster
    if (!cluster.isMember()) this.#isUnsure = true
    if (!(await cluster.beat())) this.#isUnsure = true
    await this.#reconcile()
    // The answer may have come late as well.
    if (cluster.isMember()) {
      this.#isUnsure = false
      this.#confirmed.resolve()
      this.#confirmed = Promise.withResolvers()
    }
    for (const taskId of await cluster.cancelRequests()) this.#runs.cancel(taskId)
    for (const orphan of await cluster.orphans()) {
      if (this.#isClosed) return
      if (orphan.isLost) this.#runs.giveUp(orphan)
      else this.#runs.resume(orphan)
    }
  }

  /**
   * Others may have taken tasks of ours: those are let go. What is ours, and nobody runs, is taken up: it had been let go,
   * or the answer to its claim was lost.
   */
  async #reconcile(): Promise<void> {
    // What is claimed while we ask is not in the answer, and ours.
    const held = this.#runs.held()
    const ours = await this.#cluster.ours()
    const claims = new Map(ours.map(({ taskId, claim }) => [taskId, claim]))
    for (const [taskId, claim] of held) {
      if (claims.get(taskId) !== claim) this.#runs.letGo(taskId, claim)
    }
    for (const task of ours) this.#runs.resume(task)
  }
}
