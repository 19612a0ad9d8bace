/** The thread that local workers live on: forks, /proc and file copies block it instead of the HTTP loop. */
import { workerData } from 'node:worker_threads'
import { type Answer, type Call, failed } from '../../threads/messages.ts'
import { perTurn } from '../../threads/per-turn.ts'
import { serve } from '../../threads/serving.ts'
import { sorted } from './failures.ts'
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

/** How many folders cannot be removed, and one that was found to be such. */
export interface Notice {
  unremovable: number
  found: Unremovable | undefined
}

// The first may come before the thread has started.
const notices = perTurn<Notice>((all) => {
  for (const notice of all) notify(notice)
})
// Holds: local-backend.ts starts this thread with it.
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
    // Holds: local-backend.ts types its calls by `Methods`.
    const value = await method.apply(workers, request.arguments)
    answers.add({ answer: { id, value }, moved: logsIn(value) })
  } catch (err) {
    answers.add({ answer: failed(id, sorted(err)), moved: [] })
  }
}

/** The memory of a log in an answer: a copy would stay until this thread, which makes little garbage, collects it. */
function logsIn(value: unknown): ArrayBuffer[] {
  const { content } = Object(value) as { content?: unknown }
  return content instanceof Uint8Array && content.buffer instanceof ArrayBuffer
    ? [content.buffer]
    : []
}
