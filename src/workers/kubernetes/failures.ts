/** Failures of the Kubernetes API, and what each means for a task. */
import { UnavailableError } from '../../core/errors.ts'

export type FailureKind =
  /** There is no connection, or it was cut. */
  | 'unreachable'
  /** The call's own time limit passed. */
  | 'timed_out'
  /** A file or command that the kubeconfig names for credentials fails. */
  | 'credentials'
  /** 401. */
  | 'unauthorized'
  /** 429. */
  | 'busy'
  /** 5xx, including failures of webhooks and etcd. */
  | 'server_error'
  /** 403: a right is missing, or the API server is starting and has not loaded them yet. */
  | 'forbidden'
  /** 403: a quota of the namespace is used up. */
  | 'quota'
  /** 403 or 404: the namespace is being removed, or is missing. */
  | 'namespace'
  /** A webhook, a policy, a pod security standard or a LimitRange rejects the object. */
  | 'admission'
  /** 400, 413 and 422: the object is invalid. */
  | 'invalid'
  /** 404, with the name of the missing object. */
  | 'not_found'
  /** 409: the name is taken. */
  | 'already_exists'
  /** 409: another object has the name now. */
  | 'replaced'
  /** 409 for another reason, such as two calls that change a quota at once. */
  | 'conflict'
  /** 410: the version that a watch or a page continues from is too old. */
  | 'expired'
  /** An answer not from the API server, such as a proxy's page, or a truncated one. */
  | 'garbage'
  /** Any other status. */
  | 'other'

/**
 * `ours`: every task would fail now, so all wait. `task`: this task's request cannot be met, or not
 * yet. `lost`: the object is proven gone.
 */
export const FAILURES = {
  unreachable: 'ours',
  timed_out: 'ours',
  credentials: 'ours',
  unauthorized: 'ours',
  busy: 'ours',
  server_error: 'ours',
  forbidden: 'ours',
  quota: 'task',
  namespace: 'ours',
  admission: 'task',
  invalid: 'task',
  not_found: 'lost',
  already_exists: 'task',
  replaced: 'lost',
  conflict: 'ours',
  expired: 'ours',
  garbage: 'ours',
  other: 'ours',
} as const satisfies Record<FailureKind, 'ours' | 'task' | 'lost'>

/** The API server rejected a call about one object, with its own message (meta/v1 Status). */
export class ApiError extends Error {
  override name = 'ApiError'
  readonly kind: FailureKind

  constructor(kind: FailureKind, message: string) {
    super(message)
    this.kind = kind
  }
}

/** The API is unavailable, so nothing is known about its objects. */
export class ApiUnavailableError extends UnavailableError {
  override name = 'ApiUnavailableError'
  readonly kind: FailureKind
  /** Wait that a busy API server requests; else 0. */
  readonly retryAfterMs: number

  constructor(
    kind: FailureKind,
    message: string,
    { cause, retryAfterMs = 0 }: { cause?: unknown; retryAfterMs?: number } = {},
  ) {
    super(message, { cause })
    this.kind = kind
    this.retryAfterMs = retryAfterMs
  }
}

/** Fields that are read of an error response (meta/v1 Status). */
interface StatusBody {
  kind?: unknown
  reason?: unknown
  message?: unknown
  details?: { name?: unknown; kind?: unknown } | null
}

/** Returns the error for a response with a status of 400 or more. */
export function failureOf(
  status: number,
  text: string,
  retryAfterMs = 0,
): ApiError | ApiUnavailableError {
  const body = parseStatus(text)
  const words = typeof body?.message === 'string' ? body.message : ''
  const kind = kindOf(status, body, words)
  if (FAILURES[kind] !== 'ours') return new ApiError(kind, words)
  const message = `The Kubernetes API answered with status ${status}`
  return new ApiUnavailableError(kind, words ? `${message}: ${words}` : message, { retryAfterMs })
}

/** Returns the kind of a 403, which only its message shows. */
export function kindOfRefusal(words: string): FailureKind {
  if (/exceeded quota/.test(words)) return 'quota'
  if (/because it is being terminated/.test(words)) return 'namespace'
  return ADMISSION_WORDS.test(words) ? 'admission' : 'forbidden'
}

/** Messages of webhooks, policies, Pod Security, LimitRanger, ResourceQuota and Priority. */
const ADMISSION_WORDS =
  /denied (the )?request|violates PodSecurity|(max|min)imum \S+ usage per|limit to request ratio per|must specify |no PriorityClass/

function kindOf(status: number, body: StatusBody | undefined, words: string): FailureKind {
  if (status >= 500) return 'server_error'
  if (status === 429) return 'busy'
  if (status === 401) return 'unauthorized'
  // A proxy's 404 does not prove that an object is gone.
  if (body?.kind !== 'Status') return 'garbage'
  if (/^admission webhook .* denied the request/.test(words)) return 'admission'
  if (status === 403) return kindOfRefusal(words)
  if (status === 404) {
    if (body.details?.kind === 'namespaces') return 'namespace'
    return body.details?.name ? 'not_found' : 'other'
  }
  if (status === 409) {
    if (body.reason === 'AlreadyExists') return 'already_exists'
    return /Precondition failed: UID/.test(words) ? 'replaced' : 'conflict'
  }
  if (status === 410) return 'expired'
  return [400, 413, 422].includes(status) ? 'invalid' : 'other'
}

function parseStatus(text: string): StatusBody | undefined {
  try {
    const parsed: unknown = JSON.parse(text)
    return typeof parsed === 'object' && parsed !== null ? parsed : undefined
  } catch {
    return undefined
  }
}
