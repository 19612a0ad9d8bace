import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'

export interface Arrival {
  taskId: string
  logs: string
  /** Epoch ms at which its request was complete. */
  at: number
}

/** Receives callbacks, answers at once, counts each task once, and counts failed ones. */
export class Receiver implements AsyncDisposable {
  readonly #server
  readonly #seen = new Set<string>()
  readonly #waiting = new Set<{ count: number; reached: () => void }>()
  failed = 0
  onArrival: ((arrival: Arrival) => void) | undefined

  private constructor() {
    this.#server = createServer((request, response) => {
      const chunks: Buffer[] = []
      request.on('data', (chunk: Buffer) => chunks.push(chunk))
      request.on('end', () => {
        response.end('{}')
        const at = Date.now()
        // The body of callbacks in the API.
        const outcome = JSON.parse(Buffer.concat(chunks).toString()) as {
          task_id: string
          success: boolean
          logs: string
        }
        if (this.#seen.has(outcome.task_id)) return
        this.#seen.add(outcome.task_id)
        if (!outcome.success) this.failed += 1
        this.onArrival?.({ taskId: outcome.task_id, logs: outcome.logs, at })
        for (const waiting of this.#waiting) {
          if (this.#seen.size >= waiting.count) waiting.reached()
        }
      })
    })
  }

  static async start(): Promise<Receiver> {
    const receiver = new Receiver()
    await new Promise<void>((resolve) => receiver.#server.listen(0, '127.0.0.1', resolve))
    return receiver
  }

  get url(): string {
    // A TCP server that listens has this address.
    const { port } = this.#server.address() as AddressInfo
    return `http://127.0.0.1:${port}/callback`
  }

  get count(): number {
    return this.#seen.size
  }

  async reaches(count: number): Promise<void> {
    if (this.count >= count) return
    await new Promise<void>((resolve) => {
      const waiting = {
        count,
        reached: () => {
          this.#waiting.delete(waiting)
          resolve()
        },
      }
      this.#waiting.add(waiting)
    })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.closeAllConnections()
    await new Promise((resolve) => this.#server.close(resolve))
  }
}
