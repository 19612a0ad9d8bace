import { setTimeout as pause } from 'node:timers/promises'
import { NodeProcess } from './process.ts'
import type { Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'
import { DurableWriter } from './yardsticks.ts'

const QUEUED = 10_000
const SETTLE_MS = 2_000
const DISK_WRITES = 300
const IDLE_MB = 110

/** Measures resident memory, and the rate at which tasks are accepted while none can run. */
export async function memory(context: Context): Promise<Row[]> {
  const queued = context.quick ? QUEUED / 10 : QUEUED
  await using disk = await DurableWriter.start()
  await using bare = new NodeProcess(
    ['--eval', 'setInterval(() => {}, 1000); console.log("started")'],
    { folder: disk.folder, env: {} },
  )
  await bare.line((line) => line === 'started')
  await using service = await Service.start({
    tasks: { 'block.sh': 'sleep 1000\n', 'echo.sh': 'echo hi\n' },
    callbackUrl: null,
    env: { MAX_CONCURRENT_TASKS: '1' },
    nodeOptions: context.nodeOptions,
  })
  await pause(SETTLE_MS)
  await context.quiet()
  const idle = await service.process.residentMb()
  await service.submit('block.sh')
  const writesStartedAt = performance.now()
  for (let write = 0; write < DISK_WRITES; write += 1) await disk.write()
  const writesPerSecond = (DISK_WRITES * 1000) / (performance.now() - writesStartedAt)
  const startedAt = performance.now()
  await service.submitMany('echo.sh', queued)
  const acceptsPerSecond = (queued * 1000) / (performance.now() - startedAt)
  await pause(SETTLE_MS)
  const full = await service.process.residentMb()
  const yardstick = { name: 'an idle Node process', figures: [await bare.residentMb()] }
  return [
    {
      what: 'resident memory, idle',
      unit: 'MB',
      measured: [idle],
      yardstick,
      aim: { of: 'value', limit: IDLE_MB, better: 'less' },
    },
    { what: `resident memory, ${queued} tasks queued`, unit: 'MB', measured: [full], yardstick },
    {
      what: 'accepts, 8 connections, nothing running',
      unit: '/s',
      measured: [acceptsPerSecond],
      yardstick: { name: 'durable 4 KB writes, one after another', figures: [writesPerSecond] },
    },
  ]
}
