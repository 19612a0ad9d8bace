import { useState } from 'preact/hooks'
import { api, type Worker } from '../api.ts'
import { useAction, useLive, useNow } from '../live.ts'
import { ConfirmButton, Heading, Message, Problem } from '../parts.tsx'
import { taskHref } from '../route.ts'
import { Status } from '../status.tsx'
import { counted, duration, visible } from '../text.ts'

const POLL_MS = 2000
/** Default of the API. */
const CLEANUP_SECONDS_DEFAULT = 59

export function WorkersView() {
  const { data, problem, reload } = useLive('workers', api.workers, { everyMs: POLL_MS })
  const now = useNow(true)
  const action = useAction()
  const [seconds, setSeconds] = useState(String(CLEANUP_SECONDS_DEFAULT))
  const act = async (work: () => Promise<{ message: string }>) => {
    if (await action.run(work)) reload()
  }
  const workers = (data?.workers ?? []).toSorted((a, b) =>
    a.creation_time < b.creation_time ? 1 : -1,
  )
  return (
    <>
      <Heading title="Workers">Workers</Heading>
      <Problem text={problem} />
      <div class="actions">
        <label class="inline">
          Stuck in Provisioning for
          <input
            type="number"
            min={0}
            class="short"
            value={seconds}
            onInput={(event) => setSeconds(event.currentTarget.value)}
          />
          seconds or longer
        </label>
        <ConfirmButton
          label="Clean up"
          question="Really terminate them?"
          isBusy={action.isBusy}
          onConfirm={() => void act(() => api.cleanUp(Number(seconds)))}
        />
        <Message text={action.message} isError={action.isError} />
      </div>
      {data && workers.length === 0 && (
        <p class="nothing">No workers. Each is created for one task and removed with it.</p>
      )}
      {workers.length > 0 && (
        <div class="table workers" role="table" aria-label="Workers">
          <div role="row" class="row head">
            {['Status', 'Worker', 'Task', 'Kind', 'Age', 'Action'].map((name) => (
              <span role="columnheader" class={name === 'Age' ? 'took' : ''} key={name}>
                {name}
              </span>
            ))}
          </div>
          {workers.map((worker) => (
            <WorkerRow
              key={worker.name}
              worker={worker}
              now={now}
              isBusy={action.isBusy}
              onTerminate={() => void act(() => api.terminate(worker.name))}
            />
          ))}
        </div>
      )}
      {workers.length > 0 && <p class="facts">{counted(workers.length, 'worker')}</p>}
    </>
  )
}

function WorkerRow(props: {
  worker: Worker
  now: number
  isBusy: boolean
  onTerminate: () => void
}) {
  const { worker, now, isBusy, onTerminate } = props
  const kind = [worker.backend, worker.size, worker.image].filter((each) => each !== null)
  return (
    <div role="row" class="row">
      <span role="cell" class="state">
        <Status of={worker.status} />
      </span>
      <span role="cell" class="name">
        {worker.name}
      </span>
      <span role="cell" class="task">
        <a href={taskHref(worker.task_id)}>{visible(worker.task_id)}</a>
      </span>
      <span role="cell" class="kind">
        {visible(kind.join(' · '))}
      </span>
      <span role="cell" class="took">
        {duration(now - Date.parse(worker.creation_time))}
      </span>
      <span role="cell">
        <ConfirmButton
          label="Terminate"
          question="Really?"
          about={worker.name}
          isBusy={isBusy}
          onConfirm={onTerminate}
        />
      </span>
    </div>
  )
}
