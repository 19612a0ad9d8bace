import { useState } from 'preact/hooks'
import { api, hasEnded, type Statistics, type TaskSummary } from '../api.ts'
import { SecondsChart, ThroughputChart } from '../charts.tsx'
import { useLive, useNow } from '../live.ts'
import { Heading, Problem } from '../parts.tsx'
import { Status } from '../status.tsx'
import { TaskHead, TaskRow } from '../task-row.tsx'
import { duration, words } from '../text.ts'

const POLL_MS = 5000
const LATEST = 8
const SPANS = [
  { minutes: 60, label: '1 hour' },
  { minutes: 360, label: '6 hours' },
  { minutes: 1440, label: '24 hours' },
]

export function OverviewView() {
  const [minutes, setMinutes] = useState(60)
  const statistics = useLive(String(minutes), (signal) => api.statistics(minutes, signal), {
    everyMs: POLL_MS,
  })
  const latest = useLive('latest', (signal) => api.tasks({ limit: LATEST }, signal), {
    everyMs: POLL_MS,
  })
  return (
    <>
      <div class="title">
        <Heading title="Overview">Overview</Heading>
        <fieldset class="spans">
          <legend class="hidden">Time shown</legend>
          {SPANS.map((span) => (
            <label key={span.minutes}>
              <input
                type="radio"
                name="span"
                checked={minutes === span.minutes}
                onChange={() => setMinutes(span.minutes)}
              />
              {span.label}
            </label>
          ))}
        </fieldset>
      </div>
      <Problem text={statistics.problem ?? latest.problem} />
      {statistics.data && <Charts statistics={statistics.data} />}
      {latest.data && <Latest tasks={latest.data.tasks} />}
    </>
  )
}

function Charts({ statistics }: { statistics: Statistics }) {
  const { buckets, live, oldest_queued_seconds: oldest, reasons } = statistics
  return (
    <>
      <dl class="tiles">
        {(['running', 'provisioning', 'queued'] as const).map((status) => (
          <div class="card" key={status}>
            <dt>
              <Status of={status} />
            </dt>
            <dd>{live[status].toLocaleString('en')}</dd>
          </div>
        ))}
        <div class="card">
          <dt>oldest in queue</dt>
          <dd>{oldest === null ? '–' : duration(oldest * 1000)}</dd>
        </div>
        <div class="card">
          <dt>succeeded</dt>
          <dd>{share(buckets)}</dd>
        </div>
      </dl>
      <div class="charts">
        <ThroughputChart buckets={buckets} />
        <Reasons reasons={reasons} />
        <SecondsChart title="Queue wait" buckets={buckets} of="queue_wait_seconds" />
        <SecondsChart title="Callback delay" buckets={buckets} of="callback_delay_seconds" />
      </div>
    </>
  )
}

/** Returns the share of tasks that succeeded, not counting cancelled ones. */
function share(buckets: Statistics['buckets']): string {
  const succeeded = buckets.reduce((sum, bucket) => sum + bucket.succeeded, 0)
  const failed = buckets.reduce((sum, bucket) => sum + bucket.failed, 0)
  if (succeeded + failed === 0) return '–'
  // Rounded down, so that 100 % means all.
  return `${Math.floor((succeeded / (succeeded + failed)) * 1000) / 10} %`
}

function Reasons({ reasons }: { reasons: Statistics['reasons'] }) {
  const most = Math.max(1, ...reasons.map(({ count }) => count))
  return (
    <section class="card reasons" aria-labelledby="reasons-heading">
      <h2 id="reasons-heading">Why tasks did not succeed</h2>
      {reasons.length === 0 && <p class="quiet">All tasks succeeded.</p>}
      <ul>
        {reasons.slice(0, 6).map(({ reason, count }) => (
          <li key={reason}>
            <span>{words(reason)}</span>
            <svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
              <rect
                class={reason === 'cancelled' ? 'quiet' : 'bad'}
                width={(count / most) * 100}
                height={10}
              />
            </svg>
            <b>{count.toLocaleString('en')}</b>
          </li>
        ))}
      </ul>
    </section>
  )
}

function Latest({ tasks }: { tasks: TaskSummary[] }) {
  const now = useNow(tasks.some((task) => !hasEnded(task)))
  return (
    <section aria-labelledby="latest-heading">
      <div class="title">
        <h2 id="latest-heading">Latest tasks</h2>
        <a href="#/tasks">All tasks</a>
      </div>
      {tasks.length === 0 ? (
        <p class="nothing">
          No tasks yet. <a href="#/run">Run one</a>
        </p>
      ) : (
        <div class="table" role="table" aria-labelledby="latest-heading">
          <TaskHead />
          {tasks.map((task, index) => (
            <TaskRow key={task.task_id} task={task} now={now} index={index} />
          ))}
        </div>
      )}
    </section>
  )
}
