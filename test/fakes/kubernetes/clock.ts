export interface Clock {
  now(): number
  /** RFC 3339 in whole seconds, as the API writes times. */
  timestamp(at?: number): string
  /** Runs `action` once, `ms` from now on this clock. Returns what cancels it. */
  after(ms: number, action: () => void): () => void
  /** Moves time on by hand and runs what falls due on the way, in order. */
  advance(ms: number): Promise<void>
  stop(): void
}

interface Alarm {
  at: number
  action: () => void
}

const MAX_TIMEOUT_MS = 2 ** 31 - 1

/** Real time that can be advanced by hand; with `manual`, time moves by hand alone. */
export function createClock({ manual = false }: { manual?: boolean } = {}): Clock {
  let offset = manual ? Date.now() : 0
  const now = () => (manual ? offset : Date.now() + offset)
  let alarms: Alarm[] = []
  let timer: NodeJS.Timeout | undefined
  const next = () =>
    alarms.reduce<Alarm | undefined>((a, b) => (a && a.at <= b.at ? a : b), undefined)
  const fire = (alarm: Alarm) => {
    alarms = alarms.filter((other) => other !== alarm)
    alarm.action()
  }
  const arm = () => {
    clearTimeout(timer)
    const first = manual ? undefined : next()
    if (!first) return
    timer = setTimeout(
      () => {
        for (let due = next(); due && due.at <= now(); due = next()) fire(due)
        arm()
      },
      Math.min(Math.max(0, first.at - now()), MAX_TIMEOUT_MS),
    )
    // A test that forgot to close its server should end all the same.
    timer.unref()
  }
  return {
    now,
    timestamp: (at = now()) => new Date(at).toISOString().replace(/\.\d+Z$/, 'Z'),
    after(ms, action) {
      const alarm = { at: now() + ms, action }
      alarms.push(alarm)
      arm()
      return () => {
        alarms = alarms.filter((other) => other !== alarm)
        arm()
      }
    },
    async advance(ms) {
      const target = now() + ms
      for (let due = next(); due && due.at <= target; due = next()) {
        offset += Math.max(0, due.at - now())
        fire(due)
        // Lets the controllers, which react in microtasks, set new alarms before time goes on.
        await new Promise((resolve) => setImmediate(resolve))
      }
      offset += Math.max(0, target - now())
      arm()
    },
    stop() {
      alarms = []
      clearTimeout(timer)
    },
  }
}
