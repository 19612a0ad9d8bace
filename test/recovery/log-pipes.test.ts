import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { get, killIfThere } from '../helpers/recovery.ts'
import { processesOf, startService } from '../helpers/service.ts'

const TASKS = 8
const LINES = 2_000_000
/** Each line has 25 bytes. */
const LOG_BYTES = LINES * 25
const KILLS = Number(process.env.KILLS ?? 6)

async function hashOf(path: string): Promise<string> {
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(path)) hash.update(chunk)
  return hash.digest('hex')
}

function hashOfLog(task: number): string {
  const hash = createHash('sha256')
  for (let from = 1; from <= LINES; from += 10_000) {
    const lines = Array.from(
      { length: 10_000 },
      (_, index) => `task ${task} line ${String(from + index).padStart(12, '0')}\n`,
    )
    hash.update(lines.join(''))
  }
  return hash.digest('hex')
}

test.for(['the service', 'the service and what reads in its place'])(
  `${TASKS} tasks log ${LOG_BYTES / 1e6} MB each while %s is killed again and again: every byte is there, in order`,
  { timeout: 300_000 },
  async (killed) => {
    const folder = await mkdtemp(join(tmpdir(), 'task-runner-log-pipes-'))
    const workersDir = join(folder, 'workers')
    const env = { DATA_DIR: folder, MAX_CONCURRENT_TASKS: String(TASKS), MAX_LOG_MB: '200' }
    const paths = async () =>
      (await readdir(workersDir)).map((name) => join(workersDir, name)).sort()
    const logged = async () => {
      const bodies = await Promise.all(
        Array.from({ length: TASKS }, (_, task) => get(service, `/tasks/pipes-${task}`)),
      )
      return bodies.filter(({ body }) => body.finished_at !== null).length
    }
    let service = await startService(env)
    try {
      for (let task = 0; task < TASKS; task += 1) {
        // Slow enough to be killed amid it.
        const script = `for part in $(seq 0 19); do
          seq -f "task ${task} line %012.0f" $((part * ${LINES / 20} + 1)) $(((part + 1) * ${LINES / 20})); sleep 0.1
        done; exit 7`
        const answer = await fetch(`${service.url}/task-runner`, {
          method: 'POST',
          headers: { 'content-type': 'application/json' },
          body: JSON.stringify({
            ...{ task_id: `pipes-${task}`, task_file_name: 'w-eval.sh' },
            terminate_on_completion: false,
            worker_config: { env_variables: { SCRIPT: script } },
          }),
        })
        expect(answer.status).toBe(200)
      }
      for (let kills = 0; kills < KILLS; kills += 1) {
        await pause(200 + Math.random() * 300)
        const readers =
          killed === 'the service'
            ? []
            : await Promise.all(
                (await paths()).map(async (path) => {
                  const record = await readFile(join(path, 'worker.json'), 'utf8')
                  return JSON.parse(record).reader.pid as number
                }),
              )
        // Those first: they must not have begun.
        for (const pid of readers) killIfThere(pid)
        await service.kill()
        service = await startService(env)
      }
      await expect.poll(logged, { timeout: 200_000, interval: 500 }).toBe(TASKS)
      for (let task = 0; task < TASKS; task += 1) {
        const { body } = await get(service, `/tasks/pipes-${task}`)
        expect(body).toMatchObject({ reason: 'exit_code', exit_code: 7, log_bytes: LOG_BYTES })
      }
      const hashes = await Promise.all((await paths()).map((path) => hashOf(join(path, 'log'))))
      const expected = Array.from({ length: TASKS }, (_, task) => hashOfLog(task))
      expect(hashes.toSorted()).toEqual(expected.toSorted())
    } finally {
      await service.kill()
      for (const pid of processesOf(folder)) killIfThere(pid)
      await rm(folder, { recursive: true, force: true, maxRetries: 10 })
    }
  },
)
