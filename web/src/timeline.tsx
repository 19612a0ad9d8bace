import type { ComponentChildren } from 'preact'
import { type CallbackState, hasEnded, type Task } from './api.ts'
import { Time } from './parts.tsx'
import { Status } from './status.tsx'
import { duration, visible, words } from './text.ts'

/** A task from its acceptance to the last attempt of its callback. */
export function Timeline(props: { task: Task; callback: CallbackState; now: number }) {
  const { task, callback, now } = props
  const spent = (from: string, until: string | null) =>
    duration((until === null ? now : Date.parse(until)) - Date.parse(from))
  const next = callback.next_attempt_at
  const isAttemptDue = next !== null && Date.parse(next) <= now
  return (
    <ol class="timeline">
      <Step shape="queued" at={task.created_at}>
        {spent(task.created_at, task.claimed_at ?? task.started_at ?? task.finished_at)}
        {task.priority > 0 && ` · priority ${task.priority}`}
      </Step>
      {task.claimed_at !== null && (
        <Step shape="provisioning" at={task.claimed_at}>
          {spent(task.claimed_at, task.started_at ?? task.finished_at)}
        </Step>
      )}
      {task.started_at !== null && (
        <Step shape="running" at={task.started_at}>
          {spent(task.started_at, task.finished_at)}
        </Step>
      )}
      {hasEnded(task) && task.finished_at !== null && (
        <Step shape={task.status} at={task.finished_at}>
          {outcome(task)}
        </Step>
      )}
      {callback.attempts.map((attempt) => {
        const isDelivered = attempt.status_code !== null && attempt.status_code < 300
        return (
          <Step
            shape={isDelivered ? 'delivered' : 'given_up'}
            word={`callback ${attempt.number}`}
            at={attempt.started_at}
            key={attempt.number}
          >
            {[
              duration(attempt.duration_ms),
              ...(attempt.status_code === null ? [] : [`HTTP ${attempt.status_code}`]),
              ...(attempt.error === null ? [] : [visible(attempt.error)]),
            ].join(' · ')}
          </Step>
        )
      })}
      {callback.status === 'pending' && (
        <Step shape="pending" word="callback" {...(next === null ? {} : { at: next })}>
          {next === null || isAttemptDue
            ? 'under way'
            : `next attempt in ${duration(Date.parse(next) - now)}`}
        </Step>
      )}
      {callback.status === 'given_up' && <Step shape="given_up">no further attempt is made</Step>}
    </ol>
  )
}

function Step(props: { shape: string; word?: string; at?: string; children?: ComponentChildren }) {
  return (
    <li>
      <span class="what">
        <Status of={props.shape} word={props.word} />
      </span>
      <span class="when">{props.at === undefined ? '' : <Time at={props.at} />}</span>
      <span class="detail">{props.children}</span>
    </li>
  )
}

function outcome(task: Task): string {
  return [
    ...(task.reason === null || task.reason === task.status ? [] : [words(task.reason)]),
    ...(task.exit_code === null ? [] : [`exit code ${task.exit_code}`]),
    ...(task.signal === null ? [] : [task.signal]),
    ...(task.message === null ? [] : [visible(task.message)]),
  ].join(' · ')
}
