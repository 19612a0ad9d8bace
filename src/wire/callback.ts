import { Readable } from 'node:stream'
import { z } from 'zod'
import type { CallbackPayload } from '../core/ports.ts'
import { turn } from '../core/turns.ts'
import { logText } from './log-text.ts'

/** What a receiver gets: exactly these four fields, whatever happened to the task. */
export const callbackSchema = z
  .strictObject({
    task_name: z.string().describe('The `task_file_name` of the request'),
    task_id: z.string(),
    success: z.boolean(),
    logs: z.string().describe('The last 5 MB of the log'),
  })
  .meta({
    id: 'TaskRunnerCallback',
    examples: [
      { task_name: 'parameters.sh', task_id: 'my-first-task', success: true, logs: 'hello\n' },
    ],
  })

/** Settles when the large log before has been encoded. */
let line: Promise<void> = Promise.resolve()

/** Characters encoded between two turns of the event loop: about a millisecond's work. */
const PIECE_LENGTH = 64 * 1024

/** A callback's body, UTF-8. */
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
  const isLarge = payload.logs.content.length > PIECE_LENGTH
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
  const logs = logText(payload.logs)
  const kept: Buffer[] = []
  let length = 0
  for await (const piece of encoded(payload, logs)) {
    length += piece.length
    look(piece)
    if (logs.length <= PIECE_LENGTH) kept.push(piece)
  }
  if (kept.length > 0) {
    const whole = Buffer.concat(kept)
    return { length, read: () => whole }
  }
  return { length, read: () => Readable.from(encoded(payload, logs), { objectMode: false }) }
}

async function* encoded(payload: CallbackPayload, logs: string): AsyncGenerator<Buffer, void> {
  const head = JSON.stringify({
    task_name: payload.taskName,
    task_id: payload.taskId,
    success: payload.success,
  })
  yield Buffer.from(`${head.slice(0, -1)},"logs":"`)
  for (let at = 0; at < logs.length; ) {
    if (at > 0) await turn()
    let end = Math.min(at + PIECE_LENGTH, logs.length)
    // Half a surrogate pair would be escaped instead of encoded.
    if (end < logs.length && isHighSurrogate(logs.charCodeAt(end - 1))) end += 1
    yield Buffer.from(JSON.stringify(logs.slice(at, end)).slice(1, -1))
    at = end
  }
  yield Buffer.from('"}')
}

function isHighSurrogate(code: number): boolean {
  return code >= 0xd800 && code <= 0xdbff
}
