import { Readable } from 'node:stream'
import { z } from 'zod'
import type { CallbackPayload } from '../core/ports.ts'
import { turn } from '../core/turns.ts'
import { logTextPieces } from './log-text.ts'

/** Body of a callback: exactly these four fields. The sample receivers ignore further ones. */
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

/** Response of a receiver. The service looks at its status only. */
export const callbackResponseSchema = z
  .object({ success: z.boolean(), message: z.string() })
  .meta({ id: 'TaskRunnerCallbackResponse', examples: [{ success: true, message: 'ok' }] })

/** Resolves when the large logs begun so far have been encoded. */
let largeLogs: Promise<void> = Promise.resolve()

/** Bytes of log encoded between two turns of the event loop: about a millisecond's work. */
const PIECE_BYTES = 64 * 1024

/** Body of a callback in UTF-8. A large log is not held in memory but read from the store again. */
export interface CallbackBody {
  length: number
  /** Returns the body, or a new stream of it: call it once per reader. */
  read(): Buffer | Readable
}

/**
 * Encodes a callback and passes each piece to `onPiece`. A large log is encoded in pieces: 5 MB of
 * coloured text in one JSON.stringify would block the event loop for a quarter of a second, and 5
 * MB of zero bytes are 30 MB of JSON.
 */
export async function encodeCallback(
  payload: CallbackPayload,
  onPiece: (piece: Buffer) => void = () => {},
): Promise<CallbackBody> {
  // One large log at a time: in parallel all would end as late as the last, and fill the memory.
  const isLarge = payload.logs.bytes > PIECE_BYTES
  const done = Promise.withResolvers<void>()
  if (isLarge) {
    const before = largeLogs
    largeLogs = done.promise
    await before
  }
  try {
    return await encode(payload, onPiece)
  } finally {
    done.resolve()
  }
}

async function encode(
  payload: CallbackPayload,
  onPiece: (piece: Buffer) => void,
): Promise<CallbackBody> {
  const kept: Buffer[] = []
  let length = 0
  for await (const piece of encoded(payload)) {
    length += piece.length
    onPiece(piece)
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
