/** Measures what a long queue costs when a task is accepted, and at a restart. */
import { join } from 'node:path'
import { onBeat } from './beat.ts'
import { fill } from './filling.ts'
import { Receiver } from './receiver.ts'
import { quantile, type Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'
import { STAMP } from './side-by-side.ts'
import { BARE_ACCEPT, bareAccept, DurableWriter } from './yardsticks.ts'

const SLEEP = 'sleep.sh'
const TASKS = { [SLEEP]: 'sleep 1000\n', 'stamp.sh': STAMP }
const PER_SECOND = 1_000
const BARE_PER_SECOND = 50
const WAITING = 100_000
/** Rate for each of two services that are asked in turn. */
const IN_TURN_PER_SECOND = 50
const PENDING = 10_000

/** Measures accepting at a fixed rate while sleeping tasks hold every slot. */
export async function acceptIntoQueue(context: Context): Promise<Row[]> {
  const rounds = context.quick ? 2 : 3
  const roundMs = context.quick ? 3_000 : 10_000
  await using disk = await DurableWriter.start()
  await using service = await sleeping({ nodeOptions: context.nodeOptions })
  const accept: number[][] = []
  const bare: number[][] = []
  for (let round = -1; round < rounds; round += 1) {
    await context.quiet()
    const samples = { accept: [] as number[], bare: [] as number[] }
    const ms = round < 0 ? 1_000 : roundMs
    await Promise.all([
      onBeat(PER_SECOND, ms, async () => {
        samples.accept.push((await service.submit(SLEEP)).latencyMs)
      }),
      onBeat(BARE_PER_SECOND, ms, async () => {
        samples.bare.push(await bareAccept(service, disk))
      }),
    ])
    if (round < 0) continue
    accept.push(samples.accept)
    bare.push(samples.bare)
    context.note(`accepts round ${round + 1}: p99 ${quantile(samples.accept, 0.99).toFixed(1)} ms`)
  }
  const row = (q: number): Row => ({
    what: `accept, ${PER_SECOND} a second into the queue, p${q * 100}`,
    unit: 'ms',
    measured: accept.map((round) => quantile(round, q)),
    yardstick: { name: BARE_ACCEPT, figures: bare.map((round) => quantile(round, q)) },
  })
  return [row(0.5), { ...row(0.99), aim: { of: 'value', limit: 10, better: 'less' } }]
}

/** Compares a service with a very long queue with one whose queue is empty, asked in turn. */
export async function longQueue(context: Context): Promise<Row[]> {
  const rounds = context.quick ? 2 : 3
  const roundMs = context.quick ? 3_000 : 10_000
  const waiting = context.quick ? WAITING / 10 : WAITING
  const env = { MAX_QUEUED_TASKS: String(WAITING * 2) }
  const { nodeOptions } = context
  await using full = await Service.start({
    tasks: TASKS,
    callbackUrl: null,
    nodeOptions,
    env,
    idPrefix: 'again',
    folder: await leaveQueued(SLEEP, waiting, null),
  })
  await using empty = await sleeping({ nodeOptions, env })
  const times = { full: [] as number[][], empty: [] as number[][] }
  for (let round = -1; round < rounds; round += 1) {
    await context.quiet()
    const samples = { full: [] as number[], empty: [] as number[] }
    await onBeat(2 * IN_TURN_PER_SECOND, round < 0 ? 1_000 : roundMs, async (beat) => {
      const [name, service] =
        beat % 2 === 0 ? (['full', full] as const) : (['empty', empty] as const)
      samples[name].push((await service.submit(SLEEP)).latencyMs)
    })
    if (round < 0) continue
    times.full.push(samples.full)
    times.empty.push(samples.empty)
  }
  return [0.5, 0.99].map((q) => ({
    what: `accept with ${waiting} tasks waiting, p${q * 100}`,
    unit: 'ms',
    measured: times.full.map((round) => quantile(round, q)),
    yardstick: {
      name: 'with hardly any waiting',
      figures: times.empty.map((round) => quantile(round, q)),
    },
    aim: { of: 'ratio', limit: 1.2, better: 'less' },
  }))
}

/** Measures from the start of the process after a kill until the first waiting task runs. */
export async function restart(context: Context): Promise<Row[]> {
  const rounds = context.quick ? 2 : 5
  const pending = context.quick ? PENDING / 10 : PENDING
  const started = { full: [] as number[], empty: [] as number[] }
  for (let round = 0; round < rounds; round += 1) {
    await context.quiet()
    started.full.push(await untilFirstRuns(pending))
    started.empty.push(await untilFirstRuns(1))
  }
  return [
    {
      what: `restart with ${pending} tasks waiting, to the first one running`,
      unit: 's',
      measured: started.full,
      yardstick: { name: 'with one waiting', figures: started.empty },
      aim: { of: 'value', limit: 2, better: 'less' },
    },
  ]

  async function untilFirstRuns(count: number): Promise<number> {
    await using receiver = await Receiver.start()
    const first = Promise.withResolvers<number>()
    // The script prints its time. The task that ran during the kill calls back with other output.
    receiver.onArrival = ({ logs }) => {
      if (Number(logs) > 0) first.resolve(Number(logs))
    }
    const callbackUrl = receiver.url
    const folder = await leaveQueued('stamp.sh', count, callbackUrl)
    const startedAt = Date.now() / 1000
    const { nodeOptions } = context
    await using _ = await Service.start({ tasks: TASKS, callbackUrl, folder, nodeOptions })
    return (await first.promise) - startedAt
  }
}

/** Returns the folder of a service that was killed while `count` tasks were waiting. */
async function leaveQueued(
  file: string,
  count: number,
  callbackUrl: string | null,
): Promise<string> {
  const service = await sleeping({ callbackUrl, env: { MAX_CONCURRENT_TASKS: '1' } })
  const { taskId } = await service.submit(file)
  await service.kill()
  if (count > 1) await fill(join(service.folder, 'data'), [taskId], count - 1)
  return service.folder
}

/** Starts a service whose slots are all held by tasks that end with it. */
async function sleeping(options: {
  callbackUrl?: string | null
  nodeOptions?: readonly string[]
  env?: Record<string, string>
}): Promise<Service> {
  const service = await Service.start({ tasks: TASKS, callbackUrl: null, ...options })
  const slots = Number(options.env?.MAX_CONCURRENT_TASKS ?? 4 * navigator.hardwareConcurrency)
  await service.submitMany(SLEEP, slots)
  return service
}
