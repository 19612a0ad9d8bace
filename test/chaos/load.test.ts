import { readFileSync } from 'node:fs'
import { Pool } from 'undici'
import { expect, test } from 'vitest'
import { eventually, get, startStage } from '../helpers/recovery.ts'

const CONNECTIONS = 500
const SUBMISSIONS = 20_000
const QUEUED_MAX = 15_000
const HEAP_MB_MAX = 64
const MEMORY_GROWTH_MB_MAX = 150

test('500 clients with 20,000 tasks for a queue of 15,000 are each told the truth, and the service stays small and answers', async () => {
  await using stage = await startStage({
    env: {
      MAX_CONCURRENT_TASKS: '1',
      MAX_QUEUED_TASKS: String(QUEUED_MAX),
      // What is needed, not what V8 takes while nobody asks it to collect: without a cap the growth was
      // anything from 100 to 210 MB, and 80,000 more requests added 22 MB.
      NODE_OPTIONS: `--max-old-space-size=${HEAP_MB_MAX}`,
    },
  })
  const service = await stage.start()
  await stage.submit(service, 'blocker', 'r-story.sh', { callback_url: null })
  await eventually(async () =>
    expect((await get(service, '/tasks/blocker')).body.status).toBe('running'),
  )
  const pid = Number(service.process.pid)
  const before = residentMb(pid)

  await using pool = closing(new Pool(service.url, { connections: CONNECTIONS, pipelining: 1 }))
  const accepted: string[] = []
  const refusals: Array<{ status: number; retryAfter: string | undefined; body: string }> = []
  let next = 0
  const client = async () => {
    while (next < SUBMISSIONS) {
      const taskId = `load-${next}`
      next += 1
      const answer = await pool.request({
        method: 'POST',
        path: '/task-runner',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify(stage.request(taskId, 'r-story.sh')),
      })
      const body = await answer.body.text()
      if (answer.statusCode === 200) accepted.push(taskId)
      else {
        const retryAfter = answer.headers['retry-after']
        refusals.push({ status: answer.statusCode, retryAfter: retryAfter?.toString(), body })
      }
    }
  }
  const clients = Promise.all(Array.from({ length: CONNECTIONS }, client)).then(() => 'done')
  let connected = 0
  let slowestMs = 0
  let looks = 0
  const health = async () => {
    const startedAt = performance.now()
    expect((await get(service, '/health/ready')).status).toBe(200)
    expect((await get(service, '/health/live')).status).toBe(200)
    slowestMs = Math.max(slowestMs, performance.now() - startedAt)
    connected = Math.max(connected, pool.stats.connected)
    looks += 1
  }
  do await health()
  while ((await Promise.race([clients, Promise.resolve('busy')])) === 'busy')

  expect(connected).toBe(CONNECTIONS)
  expect(looks).toBeGreaterThan(5)
  expect(slowestMs, 'of the two health checks together, under load').toBeLessThan(10_000)
  expect(accepted.length + refusals.length).toBe(SUBMISSIONS)
  // Whoever was on the way when the queue became full may still have been let in.
  expect(accepted.length).toBeGreaterThanOrEqual(QUEUED_MAX)
  expect(accepted.length).toBeLessThanOrEqual(QUEUED_MAX + CONNECTIONS)
  for (const { status, retryAfter, body } of refusals) {
    expect(status).toBe(429)
    expect(Number(retryAfter)).toBeGreaterThan(0)
    expect(JSON.parse(body)).toMatchObject({ success: false, message: expect.any(String) })
  }
  expect(residentMb(pid) - before, 'growth in MB').toBeLessThan(MEMORY_GROWTH_MB_MAX)

  await service.kill()
  const stored = stage.database((db) =>
    db.prepare(`select task_id from tasks where task_id like 'load-%'`).all(),
  )
  expect(stored.map((row) => String(row.task_id)).sort()).toEqual(accepted.sort())
}, 120_000)

function residentMb(pid: number): number {
  const kb = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]
  return Number(kb) / 1024
}

function closing(pool: Pool): Pool & AsyncDisposable {
  return Object.assign(pool, { [Symbol.asyncDispose]: () => pool.destroy() })
}
