import { setTimeout as pause } from 'node:timers/promises'
import type { Logger } from '../../core/ports.ts'
import type { KubernetesApi } from './api.ts'
import { ApiError, ApiUnavailableError, type FailureKind } from './failures.ts'

const PAGE_SIZE = 500
/** Time after which the server ends a watch, plus a random part so that watches spread out. */
const WATCH_SECONDS = 240
const WATCH_SECONDS_SPREAD = 60
/** Silence after which a watch is opened again: its connection may be dead. */
const IDLE_MS = 30_000
/** Time limit for the answer to a watch. */
const ANSWER_MS = 10_000
const RETRY_MS = 1_000
/** Tasks may wait this long after the API is back. */
const RETRY_MAX_MS = 5_000
/** Some servers close a watch of an expired version without an error (kubernetes#137089). */
const EMPTY_WATCHES_MAX = 3
const EMPTY_WATCH_MS = 5_000
/** Failures after which a watch can resume from the last version. */
const TRANSIENT: readonly FailureKind[] = [
  'unreachable',
  'timed_out',
  'credentials',
  'unauthorized',
  'busy',
  'server_error',
]

interface Resource {
  metadata?: { uid?: string; resourceVersion?: string; managedFields?: unknown }
}

/**
 * Keeps a copy of all objects of one kind: lists them, then watches for changes, and lists again if
 * the watch cannot resume. All workers share it, to spare the API server.
 */
export class Reflector<T extends Resource> {
  /** Objects by uid, since names are reused. */
  readonly objects = new Map<string, T>()
  readonly #api: KubernetesApi
  readonly #path: string
  readonly #labelSelector: string
  readonly #answer: string
  readonly #onChange: (object: T) => void
  readonly #onDeleted: (last: T) => void
  readonly #log: Logger
  readonly #idleMs: number
  readonly #stopped = new AbortController()
  readonly #synced = Promise.withResolvers<void>()
  #running: Promise<void> | undefined
  /** Last version seen, from which a watch resumes. Undefined: a list is needed first. */
  #version: string | undefined
  #listedAt = Number.NEGATIVE_INFINITY
  /** Current failure and when it began (`performance.now()`); undefined while a watch works. */
  problem: { message: string; since: number } | undefined
  /** When the watch began, not counting short breaks (`performance.now()`). */
  watchedSince: number | undefined

  constructor(
    api: KubernetesApi,
    options: {
      path: string
      labelSelector: string
      /** Kind of the list, such as `JobList`. */
      answer: string
      onChange: (object: T) => void
      /** Called with the last state of a deleted object. */
      onDeleted: (last: T) => void
      log: Logger
      /** Silence after which a watch is opened again. */
      idleMs?: number | undefined
    },
  ) {
    this.#api = api
    this.#path = options.path
    this.#labelSelector = options.labelSelector
    this.#answer = options.answer
    this.#onChange = options.onChange
    this.#onDeleted = options.onDeleted
    this.#log = options.log
    this.#idleMs = options.idleMs ?? IDLE_MS
    this.#synced.promise.catch(() => {})
  }

  /** Starts it, and waits for the first list. Idempotent. */
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
    let waitMs = RETRY_MS
    let emptyWatches = 0
    while (!signal.aborted) {
      const began = performance.now()
      const progress = { events: 0, isAnswered: false }
      let mustWait = false
      try {
        if (this.#version === undefined) await this.#list()
        this.#synced.resolve()
        await this.#watch(this.#version ?? '', progress)
        mustWait = progress.events === 0 && performance.now() - began < EMPTY_WATCH_MS
        emptyWatches = mustWait ? emptyWatches + 1 : 0
        if (emptyWatches >= EMPTY_WATCHES_MAX) this.#version = undefined
      } catch (err) {
        if (signal.aborted) return
        const isSilent = err instanceof SilentError && progress.isAnswered
        if (!isSilent) this.#failed(err)
        mustWait = !isSilent && !(isExpired(err) && this.#isListOld())
        // The backoff starts again after each answer.
        if (progress.isAnswered) waitMs = RETRY_MS
      }
      if (!mustWait) {
        waitMs = RETRY_MS
        continue
      }
      const jitter = 0.5 + Math.random()
      await pause(waitMs * jitter, undefined, { signal }).catch(() => {})
      waitMs = Math.min(waitMs * 2, RETRY_MAX_MS)
    }
  }

  #failed(err: unknown): void {
    const kind =
      err instanceof ApiError || err instanceof ApiUnavailableError ? err.kind : undefined
    // The last version is too old to resume from, or may be.
    if (isExpired(err) || (kind && !TRANSIENT.includes(kind))) this.#version = undefined
    const message = err instanceof Error ? err.message : String(err)
    this.problem = { message, since: this.problem?.since ?? performance.now() }
    this.#log.warn({ err, path: this.#path }, 'watching was interrupted')
  }

