import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { Socket } from 'node:net'
import type { Readable, Writable } from 'node:stream'
import { quote } from '../quote.ts'
import { identify, type ProcessIdentity } from './processes.ts'

/**
 * A long-lived shell that runs one task at a time as a foreground command: starting a task then costs one
 * vfork and exec by a tiny process, instead of a fork of the whole service (bench/README.md has figures).
 * It leads its own session and process group, outlives the service until its task has ended, and takes no
 * environment from it.
 */
export class SlotShell {
  readonly identity: ProcessIdentity
  readonly #child: ChildProcessByStdio<Writable, Readable, null>

  /** `onTaskEnd` is called with the name of the worker whose task has ended, its exit file being written. */
  constructor(options: {
    bootstrap: string
    umask: number
    onTaskEnd: (name: string) => void
    onExit: () => void
  }) {
    this.#child = spawn('/bin/sh', ['-s'], {
      cwd: '/',
      detached: true,
      env: {},
      stdio: ['pipe', 'pipe', 'ignore'],
    })
    const { pid } = this.#child
    this.#child.on('error', options.onExit)
    this.#child.on('exit', options.onExit)
    const identity = pid === undefined ? undefined : identify(pid)
    if (!identity) throw new Error('a slot shell could not be started')
    this.identity = identity
    // The shell's end is told by its exit event.
    this.#child.stdin.on('error', () => {})
    let unread = ''
    this.#child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      const lines = (unread + chunk).split('\n')
      unread = lines.pop() ?? ''
      for (const name of lines) options.onTaskEnd(name)
    })
    // TERM is for the task: the shell waits for it and writes down its exit code.
    this.#child.stdin.write(
      `trap : TERM\numask ${options.umask.toString(8)}\n. ${quote(options.bootstrap)}\n`,
    )
  }

  get isAlive(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null
  }

  run(job: string): void {
    this.#child.stdin.write(job)
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
}
