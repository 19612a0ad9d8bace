import { setTimeout as pause } from 'node:timers/promises'
import pg from 'pg'
import { openPostgres } from '../src/store/postgres.ts'
import { taskWrites } from '../src/store/task-writes.ts'
import { type Postgres, startPostgres } from '../test/helpers/postgres.ts'
import { open } from './open.ts'
import { quantile, type Row } from './report.ts'
import type { Context } from './scenario.ts'
import { Service } from './service.ts'

const TRIVIAL = new URL('./trivial-service.ts', import.meta.url).pathname
const SEALING_KEY = Buffer.alloc(32, 7).toString('base64')
const INSTANCES = [1, 2, 4]
/** Pace at which no queue builds up, to measure the time from the answer to the claim. */
const PACE_MS = 20
const WAITING = [1_000, 10_000, 100_000, 1_000_000]
/** As the queue does. */
const CLAIMED = 16

/** Measures instances that share one Postgres, against one with SQLite; tasks start no process. */
export async function instances(context: Context): Promise<Row[]> {
  await using postgres = await startPostgres()
  open.add(postgres)
  const count = context.quick ? 500 : 2_000
  const rounds = context.quick ? 1 : 3
  const rates: Record<string, number[]> = {}
  const waits: Record<string, number[]> = {}
  for (let round = 0; round < rounds; round += 1) {
    for (const size of [0, ...INSTANCES]) {
      await context.quiet()
      const name = size === 0 ? 'SQLite' : `${size} over Postgres`
      const measured = await measure(size, count, postgres)
      rates[name] = [...(rates[name] ?? []), measured.rate]
      if (size > 0) waits[name] = [...(waits[name] ?? []), measured.waitMs]
      context.note(`${name}: ${measured.rate.toFixed(0)}/s, p50 ${measured.waitMs.toFixed(1)} ms`)
    }
  }
  open.delete(postgres)
  const yardstick = { name: 'one instance over SQLite', figures: rates.SQLite ?? [] }
  const alone = waits['1 over Postgres'] ?? []
  return [
    ...INSTANCES.map((size): Row => {
      const measured = rates[`${size} over Postgres`] ?? []
      return { what: `trivial tasks, ${size} instances`, unit: '/s', measured, yardstick }
    }),
    ...INSTANCES.map((size): Row => {
      const measured = waits[`${size} over Postgres`] ?? []
      const one = { name: 'one instance over Postgres', figures: alone }
      return {
        what: `accepted to claimed, ${size} instances, p50`,
        unit: 'ms',
        measured,
        yardstick: one,
      }
    }),
  ]
}

async function measure(size: number, count: number, postgres: Postgres) {
  const url = await postgres.database()
  const services: Service[] = []
  try {
    for (let index = 0; index < Math.max(1, size); index += 1) {
      services.push(
        await Service.start({
          tasks: { 'trivial.sh': '' },
          callbackUrl: null,
          main: TRIVIAL,
          idPrefix: `instance-${index}`,
          env: { LOG_LEVEL: 'info', ...(size > 0 ? { DATABASE_URL: url, SEALING_KEY } : {}) },
        }),
      )
    }
    const startedAt = performance.now()
    const share = count / services.length
    await Promise.all(services.map((service) => service.submitMany('trivial.sh', share)))
    await allDone(services)
    const rate = (count * 1000) / (performance.now() - startedAt)
    return { rate, waitMs: size > 0 ? await waitOf(services, url) : Number.NaN }
  } finally {
    for (const service of services) await service[Symbol.asyncDispose]()
  }
}

/** Returns the median wait, by the clock of the database. */
async function waitOf(services: Service[], url: string): Promise<number> {
  for (let index = 0; index < 100; index += 1) {
    await services[index % services.length]?.submit('trivial.sh')
    await pause(PACE_MS)
  }
  await allDone(services)
  const client = new pg.Client(url)
  await client.connect()
  const { rows } = await client.query(
    'select started_at - created_at as ms from tasks order by seq desc limit 100',
  )
  await client.end()
  return quantile(
    rows.map(({ ms }) => Number(ms)),
    0.5,
  )
}

async function allDone([service]: Service[]): Promise<void> {
  const isOver = async (status: string) => (await service?.count(status)) === 0
  while (
    !((await isOver('queued')) && (await isOver('provisioning')) && (await isOver('running')))
  ) {
    await pause(PACE_MS)
  }
}

/** Measures how long claiming takes with many waiting tasks; it should not grow with them. */
export async function waiting(context: Context): Promise<Row[]> {
  await using postgres = await startPostgres()
  const url = await postgres.database()
  const connection = await openPostgres(url, { instance: 'bench', poolSize: 1 })
  const { claimNext } = taskWrites(connection)
  const client = new pg.Client(url)
  await client.connect()
  const figures = new Map<number, number[]>()
  let there = 0
  for (const size of context.quick ? WAITING.slice(0, 3) : WAITING) {
    // Each task is a second younger than the one before, so that the oldest goes first.
    await client.query(
      `insert into tasks (task_id, task_file_name, status, worker_name, worker_state, claim, digest,
         terminate_on_completion, timeout_seconds, has_callback, created_at, sealed)
       select 'waiting-' || n, 'trivial.sh', 'queued', 'worker-' || n, 'none', 0, '',
         1, 60, 0, n * 1000::bigint, ''
       from generate_series($1::int, $2::int) as n`,
      [there + 1, size],
    )
    there = size
    await client.query('vacuum analyze tasks')
    await context.quiet()
    const times: number[] = []
    for (let index = 0; index < 50; index += 1) {
      const startedAt = performance.now()
      const claim = claimNext({ at: 0, limit: CLAIMED, instance: 'bench' })
      const tasks = await connection.atomically(claim)
      times.push(performance.now() - startedAt)
      if (tasks?.length !== CLAIMED) throw new Error(`claimed ${tasks?.length}`)
    }
    figures.set(
      size,
      [0.25, 0.5, 0.75].map((q) => quantile(times, q)),
    )
    context.note(`${size} waiting: ${quantile(times, 0.5).toFixed(2)} ms`)
  }
  await client.end()
  await connection.close()
  const yardstick = { name: `of ${WAITING[0]}`, figures: figures.get(WAITING[0] ?? 0) ?? [] }
  return [...figures].map(([size, measured]) => ({
    what: `claim ${CLAIMED} of ${size} waiting tasks`,
    unit: 'ms',
    measured,
    yardstick,
  }))
}
