import { setTimeout as pause } from 'node:timers/promises'

/**
 * Calls `send` at a fixed rate for `ms`, without waiting for answers: slow answers must not reduce
 * the number of probes. Makes up for late calls at once. Settles with the last answer.
 */
export async function onBeat(
  perSecond: number,
  ms: number,
  send: (beat: number) => Promise<unknown>,
): Promise<void> {
  const underWay: Array<Promise<unknown>> = []
  const startedAt = performance.now()
  for (let beat = 0; beat < (ms / 1000) * perSecond; ) {
    const due = Math.floor(((performance.now() - startedAt) / 1000) * perSecond)
    for (; beat <= due; beat += 1) underWay.push(send(beat))
    await pause(Math.max(0, startedAt + (beat * 1000) / perSecond - performance.now()))
  }
  await Promise.all(underWay)
}
