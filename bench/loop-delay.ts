/**
 * `node --import ./bench/loop-delay.ts …`: measures the event loop of the process's main thread from outside its code.
 * On SIGUSR2, writes what was measured since the last time as one line of JSON to stderr, and starts anew.
 */
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { isMainThread } from 'node:worker_threads'

const RESOLUTION_MS = 10

/** Milliseconds that a timer came late. */
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
    // The histogram holds the time between two firings, which includes the interval itself.
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
