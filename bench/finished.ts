import { join } from 'node:path'
import { fill } from './filling.ts'
import { Receiver } from './receiver.ts'
import { quantile, type Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'

const TASKS = { 'often.sh': 'echo hi\n', 'seldom.sh': 'echo hi\n', 'fails.sh': 'exit 1\n' }
const FINISHED = 1_000_000
const FEW = 1_000
/** One task in this many runs `seldom.sh`, and one fails. */
const SELDOM = 100
const P99_MS = 20

/** Measures requests for tasks after many tasks have ended, and after few. */
export async function finished(context: Context): Promise<Row[]> {
  const rounds = context.quick ? 2 : 3
  const probes = context.quick ? 100 : 300
  const count = context.quick ? FINISHED / 10 : FINISHED
  await using receiver = await Receiver.start()
  const { nodeOptions } = context
  const start = (folder: string) =>
    Service.start({ tasks: TASKS, callbackUrl: null, nodeOptions, folder })
  const startedAt = performance.now()
  const manyFolder = await leaveFinished(count, receiver)
  context.note(`filled in ${((performance.now() - startedAt) / 1000).toFixed(0)} s`)
  await using many = await start(manyFolder)
  await using few = await start(await leaveFinished(FEW, receiver))
  // Makes the cursor itself: paging there would take too many requests.
  const cursor = (before: number) => Buffer.from(`before:${before}`).toString('base64url')
  const requests: Record<string, (of: number) => string> = {
    'GET /tasks': () => '/tasks',
    'GET /tasks, failed': () => '/tasks?status=failed',
    'GET /tasks, queued (none)': () => '/tasks?status=queued',
    'GET /tasks, of a file': () => '/tasks?task_file_name=seldom.sh',
    'GET /tasks, failed of a file (none)': () => '/tasks?status=failed&task_file_name=seldom.sh',
    'GET /tasks, callback given up (none)': () => '/tasks?callback_status=given_up',
    'GET /tasks, callback delivered': () => '/tasks?callback_status=delivered',
    'GET /tasks, callback pending (none)': () => '/tasks?callback_status=pending',
    'GET /tasks, without a callback (none)': () => '/tasks?callback_status=none',
    'GET /tasks, half way through': (of) => `/tasks?cursor=${cursor(of / 2)}`,
    'GET /tasks/{id}': (of) => `/tasks/filled-${1 + Math.floor(Math.random() * of)}`,
  }
  const rows: Row[] = []
  for (const [what, path] of Object.entries(requests)) {
    const times = { many: [] as number[][], few: [] as number[][] }
    for (let round = 0; round < rounds; round += 1) {
      await context.quiet()
      const samples = { many: [] as number[], few: [] as number[] }
      for (let probe = 0; probe < probes; probe += 1) {
        samples.many.push(await timeOf(many, path(count)))
        samples.few.push(await timeOf(few, path(FEW)))
      }
      times.many.push(samples.many)
      times.few.push(samples.few)
    }
    const p99 = (rounds: number[][]) => rounds.map((round) => quantile(round, 0.99))
    rows.push({
      what: `${what}, ${count} tasks, p99`,
      unit: 'ms',
      measured: p99(times.many),
      yardstick: { name: `${FEW} tasks`, figures: p99(times.few) },
      aim: { of: 'value', limit: P99_MS, better: 'less' },
    })
  }
  return rows
}

/** Returns the folder of a stopped service with `count` ended tasks, their callbacks delivered. */
async function leaveFinished(count: number, receiver: Receiver): Promise<string> {
  const service = await Service.start({
    tasks: TASKS,
    callbackUrl: receiver.url,
    idPrefix: `of-${count}`,
  })
  const models: string[] = []
  for (const file of ['often.sh', 'seldom.sh', 'fails.sh']) {
    const goal = receiver.count + 1
    const { taskId } = await service.submit(file)
    await receiver.reaches(goal)
    models.push(taskId)
  }
  // Waits until the attempts are recorded.
  await service.stop()
  const [often = '', ...others] = models
  const turns = [...Array<string>(SELDOM - others.length).fill(often), ...others]
  await fill(join(service.folder, 'data'), turns, count)
  return service.folder
}

async function timeOf(service: Service, path: string): Promise<number> {
  const startedAt = performance.now()
  await service.get(path)
  return performance.now() - startedAt
}
