import { randomUUID } from 'node:crypto'
import type { SlotCgroups } from './cgroup.ts'
import { codeOf } from './failures.ts'
import { SlotShell, type SlotShellOptions } from './slot-shell.ts'

/** Keeps the slot shells that run no task, and makes a cgroup for each shell, where possible. */
export class SlotPool {
  readonly #options: Omit<SlotShellOptions, 'cgroup'>
  readonly #cgroups: SlotCgroups | undefined
  readonly #idle: SlotShell[] = []
  /** Cgroups of shells that have ended; they may still have processes. */
  #oldCgroups: string[] = []
  #isClosed = false

  constructor(options: Omit<SlotShellOptions, 'cgroup'>, cgroups: SlotCgroups | undefined) {
    this.#options = options
    this.#cgroups = cgroups
  }

  /** Returns an idle shell, or starts one. Throws a `LocalFailure`. */
  async take(): Promise<SlotShell> {
    return this.#idle.pop() ?? (await this.#start())
  }

  /** Returns a shell that has just forked, and so can start a task. Throws a `LocalFailure`. */
  async takeProven(): Promise<SlotShell> {
    const slot = await this.take()
    await slot.prove()
    return slot
  }

  /** Takes back a shell that runs no task and has no processes of the last one. */
  giveBack(slot: SlotShell): void {
    if (this.#isClosed) slot.retire()
    else this.#idle.push(slot)
  }

  /** Removes the empty cgroups of shells that have ended. */
  removeCgroups(): void {
    this.#oldCgroups = this.#oldCgroups.filter((path) => this.#cgroups?.remove(path) === false)
  }

  /** Ends the idle shells, and later those that are given back. */
  close(): void {
    this.#isClosed = true
    for (const slot of this.#idle) slot.retire()
    this.removeCgroups()
    this.#cgroups?.close()
  }

  #start(): Promise<SlotShell> {
    const cgroup = this.#makeCgroup()
    return SlotShell.start({
      ...this.#options,
      cgroup,
      onExit: (slot, hasFailed) => {
        if (cgroup !== undefined) this.#oldCgroups.push(cgroup)
        this.removeCgroups()
        const idle = this.#idle.indexOf(slot)
        if (idle >= 0) {
          this.#idle.splice(idle, 1)
          slot.retire()
        }
        this.#options.onExit(slot, hasFailed)
      },
    })
  }

  /** Returns undefined if none can be made: processes are then found by their marks only. */
  #makeCgroup(): string | undefined {
    try {
      return this.#cgroups?.make(`slot-${randomUUID()}`)
    } catch (err) {
      // The limit of cgroups may be reached.
      if (codeOf(err) === undefined) throw err
      return undefined
    }
  }
}
