import { buildApp } from './app.ts'
import { ConfigError, loadConfig } from './config.ts'

/** Closing takes a moment, even where nothing is waited for. */
const STOP_MS_MIN = 1_000

// Whatever we write is ours alone; tasks get the mask that we were started with.
const taskUmask = process.umask(0o077)

try {
  const config = loadConfig()
  const { host, port } = config
  const app = await buildApp({ config, taskUmask, listen: { host, port } })
  const { log } = app.http
  if (config.authOff) log.warn('AUTH=off: whoever reaches this service can run scripts on it')

  let stopping = false
  const stop = async (signal: NodeJS.Signals) => {
    // A second signal means it.
    if (stopping) process.exit(1)
    stopping = true
    log.info({ signal }, 'stopping; local tasks go on and are found again at the next start')
    // An engine, a database or a disk that never answers must not keep the service from ending.
    setTimeout(
      () => {
        log.warn('stopping took too long: the next start takes up what is left')
        process.exit(0)
      },
      Math.max(config.shutdownGraceMs, STOP_MS_MIN),
    )
    try {
      await app.stop()
      await app.http.close()
      process.exit(0)
    } catch (err) {
      log.error({ err }, 'stopping failed; what is stored is taken up at the next start')
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

/** The error and what caused it, for whoever reads the terminal. */
function explain(err: unknown): string {
  if (!(err instanceof Error)) return String(err)
  const cause = err.cause === undefined ? '' : `: ${explain(err.cause)}`
  return err.message + cause
}
