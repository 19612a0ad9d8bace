import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { Receiver } from './receiver.ts'
import type { Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'
import { timeOf } from './yardsticks.ts'

const MEGABYTES = 500
const LINE = 'a line of a log, about as long as the lines that build tools print'

/** Measures a task that prints a lot, against the same script writing into a file. */
export async function logThroughput(context: Context): Promise<Row[]> {
  const megabytes = context.quick ? MEGABYTES / 5 : MEGABYTES
  const rounds = context.quick ? 2 : 5
  const file = 'print.sh'
  await using receiver = await Receiver.start()
  await using service = await Service.start({
    tasks: { [file]: `yes '${LINE}' | head -c ${megabytes * 1_000_000}\n` },
    callbackUrl: receiver.url,
    env: { MAX_LOG_MB: '1024' },
    nodeOptions: context.nodeOptions,
  })
  const folder = join(service.folder, 'tasks')
  const measured: number[] = []
  const alone: number[] = []
  for (let round = -1; round < rounds; round += 1) {
    await context.quiet()
    const rates = { measured: 0, alone: 0 }
    const contenders = [
      async () => {
        const output = join(service.folder, 'output')
        rates.alone = (megabytes / (await timeOf(`bash ./${file} >${output}`, folder))) * 1000
        await rm(output)
      },
      async () => {
        const { taskId } = await service.submit(file)
        await receiver.reaches(round + 2)
        const task = await service.task(taskId)
        const runMs = Date.parse(String(task.finished_at)) - Date.parse(String(task.started_at))
        if (task.log_bytes !== megabytes * 1_000_000) throw new Error('the log is not whole')
        rates.measured = (megabytes / runMs) * 1000
      },
    ]
    for (const contender of round % 2 === 0 ? contenders : contenders.toReversed()) {
      // The disk must not still write the output of the last turn.
      await timeOf('sync', folder)
      await contender()
    }
    context.note(
      `logs round ${round + 1}: ${rates.measured.toFixed(0)} against ${rates.alone.toFixed(0)} MB/s`,
    )
    if (round < 0) continue
    measured.push(rates.measured)
    alone.push(rates.alone)
  }
  return [
    {
      what: `log of ${megabytes} MB`,
      unit: 'MB/s',
      measured,
      yardstick: { name: 'the same script writing to a file', figures: alone },
      aim: { of: 'ratio', limit: 0.9, better: 'more' },
    },
  ]
}
