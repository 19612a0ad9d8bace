import { type LookupAddress, Resolver, lookup as systemLookup } from 'node:dns'

export type Lookup = (
  hostname: string,
  options: { all: true },
  done: (err: NodeJS.ErrnoException | null, addresses: LookupAddress[]) => void,
) => void

/**
 * Lookups under way at a time. The system's lookup holds a thread, half of `UV_THREADPOOL_SIZE` may be held (16 in
 * `npm start`), and a name whose server is silent holds one for ten seconds and longer.
 */
const QUICK_MAX = 6
const SLOW_MAX = 2
/** How many names whose server is silent may wait; more are refused for the moment. */
const SLOW_WAITING_MAX = 128
/** How long a name server may take to say anything. */
const ANSWER_MS = 1_500
/** How long a caller waits for a lookup. */
const LOOKUP_MS = 5_000
const NAMES_KNOWN_MAX = 1_000

/** Places for lookups, and those that wait for one. */
class Lane {
  readonly waiting: Array<() => void> = []
  #free: number

  constructor(places: number) {
    this.#free = places
  }

  enter(begin: () => void): void {
    if (this.#free === 0) this.waiting.push(begin)
    else {
      this.#free -= 1
      begin()
    }
  }

  leave(): void {
    const next = this.waiting.shift()
    if (next) next()
    else this.#free += 1
  }
}

/**
 * Looks names up as the system does, so that names whose server is silent delay no others: a name server is asked first,
 * without a thread, whether it says anything about the name at all. Names that it is silent about share two places.
 */
export class BoundedLookup {
  readonly #lookup: Lookup
  readonly #answers: (hostname: string) => Promise<boolean>
  readonly #quick = new Lane(QUICK_MAX)
  readonly #slow = new Lane(SLOW_MAX)
  /** Names whose last lookup was quick; those looked up last come last. */
  readonly #known = new Set<string>()

  /** `answers`: whether the name server says anything about a name, be it that there is no such name. */
  constructor({
    lookup = systemLookup as Lookup,
    answers = serverAnswers(),
  }: {
    lookup?: Lookup
    answers?: (hostname: string) => Promise<boolean>
  } = {}) {
    this.#lookup = lookup
    this.#answers = answers
  }

  /** Rejects with the system's error, or with `ETIMEOUT` or `EAI_AGAIN` when nobody could tell in time. */
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
    // One that was quick is looked up at once: what is in /etc/hosts no server knows.
    const isSlow = !this.#known.has(hostname) && !(await this.#answers(hostname))
    const lane = isSlow ? this.#slow : this.#quick
    if (isSlow && lane.waiting.length >= SLOW_WAITING_MAX) {
      done(failure('EAI_AGAIN', hostname), [])
      return
    }
    lane.enter(() => {
      const startedAt = performance.now()
      this.#lookup(hostname, { all: true }, (err, addresses) => {
        lane.leave()
        this.#remember(hostname, performance.now() - startedAt < ANSWER_MS)
        done(err, addresses)
      })
    })
  }

  #remember(hostname: string, isQuick: boolean): void {
    this.#known.delete(hostname)
    if (isQuick) this.#known.add(hostname)
    const [oldest] = this.#known
    if (this.#known.size > NAMES_KNOWN_MAX && oldest !== undefined) this.#known.delete(oldest)
  }
}

/** Asks the system's name servers, or these. */
export function serverAnswers(servers?: readonly string[]): (name: string) => Promise<boolean> {
  const resolver = new Resolver({ timeout: ANSWER_MS, tries: 1 })
  if (servers) resolver.setServers(servers)
  return (name) =>
    new Promise((resolve) => {
      resolver.resolve4(name, (err) => resolve(err?.code !== 'ETIMEOUT'))
    })
}

function failure(code: string, hostname: string): NodeJS.ErrnoException {
  return Object.assign(new Error(`${code} ${hostname}`), { code, hostname })
}
