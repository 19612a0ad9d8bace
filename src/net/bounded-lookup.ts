import { type LookupAddress, Resolver, lookup as systemLookup } from 'node:dns'

export type Lookup = (
  hostname: string,
  options: { all: true },
  done: (err: NodeJS.ErrnoException | null, addresses: LookupAddress[]) => void,
) => void

/**
 * Maximum concurrent lookups: together at most half of `UV_THREADPOOL_SIZE` (16 in `npm start`). A
 * lookup occupies a thread, for ten seconds or more if the name server does not respond.
 */
const QUICK_MAX = 6
const SLOW_MAX = 2
/** Maximum waiting lookups of names whose server does not respond; more fail with `EAI_AGAIN`. */
const SLOW_WAITING_MAX = 128
/** Time after which a name server counts as not responding. */
const RESPONSE_MS = 1_500
/** Timeout of a lookup for its caller. */
const LOOKUP_MS = 5_000
const QUICK_NAMES_MAX = 1_000

/** A limit of concurrent lookups, with a queue. */
class Lane {
  readonly waiting: Array<() => void> = []
  #free: number

  constructor(max: number) {
    this.#free = max
  }

  enter(start: () => void): void {
    if (this.#free === 0) this.waiting.push(start)
    else {
      this.#free -= 1
      start()
    }
  }

  leave(): void {
    const next = this.waiting.shift()
    if (next) next()
    else this.#free += 1
  }
}

/**
 * Resolves names with the system's lookup, without letting unresponsive name servers delay other
 * names. A query that needs no thread first tests whether a server responds at all; names for which
 * none does share two threads.
 */
export class BoundedLookup {
  readonly #lookup: Lookup
  readonly #responds: (hostname: string) => Promise<boolean>
  readonly #quick = new Lane(QUICK_MAX)
  readonly #slow = new Lane(SLOW_MAX)
  /** Names whose last lookup was quick, the most recent last. */
  readonly #quickNames = new Set<string>()

  /** `responds`: returns whether a name server responds, even if the name does not exist. */
  constructor({
    lookup = systemLookup as Lookup,
    responds = serverResponds(),
  }: {
    lookup?: Lookup
    responds?: (hostname: string) => Promise<boolean>
  } = {}) {
    this.#lookup = lookup
    this.#responds = responds
  }

  /** Resolves a name. Rejects with the system's error, or with `ETIMEOUT` or `EAI_AGAIN`. */
  async addresses(hostname: string): Promise<LookupAddress[]> {
    const { promise, resolve, reject } = Promise.withResolvers<LookupAddress[]>()
    const timer = setTimeout(() => reject(failure('ETIMEOUT', hostname)), LOOKUP_MS)
    try {
      await this.#enter(hostname, (err, addresses) => (err ? reject(err) : resolve(addresses)))
      return await promise
    } finally {
      clearTimeout(timer)
    }
  }

  async #enter(hostname: string, done: Parameters<Lookup>[2]): Promise<void> {
    // Names in /etc/hosts are quick although no server knows them.
    const isSlow = !this.#quickNames.has(hostname) && !(await this.#responds(hostname))
    const lane = isSlow ? this.#slow : this.#quick
    if (isSlow && lane.waiting.length >= SLOW_WAITING_MAX) {
      done(failure('EAI_AGAIN', hostname), [])
      return
    }
    lane.enter(() => {
      const startedAt = performance.now()
      this.#lookup(hostname, { all: true }, (err, addresses) => {
        lane.leave()
        this.#remember(hostname, performance.now() - startedAt < RESPONSE_MS)
        done(err, addresses)
      })
    })
  }

  #remember(hostname: string, isQuick: boolean): void {
    this.#quickNames.delete(hostname)
    if (isQuick) this.#quickNames.add(hostname)
    const [oldest] = this.#quickNames
    if (this.#quickNames.size > QUICK_NAMES_MAX && oldest !== undefined) {
      this.#quickNames.delete(oldest)
    }
  }
}

/** Returns a function that queries the system's name servers, or the given ones. */
export function serverResponds(servers?: readonly string[]): (name: string) => Promise<boolean> {
  const resolver = new Resolver({ timeout: RESPONSE_MS, tries: 1 })
  if (servers) resolver.setServers(servers)
  return (name) =>
    new Promise((resolve) => {
      resolver.resolve4(name, (err) => resolve(err?.code !== 'ETIMEOUT'))
    })
}

function failure(code: string, hostname: string): NodeJS.ErrnoException {
  return Object.assign(new Error(`${code} ${hostname}`), { code, hostname })
}
