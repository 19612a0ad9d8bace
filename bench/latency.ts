import { setTimeout as pause } from 'node:timers/promises'
import { LOOP_DELAY, NodeProcess } from './process.ts'
import { Receiver } from './receiver.ts'
import { quantile, type Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'
import { BARE_ACCEPT, bareAccept, DurableWriter } from './yardsticks.ts'

const FILE = 'echo.sh'
const TASKS = { [FILE]: 'echo hi\n' }
/** Pause between two probes. */
const PACE_MS = 10
/** More tasks than a round can run. */
const QUEUED = 16_000

/** Milliseconds, of one round. */
interface Samples {
  accept: number[]
  bare: number[]
}

/** Measures accept and end-to-end latency, one task at a time on an otherwise idle service. */
export async function idleLatency(context: Context): Promise<Row[]> {
  const rounds = context.quick ? 2 : 3
  const probes = context.quick ? 50 : 100
  await using receiver = await Receiver.start()
  await using service = await start(receiver, context.nodeOptions)
  await using disk = await DurableWriter.start()
  const all: Samples[] = []
  const whole: number[][] = []
  for (let round = -1; round < rounds; round += 1) {
    await context.quiet()
    const samples: Samples = { accept: [], bare: [] }
    const ends: number[] = []
    for (let probe = 0; probe < probes; probe += 1) {
      const startedAt = performance.now()
      const goal = receiver.count + 1
      samples.accept.push((await service.submit(FILE)).latencyMs)
      await receiver.reaches(goal)
      ends.push(performance.now() - startedAt)
      // The worker is terminated after its callback.
      await pause(PACE_MS)
      samples.bare.push(await bareAccept(service, disk))
    }
    if (round < 0) continue
    all.push(samples)
    whole.push(ends)
  }
  const bare = { name: BARE_ACCEPT, figures: all.map((round) => quantile(round.bare, 0.5)) }
  return [
    ...acceptRows('idle', all),
    {
      what: 'one task, submit to callback, idle, p50',
      unit: 'ms',
      measured: whole.map((round) => quantile(round, 0.5)),
      yardstick: bare,
    },
  ]
}

/** Measures accept latency with a full queue, and the delay of the service's event loop. */
export async function saturatedLatency(context: Context): Promise<Row[]> {
  const rounds = context.quick ? 2 : 3
  const roundMs = context.quick ? 4_000 : 10_000
  await using receiver = await Receiver.start()
  await using service = await start(receiver, ['--import', LOOP_DELAY, ...context.nodeOptions])
  await using disk = await DurableWriter.start()
  // An idle process that competes for the same cores.
  await using idler = new NodeProcess(
    ['--import', LOOP_DELAY, '--eval', 'setInterval(() => {}, 1000); console.log("started")'],
    { folder: disk.folder, env: {} },
  )
  await idler.line((line) => line === 'started')
  const all: Samples[] = []
  const delays: number[] = []
  const idlerDelays: number[] = []
  let submitted = 0
  // Only once: between rounds the service itself keeps the machine busy.
  await context.quiet()
  for (let round = 0; round < rounds; round += 1) {
    const refill = QUEUED - (submitted - receiver.count)
    await service.submitMany(FILE, refill)
    submitted += refill
    await Promise.all([service.process.loopDelay(), idler.loopDelay()])
    const samples = await probe(service, disk, roundMs)
    all.push(samples)
    submitted += samples.accept.length
    const [own, others] = await Promise.all([service.process.loopDelay(), idler.loopDelay()])
    delays.push(own.p99)
    idlerDelays.push(others.p99)
    if (submitted - receiver.count < QUEUED / 10) context.note('warning: the queue ran low')
    context.note(
      `saturated round ${round + 1}: ${samples.accept.length} accepts, loop ${JSON.stringify(own)}`,
    )
  }
  return [
    ...acceptRows('saturated', all),
    {
      what: 'event loop delay, saturated, p99',
      unit: 'ms',
      measured: delays,
      yardstick: { name: 'an idle Node process beside it', figures: idlerDelays },
      aim: { of: 'value', limit: 30, better: 'less' },
    },
  ]
}

/** Sends probes at a fixed rate: slow answers must not reduce their number. */
async function probe(service: Service, disk: DurableWriter, ms: number): Promise<Samples> {
  const samples: Samples = { accept: [], bare: [] }
  const underWay: Array<Promise<unknown>> = []
  const endsAt = performance.now() + ms
  for (let beat = 0; performance.now() < endsAt; beat += 1) {
    underWay.push(
      beat % 2 === 0
        ? service.submit(FILE).then(({ latencyMs }) => samples.accept.push(latencyMs))
        : bareAccept(service, disk).then((latencyMs) => samples.bare.push(latencyMs)),
    )
    await pause(PACE_MS)
  }
  await Promise.all(underWay)
  return samples
}

function acceptRows(state: 'idle' | 'saturated', rounds: Samples[]): Row[] {
  return [0.5, 0.99].map((q) => ({
    what: `accept, ${state}, p${q * 100}`,
    unit: 'ms',
    measured: rounds.map((round) => quantile(round.accept, q)),
    yardstick: { name: BARE_ACCEPT, figures: rounds.map((round) => quantile(round.bare, q)) },
    ...(state === 'saturated' && q === 0.99
      ? { aim: { of: 'value', limit: 50, better: 'less' } as const }
      : {}),
  }))
}

function start(receiver: Receiver, nodeOptions: readonly string[]): Promise<Service> {
  return Service.start({ tasks: TASKS, callbackUrl: receiver.url, nodeOptions })
}
