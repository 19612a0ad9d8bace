/** `npm run bench -- [--quick] [--only <name>]`. README.md explains the rows. */
import { cpus, release, totalmem } from 'node:os'
import { parseArgs } from 'node:util'
import { finished } from './finished.ts'
import { instances, waiting } from './instances.ts'
import { idleLatency, saturatedLatency } from './latency.ts'
import { logThroughput } from './logs.ts'
import { memory } from './memory.ts'
import { closeAll } from './open.ts'
import { OtherLoad } from './other-load.ts'
import { acceptIntoQueue, longQueue, restart } from './queue.ts'
import { median, type Row, table } from './report.ts'
import type { Scenario } from './scenario.ts'
import { sideBySide } from './side-by-side.ts'
import { throughput } from './throughput.ts'

const PATIENCE_MS = 60_000
const SCENARIOS: Record<string, Scenario> = {
  'throughput-sh': (context) => throughput('sh', context),
  'throughput-py': (context) => throughput('py', context),
  'latency-idle': idleLatency,
  'latency-saturated': saturatedLatency,
  'side-by-side': sideBySide,
  'accept-into-queue': acceptIntoQueue,
  'long-queue': longQueue,
  restart,
  finished,
  logs: logThroughput,
  memory,
  instances,
  waiting,
}

const { values: options } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    only: { type: 'string', multiple: true, default: Object.keys(SCENARIOS) },
    'node-option': { type: 'string', multiple: true, default: [] },
  },
})
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, async () => {
    await closeAll()
    process.exit(130)
  })
}
const startedAt = performance.now()
const note = (text: string) => process.stderr.write(`${text}\n`)
const load = new OtherLoad(options.quick ? 0 : PATIENCE_MS)
const rows: Row[] = []
for (const name of options.only) {
  const scenario = SCENARIOS[name]
  if (!scenario) {
    note(`There is no "${name}"; there are: ${Object.keys(SCENARIOS).join(', ')}`)
    process.exit(2)
  }
  note(`-- ${name}`)
  const { quick, 'node-option': nodeOptions } = options
  rows.push(...(await scenario({ quick, nodeOptions, note, quiet: () => load.quiet() })))
}
const cores = cpus()
const percent = (share: number) => `${Math.round(share * 100)} %`
process.stdout.write(
  `\n${table(rows)}\n\n` +
    `${cores.length} cores (${cores[0]?.model}), ${Math.round(totalmem() / 2 ** 30)} GB, ` +
    `Linux ${release()}, Node ${process.version}, ${new Date().toISOString().slice(0, 10)}; ` +
    `other load before each round: median ${percent(median(load.found))}, at most ${percent(Math.max(...load.found))}; ` +
    `${Math.round((performance.now() - startedAt) / 1000)} s${options.quick ? ', --quick' : ''}\n`,
)
