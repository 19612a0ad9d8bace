/** The thread's end of a `ServiceThread`. */
import { parentPort } from 'node:worker_threads'
import type { Answer, Call, FromThread, ToThread } from './messages.ts'

export interface Serving {
  /** `moved`: memory that goes over with the answers, instead of being copied. */
  tell(answers: Answer[], moved?: ArrayBuffer[]): void
  notify(notice: unknown): void
}

/**
 * Says that the thread has started, and calls `take` with what it is asked. Each call is to be answered once. `close` is
 * called before the thread ends.
 */
export function serve<Request>(take: (calls: Call<Request>[]) => void, close: () => void): Serving {
  const port = parentPort
  if (!port) throw new Error('runs as a thread only')
  const post = (message: FromThread, moved: ArrayBuffer[] = []) => port.postMessage(message, moved)
  port.on('message', (message: ToThread<Request>) => {
    if (message !== 'close') {
      take(message)
      return
    }
    close()
    // What was answered in this turn is sent first.
    setImmediate(() => port.close())
  })
  post('open')
  return { tell: post, notify: (notice) => post({ notice }) }
}
