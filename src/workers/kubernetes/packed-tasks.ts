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
/** File times are coarse: a file may change again within this time without a new ctime. */
const SETTLED_MS = 1_000

export interface Packed {
  configMap: V1ConfigMap
  zippedBytes: number
  leftOut: readonly LeftOut[]
}

/** Packs the tasks folder for workers, and again after a change in it. */
export class PackedTasks {
  readonly #folder: string
  readonly #deployment: string
  #known: { packed: Promise<Packed>; until: number } | undefined
  #last: { fingerprint: string; packed: Packed } | undefined

  constructor(folder: string, deployment: string) {
    this.#folder = folder
    this.#deployment = deployment
  }

  /** Returns the packed folder, which is checked for changes at most once a second. */
  current(): Promise<Packed> {
    if (!this.#known || this.#known.until < Date.now()) {
      const packed = this.#packIfChanged()
      this.#known = { packed, until: Date.now() + KNOWN_MS }
      packed.catch(() => {
        this.#known = undefined
      })
    }
    return this.#known.packed
  }

  async #packIfChanged(): Promise<Packed> {
    const settledAt = Date.now() - SETTLED_MS
    const { fingerprint, changedAt } = await fingerprintOf(this.#folder)
    if (this.#last?.fingerprint === fingerprint) return this.#last.packed
    const packed = await this.#pack()
    // An unreadable file may become readable without a change of the folder.
    const mayReuse = changedAt < settledAt && packed.leftOut.length === 0
    this.#last = mayReuse ? { fingerprint, packed } : undefined
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

/** Returns a fingerprint of the folder's entries, and their last change in epoch ms. */
async function fingerprintOf(folder: string): Promise<{ fingerprint: string; changedAt: number }> {
  const { entries, leftOut } = await listTasks(folder)
  let changedAt = 0
  const lineOf = async (path: string, statOf: typeof stat) => {
    try {
      const { ino, size, mode, ctimeMs } = await statOf(join(folder, path))
      changedAt = Math.max(changedAt, ctimeMs)
      return [path, ino, size, mode, ctimeMs]
    } catch (err) {
      return [path, leftOutFor(path, err)?.why]
    }
  }
  const lines = entries.map(async ({ path, kind }) => [
    await lineOf(path, lstat),
    // The target of a link may change without the link.
    ...(kind === 'link' ? [await lineOf(path, stat)] : []),
  ])
  const all = JSON.stringify([await Promise.all(lines), leftOut])
  return { fingerprint: createHash('sha256').update(all).digest('hex'), changedAt }
}
