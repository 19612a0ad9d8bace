import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { lstat, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { createGzip } from 'node:zlib'
import type { V1ConfigMap } from '@kubernetes/client-node'
import { type LeftOut, leftOutFor, listTasks } from '../../core/tasks-folder.ts'
import { sharedTar } from '../worker-files.ts'
import { filesConfigMap } from './manifests.ts'

const KNOWN_MS = 1_000
/** Clocks of file systems tick: a file may change again in the tick in which it was looked at. */
const SETTLED_MS = 1_000

export interface Packed {
  configMap: V1ConfigMap
  zippedBytes: number
  leftOut: readonly LeftOut[]
}

/** The tasks folder as workers get it: packed once, and again after something in it has changed. */
export class PackedTasks {
  readonly #folder: string
  readonly #deployment: string
  #known: { packed: Promise<Packed>; until: number } | undefined
  #last: { print: string; packed: Packed } | undefined

  constructor(folder: string, deployment: string) {
    this.#folder = folder
    this.#deployment = deployment
  }

  /** Looks at the folder at most once a second: many tasks may come at once. */
  current(): Promise<Packed> {
    if (!this.#known || this.#known.until < Date.now()) {
      const packed = this.#look()
      this.#known = { packed, until: Date.now() + KNOWN_MS }
      packed.catch(() => {
        this.#known = undefined
      })
    }
    return this.#known.packed
  }

  async #look(): Promise<Packed> {
    const settledAt = Date.now() - SETTLED_MS
    const { print, changedAt } = await look(this.#folder)
    if (this.#last?.print === print) return this.#last.packed
    const packed = await this.#pack()
    // What could not be read may be readable at any moment, whatever its times say.
    const mayStay = changedAt < settledAt && packed.leftOut.length === 0
    this.#last = mayStay ? { print, packed } : undefined
    return packed
  }

  async #pack(): Promise<Packed> {
    const gzip = createGzip()
    const chunks: Buffer[] = []
    gzip.on('data', (chunk: Buffer) => chunks.push(chunk))
    const { tar, leftOut } = await sharedTar(this.#folder)
    const ended = once(gzip, 'end')
    for await (const chunk of tar) gzip.write(chunk)
    gzip.end()
    await ended
    const zipped = Buffer.concat(chunks)
    const configMap = filesConfigMap(zipped, this.#deployment)
    return { configMap, zippedBytes: zipped.length, leftOut }
  }
}

/** Returns a print of all that is in the folder, and when it changed last, in epoch ms. */
async function look(folder: string): Promise<{ print: string; changedAt: number }> {
  const { entries, leftOut } = await listTasks(folder)
  let changedAt = 0
  const lineOf = async (path: string, look: typeof stat) => {
    try {
      const { ino, size, mode, ctimeMs } = await look(join(folder, path))
      changedAt = Math.max(changedAt, ctimeMs)
      return [path, ino, size, mode, ctimeMs]
    } catch (err) {
      return [path, leftOutFor(path, err)?.why]
    }
  }
  const lines = entries.map(async ({ path, kind }) => [
    await lineOf(path, lstat),
    // What a link leads to may change while the link does not.
    ...(kind === 'link' ? [await lineOf(path, stat)] : []),
  ])
  const all = JSON.stringify([await Promise.all(lines), leftOut])
  return { print: createHash('sha256').update(all).digest('hex'), changedAt }
}
