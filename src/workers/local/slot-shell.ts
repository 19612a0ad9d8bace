import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { closeSync, constants, openSync, readdirSync, readlinkSync, rmSync } from 'node:fs'
import { Socket } from 'node:net'
import { join } from 'node:path'
import type { Readable, Writable } from 'node:stream'
import { quote } from '../quote.ts'
import { codeOf, LocalFailure, sorted, sortedAs } from './failures.ts'
import type { WorkerRecord } from './folders.ts'
import { SLOT_PIPE } from './job.ts'
import { GONE, identify, isAlive, kill, type ProcessIdentity } from './processes.ts'

/** Longer than any name of a worker. */
const LINE_LENGTH_MAX = 1024

/** Reading does not wait for what is not there yet. */
const READ = constants.O_RDONLY | constants.O_NONBLOCK
/** What the slot shell ends with when it cannot make its pipe. */
const NO_PIPE = 3
/**
 * Takes the log over when the service has died, which closes its input: until then it only notes which worker's log that is.
 * Its output is the pipe, to read from; it stands in the folder of the workers.
 */
const READER =
  'while read -r name; do worker=$name; done; [ -z "$worker" ] || exec cat <&1 >>"$worker/log"'

type Child = ChildProcessByStdio<Writable, Readable, null>

export interface SlotShellOptions {
  bootstrap: string
  umask: number
  workersDir: string
  /** The cgroup that it enters, if it can. */
  cgroup: string | undefined
  /** Where its pipe gets a name. It may not be there yet. */
  pipesDir: string
  /** Soft limit of open files; undefined: as the service's own. */
  openFiles?: number | undefined
  /** Called with the name of the worker whose task has ended, its exit file being written. */
  onTaskEnd: (slot: SlotShell, name: string) => void
  /** `hasFailed`: the shell ended by itself, as shells do that cannot fork. No signal ended it. */
  onExit: (slot: SlotShell, hasFailed: boolean) => void
}

/**
 * A long-lived shell that runs one task at a time as a foreground command: starting a task then costs one
 * vfork and exec by a tiny process, instead of a fork of the whole service (bench/README.md has figures).
 * It leads its own session and process group, outlives the service until its task has ended, and takes no
 * environment from it. Tasks write into a pipe that it holds open for reading and writing, so that nobody who reads from it
 * need be there.
 */
