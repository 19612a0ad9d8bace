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
import { begun, type KeptLogs, type LogPart, liveTail, sendLog } from './log-pieces.ts'
import { errorResponses } from './responses.ts'
import { closeWhenIdle, READER_IDLE_MS } from './slow-readers.ts'
import { taskIdParams, taskOr404 } from './tasks.ts'

const MEGABYTE = 1024 * 1024
const TAIL_MB_MAX = LOG_BYTES_KEPT / MEGABYTE
const QUEUED_POLL_MS = 250
/** As long as timers can be; Fastify takes no 0 here. */
const FOLLOW_TIMEOUT_MS = 2 ** 31 - 1
/** Masked and sent at once: some lines. */
const SMALL_BYTES_MAX = 4 * 1024
/** Proxies close streams that are silent for a minute. */
const KEEP_ALIVE_MS = 20_000

const FLAGS: Readonly<Record<string, boolean>> = { true: true, false: false }
const flag = z.preprocess((text: string) => FLAGS[text] ?? text, z.boolean())

/** A task's log: its tail as text, or followed as Server-Sent Events. */
export const taskLogRoutes: FastifyPluginAsyncZod<{
  tasks: TaskStore
  kept: KeptLogs
  backend: WorkerBackend
  maskerFor: (task: Task) => Masker
  /** The instance that alone can read the log of a task that runs; undefined: this one can. */
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
          'The last `tail_mb` megabytes as text. With `follow=true` a stream of Server-Sent Events: pieces of the log as they come, each with the byte offset after it as its id, then an `end` event with the status of the task. A client that comes back with `Last-Event-ID` goes on where it was.',
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
      // Empty, as clients send it that have no id yet, it counts as absent.
      const resumeAt = headers['last-event-id'] || undefined
      reply.hijack()
      reply.raw.writeHead(200, {
        'content-type': 'text/event-stream',
        'cache-control': 'no-store',
        'x-accel-buffering': 'no',
        // Kept alive, it would keep a service that stops from stopping.
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

  /** The kept log of a final task, the worker's of one that runs, nothing for one that waits. */
  async function tailOf(
    task: Task,
    options: { maxBytes: number; signal: AbortSignal },
  ): Promise<LogPart> {
    const stored = await kept.tail(task.taskId, options.maxBytes)
    if (stored) return stored
    const running = await runningNow(task)
    const live = async ({ worker, task }: { worker: Worker; task: Task }) =>
      begun(await liveTail(worker, maskerFor(task), options))
    // It may have ended, and its worker gone, between the two looks.
    const log =
      (running && (await unlessEnded(live(running), task))) ??
      (await kept.tail(task.taskId, options.maxBytes))
    return (
      log ?? { cutBytes: 0, pieces: line(running ? '' : whereItRuns(await tasks.get(task.taskId))) }
    )
  }

  /** A line for people, while the log cannot be read here. */
  function whereItRuns(task: Task | undefined): string {
    const instance = task && !isFinal(task.status) && elsewhere(task)
    return instance
      ? `[task-runner] The task runs at ${instance}, where its log can be read; it is here once the task has ended\n`
      : ''
  }

  /** The worker of a task that runs, and the task as it is now, which knows all that must be masked. */
  async function runningNow(task: Task): Promise<{ worker: Worker; task: Task } | undefined> {
    const now = await tasks.get(task.taskId)
    const worker = now?.status === 'running' ? await backend.find(task.workerName) : undefined
    return worker && now && { worker, task: now }
  }

  /** What a worker gives; undefined when it went away because its task has ended, and the log is stored. */
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
    // The beginning of a character, or of a line end, at the end of a piece waits for its rest.
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
      // Cut short by us: what is held back may be half a secret, and comes whole when they ask again.
      if (!signal.aborted) await sendPiece(masked.flush(), read)
    }
    if (running) await unlessEnded(streamFrom(running), task)
    const ended = await finalTask(task, signal)
    if (!ended) return
    // What came after the last look with the line that says why the task ended, or all of it when
    // the worker was gone before.
    const log = await kept.size(task.taskId)
    if (log) {
      const keptFrom = log.totalBytes - log.keptBytes
      // Offsets count what was logged. Where values were masked the kept log is shorter: rather send a few
      // bytes again than leave any out.
      const maskedBytes = (ended.logBytes ?? log.totalBytes) - log.totalBytes
      const from = at === undefined ? log.totalBytes - start.maxBytes : at - maskedBytes
      const cut = at === undefined ? '' : cutLine(keptFrom - from)
      if (cut !== '') await send(response, signal, { data: cut })
      // Less is kept than was read here: the log could not be read again, and says so instead.
      const isAnother = hasRead && from > log.totalBytes
      const first = isAnother ? 0 : Math.max(0, from - keptFrom)
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

  /** Waits while the task has no worker yet. Undefined: the task is final. */
  async function onceRunning(task: Task, response: ServerResponse, signal: AbortSignal) {
    let told = ''
    while (!signal.aborted) {
      const running = await runningNow(task)
      if (running) return running
      const now = await tasks.get(task.taskId)
      if (!now || isFinal(now.status)) return undefined
      const where = whereItRuns(now)
      if (where !== told) await send(response, signal, { data: where })
      told = where
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

/** How many bytes at the end wait for what follows: a character, or a line end of two. */
function unfinishedBytes(piece: Buffer): number {
  return piece.at(-1) === CARRIAGE_RETURN ? 1 : incompleteBytes(piece)
}

/** One event; waits while the reader is slower than the log. */
async function send(
  response: ServerResponse,
  signal: AbortSignal,
  event: { id?: number; event?: string; data: string },
): Promise<void> {
  const head = [
    ...(event.id === undefined ? [] : [`id: ${event.id}\n`]),
    ...(event.event === undefined ? [] : [`event: ${event.event}\n`]),
  ]
  // A lone CR would end the line for the event stream as well: it becomes a line of its own.
  const lines = event.data.replace(/\r\n|\r|\n/g, '\ndata: ')
  if (!response.write(`${head.join('')}data: ${lines}\n\n`)) {
    await once(response, 'drain', { signal })
  }
}

async function* line(text: string): AsyncGenerator<Buffer, void> {
  yield Buffer.from(text)
}

/** Until the next look, or until `signal` aborts. */
async function pause(signal: AbortSignal): Promise<void> {
  await setTimeout(QUEUED_POLL_MS, undefined, { signal }).catch(() => {})
}
