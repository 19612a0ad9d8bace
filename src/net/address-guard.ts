import type { LookupAddress } from 'node:dns'
import { isIP } from 'node:net'
import { networkInterfaces } from 'node:os'
import ipaddr from 'ipaddr.js'
import { buildConnector } from 'undici'
import { BoundedLookup, type Lookup } from './bounded-lookup.ts'

type Network = [ipaddr.IPv4 | ipaddr.IPv6, number]
const NAMED: Record<string, readonly string[]> = {
  loopback: ['127.0.0.0/8', '::1/128'],
  private: ['10.0.0.0/8', '172.16.0.0/12', '192.168.0.0/16', 'fc00::/7'],
}

/** Metadata addresses of clouds, which serve credentials: allowed only if an entry names them. */
const METADATA = networks([
  '169.254.0.0/16',
  'fe80::/10',
  'fd00:ec2::/112', // AWS
  'fd20:ce::254/128', // Google
  '168.63.129.16/32', // Azure; looks public
  '100.100.100.200/32', // Alibaba
  '192.0.0.192/32', // Oracle
])

/** Special-purpose ranges (IANA) that ipaddr.js 2.5 counts as public (whitequark/ipaddr.js#203). */
const NOT_PUBLIC = networks(['::/96', '100:0:0:1::/64', '192.31.196.0/24', '192.52.193.0/24'])

const TRANSLATED = networks(['64:ff9b::/96', '::ffff:0:0:0/96', '::/96'])
const SIX_TO_FOUR: Network = ipaddr.parseCIDR('2002::/16')

export interface GuardOptions {
  /** Name of the setting that allows an address, for messages. */
  setting?: string
  /** Whether our sample receivers may be called, whatever address the service listens on. */
  samplesAreOn?: boolean
  /** Replaces the system's lookup. */
  lookup?: Lookup | undefined
}

/** Path of a sample receiver, below any base path. */
const SAMPLE_PATH = /\/(sample-task-runner-callback2?|task-runner-callback)\/?$/

/** Shared by the process, because all lookups share its threads. */
const names = new BoundedLookup()

/** Thrown for a connection to an address that may not be called. */
export class BlockedAddressError extends Error {
  override name = 'BlockedAddressError'
}

/**
 * Blocks callbacks and clones to internal addresses (SSRF). Public addresses may be called, others
 * only if the operator allows them. The address that is dialled is checked itself, so that a name
 * cannot resolve to another address after the check (DNS rebinding).
 */
export class AddressGuard {
  readonly #allowed: Network[]
  readonly #options: GuardOptions
  readonly #names: BoundedLookup
  readonly #lookups = new Map<string, Promise<LookupAddress[]>>()
  /** Port of this service, where callbacks may call only the sample receivers. */
  ownPort: number | undefined

  /** Accepts CIDRs, `private` and `loopback` in `allowed`. Throws on anything else. */
  constructor(allowed: readonly string[], options: GuardOptions = {}) {
    const { lookup } = options
    this.#options = options
    this.#allowed = networks(allowed.flatMap((name) => NAMED[name] ?? [name]))
    this.#names = lookup ? new BoundedLookup({ lookup, responds: async () => true }) : names
  }

