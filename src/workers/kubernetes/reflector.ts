import { setTimeout as pause } from 'node:timers/promises'
import type { Logger } from '../../core/ports.ts'
import { ApiError, type KubernetesApi } from './api.ts'

const PAGE_SIZE = 500
/** A watch is ended by the server after this; both at random, so that many do not come back together. */
const WATCH_SECONDS = 240
const WATCH_SECONDS_SPREAD = 60
/** A connection that is dead says nothing. Bookmarks come once a minute. */
const IDLE_MS = 90_000
const RETRY_MS = 1_000
const RETRY_MAX_MS = 30_000

interface Resource {
  metadata?: { name?: string; resourceVersion?: string }
}

/**
 * What there is of one kind, as the API server tells it: a list, then a watch from there on, and a list again
 * when that is not to be had. One for all workers: a watch for each would overrun the API server.
 */
export class Reflector<T extends Resource> {
  readonly objects = new Map<string, T>()
  readonly #api: KubernetesApi
  readonly #path: string
  readonly #labelSelector: string
  readonly #onChange: () => void
  readonly #onDeleted: (last: T) => void
  readonly #log: Logger
  readonly #stopped = new AbortController()
  readonly #synced = Promise.withResolvers<void>()
  #running: Promise<void> | undefined
  /** When the API server was last heard of, epoch ms. */
  heardAt = 0

  constructor(
    api: KubernetesApi,
    options: {
      path: string
      labelSelector: string
      onChange: () => void
      /** With what was told last about it. */
      onDeleted: (last: T) => void
      log: Logger
    },
  ) {
    this.#api = api
    this.#path = options.path
    this.#labelSelector = options.labelSelector
    this.#onChange = options.onChange
    this.#onDeleted = options.onDeleted
    this.#log = options.log
    this.#synced.promise.catch(() => {})
  }

  /** Settles when the first list is there. Idempotent. */
  async synced(): Promise<void> {
    this.#running ??= this.#run()
    await this.#synced.promise
  }

  async stop(): Promise<void> {
    this.#stopped.abort()
    this.#synced.reject(this.#stopped.signal.reason)
    await this.#running
  }

  /** Never rejects. */
  async #run(): Promise<void> {
    const { signal } = this.#stopped
    let version: string | undefined
    for (let waitMs = RETRY_MS; !signal.aborted; ) {
      try {
        version ??= await this.#list()
        this.#synced.resolve()
        version = await this.#watch(version)
        waitMs = RETRY_MS
      } catch (err) {
        if (signal.aborted) return
        // What we have seen last is too old to go on from, or nobody knows what it was.
        if (err instanceof ApiError || err instanceof ExpiredError) version = undefined
        else this.#log.warn({ err, path: this.#path }, 'watching was interrupted')
        const jitter = 0.5 + Math.random()
        await pause(waitMs * jitter, undefined, { signal }).catch(() => {})
        waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)
      }
    }
  }

  async #list(): Promise<string> {
    const { signal } = this.#stopped
    const found = new Map<string, T>()
    let next: string | undefined
    let version = ''
    do {
      const page = await this.#api.json<{
        metadata: { resourceVersion: string; continue?: string }
        items: T[]
      }>('GET', this.#path, {
        query: {
          labelSelector: this.#labelSelector,
          limit: PAGE_SIZE,
          ...(next === undefined ? {} : { continue: next }),
        },
        signal,
      })
      for (const item of page.items) found.set(item.metadata?.name ?? '', item)
      next = page.metadata.continue || undefined
      version = page.metadata.resourceVersion
    } while (next !== undefined)
    // What is not there any more was deleted while nobody watched.
    for (const [name, last] of this.objects) if (!found.has(name)) this.#remove(name, last)
    for (const [name, item] of found) this.objects.set(name, item)
    this.#heard()
    return version
  }

  /** Until the server ends it. Returns the version that was seen last. */
  async #watch(from: string): Promise<string> {
    let version = from
    const idle = new AbortController()
    const timer = setTimeout(() => idle.abort(new Error('the watch was silent')), IDLE_MS)
    const signal = AbortSignal.any([this.#stopped.signal, idle.signal])
    try {
      const seconds = WATCH_SECONDS + Math.floor(Math.random() * WATCH_SECONDS_SPREAD)
      const stream = await this.#api.stream(this.#path, {
        query: {
          ...{ labelSelector: this.#labelSelector, resourceVersion: from },
          ...{ watch: 'true', allowWatchBookmarks: 'true', timeoutSeconds: seconds },
        },
        signal,
      })
      const decoder = new TextDecoder()
      let unread = ''
      for await (const chunk of stream) {
        timer.refresh()
        const lines = (unread + decoder.decode(chunk, { stream: true })).split('\n')
        unread = lines.pop() ?? ''
        for (const line of lines) if (line !== '') version = this.#apply(line) ?? version
        this.#heard()
      }
      return version
    } finally {
      clearTimeout(timer)
    }
  }

  /** One event. Returns the version it brought. One that cannot be read must not stop the others. */
  #apply(line: string): string | undefined {
    const event = JSON.parse(line) as {
      type: 'ADDED' | 'MODIFIED' | 'DELETED' | 'BOOKMARK' | 'ERROR'
      object: T & { code?: number; message?: string }
    }
    const { name = '', resourceVersion } = event.object.metadata ?? {}
    if (event.type === 'ERROR') throw new ExpiredError(event.object.message)
    if (event.type === 'DELETED') this.#remove(name, event.object)
    else if (event.type !== 'BOOKMARK') this.objects.set(name, event.object)
    return resourceVersion
  }

  #remove(name: string, last: T): void {
    this.objects.delete(name)
    this.#onDeleted(last)
  }

  #heard(): void {
    this.heardAt = Date.now()
    this.#onChange()
  }
}

class ExpiredError extends Error {
  override name = 'ExpiredError'
}
