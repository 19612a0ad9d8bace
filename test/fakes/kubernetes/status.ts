import { qualified, type Resource } from './resources.ts'

export interface Cause {
  reason?: string
  message: string
  field?: string
}

export interface StatusDetails {
  name?: string
  group?: string
  kind?: string
  uid?: string
  causes?: Cause[]
  retryAfterSeconds?: number
}

export interface Status {
  kind: 'Status'
  apiVersion: 'v1'
  metadata: object
  status: 'Success' | 'Failure'
  message?: string
  reason?: string
  details?: StatusDetails
  code: number
}

/** What the API answers instead of an object; thrown anywhere below the server. */
export class ApiError extends Error {
  readonly body: Status
  readonly code: number

  constructor(code: number, reason: string, message: string, details?: StatusDetails) {
    super(message)
    this.code = code
    this.body = {
      kind: 'Status',
      apiVersion: 'v1',
      metadata: {},
      status: 'Failure',
      message,
      reason,
      ...(details && { details }),
      code,
    }
  }
}

export function detailsOf(resource: Resource, name?: string): StatusDetails {
  const [kind = resource, group] = qualified(resource).split('.')
  return { ...(name && { name }), ...(group && { group }), kind }
}

export const badRequest = (message: string) => new ApiError(400, 'BadRequest', message)

export const notFound = (resource: Resource, name: string) =>
  new ApiError(
    404,
    'NotFound',
    `${qualified(resource)} "${name}" not found`,
    detailsOf(resource, name),
  )

export const alreadyExists = (resource: Resource, name: string) =>
  new ApiError(
    409,
    'AlreadyExists',
    `${qualified(resource)} "${name}" already exists`,
    detailsOf(resource, name),
  )

export const conflict = (resource: Resource, name: string, why: string) =>
  new ApiError(
    409,
    'Conflict',
    `Operation cannot be fulfilled on ${qualified(resource)} "${name}": ${why}`,
    detailsOf(resource, name),
  )

export const CHANGED_MEANWHILE =
  'the object has been modified; please apply your changes to the latest version and try again'

export const forbidden = (
  resource: Resource,
  name: string | undefined,
  why: string,
  causes?: Cause[],
) =>
  new ApiError(
    403,
    'Forbidden',
    `${qualified(resource)}${name ? ` "${name}"` : ''} is forbidden: ${why}`,
    { ...detailsOf(resource, name), ...(causes && { causes }) },
  )

export interface Invalid {
  field: string
  /** Required value, Invalid value: "x", Forbidden, Not found: "x", Unsupported value: "x", Duplicate value: "x", Too long */
  problem: string
  detail?: string
}

const CAUSE_REASONS: [prefix: string, reason: string][] = [
  ['Required', 'FieldValueRequired'],
  ['Forbidden', 'FieldValueForbidden'],
  ['Not found', 'FieldValueNotFound'],
  ['Unsupported', 'FieldValueNotSupported'],
  ['Duplicate', 'FieldValueDuplicate'],
  ['Too long', 'FieldValueTooLong'],
]

export function invalid(kind: string, group: string, name: string, problems: Invalid[]): ApiError {
  const causes = problems.map(({ field, problem, detail }) => ({
    reason:
      CAUSE_REASONS.find(([prefix]) => problem.startsWith(prefix))?.[1] ?? 'FieldValueInvalid',
    message: detail ? `${problem}: ${detail}` : problem,
    field,
  }))
  const all = causes.map(({ field, message }) => `${field}: ${message}`)
  const text = all.length === 1 ? all[0] : `[${all.join(', ')}]`
  return new ApiError(
    422,
    'Invalid',
    `${group ? `${kind}.${group}` : kind} "${name}" is invalid: ${text}`,
    { name, ...(group && { group }), kind, causes },
  )
}

export const expired = (message: string) => new ApiError(410, 'Expired', message)
