import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { expect } from 'vitest'

export interface Received {
  headers: IncomingMessage['headers']
  raw: Buffer
  body: { task_name: string; task_id: string; success: boolean; logs: string }
}

export interface Receiver extends AsyncDisposable {
  url: string
  received: Received[]
  /** Waits for the first callback of the task. */
  callbackOf(taskId: string): Promise<Received>
}

/** A real HTTP server on loopback that keeps what it gets; `answer` decides what to say (default: 200). */
export async function startReceiver(
  answer: (request: Received, response: ServerResponse, count: number) => void = (_, response) => {
    response.end('{}')
  },
): Promise<Receiver> {
  const received: Received[] = []
  const server = createServer(async (request, response) => {
    const raw = await bodyOf(request)
    if (!raw) return
    const each = { headers: request.headers, raw, body: JSON.parse(raw.toString()) }
    received.push(each)
    answer(each, response, received.length)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  const find = (taskId: string) => received.find(({ body }) => body.task_id === taskId)
  return {
    url: `http://127.0.0.1:${port}/callback`,
    received,
    async callbackOf(taskId) {
      await expect.poll(() => find(taskId), { timeout: 20_000, interval: 20 }).toBeDefined()
      return find(taskId) as Received
    },
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

/** The whole body of a request; undefined when its sender was killed amid it. */
export async function bodyOf(request: IncomingMessage): Promise<Buffer | undefined> {
  const chunks: Buffer[] = []
  try {
    for await (const chunk of request) chunks.push(chunk as Buffer)
  } catch {
    return undefined
  }
  return Buffer.concat(chunks)
}
