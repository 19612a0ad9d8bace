/** Classifies the failures of the engine. Pure. */

/**
 * `ours`: no task could get a worker now, or a worker's state is unknown: the step is retried.
 * `task`: what this task asked for is unavailable. `lost`: the container or its exit is gone.
 */
export type Verdict = 'ours' | 'task' | 'lost'

/** Purpose of a call: one answer has different meanings for different calls. */
export type Step = 'look' | 'pull' | 'make' | 'exit'

export type FailureKind =
  | 'unreachable'
  | 'timeout'
  | 'garbage'
  | 'engine_failed'
  | 'unauthorized'
  | 'forbidden'
  | 'too_many_requests'
  | 'version_refused'
  | 'disk_full'
  | 'network_missing'
  | 'own_files'
  | 'conflict'
  | 'pull_failed'
  | 'pull_refused'
  | 'no_device'
  | 'invalid_request'
  | 'not_found'
  | 'exit_broken'

/** Verdict on each kind, and the sentence for people, to which the details are added. */
export const FAILURES = {
  unreachable: { verdict: 'ours', sentence: 'The Docker engine does not answer' },
  timeout: { verdict: 'ours', sentence: 'The Docker engine does not answer in time' },
  /** A proxy answers instead of the engine, or something else listens there. */
  garbage: { verdict: 'ours', sentence: 'The answer is not one of a Docker engine' },
  engine_failed: { verdict: 'ours', sentence: 'The Docker engine fails' },
  unauthorized: { verdict: 'ours', sentence: 'The Docker engine does not accept our certificate' },
  forbidden: {
    verdict: 'ours',
    sentence: 'The Docker engine does not allow the service to do this',
  },
  too_many_requests: { verdict: 'ours', sentence: 'The Docker engine has too many requests' },
  /** The engine was replaced while the service ran: the version is negotiated again. */
  version_refused: { verdict: 'ours', sentence: 'The Docker engine speaks another API version' },
  disk_full: { verdict: 'ours', sentence: 'The disk of the Docker engine is full' },
  network_missing: {
    verdict: 'ours',
    sentence: 'The network for workers (DOCKER_NETWORK) is missing',
  },
  /** The body of a request could not be read. */
  own_files: { verdict: 'ours', sentence: 'The task files cannot be read' },
  /** The container is being removed, or is not running. */
  conflict: { verdict: 'ours', sentence: 'The Docker engine cannot do this at the moment' },
  /** The registry may be down: retried until the provisioning timeout, then fails the task. */
  pull_failed: { verdict: 'task', sentence: 'The image could not be pulled' },
  pull_refused: { verdict: 'task', sentence: 'The image could not be pulled' },
  no_device: { verdict: 'task', sentence: 'The Docker engine has no such device' },
  invalid_request: { verdict: 'task', sentence: 'The Docker engine refuses the request' },
  not_found: { verdict: 'lost', sentence: 'The Docker engine does not find it' },
  /** The task has replaced the exit file with something unreadable. */
  exit_broken: { verdict: 'lost', sentence: 'The Docker engine cannot read the exit code' },
} as const satisfies Record<FailureKind, { verdict: Verdict; sentence: string }>

/** An error response of the engine, or of a proxy in front of it. */
export interface Refusal {
  status: number
  /** Message of the engine; undefined: the body is not in the engine's form. */
  words: string | undefined
  /** Beginning of the raw body. */
  body: string
}

/** Messages of registries that a retry does not change. */
const PULL_REFUSED = new RegExp(
  [
    'not found',
    'manifest unknown',
    'name unknown',
    'does not exist',
    'no matching manifest',
    '\\bunauthorized\\b',
    'no basic auth credentials',
    'incorrect username or password',
    '\\bdenied\\b',
    'invalid reference format',
    'not supported',
  ].join('|'),
  'i',
)
/** Messages about the engine's own files and plugins that look like those of a registry. */
const ENGINES_OWN = /permission denied$|authorization denied by plugin/i

/** Messages of the engine about unusual files, such as a link to itself or a socket. */
const EXIT_BROKEN = /too many (links|levels of symbolic links)|not supported|not a directory/i

export function kindOfRefusal({ status, words, body }: Refusal, step: Step): FailureKind {
  // Docker sends this message as plain text.
  if (status === 400 && /client version \S+ is too (old|new)/.test(body)) return 'version_refused'
  if (words !== undefined) {
    const kind = kindOfWords(words, step)
    if (kind) return kind
  }
  if (status === 401) return 'unauthorized'
  if (status === 403) return 'forbidden'
  if (status === 429) return 'too_many_requests'
  if (status >= 500) return step === 'pull' && words !== undefined ? 'pull_failed' : 'engine_failed'
  // A proxy's 404 does not prove that a container is gone.
  if (words === undefined || words === 'page not found') return 'garbage'
  if (status === 404) return 'not_found'
  if (status === 409) return 'conflict'
  return step === 'make' || step === 'pull' ? 'invalid_request' : 'engine_failed'
}

function kindOfWords(words: string, step: Step): FailureKind | undefined {
  if (/no space left on device|disk quota exceeded/i.test(words)) return 'disk_full'
  // Podman sends this message with status 500.
  if (words.includes('container state improper')) return 'conflict'
  if (step === 'pull' && PULL_REFUSED.test(words) && !ENGINES_OWN.test(words)) {
    return 'pull_refused'
  }
  if (step === 'exit' && EXIT_BROKEN.test(words)) return 'exit_broken'
  if (step !== 'make') return undefined
  if (/could not select device driver/.test(words)) return 'no_device'
  if (/\bnetwork\b.* not found|unable to find network/i.test(words)) return 'network_missing'
  return undefined
}

/** Returns the message in an answer; undefined: the answer is not in the engine's form. */
export function messageIn(body: string): string | undefined {
  try {
    const { message } = JSON.parse(body) as { message?: unknown }
    return typeof message === 'string' && message !== '' ? message : undefined
  } catch {
    return undefined
  }
}
