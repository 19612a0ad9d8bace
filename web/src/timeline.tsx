import type { ComponentChildren } from 'preact'
import { type CallbackState, hasEnded, type Task } from './api.ts'
import { Time } from './parts.tsx'
import { Status } from './status.tsx'
import { duration, visible, words } from './text.ts'

/** A task from its acceptance to the last attempt of its callback. */
export function Timeline(props: { task: Task; callback: CallbackState; now: number }) {
  const { task, callback, now } = props
  const created = Date.parse(task.created_at)
  const end = task.finished_at === null ? now : Date.parse(task.finished_at)
  const phase = (shape: string, at: string | null, until: string | null) => {
    if (at === null) return null
    const from = Date.parse(at)
    const to = until === null ? Math.max(now, from) : Date.parse(until)
    const scale = 100 / Math.max(1, end - created)
    const width = Math.max(0.6, (to - from) * scale)
    return (
      <Step shape={shape} at={at}>
        <span class="spent">{duration(to - from)}</span>
        <svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true" class={shape}>
          <rect x={Math.min(100 - width, (from - created) * scale)} width={width} height={8} />
        </svg>
      </Step>
    )
  }
  const next = callback.next_attempt_at
  const pendingWords = () => {
    if (!hasEnded(task)) return 'once the task has ended'
    if (next === null || Date.parse(next) <= now) return 'in progress'
    return `next attempt in ${duration(Date.parse(next) - now)}`
  }
  return (
    <ol class="timeline">
      {phase('queued', task.created_at, task.claimed_at ?? task.started_at ?? task.finished_at)}
      {phase('provisioning', task.claimed_at, task.started_at ?? task.finished_at)}
      {phase('running', task.started_at, task.finished_at)}
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
              ...(attempt.manual ? ['manual'] : []),
              duration(attempt.duration_ms),
              ...(attempt.status_code === null ? [] : [`HTTP ${attempt.status_code}`]),
              ...(attempt.error === null ? [] : [visible(attempt.error)]),
            ].join(' · ')}
          </Step>
        )
      })}
      {callback.status === 'pending' && (
        <Step shape="pending" word="callback" {...(next === null ? {} : { at: next })}>
          {pendingWords()}
        </Step>
      )}
      {callback.status === 'given_up' && <Step shape="given_up">no further attempts</Step>}
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

/** Returns the task's message, with the exit code and signal if it does not mention them. */
function outcome(task: Task): string {
  const sentence = visible(task.message ?? words(task.reason ?? task.status))
  const facts = [
    ...(task.exit_code === null ? [] : [`exit code ${task.exit_code}`]),
    ...(task.signal === null ? [] : [task.signal]),
  ]
  const known = sentence.toLowerCase()
  return [sentence, ...facts.filter((fact) => !known.includes(fact.toLowerCase()))].join(' · ')
}
