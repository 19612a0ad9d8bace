import type { z } from 'zod'
import { errorSchema } from '../wire/responses.ts'

const DESCRIPTIONS = {
  401: 'The bearer token is missing or invalid',
  404: 'No such task, file or worker',
  409: 'The request conflicts with the current state of the task',
  413: 'The body is too large',
  415: 'The body is not JSON',
  422: 'The request is invalid; `errors` names each field',
  429: 'The queue is full; see Retry-After',
  500: 'The service failed, or a worker defaults file is broken',
  503: 'Shutting down, busy, or the store or the workers are unavailable; see Retry-After',
} as const

/** Describes the 200 response of a route. */
export function okResponse<T extends z.ZodType>(description: string, schema: T) {
  return { 200: { description, content: { 'application/json': { schema } } } }
}

/** Describes the error responses of a route. */
export function errorResponses(...statuses: Array<keyof typeof DESCRIPTIONS>) {
  // Safe: built from exactly these statuses.
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
