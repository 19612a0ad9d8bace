/** Runs local workers on a thread: forks, /proc and file copies would block the HTTP loop. */
import { workerData } from 'node:worker_threads'
import { type Answer, type Call, failed } from '../../threads/messages.ts'
import { perTurn } from '../../threads/per-turn.ts'
import { serve } from '../../threads/serving.ts'
import { classified } from './failures.ts'
import { type LocalSettings, LocalWorkers } from './local-workers.ts'
import type { Unremovable } from './removal.ts'

export type Methods = Pick<
  LocalWorkers,
  | 'provision'
  | 'find'
  | 'list'
  | 'completion'
  | 'tail'
  | 'stop'
  | 'hasEnded'
  | 'terminate'
  | 'freeSpace'
  | 'check'
>

export interface Request {
  method: keyof Methods
  arguments: unknown[]
}

/** The number of folders that cannot be removed, and the new one, if any. */
export interface Notice {
  unremovable: number
  found: Unremovable | undefined
}

// Sends at the end of the turn: the first notice may come before `notify` is defined.
const notices = perTurn<Notice>((all) => {
  for (const notice of all) notify(notice)
})
// local-backend.ts starts this thread with the settings.
const workers = new LocalWorkers(workerData as LocalSettings, (unremovable, found) =>
  notices.add({ unremovable, found }),
)
const methods: Methods = workers

const { tell, notify } = serve<Request>(
  (calls) => {
    for (const call of calls) void answer(call)
  },
  () => workers.close(),
)
const answers = perTurn<{ answer: Answer; moved: readonly ArrayBuffer[] }>((all) =>
  tell(
    all.map(({ answer }) => answer),
    all.flatMap(({ moved }) => moved),
  ),
)

/** Never rejects. */
async function answer({ id, request }: Call<Request>): Promise<void> {
  try {
    const method = methods[request.method] as (...args: unknown[]) => unknown
    // local-backend.ts types the arguments by `Methods`.
    const value = await method.apply(workers, request.arguments)
    answers.add({ answer: { id, value }, moved: logsIn(value) })
  } catch (err) {
    answers.add({ answer: failed(id, classified(err)), moved: [] })
  }
}

/** Returns the memory of a log in an answer, to be moved: a copy would be collected late. */
function logsIn(value: unknown): ArrayBuffer[] {
  const { content } = Object(value) as { content?: unknown }
  return content instanceof Uint8Array && content.buffer instanceof ArrayBuffer
    ? [content.buffer]
    : []
}
