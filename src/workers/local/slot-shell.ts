import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import { Socket } from 'node:net'
import type { Readable, Writable } from 'node:stream'
import { quote } from '../quote.ts'
import { LocalFailure, sortedAs } from './failures.ts'
import { identify, kill, type ProcessIdentity } from './processes.ts'

/** Longer than any name of a worker. */
const LINE_LENGTH_MAX = 1024

type Child = ChildProcessByStdio<Writable, Readable, null>

export interface SlotShellOptions {
  bootstrap: string
  umask: number
  /** Called with the name of the worker whose task has ended, its exit file being written. */
  onTaskEnd: (slot: SlotShell, name: string) => void
  /** `hasFailed`: the shell ended by itself, as shells do that cannot fork. No signal ended it. */
  onExit: (slot: SlotShell, hasFailed: boolean) => void
}

/**
 * A long-lived shell that runs one task at a time as a foreground command: starting a task then costs one
 * vfork and exec by a tiny process, instead of a fork of the whole service (bench/README.md has figures).
 * It leads its own session and process group, outlives the service until its task has ended, and takes no
 * environment from it.
 */
export class SlotShell {
  readonly identity: ProcessIdentity
  readonly #child: Child
  readonly #proofs: Array<PromiseWithResolvers<void>> = []
  #isKilled = false

  /** Throws a `LocalFailure` when no process can be started. */
  static async start(options: SlotShellOptions): Promise<SlotShell> {
    let child: Child | undefined
    try {
      child = spawn('/bin/sh', ['-s'], {
        cwd: '/',
        detached: true,
        env: {},
        stdio: ['pipe', 'pipe', 'ignore'],
      })
      // Not begun: the error comes as an event, which names the cause.
      if (child.pid === undefined) await once(child, 'spawn')
      const identity = identify(child.pid ?? 0)
      if (!identity) throw new LocalFailure('no_processes')
      return new SlotShell(child, identity, options)
    } catch (err) {
      // Its end is nobody's concern any more, and must not become an unheard error.
      child?.on('error', () => {})
      if (child?.pid !== undefined) kill(child.pid)
      throw sortedAs('no_processes', err)
    }
  }

  private constructor(child: Child, identity: ProcessIdentity, options: SlotShellOptions) {
    this.#child = child
    this.identity = identity
    child.on('error', () => this.#exited(options, false))
    child.on('exit', (_code, signal) => this.#exited(options, signal === null))
    // The shell's end is told by its exit event.
    child.stdin.on('error', () => {})
    let unread = ''
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      const lines = (unread + chunk).split('\n')
      unread = (lines.pop() ?? '').slice(-LINE_LENGTH_MAX)
      for (const name of lines) {
        if (name === '') this.#proofs.shift()?.resolve()
        else options.onTaskEnd(this, name)
      }
    })
    // TERM is for the task: the shell waits for it and writes down its exit code.
    child.stdin.write(
      `trap : TERM\numask ${options.umask.toString(8)}\n. ${quote(options.bootstrap)}\n`,
    )
  }

  /** False from `kill` on: its exit event comes later. */
  get isAlive(): boolean {
    return !this.#isKilled && this.#child.exitCode === null && this.#child.signalCode === null
  }

  /** Kills it with all of its group. */
  kill(): void {
    this.#isKilled = true
    kill(-this.identity.pid)
  }

  run(job: string): void {
    this.#child.stdin.write(job)
  }

  /** Lets the idle shell fork once. Rejects when it cannot, which ends it. */
  prove(): Promise<void> {
    const proof = Promise.withResolvers<void>()
    this.#proofs.push(proof)
    this.run('(:); echo\n')
    return proof.promise
  }

  /** It ends after its current task, for which nobody here waits. */
  retire(): void {
    this.#child.stdin.end()
    this.#child.unref()
    for (const pipe of [this.#child.stdin, this.#child.stdout]) {
      // They are; the types only say streams.
      if (pipe instanceof Socket) pipe.unref()
    }
  }

  #exited(options: SlotShellOptions, hasFailed: boolean): void {
    for (const { reject } of this.#proofs.splice(0)) reject(new LocalFailure('no_processes'))
    options.onExit(this, hasFailed)
  }
}
