/** Measures the machine without the service. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { type FileHandle, mkdtemp, open as openFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { open } from './open.ts'
import { ENVIRONMENT, PYTHON, type Service } from './service.ts'

const INTERPRETERS: Record<string, string> = { sh: '/usr/bin/bash', py: `${PYTHON} -u` }
const WRITE_BYTES = 4096

/** Returns how long a shell command takes, in milliseconds; discards its output. */
export async function timeOf(command: string, folder: string): Promise<number> {
  const startedAt = performance.now()
  const child = spawn('/bin/sh', ['-c', command], {
    cwd: folder,
    env: { ...ENVIRONMENT, HOME: folder },
    stdio: ['ignore', 'ignore', 'inherit'],
  })
  const [code] = await once(child, 'exit')
  if (code !== 0) throw new Error(`exit code ${code} from: ${command}`)
  return performance.now() - startedAt
}

export type ScriptsPerSecond = (file: string, count: number, folder: string) => Promise<number>

/**
 * Ways to run a script many times with the service's interpreter. The output goes into a file
 * outside of the tasks folder, which the service would copy for each worker.
 */
export const RUN_MANY: Record<string, ScriptsPerSecond> = {
  'shell loop': async (file, count, folder) => {
    const loop = `i=0; while [ $i -lt ${count} ]; do ${interpreter(file)} ./${file}; i=$((i+1)); done`
    return (count * 1000) / (await timeOf(`{ ${loop}; } >../output </dev/null`, folder))
  },
  'xargs -P2': xargs(2),
  'xargs -P4': xargs(4),
  'xargs -P8': xargs(8),
}

function xargs(processes: number): ScriptsPerSecond {
  return async (file, count, folder) => {
    const command = `seq ${count} | xargs -P ${processes} -n 1 ${interpreter(file)} ./${file} >../output`
    return (count * 1000) / (await timeOf(command, folder))
  }
}

function interpreter(file: string): string {
  const command = INTERPRETERS[file.slice(file.lastIndexOf('.') + 1)]
  if (command === undefined) throw new Error(`no interpreter for ${file}`)
  return command
}

export const BARE_ACCEPT = 'GET /health/live plus one durable 4 KB write'

/** Measures the minimum cost of a durable accept over HTTP. */
export async function bareAccept(service: Service, disk: DurableWriter): Promise<number> {
  const startedAt = performance.now()
  await service.ping()
  return performance.now() - startedAt + (await disk.write())
}

/** Appends and waits for the disk, as any durable accept must. */
export class DurableWriter implements AsyncDisposable {
  readonly folder: string
  readonly #file: FileHandle
  readonly #content = Buffer.alloc(WRITE_BYTES, 'x')

  private constructor(folder: string, file: FileHandle) {
    this.folder = folder
    this.#file = file
    open.add(this)
  }

  static async start(): Promise<DurableWriter> {
    const folder = await mkdtemp(join(tmpdir(), 'task-runner-bench-disk-'))
    return new DurableWriter(folder, await openFile(join(folder, 'file'), 'a'))
  }

  /** Returns the time that it took, in milliseconds. */
  async write(): Promise<number> {
    const startedAt = performance.now()
    await this.#file.write(this.#content)
    await this.#file.datasync()
    return performance.now() - startedAt
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!open.delete(this)) return
    await this.#file.close()
    await rm(this.folder, { recursive: true })
  }
}
