import { hasEnded, type TaskSummary } from './api.ts'
import { Time } from './parts.tsx'
import { taskHref } from './route.ts'
import { Status } from './status.tsx'
import { duration, visible, words } from './text.ts'

/** Returns how long the task has been waiting, or how long it ran. */
export function took(task: TaskSummary, now: number): string {
  const from = Date.parse(task.started_at ?? task.created_at)
  const until = task.finished_at === null ? now : Date.parse(task.finished_at)
  if (task.started_at === null && hasEnded(task)) return '–'
  return duration(until - from)
}

export function TaskHead() {
  return (
    <div role="row" class="row head">
      {['Status', 'Task', 'File', 'Reason', 'Took', 'Accepted', 'Callback'].map((name) => (
        <span role="columnheader" class={name === 'Took' ? 'took' : ''} key={name}>
          {name}
        </span>
      ))}
    </div>
  )
}

export function TaskRow({ task, now, index }: { task: TaskSummary; now: number; index: number }) {
  const isUsual = task.reason === null || task.reason === 'completed' || task.reason === 'cancelled'
  const exit = task.exit_code === null || task.exit_code === 0 ? '' : ` ${task.exit_code}`
  const reason = isUsual || !task.reason ? '' : words(task.reason) + exit
  const waiting = task.waiting_for === null ? undefined : `Waits: ${visible(task.waiting_for)}`
  return (
    <div role="row" class="row" aria-rowindex={index + 2}>
      <span role="cell" class="status-cell">
        <Status of={task.status} />
      </span>
      <span role="cell" class="task">
        <a href={taskHref(task.task_id)}>{visible(task.task_id)}</a>
      </span>
      <span role="cell" class="file">
        {visible(task.task_file_name)}
      </span>
      <span role="cell" class="reason" title={waiting ?? task.message ?? undefined}>
        {waiting ?? reason}
      </span>
      <span role="cell" class="took">
        {took(task, now)}
      </span>
      <span role="cell" class="accepted">
        <Time at={task.created_at} />
      </span>
      <span role="cell" class="callback">
        {task.callback_status !== 'none' && <Status of={task.callback_status} />}
      </span>
    </div>
  )
}
