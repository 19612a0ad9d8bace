import type { ServerResponse } from 'node:http'
import type { Clock } from './clock.ts'
import type { Representation } from './representation.ts'
import { apiVersionOf, type KubernetesObject, RESOURCES, type Resource } from './resources.ts'
import type { Matcher } from './selectors.ts'
import { badRequest, expired, invalid, type Status } from './status.ts'
import type { Change, Store } from './store.ts'

const BOOKMARK_MS = 60_000

interface WatchRequest {
  resource: Resource
  namespace: string | undefined
  matches: Matcher
  represent: Representation
  query: URLSearchParams
}

/** A watch that is open now, for tests to break. */
export interface WatchStream {
  resource: Resource
  query: string
  /** Sends nothing more and stays open: a connection whose other end is gone. */
  freeze(): void
  /** Breaks the connection. */
  cut(): void
  /** Ends it cleanly. */
  end(): void
  /** Sends an ERROR event and ends it. */
  error(status: Status): void
  bookmark(): void
}

export class Watches {
  readonly open = new Set<WatchStream>()
  /** What a watch from a forgotten version meets; some servers only close it (kubernetes#137089). */
  whenExpired: 'http' | 'stream' | 'close' = 'http'
  /** Sends the stream in pieces of so many bytes, through JSON and UTF-8 alike. */
  pieceBytes = Number.POSITIVE_INFINITY
  bookmarkMs = BOOKMARK_MS
  readonly #store: Store
  readonly #clock: Clock
  #held = false
  readonly #flushes = new Set<() => void>()

  constructor(store: Store, clock: Clock) {
    this.#store = store
    this.#clock = clock
  }

  /** Gathers events until `release`, which sends all of them in one chunk. */
  hold(): void {
    this.#held = true
  }

  release(): void {
    this.#held = false
    for (const flush of this.#flushes) flush()
  }

  serve(request: WatchRequest, response: ServerResponse): void {
    const { resource, namespace, matches, represent, query } = request
    const from = query.get('resourceVersion') ?? ''
    if (!/^\d*$/.test(from)) {
      throw badRequest(
        `Invalid value: "${from}": strconv.ParseUint: parsing "${from}": invalid syntax`,
      )
    }
    if (query.get('sendInitialEvents')) {
      throw invalid('ListOptions', 'meta.k8s.io', '', [
        {
          field: 'sendInitialEvents',
          problem: 'Forbidden',
          detail:
            'sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled',
        },
      ])
    }
    const fromStart = from === '' || from === '0'
    const missed = fromStart ? [] : this.#store.since(Number(from))
    const tooOld = expired(`too old resource version: ${from} (${this.#store.version})`)
    if (!missed && this.whenExpired === 'http') throw tooOld

    let waiting: string[] = []
    let frozen = false
    const pieces: Buffer[] = []
    let ending = false
    /** One piece per turn: Node would make one chunk of what is written within a turn. */
    const pump = () => {
      const piece = pieces.shift()
      if (piece) {
        response.write(piece)
        setImmediate(pump)
      } else if (ending) response.end()
    }
    const end = () => {
      ending = true
      if (pieces.length === 0 && !frozen) response.end()
    }
    const flush = () => {
      if (this.#held || frozen || waiting.length === 0) return
      const bytes = Buffer.from(waiting.join(''))
      waiting = []
      const idle = pieces.length === 0
      const length = Math.min(this.pieceBytes, bytes.length)
      for (let at = 0; at < bytes.length; at += length) {
        pieces.push(bytes.subarray(at, at + length))
      }
      if (idle) pump()
    }
    const send = (type: string, object: unknown) => {
      waiting.push(`${JSON.stringify({ type, object })}\n`)
      flush()
    }
    const onChange = (change: Change) => {
      if (change.resource !== resource) return
      if (namespace !== undefined && change.object.metadata.namespace !== namespace) return
      const event = eventOf(change, matches)
      if (event) send(event.type, represent.object(event.object))
    }
    const bookmark = () => {
      send('BOOKMARK', {
        kind: RESOURCES[resource].kind,
        apiVersion: apiVersionOf(resource),
        metadata: { resourceVersion: String(this.#store.version), creationTimestamp: null },
      })
    }

    response.writeHead(200, { 'content-type': 'application/json' })
    response.flushHeaders()
    if (!missed) {
      if (this.whenExpired === 'stream') send('ERROR', tooOld.body)
      end()
      return
    }
    if (fromStart) {
      for (const object of this.#store.list(resource, namespace)) {
        if (matches(object)) send('ADDED', represent.object(object))
      }
    }
    for (const change of missed) onChange(change)
    const unsubscribe = this.#store.subscribe(onChange)
    this.#flushes.add(flush)

    let cancelBookmark = () => {}
    const bookmarks = ['true', '1'].includes(query.get('allowWatchBookmarks') ?? '')
    const nextBookmark = () => {
      cancelBookmark = this.#clock.after(this.bookmarkMs, () => {
        bookmark()
        nextBookmark()
      })
    }
    if (bookmarks) nextBookmark()
    const seconds = Number(query.get('timeoutSeconds') ?? 0)
    const cancelTimeout = seconds > 0 ? this.#clock.after(seconds * 1000, end) : () => {}

    const stream: WatchStream = {
      resource,
      query: query.toString(),
      freeze: () => {
        frozen = true
      },
      cut: () => response.destroy(),
      end,
      error: (status) => {
        send('ERROR', status)
        end()
      },
      bookmark: () => bookmarks && bookmark(),
    }
    this.open.add(stream)
    const close = () => {
      unsubscribe()
      cancelBookmark()
      cancelTimeout()
      this.#flushes.delete(flush)
      this.open.delete(stream)
    }
    response.on('close', close)
    // Ended, but a client may leave the connection be.
    response.on('finish', close)
  }
}

/** A change as one selector sees it: what no longer matches is deleted, what now does is added. */
function eventOf(
  { type, object, previous }: Change,
  matches: Matcher,
): { type: Change['type']; object: KubernetesObject } | undefined {
  const before = previous !== undefined && matches(previous)
  if (type === 'DELETED') return before ? { type, object } : undefined
  if (matches(object)) return { type: before ? 'MODIFIED' : 'ADDED', object }
  if (!before) return undefined
  const { resourceVersion } = object.metadata
  return {
    type: 'DELETED',
    object: { ...previous, metadata: { ...previous.metadata, resourceVersion } },
  }
}
