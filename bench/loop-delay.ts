/**
 * Measures the event loop of a process that is started with `node --import ./bench/loop-delay.ts`.
 * On SIGUSR2, writes the delays since the last time as a line of JSON to stderr.
 */
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { isMainThread } from 'node:worker_threads'

const RESOLUTION_MS = 10

/** Delays of a timer in milliseconds. */
export interface LoopDelay {
  p50: number
  p99: number
  max: number
}

// Threads inherit --import.
if (isMainThread) {
  const histogram = monitorEventLoopDelay({ resolution: RESOLUTION_MS })
  histogram.enable()
  process.on('SIGUSR2', () => {
    // The histogram measures the time between two timers, which includes the interval.
    const late = (nanoseconds: number) => Math.max(0, nanoseconds / 1e6 - RESOLUTION_MS)
    const loopDelay: LoopDelay = {
      p50: late(histogram.percentile(50)),
      p99: late(histogram.percentile(99)),
      max: late(histogram.max),
    }
    histogram.reset()
    process.stderr.write(`${JSON.stringify({ loopDelay })}\n`)
  })
}
