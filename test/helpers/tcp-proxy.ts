import { once } from 'node:events'
import { type AddressInfo, createServer, type Socket, connect as tcpConnect } from 'node:net'

/**
 * What happens to connections. `stalled`: they are taken, and nothing passes in either direction, as when packets get
 * lost; once `open` again, what was sent meanwhile arrives, late. `refused`: they are reset, and new ones are refused.
 */
export type ProxyMode = 'open' | 'stalled' | 'refused'

/** Stands between a client and a server on loopback, and fails as networks do. */
export interface TcpProxy extends AsyncDisposable {
  port: number
  /** Connections open at the moment. */
  connections: number
  set(mode: ProxyMode): Promise<void>
  /** Ends all connections, as a server that goes away does; new ones work. */
  cut(): void
  /** Nothing passes any more on the connections of now, and nobody is told, as when a firewall forgets them; new ones work. */
  deaden(): void
  /**
   * Of the next connection on which these bytes come from a client (in one piece): `answer` passes them on, waits for
   * what the server says, and cuts instead of telling; `request` cuts before the server has them; `silently` keeps them
   * to itself, and all that comes later.
   */
  lose(what: Loss['what'], bytes: string): { hits: number }
}

export async function startTcpProxy(targetPort: number): Promise<TcpProxy> {
  const pairs = new Set<Pair>()
  const losses: Loss[] = []
  let mode: ProxyMode = 'open'
  const server = createServer({ allowHalfOpen: false }, (client) => {
    const pair = new Pair(client, targetPort, losses)
    pairs.add(pair)
    client.once('close', () => pairs.delete(pair))
    if (mode === 'stalled') pair.stall()
  })
  const listen = async (port: number) => {
    server.listen(port, '127.0.0.1')
    await once(server, 'listening')
    return (server.address() as AddressInfo).port
  }
  const port = await listen(0)
  const cut = () => {
    for (const pair of pairs) pair.cut()
  }
  const stopListening = () => {
    const closed = new Promise((resolve) => server.close(resolve))
    cut()
    return closed
  }
  return {
    port,
    get connections() {
      return pairs.size
    },
    async set(next) {
      if (next === 'refused' && mode !== 'refused') await stopListening()
      if (next !== 'refused' && mode === 'refused') await listen(port)
      mode = next
      for (const pair of pairs) {
        if (mode === 'stalled') pair.stall()
        else pair.resume()
      }
    },
    cut,
    deaden() {
      for (const pair of pairs) pair.deaden()
    },
    lose(what, bytes) {
      const loss: Loss = { what, bytes: Buffer.from(bytes), hits: 0 }
      losses.push(loss)
      return loss
    },
    async [Symbol.asyncDispose]() {
      if (mode === 'refused') return
      await stopListening()
    },
  }
}

interface Loss {
  what: 'request' | 'answer' | 'silently'
  bytes: Buffer
  hits: number
}

/** A client's connection, and ours to the server. */
class Pair {
  readonly #client: Socket
  readonly #server: Socket
  #losesAnswer = false
  #isDead = false

  constructor(client: Socket, targetPort: number, losses: Loss[]) {
    this.#client = client
    this.#server = tcpConnect(targetPort, '127.0.0.1')
    for (const socket of [client, this.#server]) {
      socket.setNoDelay(true)
      socket.on('error', () => this.cut())
      socket.on('close', () => this.cut())
    }
    client.on('data', (chunk: Buffer) => {
      const loss = losses.find(({ hits, bytes }) => hits === 0 && chunk.includes(bytes))
      if (loss) {
        loss.hits += 1
        if (loss.what === 'request') return this.cut()
        if (loss.what === 'silently') return this.deaden()
        this.#losesAnswer = true
      }
      this.#server.write(chunk)
    })
    this.#server.on('data', (chunk) => {
      if (this.#losesAnswer) this.cut()
      else client.write(chunk)
    })
  }

  stall(): void {
    this.#client.pause()
    this.#server.pause()
  }

  deaden(): void {
    this.#isDead = true
    this.stall()
  }

  resume(): void {
    if (this.#isDead) return
    this.#client.resume()
    this.#server.resume()
  }

  cut(): void {
    this.#client.destroy()
    this.#server.destroy()
  }
}