  /** Returns whether the last list is old enough to list again at once after an expired version. */
  #isListOld(): boolean {
    return performance.now() - this.#listedAt >= EMPTY_WATCH_MS
  }

  async #list(): Promise<void> {
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
        answer: this.#answer,
        isUrgent: true,
      })
      for (const item of page.items) found.set(item.metadata?.uid ?? '', item)
      next = page.metadata.continue || undefined
      version = page.metadata.resourceVersion
    } while (next !== undefined)
    // Missing objects were deleted while there was no watch.
    for (const [uid, last] of this.objects) if (!found.has(uid)) this.#remove(uid, last)
    for (const [uid, item] of found) this.#put(uid, item)
    this.#version = version
    this.#listedAt = performance.now()
  }

  /** Watches until the server ends the watch. */
  async #watch(from: string, progress: { events: number; isAnswered: boolean }): Promise<void> {
    const idle = new AbortController()
    const abort = () => idle.abort(new SilentError())
    let timer = setTimeout(abort, Math.min(this.#idleMs, ANSWER_MS))
    const signal = AbortSignal.any([this.#stopped.signal, idle.signal])
    try {
      const seconds = WATCH_SECONDS + Math.floor(Math.random() * WATCH_SECONDS_SPREAD)
      const stream = await this.#api.stream(this.#path, {
        query: {
          labelSelector: this.#labelSelector,
          resourceVersion: from,
          watch: 'true',
          allowWatchBookmarks: 'true',
          timeoutSeconds: seconds,
        },
        signal,
        type: 'json',
        isUrgent: true,
      })
      progress.isAnswered = true
      clearTimeout(timer)
      timer = setTimeout(abort, this.#idleMs)
      const now = performance.now()
      const isBack = this.problem && now - this.problem.since >= EMPTY_WATCH_MS
      if (isBack || this.watchedSince === undefined) this.watchedSince = now
      this.problem = undefined
      const decoder = new TextDecoder()
      let unread: string[] = []
      for await (const chunk of stream) {
        timer.refresh()
        const [head = '', ...lines] = decoder.decode(chunk, { stream: true }).split('\n')
        // Joined only once a line is complete, since chunks may be single bytes.
        unread.push(head)
        for (const line of lines) {
          if (this.#apply(unread.join(''))) progress.events += 1
          unread = [line]
        }
      }
    } catch (err) {
      throw idle.signal.aborted ? idle.signal.reason : err
    } finally {
      clearTimeout(timer)
    }
  }

  /** Applies one event. Returns false if it is unreadable, which must not stop the others. */
  #apply(line: string): boolean {
    if (line === '') return false
    try {
      const { type, object } = JSON.parse(line) as {
        type: 'ADDED' | 'MODIFIED' | 'DELETED' | 'BOOKMARK' | 'ERROR'
        object: T & { code?: number; message?: string }
      }
      if (type === 'ERROR') throw new ExpiredError(object?.message)
      const { uid, resourceVersion } = object.metadata ?? {}
      this.#version = resourceVersion ?? this.#version
      if (type === 'BOOKMARK') return true
      if (uid === undefined) return false
      if (type === 'DELETED') this.#remove(uid, object)
      else this.#put(uid, object)
      return true
    } catch (err) {
      if (err instanceof ExpiredError) throw err
      this.#log.warn({ err, path: this.#path }, 'an event could not be read')
      return false
    }
  }

  #put(uid: string, object: T): void {
    // A third of each object, and unused.
    delete object.metadata?.managedFields
    this.objects.set(uid, object)
    this.#call(this.#onChange, object)
  }

  #remove(uid: string, last: T): void {
    this.objects.delete(uid)
    this.#call(this.#onDeleted, last)
  }

  #call(listener: (object: T) => void, object: T): void {
    try {
      listener(object)
    } catch (err) {
      this.#log.warn({ err, path: this.#path }, 'an object could not be handled')
    }
  }
}

/** An event reports an expired version; an answer that does is an `ApiUnavailableError`. */
class ExpiredError extends Error {
  override name = 'ExpiredError'
}

function isExpired(err: unknown): boolean {
  const isAnswer = err instanceof ApiUnavailableError && err.kind === 'expired'
  return isAnswer || err instanceof ExpiredError
}

class SilentError extends Error {
  override name = 'SilentError'

  constructor() {
    super('The Kubernetes API does not answer a watch')
  }
}
