import { once } from 'node:events'
import type { ServerResponse } from 'node:http'
import { setTimeout } from 'node:timers/promises'
import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { z } from 'zod'
import { MASKED_A_TURN, type Masker } from '../core/masking.ts'
import type { TaskStore, Worker, WorkerBackend } from '../core/ports.ts'
import { isFinal, type Task } from '../core/task.ts'
import { LOG_BYTES_KEPT } from '../core/task-runner.ts'
import { turn } from '../core/turns.ts'
import { cutLine, incompleteBytes } from '../wire/log-text.ts'
import { type logEndSchema, logEventSchema } from '../wire/responses.ts'
import { type KeptLogs, type LogPart, liveTail, readFirstPiece, sendLog } from './log-pieces.ts'
import { errorResponses } from './responses.ts'
import { closeWhenIdle, READER_IDLE_MS } from './slow-readers.ts'
import { taskIdParams, taskOr404 } from './tasks.ts'

const MEGABYTE = 1024 * 1024
const TAIL_MB_MAX = LOG_BYTES_KEPT / MEGABYTE
const QUEUED_POLL_MS = 250
/** Maximum delay of a timer; Fastify does not accept 0 for "no timeout" here. */
const FOLLOW_TIMEOUT_MS = 2 ** 31 - 1
/** Maximum bytes that are masked and sent without yielding to other requests first. */
const SMALL_BYTES_MAX = 4 * 1024
/** Interval of keep-alive comments: proxies close streams that are silent for a minute. */
const KEEP_ALIVE_MS = 20_000

const FLAGS: Readonly<Record<string, boolean>> = { true: true, false: false }
const flag = z.preprocess((text: string) => FLAGS[text] ?? text, z.boolean())

