import { words } from './text.ts'

/** Colour and shape of each state, in a box of 16 by 16. */
const SHAPES: Record<string, { tone: string; path: string }> = {
  queued: { tone: 'waiting', path: 'M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11' },
  provisioning: {
    tone: 'waiting',
    path: 'M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11M8 5v3.2l2 1.3',
  },
  running: { tone: 'active', path: 'M5 3.2v9.6L13 8z' },
  succeeded: { tone: 'good', path: 'M3 8.6l3.4 3.4L13 4.8' },
  failed: { tone: 'bad', path: 'M4 4l8 8M12 4l-8 8' },
  cancelled: {
    tone: 'quiet',
    path: 'M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11M4.2 4.2l7.6 7.6',
  },
  none: { tone: 'quiet', path: 'M5 8h6' },
  pending: { tone: 'waiting', path: 'M3.5 8h.1M8 8h.1M12.5 8h.1' },
  delivered: { tone: 'good', path: 'M3 8.6l3.4 3.4L13 4.8' },
  given_up: { tone: 'bad', path: 'M8 3v6.2M8 12.8v.1' },
}

/** States of workers and the task states that they look like. */
const WORKER_SHAPES: Record<string, string> = {
  Provisioning: 'provisioning',
  Running: 'running',
  Completed: 'succeeded',
  Terminating: 'cancelled',
}

export function Status({ of, word }: { of: string; word?: string | undefined }) {
  const name = WORKER_SHAPES[of] ?? of
  const { tone, path } = SHAPES[name] ?? { tone: 'quiet', path: '' }
  return (
    <span class={`status ${tone}`}>
      <svg viewBox="0 0 16 16" aria-hidden="true">
        <path d={path} class={name === 'running' ? 'filled' : undefined} />
      </svg>
      {word ?? words(of)}
    </span>
  )
}
