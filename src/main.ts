import { buildApp } from './app.ts'
import { ConfigError, loadConfig } from './config.ts'

/** Minimum time to close, even if no running work is waited for. */
const STOP_MS_MIN = 1_000

// Files of the service are readable by its user only; tasks get the original mask.
const taskUmask = process.umask(0o077)

try {
  const config = loadConfig()
  const { host, port } = config
  const app = await buildApp({ config, taskUmask, listen: { host, port } })
  const { log } = app.http
  if (config.authOff) log.warn('AUTH=off: every client that reaches this service can run scripts')

  let stopping = false
  const stop = async (signal: NodeJS.Signals) => {
    // A second signal stops immediately.
    if (stopping) process.exit(1)
    stopping = true
    log.info({ signal }, 'stopping; local tasks keep running, and the next start attaches to them')
    // An engine, a database or a disk that hangs must not keep the process from ending.
    setTimeout(
      () => {
        log.warn('stopping took too long; the next start continues its work')
        process.exit(0)
      },
      Math.max(config.shutdownGraceMs, STOP_MS_MIN),
    )
    try {
      await app.stop()
      await app.http.close()
      process.exit(0)
    } catch (err) {
      log.error({ err }, 'stopping failed; the next start continues from the store')
      process.exit(1)
    }
  }
  process.on('SIGTERM', stop)
  process.on('SIGINT', stop)

  const { address } = app
  log.info(
    { address: address + config.basePath, docs: `${address}${config.basePath}/docs` },
    'listening',
  )
} catch (err) {
  const message =
    err instanceof ConfigError ? err.message : `The service cannot start: ${explain(err)}`
  process.stderr.write(`${message}\n`)
  process.exit(1)
}

/** Returns the messages of the error and its causes, for the terminal. */
function explain(err: unknown): string {
  if (!(err instanceof Error)) return String(err)
  const cause = err.cause === undefined ? '' : `: ${explain(err.cause)}`
  return err.message + cause
}
