import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { closeSync, constants, openSync, readdirSync, readlinkSync, rmSync } from 'node:fs'
import { Socket } from 'node:net'
import { join } from 'node:path'
import type { Readable, Writable } from 'node:stream'
import { quote } from '../quote.ts'
import { classified, classifiedAs, codeOf, LocalFailure } from './failures.ts'
import type { WorkerRecord } from './folders.ts'
import { SLOT_PIPE } from './job.ts'
import { GONE, identify, isAlive, kill, type ProcessIdentity } from './processes.ts'

/** Maximum length of a line that is kept; names of workers are shorter. */
const LINE_LENGTH_MAX = 1024

/** Flags for reading a pipe without blocking. */
const READ = constants.O_RDONLY | constants.O_NONBLOCK
/** Exit code of a slot shell that cannot make its pipe. */
const NO_PIPE = 3
/**
 * Shell commands that write the log once the service has died, which closes their input. Until then
 * they read names of workers and remember the last one. Their output is the pipe, opened for
 * reading; their working folder is that of the workers.
 */
const READER =
  'while read -r name; do worker=$name; done; [ -z "$worker" ] || exec cat <&1 >>"$worker/log"'

type Child = ChildProcessByStdio<Writable, Readable, null>

export interface SlotShellOptions {
  bootstrap: string
  umask: number
  workersDir: string
  /** Cgroup that the shell tries to enter. */
  cgroup: string | undefined
  /** Folder for the names of pipes; the shell makes it. */
  pipesDir: string
  /** Soft limit of open files; undefined: the service's own. */
  openFiles?: number | undefined
  /** Called with the name of a worker whose task has ended, once its exit file is written. */
  onTaskEnd: (slot: SlotShell, name: string) => void
  /** `hasFailed`: the shell exited by itself, as when it cannot fork; no signal ended it. */
  onExit: (slot: SlotShell, hasFailed: boolean) => void
}

/**
 * A long-lived shell that runs one task at a time as a foreground command: starting a task then
 * costs one vfork and exec by a tiny process, instead of a fork of the whole service
 * (bench/README.md has figures). It leads its own session and process group, outlives the service
 * until its task has ended, and inherits no environment. Tasks write into a pipe that it keeps open
 * for reading and writing, so that they need no reader.
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
      // Not started: the error event, which `once` throws, has the cause.
      if (child.pid === undefined) await once(child, 'spawn')
      const identity = identify(child.pid ?? 0)
      if (!identity) throw new LocalFailure('no_processes')
      const shell = new SlotShell(child, identity, options)
      await shell.#open(options)
      return shell
    } catch (err) {
      // An error event without a listener would end the process.
      child?.on('error', () => {})
      if (child?.pid !== undefined) kill(child.pid)
      throw classifiedAs('no_processes', err)
    }
  }

  private constructor(child: Child, identity: ProcessIdentity, options: SlotShellOptions) {
    this.#child = child
    this.#cgroup = options.cgroup
    this.identity = identity
    child.on('error', () => this.#exited(options, false))
    child.on('exit', (code, signal) => this.#exited(options, signal === null, code))
    // The exit event reports the shell's end.
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

  /** Output of its tasks. Reading from it does not block. */
  get pipe(): number | undefined {
    return this.#opened?.pipe
  }

  /** Fields of the record by which a restarted service finds the reader and the cgroup. */
  get recordFields(): Pick<WorkerRecord, 'reader' | 'cgroup'> {
    const { reader } = this.#opened ?? {}
    const cgroup = this.#cgroup
    return { ...(reader && { reader }), ...(cgroup !== undefined && { cgroup }) }
  }

  /** Returns false from `kill` on, before the exit event. */
  get isAlive(): boolean {
    return !this.#isKilled && this.#child.exitCode === null && this.#child.signalCode === null
  }

  /** Kills its process group. */
  kill(): void {
    this.#isKilled = true
    kill(-this.identity.pid)
  }

  /** Runs a job. `name`: the worker's. */
  run(name: string, job: string): void {
    this.#opened?.readerInput?.write(`${name}\n`)
    this.#child.stdin.write(job)
  }

  /** Makes the idle shell fork once. Rejects if it cannot, which ends it. */
  prove(): Promise<void> {
    return this.#command('(:); echo\n')
  }

  /** Releases the shell, which exits after its current task. Idempotent. */
  retire(): void {
    const { path, pipe, readerInput } = this.#opened ?? {}
    this.#opened = undefined
    if (pipe !== undefined) closeSync(pipe)
    if (path !== undefined) remove(path)
    this.#child.unref()
    for (const stream of [this.#child.stdin, readerInput]) stream?.end()
    for (const stream of [this.#child.stdin, this.#child.stdout, readerInput]) {
      // All of them are sockets, although the types say streams.
      if (stream instanceof Socket) stream.unref()
    }
  }

  #command(command: string): Promise<void> {
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
    await this.#command(
      [
        // TERM is for the task: the shell waits for it and records its exit code.
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
        cwd: workersDir,
        detached: true,
        env: {},
        stdio: ['pipe', blocking, 'ignore'],
      })
      if (child.pid === undefined) await once(child, 'spawn')
      // Nothing depends on the reader: without it, output stays in the pipe until the next start.
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

/** Opens the pipe of an earlier process's shell; returns undefined if that has ended. */
export function openPipeOf(slot: ProcessIdentity, pipesDir: string): number | undefined {
  const folder = `/proc/${slot.pid}/fd`
  try {
    // Its descriptor is not 3 while a task runs: shells then duplicate it to another number.
    for (const name of readdirSync(folder)) {
      if (!readlinkSync(join(folder, name)).startsWith(pipesDir)) continue
      const pipe = openSync(join(folder, name), READ)
      if (isAlive(slot)) return pipe
      closeSync(pipe)
    }
    return undefined
  } catch (err) {
    if (GONE.includes(codeOf(err) ?? '')) return undefined
    throw classified(err)
  }
}

function remove(path: string): void {
  try {
    rmSync(path, { force: true })
  } catch {
    // The next start removes it.
  }
}
