/** The part of a `ServiceThread` that runs in the thread. */
import { parentPort } from 'node:worker_threads'
import type { Answer, Call, FromThread, ToThread } from './messages.ts'

export interface Serving {
  /** Sends answers. `moved`: memory to transfer instead of copying it. */
  tell(answers: Answer[], moved?: ArrayBuffer[]): void
  notify(notice: unknown): void
}

/** Passes calls to `take`, which must answer each once. Calls `close` before the thread ends. */
export function serve<Request>(take: (calls: Call<Request>[]) => void, close: () => void): Serving {
  const port = parentPort
  if (!port) throw new Error('this module must run in a worker thread')
  const post = (message: FromThread, moved: ArrayBuffer[] = []) => port.postMessage(message, moved)
  port.on('message', (message: ToThread<Request>) => {
    if (message !== 'close') {
      take(message)
      return
    }
    close()
    // The answers of this turn are sent first.
    setImmediate(() => port.close())
  })
  post('open')
  return { tell: post, notify: (notice) => post({ notice }) }
}
