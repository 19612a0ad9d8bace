/**
 * Signal that aborts as soon as one of `others` does, or with a `TimeoutError` after `ms`. Disposal
 * frees it at once; AbortSignal.any and AbortSignal.timeout live until a major garbage collection.
 */
export class Deadline implements Disposable {
  readonly #controller = new AbortController()
  readonly #others: readonly AbortSignal[]
  readonly #timer: NodeJS.Timeout

  constructor(ms: number, others: readonly AbortSignal[]) {
    this.#others = others
    this.#timer = setTimeout(() => {
      this.#controller.abort(new DOMException('The time is up', 'TimeoutError'))
    }, ms)
    for (const other of others) {
      other.addEventListener('abort', this.#onAbort)
      if (other.aborted) this.#onAbort()
    }
  }

  get signal(): AbortSignal {
    return this.#controller.signal
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer)
    for (const other of this.#others) other.removeEventListener('abort', this.#onAbort)
  }

  readonly #onAbort = () => {
    this.#controller.abort(this.#others.find(({ aborted }) => aborted)?.reason)
  }
}
