import type { z } from 'zod'
import { errorSchema } from '../wire/responses.ts'

const DESCRIPTIONS = {
  401: 'No bearer token, or a wrong one',
  404: 'No such task, file or worker',
  409: 'In conflict with what is there',
  413: 'The body is too large',
  415: 'The body is not JSON',
  422: 'Invalid; names each wrong field',
  429: 'The queue is full; see Retry-After',
  500: 'The service failed, or a worker defaults file is broken',
  503: 'Shutting down, busy, or the store is not available; see Retry-After',
} as const

/** The good answer of a route, for its schema. */
export function answer<T extends z.ZodType>(description: string, schema: T) {
  return { 200: { description, content: { 'application/json': { schema } } } }
}

/** The error answers of a route, for its schema. */
export function errorResponses(...statuses: Array<keyof typeof DESCRIPTIONS>) {
  // Holds: built from exactly these statuses.
  return Object.fromEntries(
    statuses.map((status) => [
      status,
      {
        description: DESCRIPTIONS[status],
        content: { 'application/json': { schema: errorSchema } },
      },
    ]),
  ) as Record<
    (typeof statuses)[number],
    { description: string; content: { 'application/json': { schema: typeof errorSchema } } }
  >
}
