import type { ComponentChildren } from 'preact'
import type { Statistics } from './api.ts'
import { clock, duration } from './text.ts'

const WIDTH = 600
const HEIGHT = 100

type Bucket = Statistics['buckets'][number]

function Chart(props: {
  title: string
  /** Text for screen readers. */
  summary: string
  legend?: ComponentChildren
  top: string
  buckets: Bucket[]
  describe: (bucket: Bucket) => string
  children: ComponentChildren
}) {
  const { title, summary, legend, top, buckets, describe, children } = props
  const step = WIDTH / buckets.length
  return (
    <figure class="card chart">
      <figcaption>
        <h2>{title}</h2>
        <span class="legend">{legend}</span>
      </figcaption>
      <div class="plot">
        <span class="top">{top}</span>
        <svg
          viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
          preserveAspectRatio="none"
          role="img"
          aria-label={summary}
        >
          {children}
          {buckets.map((bucket, index) => (
            <rect class="hit" x={index * step} y={0} width={step} height={HEIGHT} key={bucket.at}>
              <title>{`${clock(bucket.at).slice(0, -3)}: ${describe(bucket)}`}</title>
            </rect>
          ))}
        </svg>
      </div>
      <p class="axis">
        <span>{buckets[0] && clock(buckets[0].at).slice(0, -3)}</span>
        <span>now</span>
      </p>
    </figure>
  )
}

/** Bars of succeeded tasks above the base line, and of other tasks below it. */
export function ThroughputChart({ buckets }: { buckets: Bucket[] }) {
  const good = (bucket: Bucket) => bucket.succeeded
  const other = (bucket: Bucket) => bucket.failed + bucket.cancelled
  const up = Math.max(1, ...buckets.map(good))
  const down = Math.max(0, ...buckets.map(other))
  const unit = HEIGHT / (up + down)
  const line = up * unit
  const step = WIDTH / buckets.length
  const sum = (part: (bucket: Bucket) => number) =>
    buckets.reduce((total, bucket) => total + part(bucket), 0)
  const bar = (bucket: Bucket, index: number) => {
    const place = { x: index * step + step * 0.12, width: step * 0.76 }
    const failed = bucket.failed * unit
    return (
      <g key={bucket.at}>
        <rect
          class="good"
          {...place}
          y={line - bucket.succeeded * unit}
          height={bucket.succeeded * unit}
        />
        <rect class="bad" {...place} y={line} height={failed} />
        <rect class="quiet" {...place} y={line + failed} height={bucket.cancelled * unit} />
      </g>
    )
  }
  return (
    <Chart
      title="Throughput"
      summary={`${sum(good)} succeeded, ${sum((each) => each.failed)} failed, ${sum((each) => each.cancelled)} cancelled`}
      legend={
        <>
          <i class="good" /> succeeded <i class="bad" /> failed <i class="quiet" /> cancelled
        </>
      }
      top={String(up)}
      buckets={buckets}
      describe={(each) =>
        `${each.succeeded} succeeded, ${each.failed} failed, ${each.cancelled} cancelled`
      }
    >
      {buckets.map(bar)}
      <line class="base" x1={0} x2={WIDTH} y1={line} y2={line} />
    </Chart>
  )
}

/** The longest durations as an area, the mean ones as a line. */
export function SecondsChart(props: {
  title: string
  buckets: Bucket[]
  of: 'queue_wait_seconds' | 'callback_delay_seconds'
}) {
  const { title, buckets, of } = props
  const longest = Math.max(0, ...buckets.map((bucket) => bucket[of].max ?? 0))
  const scale = longest === 0 ? 0 : (HEIGHT - 4) / longest
  const step = WIDTH / buckets.length
  const y = (seconds: number | null) => HEIGHT - 1 - (seconds ?? 0) * scale
  const seconds = (count: number | null) => (count === null ? 'none' : duration(count * 1000))
  const means = buckets.map((bucket) => bucket[of].mean).filter((mean) => mean !== null)
  const mean = means.length === 0 ? null : means.reduce((a, b) => a + b) / means.length
  const area = buckets
    .map((bucket, index) => `H${index * step}V${y(bucket[of].max)}H${(index + 1) * step}`)
    .join('')
  const line = buckets
    .map((bucket, index) => `${(index + 0.5) * step},${y(bucket[of].mean)}`)
    .join(' ')
  return (
    <Chart
      title={title}
      summary={`${seconds(mean)} on average, ${seconds(longest)} at most`}
      legend={
        <>
          <i class="line" /> mean <i class="area" /> longest
        </>
      }
      top={longest === 0 ? '' : seconds(longest)}
      buckets={buckets}
      describe={(each) => `mean ${seconds(each[of].mean)}, longest ${seconds(each[of].max)}`}
    >
      <path class="area" d={`M0,${HEIGHT}${area}V${HEIGHT}Z`} />
      <polyline class="line" points={line} />
    </Chart>
  )
}
