import { type ImageConfig, WorkerError } from '../../core/ports.ts'
import { type Engine, EngineError, unreachable } from './engine.ts'

/**
 * Sees that the image is there. Returns how many ms pulling it took; undefined: it was there. Throws a
 * `WorkerError` with `image_pull_failed` and the registry's words.
 */
export async function pull(
  engine: Engine,
  image: string,
  config: ImageConfig = {},
  signal?: AbortSignal,
): Promise<number | undefined> {
  const { pullPolicy = 'IfNotPresent' } = config
  if (pullPolicy !== 'Always' && (await isThere(engine, image))) return undefined
  if (pullPolicy === 'Never') throw failed(image, 'it is not there, and pull_policy is Never')
  const startedAt = performance.now()
  let unread = ''
  try {
    const progress = await engine.stream('POST', '/images/create', {
      query: { fromImage: image },
      headers: config.credential
        ? { 'x-registry-auth': registryAuth(image, config.credential) }
        : {},
      signal,
    })
    for await (const chunk of progress) {
      const lines = (unread + chunk).split('\n')
      unread = lines.pop() ?? ''
      for (const line of lines) throwIfError(image, line)
    }
  } catch (err) {
    if (err instanceof WorkerError) throw err
    // Cut in the middle, it can be asked for again.
    throw err instanceof EngineError ? failed(image, err.message) : unreachable(err, signal)
  }
  throwIfError(image, unread)
  return performance.now() - startedAt
}

/** A pull that fails later than at its first step is told inside an answer of 200. */
function throwIfError(image: string, line: string): void {
  if (line.trim() === '') return
  const { error } = JSON.parse(line) as { error?: string }
  if (error !== undefined) throw failed(image, error)
}

async function isThere(engine: Engine, image: string): Promise<boolean> {
  try {
    await engine.json('GET', `/images/${image}/json`)
    return true
  } catch (err) {
    if (err instanceof EngineError && err.status === 404) return false
    throw err
  }
}

function registryAuth(image: string, credential: { username: string; password: string }): string {
  const [host = ''] = image.split('/')
  const serveraddress = /[.:]|^localhost$/.test(host) ? host : 'https://index.docker.io/v1/'
  const json = Buffer.from(JSON.stringify({ ...credential, serveraddress }))
  // With padding: the engine drops what is cut for the want of it, and pulls as nobody.
  return json.toString('base64').replaceAll('+', '-').replaceAll('/', '_')
}

function failed(image: string, why: string): WorkerError {
  return new WorkerError('image_pull_failed', `The image ${image} could not be pulled: ${why}`)
}
