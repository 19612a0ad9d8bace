import { onBeat } from './beat.ts'
import { FASTAPI_NAME, peer, startFastApi } from './peers.ts'
import { Receiver } from './receiver.ts'
import { quantile, type Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'

/** Prints the time in bash without starting a process. */
export const STAMP = 'echo $EPOCHREALTIME\n'
const FILE = 'stamp.sh'
const EXIT_TO_CALLBACK_MS = 50

/** Milliseconds, of one round. */
interface Samples {
  accept: number[]
  exitToCallback: number[]
}

/** Compares accepting and calling back with FastAPI, under the same load, in turn. */
export async function sideBySide(context: Context): Promise<Row[]> {
  const rounds = context.quick ? 2 : 5
  const roundMs = context.quick ? 2_000 : 5_000
  await using receiver = await Receiver.start()
  const options = { tasks: { [FILE]: STAMP }, callbackUrl: receiver.url }
  await using service = await Service.start({ ...options, nodeOptions: context.nodeOptions })
  await using peers = new AsyncDisposableStack()
  const fastApi = await startFastApi(options)
  const contenders: Record<string, Service> = { service }
  if (typeof fastApi !== 'string') contenders.fastApi = peers.use(fastApi)
  const rows: Row[] = []
  // Easy for both, enough to keep a small machine busy, and more than both can run.
  for (const perSecond of [20, 200, 1_000]) {
    const all: Record<string, Samples[]> = { service: [], fastApi: [] }
    for (let round = -1; round < rounds; round += 1) {
      await context.quiet()
      const order = Object.entries(contenders)
      for (const [name, contender] of round % 2 === 0 ? order : order.toReversed()) {
        const samples = await load(contender, receiver, perSecond, round < 0 ? 1_000 : roundMs)
        if (round < 0) continue
        all[name]?.push(samples)
        const [accept, end] = [samples.accept, samples.exitToCallback].map((times) =>
          [0.5, 0.99].map((q) => quantile(times, q).toFixed(1)).join(', '),
        )
        context.note(`${perSecond}/s round ${round + 1}: ${name} accept ${accept}, end ${end} ms`)
      }
    }
    const figures = (name: string, kind: keyof Samples, q: number) =>
      all[name]?.map((samples) => quantile(samples[kind], q)) ?? []
    const row = (what: string, kind: keyof Samples, q: number): Row => ({
      what: `${what}, ${perSecond} tasks/s, p${q * 100}`,
      unit: 'ms',
      measured: figures('service', kind, q),
      yardstick: peer(FASTAPI_NAME, figures('fastApi', kind, q), fastApi),
    })
    rows.push(
      row('accept', 'accept', 0.5),
      { ...row('accept', 'accept', 0.99), aim: { of: 'ratio', limit: 1 / 3, better: 'less' } },
      row('exit to first callback', 'exitToCallback', 0.5),
      {
        ...row('exit to first callback', 'exitToCallback', 0.99),
        aim: { of: 'value', limit: EXIT_TO_CALLBACK_MS, better: 'less' },
      },
    )
  }
  return rows
}

async function load(
  contender: Service,
  receiver: Receiver,
  perSecond: number,
  ms: number,
): Promise<Samples> {
  const samples: Samples = { accept: [], exitToCallback: [] }
  // The script prints its time in seconds as its last act.
  receiver.onArrival = ({ logs, at }) => samples.exitToCallback.push(at - Number(logs) * 1000)
  const before = receiver.count
  await onBeat(perSecond, ms, async () => {
    samples.accept.push((await contender.submit(FILE)).latencyMs)
  })
  await receiver.reaches(before + samples.accept.length)
  return samples
}