/** Route of a task's log: its tail as text, or a stream of Server-Sent Events. */
export const taskLogRoutes: FastifyPluginAsyncZod<{
  tasks: TaskStore
  kept: KeptLogs
  backend: WorkerBackend
  maskerFor: (task: Task) => Masker
  /** Returns the only instance that can read a running task's log; undefined if this one can. */
  elsewhere: (task: Task) => string | undefined
  readerIdleMs?: number
}> = async (app, { tasks, kept, backend, maskerFor, elsewhere, readerIdleMs = READER_IDLE_MS }) => {
  const closing = new AbortController()
  app.addHook('preClose', async () => closing.abort())

  app.get(
    '/tasks/:task_id/logs',
    {
      handlerTimeout: FOLLOW_TIMEOUT_MS,
      schema: {
        tags: ['Tasks'],
        operationId: 'getTaskLogs',
        summary: "Read or follow a task's log",
        description:
          'The last `tail_mb` megabytes as text. With `follow=true`, a stream of Server-Sent Events: pieces of the log as they are written, each with its end offset in bytes as the event id, then an `end` event with the status of the task. A client that reconnects with `Last-Event-ID` resumes where it stopped.',
        params: taskIdParams,
        querystring: z.strictObject({
          tail_mb: z.coerce.number().positive().max(TAIL_MB_MAX).optional().describe('Default 5'),
          follow: flag.optional().describe('Default false'),
        }),
        headers: z.object({
          'last-event-id': z
            .string()
            .regex(/^[0-9]{0,15}$/, 'is not the id of an event')
            .optional(),
        }),
        response: {
          200: {
            description: 'The log; with `follow=true`, events',
            content: {
              'text/plain': { schema: z.string() },
              'text/event-stream': { schema: logEventSchema },
            },
          },
          ...errorResponses(401, 404, 422, 503),
        },
      },
    },
    async ({ params, query, headers }, reply) => {
      const task = await taskOr404(tasks, params.task_id)
      const maxBytes = Math.round((query.tail_mb ?? TAIL_MB_MAX) * MEGABYTE)
      const gone = new AbortController()
      reply.raw.on('close', () => gone.abort())
      const signal = AbortSignal.any([gone.signal, closing.signal])
      if (!query.follow) return sendLog(reply, await tailOf(task, { maxBytes, signal }))
      // Clients without an id may send an empty header.
      const resumeAt = headers['last-event-id'] || undefined
      reply.hijack()
      reply.raw.writeHead(200, {
        'content-type': 'text/event-stream',
        'cache-control': 'no-store',
        'x-accel-buffering': 'no',
        // A kept-alive connection would delay the shutdown of the service.
        connection: 'close',
      })
      reply.raw.flushHeaders()
      closeWhenIdle(reply.raw, readerIdleMs)
      const keepAlive = setInterval(() => reply.raw.write(':\n\n'), KEEP_ALIVE_MS)
      try {
        await stream(
          task,
          { maxBytes, from: resumeAt === undefined ? undefined : Number(resumeAt) },
          reply.raw,
          signal,
        )
      } catch (err) {
        if (!signal.aborted) reply.log.error({ err, taskId: task.taskId }, 'following a log failed')
      } finally {
        clearInterval(keepAlive)
        reply.raw.end()
      }
    },
  )

  /** Returns the stored log of a final task, the worker's log of a running one, or no log. */
  async function tailOf(
    task: Task,
    options: { maxBytes: number; signal: AbortSignal },
  ): Promise<LogPart> {
    const stored = await kept.tail(task.taskId, options.maxBytes)
    if (stored) return stored
    const running = await runningNow(task)
    const live = async ({ worker, task }: { worker: Worker; task: Task }) =>
      readFirstPiece(await liveTail(worker, maskerFor(task), options))
    // The task may end, and its worker be removed, between these reads.
    const log =
      (running && (await unlessEnded(live(running), task))) ??
      (await kept.tail(task.taskId, options.maxBytes))
    return (
      log ?? { cutBytes: 0, pieces: line(running ? '' : whereItRuns(await tasks.get(task.taskId))) }
    )
  }

  /** Returns a line for people that says where the log can be read, if it is not here. */
  function whereItRuns(task: Task | undefined): string {
    const instance = task && !isFinal(task.status) && elsewhere(task)
    return instance
      ? `[task-runner] The task runs on instance ${instance}; its log is available there, and here once the task has ended\n`
      : ''
  }

  /** Returns the worker of a running task, with the latest task: it has all values to be masked. */
  async function runningNow(task: Task): Promise<{ worker: Worker; task: Task } | undefined> {
    const now = await tasks.get(task.taskId)
    const worker = now?.status === 'running' ? await backend.find(task.workerName) : undefined
    return worker && now && { worker, task: now }
  }

  /** Returns undefined if the read failed because the task has ended, and its log is stored. */
  async function unlessEnded<T>(fromWorker: Promise<T>, task: Task): Promise<T | undefined> {
    try {
      return await fromWorker
    } catch (err) {
      const now = await tasks.get(task.taskId)
      if (now && isFinal(now.status)) return undefined
      throw err
    }
  }

  async function stream(
    task: Task,
    start: { maxBytes: number; from: number | undefined },
    response: ServerResponse,
    signal: AbortSignal,
  ): Promise<void> {
    let at = start.from
    let hasRead = false
    // Incomplete characters and line ends at the end of a piece wait for the next piece.
    let rest: Buffer = Buffer.alloc(0)
    const sendPiece = async (
      bytes: Buffer,
      offset: number,
      { isLast = false }: { isLast?: boolean } = {},
    ) => {
      const piece = Buffer.concat([rest, bytes])
      const whole = isLast ? piece.length : piece.length - unfinishedBytes(piece)
      rest = piece.subarray(whole)
      at = offset - rest.length
      if (whole > 0) {
        await send(response, signal, { id: at, data: piece.subarray(0, whole).toString() })
      }
    }
    const running = await onceRunning(task, response, signal)
    const streamFrom = async ({ worker, task }: { worker: Worker; task: Task }) => {
      if (at === undefined) {
        const { totalBytes } = await worker.logs({ maxBytes: 0 })
        at = Math.max(0, totalBytes - start.maxBytes)
      }
      const masker = maskerFor(task)
      await masker.ready()
      const before = Math.min(masker.overlapBytes, at)
      const masked = masker.stream(before)
      let read = at - before
      for await (const bytes of worker.follow({ from: read, signal })) {
        for (let index = 0; index < bytes.length; index += MASKED_A_TURN) {
          if (bytes.length > SMALL_BYTES_MAX) await turn()
          const piece = bytes.subarray(index, index + MASKED_A_TURN)
          read += piece.length
          const shown = masked.push(piece)
          hasRead = true
          await sendPiece(shown, read - masked.heldBytes())
        }
      }
      // When aborted, the held bytes may be half a secret; the client gets them when it reconnects.
      if (!signal.aborted) await sendPiece(masked.flush(), read)
    }
    if (running) await unlessEnded(streamFrom(running), task)
    const ended = await finalTask(task, signal)
    if (!ended) return
    // Send the rest: what was logged since, and the line that says why the task ended. It is the
    // whole log if the worker was removed before it could be read.
    const log = await kept.size(task.taskId)
    if (log) {
      const keptFrom = log.totalBytes - log.keptBytes
      // Offsets count logged bytes, but masking shortens the stored log. Better send a few bytes
      // twice than skip any.
      const maskedBytes = (ended.logBytes ?? log.totalBytes) - log.totalBytes
      const from = at === undefined ? log.totalBytes - start.maxBytes : at - maskedBytes
      const cut = at === undefined ? '' : cutLine(keptFrom - from)
      if (cut !== '') await send(response, signal, { data: cut })
      // A shorter stored log is a note that the worker's log could not be read at the end.
      const isNote = hasRead && from > log.totalBytes
      const first = isNote ? 0 : Math.max(0, from - keptFrom)
      let offset = keptFrom + first + maskedBytes
      rest = Buffer.alloc(0)
      for await (const piece of kept.pieces(task.taskId, first)) {
        await turn()
        offset += piece.length
        await sendPiece(piece, offset)
      }
      await sendPiece(Buffer.alloc(0), offset, { isLast: true })
    }
    const { status, reason } = ended
    const end: z.input<typeof logEndSchema> = { status, reason }
    await send(response, signal, { event: 'end', data: JSON.stringify(end) })
  }

  /** Waits until the task has a worker. Returns undefined if the task is final. */
  async function onceRunning(task: Task, response: ServerResponse, signal: AbortSignal) {
    let sent = ''
    while (!signal.aborted) {
      const running = await runningNow(task)
      if (running) return running
      const now = await tasks.get(task.taskId)
      if (!now || isFinal(now.status)) return undefined
      const where = whereItRuns(now)
      if (where !== sent) await send(response, signal, { data: where })
      sent = where
      await pause(signal)
    }
    return undefined
  }

  async function finalTask(task: Task, signal: AbortSignal): Promise<Task | undefined> {
    while (!signal.aborted) {
      const now = await tasks.get(task.taskId)
      if (!now) return undefined
      if (isFinal(now.status)) return now
      await pause(signal)
    }
    return undefined
  }
}

const CARRIAGE_RETURN = 13

/** Returns how many bytes at the end belong to an incomplete character or a possible CRLF. */
function unfinishedBytes(piece: Buffer): number {
  return piece.at(-1) === CARRIAGE_RETURN ? 1 : incompleteBytes(piece)
}

/** Sends an event, and waits while the reader is slower than the log. */
async function send(
  response: ServerResponse,
  signal: AbortSignal,
  event: { id?: number; event?: string; data: string },
): Promise<void> {
  const head = [
    ...(event.id === undefined ? [] : [`id: ${event.id}\n`]),
    ...(event.event === undefined ? [] : [`event: ${event.event}\n`]),
  ]
  // A lone CR ends a line of an event stream, too.
  const lines = event.data.replace(/\r\n|\r|\n/g, '\ndata: ')
  if (!response.write(`${head.join('')}data: ${lines}\n\n`)) {
    await once(response, 'drain', { signal })
  }
}

async function* line(text: string): AsyncGenerator<Buffer, void> {
  yield Buffer.from(text)
}

/** Waits until the next poll, or until `signal` aborts. */
async function pause(signal: AbortSignal): Promise<void> {
  await setTimeout(QUEUED_POLL_MS, undefined, { signal }).catch(() => {})
}
