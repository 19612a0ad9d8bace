import { Readable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import { MASKED_A_TURN, type Masker } from '../core/masking.ts'
import type { LogTail, TaskStore, Worker } from '../core/ports.ts'
import { Shared } from '../core/shared.ts'
import { turn } from '../core/turns.ts'
import { logTextPieces } from '../wire/log-text.ts'

/** Maximum bytes of a piece. Each buffer between store and client may hold one. */
const PIECE_BYTES = 32 * 1024
/** Time after which a client counts as slow, and the log is no longer held in memory for it. */
const SLOW_MS = 250

/** The end of a log, in pieces that are loaded as the client reads them. */
export interface LogPart {
  /** Bytes of the log before the first piece. */
  cutBytes: number
  pieces: AsyncGenerator<Buffer, void>
}

/**
 * Reads stored logs in pieces. Clients that read one log share its bytes. For a slow client only a
 * piece is held, and the log is loaded again when the client continues: a hundred stalled clients
 * cost a hundred pieces of memory.
 */
export class KeptLogs {
  readonly #store: Pick<TaskStore, 'log'>
  readonly #held = new Shared<HeldLog>()

  constructor(store: Pick<TaskStore, 'log'>) {
    this.#store = store
  }

  /** Returns the size of a log; undefined if none is stored. */
  async size(taskId: string): Promise<{ totalBytes: number; keptBytes: number } | undefined> {
    const log = await this.#hold(taskId).log
    return log && { totalBytes: log.totalBytes, keptBytes: log.content.length }
  }

  /** Returns the last bytes of a log; undefined if none is stored. */
  async tail(taskId: string, maxBytes: number): Promise<LogPart | undefined> {
    const size = await this.size(taskId)
    if (!size) return undefined
    const { totalBytes, keptBytes } = size
    const from = Math.max(0, keptBytes - maxBytes)
    return { cutBytes: totalBytes - keptBytes + from, pieces: this.pieces(taskId, from) }
  }

  /** Reads the stored bytes from an index on. Throws if the log was deleted meanwhile. */
  async *pieces(taskId: string, from: number): AsyncGenerator<Buffer, void> {
    let held: HeldLog | undefined
    for (let at = from; ; ) {
      held ??= this.#hold(taskId)
      const piece = await copyOf(held, at)
      if (piece.length === 0) return
      at += piece.length
      yield* timed(piece, () => {
        held = undefined
      })
    }
  }

  #hold(taskId: string): HeldLog {
    const held = this.#held.get(taskId, () => ({ log: this.#store.log(taskId) }))
    // The next reader tries again if the log is not stored yet or could not be read.
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

/** Copies a piece: a view would keep the whole log in memory. Returns no bytes at the end. */
async function copyOf(held: HeldLog, from: number): Promise<Buffer> {
  const log = await held.log
  if (!log) throw new Error('the log was deleted while it was read')
  return Buffer.from(log.content.subarray(from, from + PIECE_BYTES))
}

/** Yields the piece, and calls `onSlow` if the client does not ask for the next one soon. */
function* timed(piece: Buffer, onSlow: () => void): Generator<Buffer, void> {
  const timer = setTimeout(onSlow, SLOW_MS)
  try {
    yield piece
  } finally {
    clearTimeout(timer)
  }
}

/** Reads the last bytes of a worker's current log, masked, as the client reads them. */
export async function liveTail(
  worker: Worker,
  masker: Masker,
  { maxBytes, signal }: { maxBytes: number; signal: AbortSignal },
): Promise<LogPart> {
  const isGrowing = (await worker.status()) === 'Running'
  const { content, totalBytes } = await worker.logs({ maxBytes: maxBytes + masker.overlapBytes })
  // These bytes precede the tail: a value to be masked may begin in them.
  const contextBytes = Math.max(0, content.length - maxBytes)
  const from = totalBytes - content.length
  const raw = content.length <= PIECE_BYTES ? [content] : worker.follow({ from, signal })
  await masker.ready()
  const bytes = content.length
  // The end of a growing log may be half a value, so it is held back.
  const pieces = maskedPieces(raw, { masker, contextBytes, bytes, isComplete: !isGrowing })
  return { cutBytes: from + contextBytes, pieces }
}

async function* maskedPieces(
  raw: AsyncIterable<Buffer> | Iterable<Buffer>,
  options: { masker: Masker; contextBytes: number; bytes: number; isComplete: boolean },
): AsyncGenerator<Buffer, void> {
  const masked = options.masker.stream(options.contextBytes)
  let left = options.bytes
  for await (const bytes of raw) {
    const piece = bytes.subarray(0, left)
    left -= piece.length
    for (let at = 0; at < piece.length; at += MASKED_A_TURN) {
      if (options.bytes > MASKED_A_TURN) await turn()
      yield masked.push(piece.subarray(at, at + MASKED_A_TURN))
    }
    // Whatever was logged since then is not part of the tail.
    if (left === 0) break
  }
  if (options.isComplete) yield masked.flush()
}

/** Reads the first piece, so that a missing worker is noticed before anything is sent. */
export async function readFirstPiece({ cutBytes, pieces }: LogPart): Promise<LogPart> {
  const first = await pieces.next()
  return { cutBytes, pieces: withFirst(first, pieces) }
}

/** Sends a log as text: whole if it is a single piece, else streamed. */
export async function sendLog(reply: FastifyReply, log: LogPart): Promise<FastifyReply> {
  const text = logTextPieces(log.pieces, log.cutBytes)
  const first = await text.next()
  const second = first.done ? first : await text.next()
  reply.type('text/plain; charset=utf-8').header('x-content-type-options', 'nosniff')
  if (second.done) return reply.send(first.value ?? '')
  const rest = withFirst(first, withFirst(second, text))
  return reply.send(Readable.from(rest, { objectMode: false, highWaterMark: PIECE_BYTES }))
}

async function* withFirst<T>(
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
