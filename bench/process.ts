/** A process, by default Node, that writes into files: reading pipes would cost the bench time. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import type { LoopDelay } from './loop-delay.ts'
import { open } from './open.ts'

const POLL_MS = 20
const START_MS_MAX = 60_000
const STOP_MS_MAX = 10_000
export const LOOP_DELAY = new URL('./loop-delay.ts', import.meta.url).pathname

export class NodeProcess implements AsyncDisposable {
  readonly #child: ChildProcess
  readonly #stdout: string
  readonly #stderr: string

  /** `folder`: of its output. */
  constructor(
    args: string[],
    options: { folder: string; env: Record<string, string>; command?: string | undefined },
  ) {
    this.#stdout = join(options.folder, 'stdout')
    this.#stderr = join(options.folder, 'stderr')
    const files = [openSync(this.#stdout, 'w'), openSync(this.#stderr, 'w')] as const
    const { command = process.execPath, env } = options
    this.#child = spawn(command, args, { env, stdio: ['ignore', ...files] })
    for (const file of files) closeSync(file)
    open.add(this)
  }

  get pid(): number {
    const { pid } = this.#child
    if (pid === undefined) throw new Error('the process could not be started')
    return pid
  }

  /** Waits for a line of stdout that `matches`. Throws when the process ends before. */
  async line(matches: (line: string) => boolean): Promise<string> {
    return this.#lineOf(this.#stdout, (lines) => lines.find(matches))
  }

  /** Returns the delays since the last call; needs `--import LOOP_DELAY`. */
  async loopDelay(): Promise<LoopDelay> {
    const own = (lines: string[]) => lines.filter((line) => line.startsWith('{"loopDelay"'))
    const before = own(await linesOf(this.#stderr)).length
    this.#child.kill('SIGUSR2')
    const line = await this.#lineOf(this.#stderr, (lines) => own(lines)[before])
    // loop-delay.ts writes this object.
    return (JSON.parse(line) as { loopDelay: LoopDelay }).loopDelay
  }

  /** Returns the resident memory in MB. */
  async residentMb(): Promise<number> {
    const status = await readFile(`/proc/${this.pid}/status`, 'utf8')
    return Number(/VmRSS:\s+(\d+) kB/.exec(status)?.[1]) / 1024
  }

  /** Kills it with SIGKILL, as the kernel's OOM killer does. */
  async kill(): Promise<void> {
    const exited = once(this.#child, 'exit')
    this.#child.kill('SIGKILL')
    await exited
  }

  async [Symbol.asyncDispose](): Promise<void> {
    open.delete(this)
    if (this.#ended) return
    const exited = once(this.#child, 'exit')
    this.#child.kill('SIGTERM')
    const stubborn = setTimeout(() => this.#child.kill('SIGKILL'), STOP_MS_MAX)
    await exited
    clearTimeout(stubborn)
  }

  get #ended(): boolean {
    return this.#child.exitCode !== null || this.#child.signalCode !== null
  }

  async #lineOf(path: string, pick: (lines: string[]) => string | undefined): Promise<string> {
    for (let waitedMs = 0; waitedMs < START_MS_MAX && !this.#ended; waitedMs += POLL_MS) {
      const line = pick(await linesOf(path))
      if (line !== undefined) return line
      await pause(POLL_MS)
    }
    throw new Error(
      `the process did not print the expected line: ${await readFile(this.#stderr, 'utf8')}`,
    )
  }
}

/** Returns the complete lines of a file. */
async function linesOf(path: string): Promise<string[]> {
  return (await readFile(path, 'utf8')).split('\n').slice(0, -1)
}
