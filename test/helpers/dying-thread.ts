/**
 * Preloaded into a service (`NODE_OPTIONS=--import`): its thread of the name before the first colon in DYING_THREAD dies as soon
 * as there is a file under the path behind it.
 */
import { existsSync } from 'node:fs'
import { isMainThread, threadName } from 'node:worker_threads'

const LOOK_MS = 10
const [name, flag = ''] = (process.env.DYING_THREAD ?? '').split(':')
if (!isMainThread && threadName === name) {
  setInterval(() => {
    if (existsSync(flag)) throw new Error('it was told\nto die')
  }, LOOK_MS).unref()
}
