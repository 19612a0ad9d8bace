import { Readable } from 'node:stream'
import { z } from 'zod'
import type { CallbackPayload } from '../core/ports.ts'
import { turn } from '../core/turns.ts'
import { logTextPieces } from './log-text.ts'

/** What a receiver gets: exactly these four fields, whatever happened to the task. Ours takes more, as that of the old app does. */
export const callbackSchema = z
  .object({
    task_name: z.string().describe('The `task_file_name` of the request'),
    task_id: z.string(),
    success: z.boolean(),
    logs: z.string().describe('The last 5 MB of the log'),
  })
  .meta({
    id: 'TaskRunnerCallbackRequest',
    examples: [
      { task_name: 'parameters.sh', task_id: 'my-first-task', success: true, logs: 'hello\n' },
    ],
  })

/** What a receiver answers; only its status counts. */
export const callbackResponseSchema = z
  .object({ success: z.boolean(), message: z.string() })
  .meta({ id: 'TaskRunnerCallbackResponse', examples: [{ success: true, message: 'ok' }] })

/** Settles when the large log before has been encoded. */
let line: Promise<void> = Promise.resolve()

/** Bytes of log encoded between two turns of the event loop: about a millisecond's work. */
const PIECE_BYTES = 64 * 1024

/** A callback's body, UTF-8. Of a large log it holds nothing: each reader gets it from where it is stored. */
export interface CallbackBody {
  length: number
  /** The body itself, or one that is made piece by piece while it is read: call it for each reader. */
  read(): Buffer | Readable
}

/**
 * Encodes a callback, and shows each piece to `look`. A large log is encoded in pieces: 5 MB of coloured text in one
 * JSON.stringify would hold the event loop for a quarter of a second, and 5 MB of zero bytes are 30 MB of JSON.
 */
export async function encodeCallback(
  payload: CallbackPayload,
  look: (piece: Buffer) => void = () => {},
): Promise<CallbackBody> {
  // One large log after the other: many at once would all take as long as the last of them, and as much memory.
  const isLarge = payload.logs.bytes > PIECE_BYTES
  const done = Promise.withResolvers<void>()
  if (isLarge) {
    const before = line
    line = done.promise
    await before
  }
  try {
    return await encode(payload, look)
  } finally {
    done.resolve()
  }
}

async function encode(
  payload: CallbackPayload,
  look: (piece: Buffer) => void,
): Promise<CallbackBody> {
  const kept: Buffer[] = []
  let length = 0
  for await (const piece of encoded(payload)) {
    length += piece.length
    look(piece)
    if (payload.logs.bytes <= PIECE_BYTES) kept.push(piece)
  }
  if (kept.length > 0) {
    const whole = Buffer.concat(kept)
    return { length, read: () => whole }
  }
  return { length, read: () => Readable.from(encoded(payload), { objectMode: false }) }
}

async function* encoded(payload: CallbackPayload): AsyncGenerator<Buffer, void> {
  const head = JSON.stringify({
    task_name: payload.taskName,
    task_id: payload.taskId,
    success: payload.success,
  })
  yield Buffer.from(`${head.slice(0, -1)},"logs":"`)
  const { content, totalBytes } = await payload.logs.read()
  for await (const text of logTextPieces(piecesOf(content), totalBytes - content.length)) {
    yield Buffer.from(JSON.stringify(text).slice(1, -1))
  }
  yield Buffer.from('"}')
}

async function* piecesOf(content: Buffer): AsyncGenerator<Buffer, void> {
  for (let at = 0; at < content.length; at += PIECE_BYTES) {
    if (at > 0) await turn()
    yield content.subarray(at, at + PIECE_BYTES)
  }
}
