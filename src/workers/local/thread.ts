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
const answers = perTurn<Answer>(tell)

/** Never rejects. */
async function answer({ id, request }: Call<Request>): Promise<void> {
  try {
    const method = methods[request.method] as (...args: unknown[]) => unknown
    // Holds: local-backend.ts types its calls by `Methods`.
    answers.add({ id, value: await method.apply(workers, request.arguments) })
  } catch (err) {
    answers.add(failed(id, sorted(err)))
  }
}
