import { Readable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import { MASKED_A_TURN, type Masker } from '../core/masking.ts'
import type { LogTail, TaskStore, Worker } from '../core/ports.ts'
import { Shared } from '../core/shared.ts'
import { turn } from '../core/turns.ts'
import { logTextPieces } from '../wire/log-text.ts'

/** Maximum bytes of a piece. Each buffer on the way to a reader that takes nothing holds one. */
const PIECE_BYTES = 32 * 1024
/** Time after which a reader counts as slow, so that the log is not held for it. */
const SLOW_MS = 250

/** The end of a log, in pieces that are read as the reader takes them. */
export interface LogPart {
  /** Bytes of the log before the first piece. */
  cutBytes: number
  pieces: AsyncGenerator<Buffer, void>
}

/**
 * Reads kept logs in pieces. Readers of one log share its bytes. For a slow reader nothing is held
 * but a piece, and the log is read again when it comes back: a hundred readers that read nothing
 * cost a hundred pieces.
 */
export class KeptLogs {
  readonly #store: Pick<TaskStore, 'log'>
  readonly #held = new Shared<HeldLog>()

  constructor(store: Pick<TaskStore, 'log'>) {
    this.#store = store
  }

  /** Returns how much of a log there is; undefined when none is kept. */
  async size(taskId: string): Promise<{ totalBytes: number; keptBytes: number } | undefined> {
    const log = await this.#hold(taskId).log
    return log && { totalBytes: log.totalBytes, keptBytes: log.content.length }
  }

  /** Returns the last bytes of a log; undefined when none is kept. */
  async tail(taskId: string, maxBytes: number): Promise<LogPart | undefined> {
    const size = await this.size(taskId)
    if (!size) return undefined
    const { totalBytes, keptBytes } = size
    const from = Math.max(0, keptBytes - maxBytes)
    return { cutBytes: totalBytes - keptBytes + from, pieces: this.pieces(taskId, from) }
  }

  /** Reads the kept bytes from an index on. Throws when the log is not kept any more. */
  async *pieces(taskId: string, from: number): AsyncGenerator<Buffer, void> {
    let held: HeldLog | undefined
    for (let at = from; ; ) {
      held ??= this.#hold(taskId)
      const piece = await copyOf(held, at)
      if (piece.length === 0) return
      at += piece.length
      yield* lentFor(piece, () => {
        held = undefined
      })
    }
  }

  #hold(taskId: string): HeldLog {
    const held = this.#held.get(taskId, () => ({ log: this.#store.log(taskId) }))
    // What is not there yet, or could not be read, is asked for again.
    held.log.then(
      (log) => log ?? this.#held.forget(taskId),
      () => this.#held.forget(taskId),
    )
    return held
  }
}

interface HeldLog {
  log: Promise<LogTail | undefined>
}

/** Copies a piece, since a view would hold the whole log. Empty at the end. */
async function copyOf(held: HeldLog, from: number): Promise<Buffer> {
  const log = await held.log
  if (!log) throw new Error('the log is not kept any more')
  return Buffer.from(log.content.subarray(from, from + PIECE_BYTES))
}

/** Yields the piece, and calls `onSlow` when the reader takes long to come back. */
function* lentFor(piece: Buffer, onSlow: () => void): Generator<Buffer, void> {
  const timer = setTimeout(onSlow, SLOW_MS)
  try {
    yield piece
  } finally {
    clearTimeout(timer)
  }
}

/** Reads the last bytes of a worker's log as it is now, masked, as the reader takes them. */
export async function liveTail(
  worker: Worker,
  masker: Masker,
  { maxBytes, signal }: { maxBytes: number; signal: AbortSignal },
): Promise<LogPart> {
  const isGrowing = (await worker.status()) === 'Running'
  const { content, totalBytes } = await worker.logs({ maxBytes: maxBytes + masker.overlapBytes })
  const lookedAtBytes = Math.max(0, content.length - maxBytes)
  const from = totalBytes - content.length
  const raw = content.length <= PIECE_BYTES ? [content] : worker.follow({ from, signal })
  await masker.ready()
  const bytes = content.length
  // Of a log that goes on, the end may be half a value.
  const pieces = maskedPieces(raw, { masker, lookedAtBytes, bytes, isWhole: !isGrowing })
  return { cutBytes: from + lookedAtBytes, pieces }
}

async function* maskedPieces(
  raw: AsyncIterable<Buffer> | Iterable<Buffer>,
  options: { masker: Masker; lookedAtBytes: number; bytes: number; isWhole: boolean },
): AsyncGenerator<Buffer, void> {
  const masked = options.masker.stream(options.lookedAtBytes)
  let left = options.bytes
  for await (const bytes of raw) {
    const piece = bytes.subarray(0, left)
    left -= piece.length
    for (let at = 0; at < piece.length; at += MASKED_A_TURN) {
      if (options.bytes > MASKED_A_TURN) await turn()
      yield masked.push(piece.subarray(at, at + MASKED_A_TURN))
    }
    // What was logged since is not asked for.
    if (left === 0) break
  }
  if (options.isWhole) yield masked.flush()
}

/** Reads the first piece, so that a worker that is gone is noticed before anything is sent. */
export async function begun({ cutBytes, pieces }: LogPart): Promise<LogPart> {
  const first = await pieces.next()
  return { cutBytes, pieces: resumed(first, pieces) }
}

/** Sends a log as text: at once when it is one piece, else as the reader takes it. */
export async function sendLog(reply: FastifyReply, log: LogPart): Promise<FastifyReply> {
  const text = logTextPieces(log.pieces, log.cutBytes)
  const first = await text.next()
  const second = first.done ? first : await text.next()
  reply.type('text/plain; charset=utf-8').header('x-content-type-options', 'nosniff')
  if (second.done) return reply.send(first.value ?? '')
  const rest = resumed(first, resumed(second, text))
  return reply.send(Readable.from(rest, { objectMode: false, highWaterMark: PIECE_BYTES }))
}

async function* resumed<T>(
  first: IteratorResult<T, void>,
  rest: AsyncGenerator<T, void>,
): AsyncGenerator<T, void> {
  try {
    if (!first.done) yield first.value
    yield* rest
  } finally {
    await rest.return()
  }
}
