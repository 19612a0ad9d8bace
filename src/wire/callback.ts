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

/** Characters encoded between two turns of the event loop: about a millisecond's work. */
const PIECE_LENGTH = 128 * 1024

/**
 * The callback's body, UTF-8. A large log is encoded in pieces: 5 MB of coloured text in one
 * JSON.stringify would hold the event loop for a quarter of a second.
 */
export async function encodeCallback(payload: CallbackPayload): Promise<Buffer> {
  const head = JSON.stringify({
    task_name: payload.taskName,
    task_id: payload.taskId,
    success: payload.success,
  })
  const pieces = [Buffer.from(`${head.slice(0, -1)},"logs":"`)]
  const logs = logText(payload.logs)
  for (let at = 0; at < logs.length; ) {
    if (at > 0) await turn()
    let end = Math.min(at + PIECE_LENGTH, logs.length)
    // Half a surrogate pair would be escaped instead of encoded.
    if (end < logs.length && isHighSurrogate(logs.charCodeAt(end - 1))) end += 1
    pieces.push(Buffer.from(JSON.stringify(logs.slice(at, end)).slice(1, -1)))
    at = end
  }
  pieces.push(Buffer.from('"}'))
  return Buffer.concat(pieces)
}

function isHighSurrogate(code: number): boolean {
  return code >= 0xd800 && code <= 0xdbff
}