  /** Returns why a URL is refused, as far as it can be known before its name is resolved. */
  refusal(url: URL): string | undefined {
    const host = bareHost(url.hostname)
    const literal = isIP(host) !== 0 ? host : isLocalhost(host) ? '127.0.0.1' : undefined
    if (literal === undefined) return undefined
    const isOwn = portOf(url) === this.ownPort && isOwnAddress(literal)
    const isSample = SAMPLE_PATH.test(url.pathname)
    if (isOwn && isSample && this.#options.samplesAreOn) return undefined
    if (!this.allows(literal)) {
      const { setting } = this.#options
      const how = setting === undefined ? '' : `; the operator can allow it with ${setting}`
      return `may not be called: ${literal} is not a public address${how}`
    }
    return isOwn && !isSample ? 'may not be called: it is this service itself' : undefined
  }

  /** Returns whether an address, in the canonical form of `URL`, may be dialled. */
  allows(address: string): boolean {
    // Converts an IPv4-mapped IPv6 address to IPv4.
    const parsed = ipaddr.process(address)
    const named = this.#allowed.filter((network) => contains(network, parsed))
    if (METADATA.some((network) => translated(parsed).some((inner) => contains(network, inner)))) {
      return false
    }
    const metadata = METADATA.find((network) => contains(network, parsed))
    if (metadata) return named.some((network) => isWithin(network, metadata))
    if (named.length > 0) return true
    return parsed.range() === 'unicast' && !NOT_PUBLIC.some((network) => contains(network, parsed))
  }

  /**
   * Returns undici's connector with the checks of the guard. It checks literal addresses before
   * connecting, and names in `lookup`, which returns the address that is dialled.
   */
  connector(options: { timeoutMs: number }): buildConnector.connector {
    const build = (isAllowed: (address: string) => boolean) =>
      buildConnector({
        timeout: options.timeoutMs,
        allowH2: false,
        lookup: (hostname, lookupOptions, done) => {
          this.#resolve(hostname, isAllowed).then(
            (addresses) => {
              const [first] = addresses
              if (lookupOptions.all) done(null, addresses)
              else if (first) done(null, first.address, first.family)
            },
            (err: NodeJS.ErrnoException) => done(err, ''),
          )
        },
      })
    const connect = build((address) => this.allows(address))
    // For loopback names, whose path `refusal` has checked.
    const connectToSamples = build((address) => this.allows(address) || isOwnAddress(address))
    // For other names, whose path was not checked: they must not reach this service.
    const connectToOwnPort = build((address) => this.allows(address) && !isOwnAddress(address))
    return (target, done) => {
      const host = bareHost(target.hostname)
      const port = target.port || (target.protocol === 'https:' ? 443 : 80)
      const isOwnPort = Number(port) === this.ownPort
      if (isIP(host) !== 0) {
        const isSample = isOwnPort && this.#options.samplesAreOn && isOwnAddress(host)
        if (isSample || this.allows(host)) connect(target, done)
        else done(new BlockedAddressError('the address may not be called'), null)
      } else if (!isOwnPort) connect(target, done)
      else if (!isLocalhost(host)) connectToOwnPort(target, done)
      else if (this.#options.samplesAreOn) connectToSamples(target, done)
      else connect(target, done)
    }
  }

  /** Returns a host's allowed addresses. Throws `BlockedAddressError` or the resolver's error. */
  async addressesOf(host: string): Promise<string[]> {
    const bare = bareHost(host)
    if (isIP(bare) !== 0) {
      if (!this.allows(bare)) throw new BlockedAddressError('the address may not be called')
      return [bare]
    }
    const found = await this.#resolve(bare, (address) => this.allows(address))
    return found.map(({ address }) => address)
  }

  /** Resolves a name; concurrent calls share one lookup. */
  async #resolve(
    hostname: string,
    isAllowed: (address: string) => boolean,
  ): Promise<LookupAddress[]> {
    const running =
      this.#lookups.get(hostname) ??
      this.#names.addresses(hostname).finally(() => this.#lookups.delete(hostname))
    this.#lookups.set(hostname, running)
    const addresses = (await running).filter(({ address }) => isAllowed(address))
    if (addresses.length === 0) throw new BlockedAddressError('the address may not be called')
    return addresses
  }
}

/** Returns whether a text is a valid entry of `CALLBACK_ALLOWED_NETWORKS`. */
export function isNetwork(name: string): boolean {
  if (Object.hasOwn(NAMED, name)) return true
  try {
    return networks([name]).length === 1
  } catch {
    return false
  }
}

/** Removes the brackets of an IPv6 address and the trailing dot of a name. */
function bareHost(hostname: string): string {
  return hostname.replace(/^\[|\]$/g, '').replace(/\.$/, '')
}

function isLocalhost(name: string): boolean {
  return name === 'localhost' || name.endsWith('.localhost')
}

function portOf(url: URL): number {
  return url.port === '' ? (url.protocol === 'https:' ? 443 : 80) : Number(url.port)
}

/** Returns whether the address belongs to this machine. */
function isOwnAddress(address: string): boolean {
  const parsed = ipaddr.process(address)
  if (['loopback', 'unspecified'].includes(parsed.range())) return true
  const own = Object.values(networkInterfaces()).flatMap((all) => all ?? [])
  return own.some((each) => ipaddr.process(each.address).toString() === parsed.toString())
}

/** Returns the IPv4 address that gateways make of an IPv6 address (NAT64, SIIT, 6to4). */
function translated(address: ipaddr.IPv4 | ipaddr.IPv6): ipaddr.IPv4[] {
  if (!(address instanceof ipaddr.IPv6)) return []
  const bytes = address.toByteArray()
  const from = TRANSLATED.some((network) => contains(network, address))
    ? 12
    : contains(SIX_TO_FOUR, address)
      ? 2
      : undefined
  return from === undefined ? [] : [new ipaddr.IPv4(bytes.slice(from, from + 4))]
}

function networks(cidrs: readonly string[]): Network[] {
  return cidrs.map((cidr) => {
    const [base = '', bits = base.includes(':') ? '128' : '32', ...rest] = cidr.split('/')
    // isIP rejects 010.0.0.0 and 10.1, which ipaddr.js would read as 8.0.0.0 and 10.0.0.1.
    if (isIP(base) === 0 || rest.length > 0) throw new Error('not a network')
    return ipaddr.parseCIDR(`${base}/${bits}`)
  })
}

function contains([base, bits]: Network, address: ipaddr.IPv4 | ipaddr.IPv6): boolean {
  return base.kind() === address.kind() && address.match(base, bits)
}

function isWithin([base, bits]: Network, [outerBase, outerBits]: Network): boolean {
  return bits >= outerBits && contains([outerBase, outerBits], base)
}
