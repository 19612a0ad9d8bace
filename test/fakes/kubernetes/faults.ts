import type { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import type { Clock } from './clock.ts'
import { ApiError } from './status.ts'

/** What goes wrong. Where a request is let through first, it takes effect and only its answer suffers. */
export interface Fault {
  /** Default: any. */
  method?: string
  /** The path, or what it must match. Default: any. */
  path?: string | RegExp
  /** Further condition on the query. */
  query?: (query: URLSearchParams) => boolean
  /** How many requests it meets; default all, until removed. */
  times?: number
  /** Lets so many matching requests through first. */
  after?: number
  /** Answers with this Status instead. */
  status?: { code: number; reason?: string; message?: string; retryAfterSeconds?: number }
  /** Answers with a proxy's page instead: 502 text/html. */
  html?: string
  /** Answers with this instead, as a server does that is not the API's. */
  answer?: { code: number; contentType: string; body: string }
  /** Handles the request only after this long. */
  latencyMs?: number
  /** Handles the request at once, and answers only after this long. */
  answerAfterMs?: number
  /** Closes the connection: instead of handling the request, or after it took effect, its answer lost. */
  drop?: 'request' | 'answer'
  /** As `drop`, with a TCP reset. */
  reset?: 'request' | 'answer'
  /** Never answers; the request takes no effect. */
  blackhole?: boolean
  /** After so many bytes of the body: breaks the connection, ends the answer as if complete, or says no more. */
  cutAfterBytes?: number
  endAfterBytes?: number
  stallAfterBytes?: number
}

export interface InjectedFault {
  readonly hits: number
  remove(): void
}

export interface Faults {
  inject(fault: Fault): InjectedFault
  clear(): void
}

export interface FaultsInternal extends Faults {
  /** Applies what matches; resolves to whether the request is to be handled. */
  meet(method: string, url: URL, response: ServerResponse): Promise<boolean>
}

const REASONS: Record<number, string> = {
  400: 'BadRequest',
  401: 'Unauthorized',
  403: 'Forbidden',
  405: 'MethodNotAllowed',
  409: 'Conflict',
  410: 'Expired',
  429: 'TooManyRequests',
  500: 'InternalError',
  503: 'ServiceUnavailable',
  504: 'Timeout',
}

export function createFaults(clock: Clock): FaultsInternal {
  let active: { fault: Fault; hits: number; seen: number }[] = []
  const wait = (ms: number) => new Promise<void>((resolve) => clock.after(ms, resolve))

  return {
    inject(fault) {
      const entry = { fault, hits: 0, seen: 0 }
      active.push(entry)
      return {
        get hits() {
          return entry.hits
        },
        remove() {
          active = active.filter((other) => other !== entry)
        },
      }
    },
    clear() {
      active = []
    },
    async meet(method, url, response) {
      for (const entry of active) {
        const { method: wanted = method, path, query, times = Infinity, after = 0 } = entry.fault
        if (wanted !== method || !(query?.(url.searchParams) ?? true)) continue
        if (typeof path === 'string' ? path !== url.pathname : !(path?.test(url.pathname) ?? true))
          continue
        entry.seen += 1
        if (entry.seen <= after || entry.hits >= times) continue
        entry.hits += 1
        return strike(entry.fault, response)
      }
      return true
    },
  }

  async function strike(fault: Fault, response: ServerResponse): Promise<boolean> {
    const { status, html, answer, drop, reset } = fault
    const destroy = () => {
      const socket = response.socket as Socket | null
      if (reset) socket?.resetAndDestroy()
      else socket?.destroy()
    }
    if (fault.blackhole) return false
    if (drop === 'request' || reset === 'request') {
      destroy()
      return false
    }
    if (fault.latencyMs) await wait(fault.latencyMs)
    if (html !== undefined) {
      response.writeHead(502, { 'content-type': 'text/html' }).end(html)
      return false
    }
    if (answer) {
      const { code, contentType, body } = answer
      response.writeHead(code, { 'content-type': contentType }).end(body)
      return false
    }
    if (status) {
      const {
        code,
        reason = REASONS[code] ?? 'Unknown',
        message = reason,
        retryAfterSeconds,
      } = status
      const details = retryAfterSeconds === undefined ? undefined : { retryAfterSeconds }
      throw new ApiError(code, reason, message, details)
    }
    if (drop === 'answer' || reset === 'answer') {
      const silent = () => {
        destroy()
        return response
      }
      response.end = silent
      response.flushHeaders = silent
      response.write = () => {
        destroy()
        return false
      }
    }
    if (fault.answerAfterMs) delayAnswer(response, wait(fault.answerAfterMs))
    const limit = fault.cutAfterBytes ?? fault.endAfterBytes ?? fault.stallAfterBytes
    if (limit !== undefined) limitAnswer(response, limit, fault)
    return true
  }
}

/** Small answers only: what is written piece by piece is not held back. */
function delayAnswer(response: ServerResponse, over: Promise<void>): void {
  const { end } = response
  response.end = (...args: unknown[]) => {
    void over.then(() => Reflect.apply(end, response, args))
    return response
  }
}

function limitAnswer(response: ServerResponse, limit: number, fault: Fault): void {
  const { write, end } = response
  let left = limit
  let over = false
  const pass = (data: unknown) => {
    if (over || data === undefined || typeof data === 'function') return
    const bytes = Buffer.from(data as string | Buffer)
    const kept = bytes.subarray(0, left)
    left -= kept.length
    over = left === 0
    Reflect.apply(write, response, [
      kept,
      () => {
        if (over && fault.cutAfterBytes !== undefined) response.destroy()
      },
    ])
    if (over && fault.endAfterBytes !== undefined) Reflect.apply(end, response, [])
  }
  // Chunked: a length would give the rest away.
  response.removeHeader('content-length')
  response.write = (data: unknown) => {
    pass(data)
    return true
  }
  response.end = (data?: unknown) => {
    pass(data)
    if (!over) Reflect.apply(end, response, [])
    return response
  }
}
