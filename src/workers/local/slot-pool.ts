import { randomUUID } from 'node:crypto'
import type { SlotCgroups } from './cgroup.ts'
import { codeOf } from './failures.ts'
import { SlotShell, type SlotShellOptions } from './slot-shell.ts'

/** Keeps the slot shells that run no task, and gives each shell a cgroup where that can be had. */
export class SlotPool {
  readonly #options: Omit<SlotShellOptions, 'cgroup'>
  readonly #cgroups: SlotCgroups | undefined
  readonly #idle: SlotShell[] = []
  /** Cgroups of shells that have ended, in which something may still live. */
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

  /** Like `take`, and the shell has forked once, so that it can start a task. */
  async takeProven(): Promise<SlotShell> {
    const slot = await this.take()
    await slot.prove()
    return slot
  }

  /** Takes back a shell that runs no task, with nothing left of its last one. */
  giveBack(slot: SlotShell): void {
    if (this.#isClosed) slot.retire()
    else this.#idle.push(slot)
  }

  /** Removes the cgroups of shells that have ended, as far as they are empty. */
  removeCgroups(): void {
    this.#oldCgroups = this.#oldCgroups.filter((path) => this.#cgroups?.remove(path) === false)
  }

  /** Ends the idle shells. Those given back later end, too. */
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

  /** Returns undefined where none can be made: then the marks that processes carry have to do. */
  #makeCgroup(): string | undefined {
    try {
      return this.#cgroups?.make(`slot-${randomUUID()}`)
    } catch (err) {
      // There may be as many as there can be.
      if (codeOf(err) === undefined) throw err
      return undefined
    }
  }
}
