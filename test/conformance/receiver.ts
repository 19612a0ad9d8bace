import { createServer, type IncomingMessage, type RequestListener } from 'node:http'
import type { AddressInfo } from 'node:net'
import { isIPv6 } from 'node:net'
import { afterAll, beforeAll, expect } from 'vitest'
import { type Json, POLL } from './target.ts'

/** Where the service under test reaches us. */
const CALLBACK_HOST = process.env.CALLBACK_HOST || '127.0.0.1'
const LOOPBACK = ['127.0.0.1', '::1', 'localhost']

export interface Callback {
  headers: IncomingMessage['headers']
  /** As it came, parsed once. */
  body: unknown
}

/** Receives callbacks for the tests of this file. */
export function useReceiver(): Receiver {
  const receiver = new Receiver()
  let close = async () => {}
  beforeAll(async () => {
    const server = await listen((request, response) => {
      const chunks: Buffer[] = []
      request.on('data', (chunk) => chunks.push(chunk))
      request.on('end', () => {
        const status = receiver.take(request, Buffer.concat(chunks).toString())
        response.writeHead(status).end()
      })
    })
    receiver.url = `${server.url}/callback`
    close = server.close
  })
  afterAll(() => close())
  return receiver
}

export class Receiver {
  url = ''
  readonly #callbacks = new Map<string, Callback[]>()
  readonly #answers = new Map<string, number>()

  /** What the callbacks of a task are answered with; default 200. */
  answer(taskId: string, status: number): void {
    this.#answers.set(taskId, status)
  }

  take({ headers }: IncomingMessage, text: string): number {
    const body: unknown = JSON.parse(text)
    const taskId = taskIdOf(body)
    this.#callbacks.set(taskId, [...this.callbacksOf(taskId), { headers, body }])
    return this.#answers.get(taskId) ?? 200
  }

  callbacksOf(taskId: string): Callback[] {
    return this.#callbacks.get(taskId) ?? []
  }

  /** Waits for a callback of the task. */
  async callbackOf(
    taskId: string,
    number = 1,
  ): Promise<{ headers: Callback['headers']; body: Json }> {
    await expect.poll(() => this.callbacksOf(taskId).length, POLL).toBeGreaterThanOrEqual(number)
    const callback = this.callbacksOf(taskId)[number - 1]
    expect(callback?.body).toBeInstanceOf(Object)
    // Holds: just checked.
    return callback as { headers: Callback['headers']; body: Json }
  }
}

/** The task that a callback is about, also when its JSON was encoded twice. */
function taskIdOf(body: unknown): string {
  const object = typeof body === 'string' ? JSON.parse(body) : body
  return String(object?.task_id)
}

/** A server that the service under test can reach. */
export async function listen(handler: RequestListener) {
  const server = createServer(handler)
  const local = LOOPBACK.includes(CALLBACK_HOST)
  const listening = Promise.withResolvers<void>()
  server.once('error', listening.reject)
  server.listen(0, local ? CALLBACK_HOST : undefined, () => listening.resolve())
  await listening.promise
  const { port } = server.address() as AddressInfo
  const host = isIPv6(CALLBACK_HOST) ? `[${CALLBACK_HOST}]` : CALLBACK_HOST
  return {
    url: `http://${host}:${port}`,
    close: async () => {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}
