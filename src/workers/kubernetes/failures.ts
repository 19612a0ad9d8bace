/** The ways in which the Kubernetes API fails us, and what each means for a task. */
import { UnavailableError } from '../../core/errors.ts'

export type FailureKind =
  /** There is no connection, or it was cut. */
  | 'unreachable'
  /** The call's own time limit passed. */
  | 'timed_out'
  /** The files or commands that the kubeconfig names for our credentials fail. */
  | 'credentials'
  /** 401. */
  | 'unauthorized'
  /** 429. */
  | 'busy'
  /** 5xx, also where a webhook or etcd is down. */
  | 'server_error'
  /** 403: a right is missing, or the API server has just started and does not know the rights yet. */
  | 'forbidden'
  /** 403: a quota of the namespace is used up. */
  | 'quota'
  /** 403 or 404: the namespace is being removed, or is not there. */
  | 'namespace'
  /** A webhook, a policy, a pod security standard or a LimitRange refuses the object. */
  | 'admission'
  /** 400, 413 and 422: the object itself is not valid. */
  | 'invalid'
  /** 404, with the name of the object that is not there. */
  | 'not_found'
  /** 409: the name is taken. */
  | 'already_exists'
  /** 409: another object has the name by now. */
  | 'replaced'
  /** 409 for any other reason, such as a quota that two calls change at once. */
  | 'conflict'
  /** 410: what a watch or a page continues from is forgotten. */
  | 'expired'
  /** An answer that is not the API server's: a page of a proxy, cut JSON, another object. */
  | 'garbage'
  /** Any other status. */
  | 'other'

/**
 * `ours`: no task could be served now, so that every task waits. `task`: what this task asked for cannot be had, or not
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

/** The API server refused for a reason that concerns this one object. The message is its own (meta/v1 Status). */
export class ApiError extends Error {
  override name = 'ApiError'
  readonly kind: FailureKind

  constructor(kind: FailureKind, message: string) {
    super(message)
    this.kind = kind
  }
}

/** The API cannot be used at the moment: nothing is known about its objects. */
export class ApiUnavailableError extends UnavailableError {
  override name = 'ApiUnavailableError'
  readonly kind: FailureKind
  /** What a busy API server asks for. */
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

/** What is read of an answer of 400 and more (meta/v1 Status). */
interface StatusBody {
  kind?: unknown
  reason?: unknown
  message?: unknown
  details?: { name?: unknown; kind?: unknown } | null
}

/** Returns the error that an answer of 400 and more stands for. */
export function failureOf(
  status: number,
  text: string,
  retryAfterMs = 0,
): ApiError | ApiUnavailableError {
  const body = parseStatus(text)
  const words = typeof body?.message === 'string' ? body.message : ''
  const kind = kindOf(status, body, words)
  if (FAILURES[kind] !== 'ours') return new ApiError(kind, words)
  const told = `The Kubernetes API answered with status ${status}`
  return new ApiUnavailableError(kind, words ? `${told}: ${words}` : told, { retryAfterMs })
}

/** Returns the kind of a 403 by its words, which are all that tells one from another. */
export function kindOfRefusal(words: string): FailureKind {
  if (/exceeded quota/.test(words)) return 'quota'
  if (/because it is being terminated/.test(words)) return 'namespace'
  return ADMISSION_WORDS.test(words) ? 'admission' : 'forbidden'
}

/** Webhooks, ValidatingAdmissionPolicy, Pod Security, LimitRanger, ResourceQuota for an object without limits, Priority. */
const ADMISSION_WORDS =
  /denied (the )?request|violates PodSecurity|(max|min)imum \S+ usage per|limit to request ratio per|must specify |no PriorityClass/

function kindOf(status: number, body: StatusBody | undefined, words: string): FailureKind {
  if (status >= 500) return 'server_error'
  if (status === 429) return 'busy'
  if (status === 401) return 'unauthorized'
  // Proxies answer in words of their own: their 404 does not mean that an object is gone.
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
    // Not the API server's words.
    return undefined
  }
}
