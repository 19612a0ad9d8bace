import { join } from 'node:path'
import { Receiver } from './receiver.ts'
import { median, type Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'
import { RUN_MANY, type ScriptsPerSecond } from './yardsticks.ts'

const WARM_UP = 50
/** Each contender's turn takes 2 to 5 seconds: long against a hiccup, short against a change of the other load. */
const SIZES = {
  sh: { rounds: 5, count: 400, script: 'echo hi\n', aim: 0.7 },
  py: { rounds: 5, count: 120, script: 'print("hi")\n', aim: 0.9 },
}

/** From the first submit to the last callback, against the same script run without any service. */
export async function throughput(kind: keyof typeof SIZES, context: Context): Promise<Row[]> {
  const { script, aim } = SIZES[kind]
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
  const contenders: Record<string, ScriptsPerSecond> = {
    ...RUN_MANY,
    service: (_: string, n: number) => run(n),
  }
  const figures: Record<string, number[]> = {}
  for (let round = -1; round < rounds; round += 1) {
    await context.quiet()
    const order = Object.entries(contenders)
    // Nobody always comes first, and nobody always follows the same one.
    order.push(...order.splice(0, Math.max(0, round) % order.length))
    for (const [name, contender] of order) {
      const rate = await contender(file, round < 0 ? WARM_UP : count, folder)
      if (round < 0) continue
      figures[name] = [...(figures[name] ?? []), rate]
      context.note(`${kind} round ${round + 1}: ${name} ${rate.toFixed(0)}/s`)
    }
  }
  if (receiver.failed > 0) throw new Error(`${receiver.failed} tasks failed`)
  const { service: measured = [], ...machine } = figures
  const [[name, best] = ['', []]] = Object.entries(machine).toSorted(
    ([, a], [, b]) => median(b) - median(a),
  )
  return [
    {
      what: `tasks end to end, .${kind}`,
      unit: '/s',
      measured,
      yardstick: { name: `${name}, the fastest way here to run the scripts alone`, figures: best },
      aim: { of: 'ratio', limit: aim, better: 'more' },
    },
  ]

  async function run(n: number): Promise<number> {
    const startedAt = performance.now()
    const goal = receiver.count + n
    await service.submitMany(file, n)
    await receiver.reaches(goal)
    return (n * 1000) / (performance.now() - startedAt)
  }
}
