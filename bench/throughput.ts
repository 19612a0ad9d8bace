import { join } from 'node:path'
import { FASTAPI_NAME, peer, startFastApi, WEBHOOK_NAME, Webhook } from './peers.ts'
import { Receiver } from './receiver.ts'
import { median, type Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'
import { RUN_MANY, type ScriptsPerSecond } from './yardsticks.ts'

/** A turn takes 1 to 5 s: long enough to outlast hiccups, shorter than changes of other load. */
const SIZES = {
  sh: { rounds: 5, warmUp: 2_000, count: 1_000, script: 'echo hi\n' },
  py: { rounds: 5, warmUp: 300, count: 300, script: 'print("hi")\n' },
}
const OF_THE_MACHINE = 0.85
const OF_FASTAPI = 1.3

/** Measures from first submit to last callback, against scripts without a service, and peers. */
export async function throughput(kind: keyof typeof SIZES, context: Context): Promise<Row[]> {
  const { script } = SIZES[kind]
  const rounds = context.quick ? 2 : SIZES[kind].rounds
  const count = context.quick ? SIZES[kind].count / 2 : SIZES[kind].count
  const file = `echo.${kind}`
  await using receiver = await Receiver.start()
  await using service = await Service.start({
    tasks: { [file]: script },
    callbackUrl: receiver.url,
    nodeOptions: context.nodeOptions,
  })
  const folder = join(service.folder, 'tasks')
  await using peers = new AsyncDisposableStack()
  const fastApi = await startFastApi({ tasks: { [file]: script }, callbackUrl: receiver.url })
  const webhook = await Webhook.start(folder)
  const contenders: Record<string, ScriptsPerSecond> = {
    ...RUN_MANY,
    service: (_: string, n: number) => run(service, n),
  }
  if (typeof fastApi !== 'string') {
    peers.use(fastApi)
    contenders.fastApi = (_: string, n: number) => run(fastApi, n)
  }
  if (typeof webhook !== 'string') {
    peers.use(webhook)
    contenders.webhook = (_: string, n: number) => webhook.run(file, n)
  }
  const figures: Record<string, number[]> = {}
  for (let round = -1; round < rounds; round += 1) {
    await context.quiet()
    const order = Object.entries(contenders)
    // Rotates the order, so that no contender always goes first.
    order.push(...order.splice(0, Math.max(0, round) % order.length))
    for (const [name, contender] of order) {
      const rate = await contender(file, round < 0 ? SIZES[kind].warmUp : count, folder)
      if (round < 0) continue
      figures[name] = [...(figures[name] ?? []), rate]
      context.note(`${kind} round ${round + 1}: ${name} ${rate.toFixed(0)}/s`)
    }
  }
  if (receiver.failed > 0) throw new Error(`${receiver.failed} tasks failed`)
  const { service: measured = [], fastApi: ofFastApi, webhook: ofWebhook, ...machine } = figures
  const [[name, best] = ['', []]] = Object.entries(machine).toSorted(
    ([, a], [, b]) => median(b) - median(a),
  )
  const row = { what: `tasks end to end, .${kind}`, unit: '/s', measured }
  return [
    {
      ...row,
      yardstick: { name: `${name}, the fastest way here to run the scripts alone`, figures: best },
      aim: { of: 'ratio', limit: OF_THE_MACHINE, better: 'more' },
    },
    {
      ...row,
      yardstick: peer(FASTAPI_NAME, ofFastApi, fastApi),
      aim: { of: 'ratio', limit: OF_FASTAPI, better: 'more' },
    },
    { ...row, yardstick: peer(WEBHOOK_NAME, ofWebhook, webhook) },
  ]

  async function run(runner: Service, n: number): Promise<number> {
    const startedAt = performance.now()
    const goal = receiver.count + n
    await runner.submitMany(file, n)
    await receiver.reaches(goal)
    return (n * 1000) / (performance.now() - startedAt)
  }
}