export class SlotShell {
  readonly identity: ProcessIdentity
  readonly #child: Child
  readonly #cgroup: string | undefined
  readonly #proofs: Array<PromiseWithResolvers<void>> = []
  #opened:
    | { path: string; pipe: number; reader: ProcessIdentity; readerInput: Writable | null }
    | undefined
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
      const shell = new SlotShell(child, identity, options)
      await shell.#open(options)
      return shell
    } catch (err) {
      // Its end is nobody's concern any more, and must not become an unheard error.
      child?.on('error', () => {})
      if (child?.pid !== undefined) kill(child.pid)
      throw sortedAs('no_processes', err)
    }
  }

  private constructor(child: Child, identity: ProcessIdentity, options: SlotShellOptions) {
    this.#child = child
    this.#cgroup = options.cgroup
    this.identity = identity
    child.on('error', () => this.#exited(options, false))
    child.on('exit', (code, signal) => this.#exited(options, signal === null, code))
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
  }

  /** What its tasks write. Reading from it does not block. */
  get pipe(): number | undefined {
    return this.#opened?.pipe
  }

  /** What a worker's record has of it, so that the next service finds what this one knows. */
  get traces(): Pick<WorkerRecord, 'reader' | 'cgroup'> {
    const { reader } = this.#opened ?? {}
    const cgroup = this.#cgroup
    return { ...(reader && { reader }), ...(cgroup !== undefined && { cgroup }) }
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

  /** `name`: of the worker whose job it is. */
  run(name: string, job: string): void {
    this.#opened?.readerInput?.write(`${name}\n`)
    this.#child.stdin.write(job)
  }

  /** Lets the idle shell fork once. Rejects when it cannot, which ends it. */
  prove(): Promise<void> {
    return this.#answered('(:); echo\n')
  }

  /** It ends after its current task, for which nobody here waits. Safe to repeat. */
  retire(): void {
    const { path, pipe, readerInput } = this.#opened ?? {}
    this.#opened = undefined
    if (pipe !== undefined) closeSync(pipe)
    if (path !== undefined) remove(path)
    this.#child.unref()
    for (const stream of [this.#child.stdin, readerInput]) stream?.end()
    for (const stream of [this.#child.stdin, this.#child.stdout, readerInput]) {
      // They are; the types only say streams.
      if (stream instanceof Socket) stream.unref()
    }
  }

  #answered(command: string): Promise<void> {
    const proof = Promise.withResolvers<void>()
    this.#proofs.push(proof)
    this.#child.stdin.write(command)
    return proof.promise
  }

  async #open({
    bootstrap,
    umask,
    openFiles,
    cgroup,
    workersDir,
    pipesDir,
  }: SlotShellOptions): Promise<void> {
    const path = join(pipesDir, `pipe-${randomUUID()}`)
    const [dir, fifo] = [quote(pipesDir), quote(path)]
    await this.#answered(
      [
        // TERM is for the task: the shell waits for it and writes down its exit code.
        'trap : TERM',
        cgroup === undefined ? '' : `echo $$ >${quote(cgroup)}/cgroup.procs`,
        `mkdir -p -m 700 ${dir} && mkfifo -m 600 ${fifo} && exec ${SLOT_PIPE}<>${fifo} || exit ${NO_PIPE}`,
        `umask ${umask.toString(8)}`,
        openFiles === undefined ? '' : `ulimit -Sn ${openFiles}`,
        `. ${quote(bootstrap)}`,
        'echo',
        '',
      ].join('\n'),
    )
    let blocking: number | undefined
    let pipe: number | undefined
    try {
      blocking = openSync(path, constants.O_RDONLY)
      pipe = openSync(path, READ)
      const child = spawn('/bin/sh', ['-c', READER], {
        ...{ cwd: workersDir, detached: true, env: {} },
        stdio: ['pipe', blocking, 'ignore'],
      })
      if (child.pid === undefined) await once(child, 'spawn')
      // Its end is nobody's concern: without it, what is in the pipe waits for the next start.
      child.on('error', () => {})
      child.stdin?.on('error', () => {})
      child.unref()
      const reader = identify(child.pid ?? 0)
      if (!reader) throw new LocalFailure('no_processes')
      this.#opened = { path, pipe, reader, readerInput: child.stdin }
    } catch (err) {
      if (pipe !== undefined) closeSync(pipe)
      remove(path)
      throw err
    } finally {
      if (blocking !== undefined) closeSync(blocking)
    }
  }

  #exited(options: SlotShellOptions, hasFailed: boolean, code?: number | null): void {
    const kind = code === NO_PIPE ? 'workers_folder_away' : 'no_processes'
    for (const { reject } of this.#proofs.splice(0)) reject(new LocalFailure(kind))
    options.onExit(this, hasFailed)
  }
}

/** Opens the pipe of a shell that an earlier process has started. Undefined: it has ended. */
export function openPipeOf(slot: ProcessIdentity, pipesDir: string): number | undefined {
  const folder = `/proc/${slot.pid}/fd`
  try {
    // Its number is another one while a task runs: shells put it aside then.
    for (const name of readdirSync(folder)) {
      if (!readlinkSync(join(folder, name)).startsWith(pipesDir)) continue
      const pipe = openSync(join(folder, name), READ)
      if (isAlive(slot)) return pipe
      closeSync(pipe)
    }
    return undefined
  } catch (err) {
    if (GONE.includes(codeOf(err) ?? '')) return undefined
    throw sorted(err)
  }
}

function remove(path: string): void {
  try {
    rmSync(path, { force: true })
  } catch {
    // The next start removes it.
  }
}
