import { extname } from 'node:path'
import { Worker } from 'node:worker_threads'
import type { FromThread, ToThread } from './messages.ts'
import { perTurn } from './per-turn.ts'

export interface ServiceThreadOptions {
  /** Name of the thread in error messages. */
  name: string
  workerData: unknown
  /**
   * Called once if the thread ends without `close`: its state is lost, and the process must
   * restart. Not called if the thread did not start; then `ready` rejects.
   */
  onDeath?: ((err: Error) => void) | undefined
  onNotice?: ((notice: unknown) => void) | undefined
}

/** A thread that answers calls, for work that would block the HTTP loop. */
export class ServiceThread<Request> {
  /** Resolves when the thread has started; rejects if it does not start. */
  readonly ready: Promise<void>
  readonly #options: ServiceThreadOptions
  readonly #thread: Worker
  readonly #ready = Promise.withResolvers<void>()
  readonly #waiting = new Map<number, PromiseWithResolvers<unknown>>()
  readonly #outgoing = perTurn<{ id: number; request: Request }>((calls) => this.#post(calls))
  #lastId = 0
  #state: 'starting' | 'open' | 'closing' = 'starting'
  #dead: Error | undefined

  /** Starts `module`, named without the extension: that of `importedFrom`, an `import.meta.url`. */
  constructor(module: string, importedFrom: string, options: ServiceThreadOptions) {
    const { name, workerData } = options
    this.#options = options
    this.ready = this.#ready.promise
    this.ready.catch(() => {})
    this.#thread = new Worker(new URL(`${module}${extname(importedFrom)}`, importedFrom), {
      workerData,
      name,
      // Hides the warning of node:ffi: see splice.ts.
      execArgv: ['--disable-warning=ExperimentalWarning'],
    })
    this.#thread.on('message', (message: FromThread) => this.#receive(message))
    this.#thread.on('messageerror', (err) => this.#fail(err))
    this.#thread.on('error', (err) => this.#fail(err))
    this.#thread.on('exit', (code) => this.#fail(new Error(`it ended with code ${code}`)))
  }

  /** Sends a request. Rejects with the error of the thread, or if the thread ends. */
  call(request: Request): Promise<unknown> {
    if (this.#dead) return Promise.reject(this.#dead)
    this.#lastId += 1
    const waiting = Promise.withResolvers<unknown>()
    this.#waiting.set(this.#lastId, waiting)
    this.#outgoing.add({ id: this.#lastId, request })
    return waiting.promise
  }

  /** Ends the thread. Idempotent. */
  async close(): Promise<void> {
    await this.ready.catch(() => {})
    if (this.#dead) return
    const exited = new Promise((resolve) => this.#thread.once('exit', resolve))
    if (this.#state !== 'closing') {
      this.#state = 'closing'
      this.#outgoing.flush()
      this.#post('close')
    }
    await exited
  }

  #post(message: ToThread<Request>): void {
    this.#thread.postMessage(message)
  }

  #receive(message: FromThread): void {
    if (message === 'open') {
      if (this.#state === 'starting') this.#state = 'open'
      this.#ready.resolve()
    } else if ('notice' in message) this.#options.onNotice?.(message.notice)
    else {
      for (const answer of message) {
        const waiting = this.#waiting.get(answer.id)
        this.#waiting.delete(answer.id)
        if ('error' in answer) waiting?.reject(Object.assign(answer.error, answer.details))
        else waiting?.resolve(answer.value)
      }
    }
  }

  #fail(cause: unknown): void {
    if (this.#dead) return
    const { name } = this.#options
    const isDeath = this.#state === 'open'
    const words = cause instanceof Error ? cause.message : String(cause)
    // An error at start says more than that the thread ended.
    this.#dead =
      this.#state === 'starting' && cause instanceof Error
        ? cause
        : new Error(`the ${name} thread ended: ${words}`, { cause })
    this.#ready.reject(this.#dead)
    for (const { reject } of this.#waiting.values()) reject(this.#dead)
    this.#waiting.clear()
    if (isDeath) this.#options.onDeath?.(this.#dead)
  }
}
