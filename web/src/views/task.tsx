import { api, hasEnded, isSettled, type Task } from '../api.ts'
import { useAction, useLive, useNow } from '../live.ts'
import { Log } from '../log.tsx'
import { ConfirmButton, Heading, Message, Problem } from '../parts.tsx'
import { runAgainHref } from '../route.ts'
import { Status } from '../status.tsx'
import { bytes, duration, visible } from '../text.ts'
import { Timeline } from '../timeline.tsx'

const POLL_MS = 1000

export function TaskView({ id }: { id: string }) {
  const { data, problem, reload } = useLive(
    id,
    async (signal) => {
      const [task, callback] = await Promise.all([api.task(id, signal), api.callback(id, signal)])
      return { task, callback }
    },
    { everyMs: POLL_MS, isDone: ({ task }) => isSettled(task) },
  )
  const now = useNow(data !== undefined && !isSettled(data.task))
  const action = useAction()
  const act = async (work: () => Promise<{ message: string }>) => {
    if (await action.run(work)) reload()
  }

  return (
    <>
      <div class="title">
        <Heading title={visible(id)}>
          <span class="id">{visible(id)}</span>
          {data && <Status of={data.task.status} />}
        </Heading>
        {data && (
          <div class="actions">
            {!hasEnded(data.task) && (
              <ConfirmButton
                label="Cancel"
                question="Really cancel?"
                isBusy={action.isBusy}
                onConfirm={() => void act(() => api.cancel(id))}
              />
            )}
            {hasEnded(data.task) && data.task.callback_status !== 'none' && (
              <button
                type="button"
                disabled={action.isBusy}
                onClick={() => void act(() => api.redeliver(id))}
              >
                Redeliver
              </button>
            )}
            <a class="button" href={runAgainHref(id)}>
              Run again
            </a>
          </div>
        )}
      </div>
      <p role="status" class="message">
        {data?.task.waiting_for && `Waits: ${visible(data.task.waiting_for)}`}
      </p>
      <Problem text={problem} />
      <Message text={action.message} isError={action.isError} />
      {data && (
        <div class="columns">
          <section class="card" aria-labelledby="timeline-heading">
            <h2 id="timeline-heading">Timeline</h2>
            <Timeline task={data.task} callback={data.callback} now={now} />
          </section>
          <section class="card" aria-labelledby="parameters-heading">
            <h2 id="parameters-heading">Parameters</h2>
            <Parameters task={data.task} />
          </section>
        </div>
      )}
      {data && <Log taskId={id} onEnd={reload} />}
    </>
  )
}

function Parameters({ task }: { task: Task }) {
  const config = Object.entries(task.worker_config).flatMap(([name, value]) =>
    isNamed(value)
      ? Object.entries(value).map(([key, each]) => [key, each] as const)
      : [[name, value] as const],
  )
  const rows: (readonly [string, unknown])[] = [
    ['task_file_name', task.task_file_name],
    ...config,
    ['callback_url', task.callback_url],
    ['timeout', duration(task.timeout_seconds * 1000)],
    ['worker', task.worker_name],
    ['instance', task.instance],
    ['terminate_on_completion', task.terminate_on_completion],
    ['traceparent', task.traceparent],
    ['logged', task.log_bytes === null ? null : bytes(task.log_bytes)],
  ]
  return (
    <dl class="parameters">
      {rows
        .filter(([, value]) => value !== null && value !== undefined)
        .map(([name, value]) => (
          <div key={name}>
            <dt>{visible(name)}</dt>
            <dd>{shown(value)}</dd>
          </div>
        ))}
    </dl>
  )
}

function isNamed(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** Returns the value as text and keeps its line ends, for startup scripts. */
function shown(value: unknown): string {
  const text = typeof value === 'string' ? value : JSON.stringify(value)
  return text.split('\n').map(visible).join('\n')
}
