import { z } from 'zod'
import { type ImageConfig, type Logger, WorkerError } from '../../core/ports.ts'
import { retrying } from '../../core/retrying.ts'
import { type Engine, EngineError, failureOf, isFailure } from './engine.ts'
import { kindOfRefusal } from './failures.ts'

const RETRY_MS = 500
const RETRY_MAX_MS = 10_000
/** Maximum time without progress: registries may be slow to answer first. */
const SILENCE_MS = 120_000
/** Maximum characters of a progress line. */
const LINE_MAX = 1024 * 1024

export interface PullOptions {
  config: ImageConfig | undefined
  signal: AbortSignal
  /** Called after each failed attempt with the error for the task, should time run out. */
  onFailed: (err: WorkerError) => void
  log: Logger
}

/**
 * Pulls the image unless the engine has it. Returns the duration in ms, or undefined without a
 * pull. Retries failures of the registry until the signal aborts. Throws `WorkerError` with
 * `image_pull_failed` and the registry's message, `EngineError`, or the reason of the signal.
 */
export async function pull(
  engine: Engine,
  image: string,
  options: PullOptions,
): Promise<number | undefined> {
  const { config = {}, signal, onFailed, log } = options
  const { pullPolicy = 'IfNotPresent' } = config
  if (pullPolicy !== 'Always' && (await isThere(engine, image, signal))) return undefined
  if (pullPolicy === 'Never') throw failed(image, 'it is not there, and pull_policy is Never')
  const startedAt = performance.now()
  try {
    await retrying(() => pullOnce(engine, image, options), {
      signal,
      fromMs: RETRY_MS,
      toMs: RETRY_MAX_MS,
      isWorthIt: (err) => isFailure(err, 'pull_failed'),
      onRetry(err) {
        onFailed(failed(image, err.words))
        log.warn({ err, image }, 'pulling an image failed, trying again')
      },
    })
  } catch (err) {
    throw isFailure(err, 'pull_refused') ? failed(image, err.words) : err
  }
  return performance.now() - startedAt
}

async function pullOnce(engine: Engine, image: string, options: PullOptions): Promise<void> {
  const { config, signal } = options
  const progress = await engine.stream('POST', '/images/create', {
    query: { fromImage: image },
    headers: config?.credential
      ? { 'x-registry-auth': registryAuth(image, config.credential) }
      : {},
    signal,
    step: 'pull',
    limitMs: SILENCE_MS,
    silenceMs: SILENCE_MS,
  })
  let unread = ''
  try {
    for await (const chunk of progress) {
      const lines = (unread + chunk).split('\n')
      unread = lines.pop() ?? ''
      if (unread.length > LINE_MAX) throw new EngineError('garbage', 'a line without an end')
      for (const line of lines) throwIfError(line)
    }
  } catch (err) {
    throw failureOf(err, signal)
  }
  throwIfError(unread)
}

/** Throws if the line reports a failure: an answer of 200 may still fail later. */
function throwIfError(line: string): void {
  if (line.trim() === '') return
  const words = errorIn(line)
  if (words === undefined) return
  throw new EngineError(kindOfRefusal({ status: 500, words, body: line }, 'pull'), words)
}

function errorIn(line: string): string | undefined {
  try {
    const { error } = JSON.parse(line) as { error?: unknown }
    return error === undefined ? undefined : String(error)
  } catch (err) {
    throw new EngineError('garbage', line.slice(0, 200), { cause: err })
  }
}

async function isThere(engine: Engine, image: string, signal: AbortSignal): Promise<boolean> {
  const parts = image.split('/')
  // This would be a path to elsewhere in the API, not an image name: the pull rejects it.
  if (parts.some((part) => part === '.' || part === '..')) return false
  const path = parts.map(encodeURIComponent).join('/')
  try {
    await engine.json('GET', `/images/${path}/json`, z.looseObject({}), { step: 'make', signal })
    return true
  } catch (err) {
    if (isFailure(err, 'not_found')) return false
    throw err
  }
}

function registryAuth(image: string, credential: { username: string; password: string }): string {
  const [host = ''] = image.split('/')
  const serveraddress = /[.:]|^localhost$/.test(host) ? host : 'https://index.docker.io/v1/'
  const json = Buffer.from(JSON.stringify({ ...credential, serveraddress }))
  // With padding: Docker ignores unpadded base64 and pulls anonymously.
  return json.toString('base64').replaceAll('+', '-').replaceAll('/', '_')
}

function failed(image: string, why: string): WorkerError {
  return new WorkerError('image_pull_failed', `The image ${image} could not be pulled: ${why}`)
}
