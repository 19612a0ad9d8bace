import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { startApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'

const MONITORING = new URL('../../deploy/monitoring/', import.meta.url)

/** Each sample by its name with labels. */
function samples(text: string): Map<string, number> {
  const lines = text.split('\n').filter((line) => line !== '' && !line.startsWith('#'))
  return new Map(
    lines.map((line) => {
      const at = line.lastIndexOf(' ')
      return [line.slice(0, at), Number(line.slice(at + 1))]
    }),
  )
}

test('a task is counted from its acceptance to its callback', async () => {
  await using receiver = await startReceiver()
  await using app = await startApp()
  const done = taskRequest({ callback_url: receiver.url })
  const failed = taskRequest({
    task_file_name: 'w-eval.sh',
    worker_config: { env_variables: { SCRIPT: 'echo 12345; exit 3' } },
  })
  for (const request of [done, failed]) {
    await app.submit(request)
    await app.finished(request.task_id)
  }
  await expect
    .poll(async () => (await app.get(`/tasks/${done.task_id}`)).body.callback_status)
    .toBe('delivered')
  const told = samples(await app.text('/metrics'))
  const expected = {
    'task_runner_tasks_finished_total{status="succeeded",reason="completed"}': 1,
    'task_runner_tasks_finished_total{status="failed",reason="exit_code"}': 1,
    task_runner_queue_wait_seconds_count: 2,
    task_runner_provisioning_seconds_count: 2,
    task_runner_run_seconds_count: 2,
    task_runner_callback_delay_seconds_count: 1,
    'task_runner_callback_attempts_total{outcome="delivered"}': 1,
    task_runner_log_bytes_total: 'hi\n'.length + '12345\n'.length,
    task_runner_log_bytes_cut_total: 0,
    task_runner_oldest_queued_seconds: 0,
    'task_runner_store_seconds_count{operation="insert"}': 2,
    'task_runner_store_seconds_count{operation="recordAttempt"}': 1,
  }
  expect(Object.fromEntries(told)).toMatchObject(expected)
})

test('what runs and what waits is told as it is', async () => {
  await using app = await startApp({ MAX_CONCURRENT_TASKS: '1' })
  const request = () =>
    taskRequest({
      task_file_name: 'w-eval.sh',
      worker_config: { env_variables: { SCRIPT: 'sleep 60' } },
    })
  const requests = [request(), request(), request()]
  for (const each of requests) await app.submit(each)
  await expect
    .poll(async () => Object.fromEntries(samples(await app.text('/metrics'))))
    .toMatchObject({
      'task_runner_tasks{status="queued"}': 2,
      'task_runner_tasks{status="running"}': 1,
      'task_runner_workers{status="Running"}': 1,
    })
  const told = samples(await app.text('/metrics'))
  expect(told.get('task_runner_oldest_queued_seconds')).toBeGreaterThan(0)
  for (const { task_id } of requests) await app.post(`/tasks/${task_id}/cancel`)
  for (const { task_id } of requests) await app.finished(task_id)
  expect(Object.keys(Object.fromEntries(samples(await app.text('/metrics'))))).not.toContain(
    'task_runner_tasks{status="queued"}',
  )
})

test('bytes of a log that were not kept are told', async () => {
  await using app = await startApp()
  const SCRIPT = 'head -c 6000000 /dev/zero | tr "\\0" x'
  const request = taskRequest({
    task_file_name: 'w-eval.sh',
    worker_config: { env_variables: { SCRIPT } },
  })
  await app.submit(request)
  await app.finished(request.task_id)
  const told = samples(await app.text('/metrics'))
  expect(told.get('task_runner_log_bytes_total')).toBe(6_000_000)
  expect(told.get('task_runner_log_bytes_cut_total')).toBe(6_000_000 - 5 * 1024 * 1024)
})

test('a worker that no task knows is told, and ended', async () => {
  await using app = await startApp()
  expect((await app.get('/workers')).body.workers).toEqual([])
  const worker = join(app.dataDir, 'workers', 'task-leaked-0123456789ab')
  await mkdir(worker)
  const record = { name: 'task-leaked-0123456789ab', taskId: 'unknown', size: null, createdAt: 1 }
  const slot = { pid: 1, startedAt: 'before the machine restarted' }
  await writeFile(join(worker, 'worker.json'), JSON.stringify({ ...record, maxLogBytes: 1, slot }))
  await app.app.reaper.sweepWorkers()
  const told = samples(await app.text('/metrics'))
  expect(told.get('task_runner_workers_leaked_total')).toBe(1)
  expect((await app.get('/workers')).body.workers).toEqual([])
})

test('the loop of the HTTP process and its delays are told', async () => {
  await using app = await startApp()
  const told = samples(await app.text('/metrics'))
  expect(told.get('nodejs_eventloop_lag_p99_seconds')).toBeGreaterThan(0)
})

test('metrics want a token where there are any', async () => {
  await using app = await startApp({ API_TOKENS: 'a-token' })
  expect((await app.get('/metrics')).status).toBe(401)
  const headers = { authorization: 'Bearer a-token' }
  const answer = await app.http.inject({ url: '/metrics', headers })
  expect(answer.headers['content-type']).toMatch(/^text\/plain; version=0\.0\.4/)
})

test('no label holds what a caller has named', async () => {
  await using app = await startApp()
  const request = taskRequest({ task_id: 'a-name-of-the-caller' })
  await app.submit(request)
  await app.finished(request.task_id)
  const text = await app.text('/metrics')
  expect(text).not.toContain('a-name-of-the-caller')
  expect(text).not.toContain('echo.sh')
})

test('the dashboard and the alerts name metrics that exist', async () => {
  await using app = await startApp()
  const text = await app.text('/metrics')
  const names = new Set(
    [...text.matchAll(/^# TYPE (\S+) (\S+)$/gm)].flatMap(([, name, type]) =>
      type === 'histogram' ? [`${name}_bucket`, `${name}_sum`, `${name}_count`] : [name],
    ),
  )
  const files = await readdir(MONITORING)
  expect(files.sort()).toEqual(['alerts.yaml', 'grafana-dashboard.json'])
  for (const file of files) {
    const used = (await readFile(new URL(file, MONITORING), 'utf8')).match(
      /\b(?:task_runner|nodejs|process)_\w+/g,
    )
    expect(used?.length).toBeGreaterThan(5)
    for (const name of used ?? []) expect(names, file).toContain(name)
  }
})
