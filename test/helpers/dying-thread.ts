/**
 * Preloaded into a service (`NODE_OPTIONS=--import`): its thread of the name before the first colon in DYING_THREAD dies as soon
 * as there is a file under the path behind it. One that says "hang" blocks the thread for as long as it is there.
 */
import { existsSync, readFileSync } from 'node:fs'
import { isMainThread, threadName } from 'node:worker_threads'

const LOOK_MS = 10
const [name, flag = ''] = (process.env.DYING_THREAD ?? '').split(':')
if (!isMainThread && threadName === name) {
  setInterval(() => {
    if (!existsSync(flag)) return
    if (readFileSync(flag, 'utf8') !== 'hang') throw new Error('it was told\nto die')
    const cell = new Int32Array(new SharedArrayBuffer(4))
    while (existsSync(flag)) Atomics.wait(cell, 0, 0, LOOK_MS)
  }, LOOK_MS).unref()
}
