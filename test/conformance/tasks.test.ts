/** How a task ends, how it is found, and its log. */
import { describe, expect, test } from 'vitest'
import { expectDone, expectError } from './expectations.ts'
import { useReceiver } from './receiver.ts'
import {
  type Json,
  LONG_RUNNING,
  type LogEvent,
  newTaskId,
  POLL,
  parameters,
  useTarget,
} from './target.ts'

const target = useTarget()
const receiver = useReceiver()

describe('a task', () => {
  test.each(['hello.py', 'hello.ts'])('%s runs and is given its task id', async (name) => {
    const { taskId, task, log } = await target.run({ task_file_name: name })
    expect(task).toMatchObject({ status: 'succeeded', reason: 'completed', exit_code: 0 })
    expect(log).toContain(`task ${taskId}`)
  })

  test('that succeeded has status, reason, exit code and times in order', async () => {
    const { taskId, task } = await target.run()
    expect(task).toMatchObject({
      task_id: taskId,
      task_file_name: 'progress.sh',
      status: 'succeeded',
      reason: 'completed',
      exit_code: 0,
      signal: null,
      worker_name: expect.stringMatching(/^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/),
      instance: expect.any(String),
      priority: 0,
      traceparent: null,
      callback_status: 'none',
      terminate_on_completion: true,
    })
    const times = [task.created_at, task.started_at, task.finished_at].map(String)
    for (const time of times) expect(time).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$/)
    expect(times.map(Date.parse)).toEqual(times.map(Date.parse).sort((a, b) => a - b))
  })

  test('that failed has its exit code, and its traceback in the log', async () => {
    const { task, log } = await target.run({ task_file_name: 'failing.py', worker_config: {} })
    expect(task).toMatchObject({ status: 'failed', reason: 'exit_code', exit_code: 1 })
    expect(log).toContain('About to divide by zero')
    expect(log).toContain('ZeroDivisionError')
  })

  test('that runs out of its time ends as timed_out, with a callback', async () => {
    const overrides = { ...LONG_RUNNING, timeout_seconds: 1, callback_url: receiver.url }
    const { taskId, task } = await target.run(overrides)
    expect(task).toMatchObject({ status: 'failed', reason: 'timed_out', timeout_seconds: 1 })
    expect((await receiver.callbackOf(taskId)).body).toMatchObject({ success: false })
  })

  test('that runs says so and has not finished', async () => {
    const taskId = await target.start(LONG_RUNNING)
    await target.running(taskId)
    const running = { status: 'running', reason: null, exit_code: null, finished_at: null }
    expect(await target.task(taskId)).toMatchObject({ ...running, started_at: expect.any(String) })
  })
})

describe('secrets', () => {
  test('are shown nowhere: values of variables, callback token, refresh token', async () => {
    const secret = `secret-${newTaskId()}`
    const { taskId, task } = await target.run({
      callback_url: receiver.url,
      callback_url_token: `${secret}-token`,
      worker_config: {
        env_variables: { STEPS: 0, PASSWORD: `${secret}-variable` },
        refresh_token: `${secret}-refresh`,
      },
    })
    await receiver.callbackOf(taskId)
    expect(task.worker_config).toMatchObject({ env_variables: { STEPS: '***', PASSWORD: '***' } })
    for (const path of [`/tasks/${taskId}`, `/tasks/${taskId}/callback`, '/tasks', '/workers']) {
      const { status, text } = await target.get(path)
      expect(status).toBe(200)
      expect(text).not.toContain(secret)
    }
    expect(JSON.stringify(task)).not.toContain('callback_url_token')
  })

  test('that a task prints are masked in its log and its callback', async () => {
    const token = `secret-${newTaskId()}`
    const { taskId, log } = await target.run({
      ...parameters(`before ${token} after`),
      callback_url: receiver.url,
      callback_url_token: token,
    })
    const masked = 'MY_FIRST_PARAM=before *** after\n'
    expect(log).toContain(masked)
    expect((await receiver.callbackOf(taskId)).body.logs).toContain(masked)
  })
})

describe('cancelling', () => {
  test('ends a task as cancelled, with a callback; repeating it changes nothing', async () => {
    const taskId = await target.start({ ...LONG_RUNNING, callback_url: receiver.url })
    await expect.poll(() => target.log(taskId), POLL).toContain('step 1 of 600')
    const cancel = () => target.request('POST', `/tasks/${taskId}/cancel`)
    expectDone(await cancel(), { task_id: taskId, status: expect.any(String) })
    expectDone(await cancel(), { task_id: taskId, status: expect.any(String) })
    const task = await target.finished(taskId)
    expect(task).toMatchObject({ status: 'cancelled', reason: 'cancelled' })
    expectDone(await cancel(), { task_id: taskId, status: 'cancelled' })
    const { body } = await receiver.callbackOf(taskId)
    expect(body).toMatchObject({ success: false, logs: expect.stringContaining('of 600') })
    await target.callback(taskId, 'delivered')
    expect(await target.task(taskId)).toEqual({ ...task, callback_status: 'delivered' })
    expect(receiver.callbacksOf(taskId)).toHaveLength(1)
  })

  test('right after it was accepted ends it as well', async () => {
    const taskId = await target.start({ ...LONG_RUNNING, callback_url: receiver.url })
    expectDone(await target.request('POST', `/tasks/${taskId}/cancel`), {
      task_id: taskId,
      status: expect.any(String),
    })
    expect(await target.finished(taskId)).toMatchObject({ status: 'cancelled' })
    expect((await receiver.callbackOf(taskId)).body).toMatchObject({ success: false })
  })

  test('a task that has ended leaves it as it is', async () => {
    const { taskId, task } = await target.run()
    const answer = await target.request('POST', `/tasks/${taskId}/cancel`)
    expectDone(answer, { task_id: taskId, status: 'succeeded' })
    expect(await target.task(taskId)).toEqual(task)
  })
})

describe('GET /tasks', () => {
  test('is newest first, page by page, each task once', async () => {
    const mine: string[] = []
    for (let count = 0; count < 5; count += 1) mine.push(await target.start())
    const seen: Json[] = []
    let cursor: unknown
    // Other callers may have posted meanwhile: a few pages more than ours need.
    for (let page = 0; page < 100; page += 1) {
      const query = cursor === undefined ? '' : `&cursor=${encodeURIComponent(String(cursor))}`
      const { tasks, next_cursor } = await list(`limit=2${query}`)
      expect(tasks.length).toBeLessThanOrEqual(2)
      seen.push(...tasks)
      cursor = next_cursor
      if (cursor === null || seen.some(({ task_id }) => task_id === mine[0])) break
    }
    const ids = seen.map(({ task_id }) => task_id)
    expect(new Set(ids).size).toBe(ids.length)
    expect(ids.filter((id) => mine.includes(String(id)))).toEqual(mine.toReversed())
    const times = seen.map(({ created_at }) => Date.parse(String(created_at)))
    expect(times).toEqual(times.toSorted((a, b) => b - a))
  })

  test('filters by status and by task file', async () => {
    const { taskId: succeeded } = await target.run()
    const { taskId: failed } = await target.run({ task_file_name: 'failing.py', worker_config: {} })
    const expectFound = async (query: string, fields: Json, there: string, away: string) => {
      const { tasks } = await list(`limit=100&${query}`)
      for (const task of tasks) expect(task).toMatchObject(fields)
      const ids = tasks.map(({ task_id }) => task_id)
      expect(ids).toContain(there)
      expect(ids).not.toContain(away)
    }
    await expectFound('status=failed', { status: 'failed' }, failed, succeeded)
    await expectFound('status=succeeded', { status: 'succeeded' }, succeeded, failed)
    const file = { task_file_name: 'failing.py' }
    await expectFound('task_file_name=failing.py', file, failed, succeeded)
  })
})

describe('a log', () => {
  test('is plain text, of which tail_mb gives the end', async () => {
    const { taskId } = await target.run(parameters('x'.repeat(50_000)))
    const whole = await target.get(`/tasks/${taskId}/logs`)
    expect(whole.headers.get('content-type')).toMatch(/^text\/plain/)
    expect(whole.text.length).toBeGreaterThan(50_000)
    const tail = await target.get(`/tasks/${taskId}/logs?tail_mb=0.01`)
    // A line may say what was cut.
    expect(tail.text.length).toBeGreaterThan(10_000)
    expect(tail.text.length).toBeLessThan(11_000)
    expect(tail.text).toMatch(/x{10000}\nMY_SECOND_PARAM=second\n$/)
  })

  test.each(['0', '-1', 'much'])('cannot have a tail of %s MB', async (size) => {
    const { taskId } = await target.run()
    expectError(await target.get(`/tasks/${taskId}/logs?tail_mb=${size}`), 422, 'tail_mb')
  })

  test('keeps its last 5 MB, for reading and in the callback', async () => {
    const startup_script =
      'i=0; while [ $i -lt 100000 ]; do echo "$i $MY_FIRST_PARAM"; i=$((i+1)); done'
    const { env_variables } = parameters('x'.repeat(60)).worker_config
    const { taskId, log } = await target.run({
      task_file_name: 'parameters.sh',
      worker_config: { startup_script, env_variables },
      callback_url: receiver.url,
    })
    expect(log).toMatch(
      /\n99998 x{60}\n99999 x{60}\nMY_FIRST_PARAM=x{60}\nMY_SECOND_PARAM=second\n$/,
    )
    expect(log).not.toContain('\n9 x')
    expect(Buffer.byteLength(log)).toBeGreaterThan(5_000_000 - 100)
    expect(Buffer.byteLength(log)).toBeLessThan(5 * 1024 * 1024 + 200)
    expect((await receiver.callbackOf(taskId)).body.logs).toBe(log)
  })

  test('is followed while the task runs, and resumed where it was', async () => {
    const overrides = { worker_config: { env_variables: { STEPS: 3 } } }
    const taskId = await target.start(overrides)
    const before: LogEvent[] = []
    for await (const event of target.follow(taskId)) {
      before.push(event)
      if (textOf(before).includes('step 1')) break
    }
    expect(await target.task(taskId)).toMatchObject({ status: 'running' })
    const at = before.at(-1)?.id
    expect(at).toBe(String(Buffer.byteLength(textOf(before))))

    const after: LogEvent[] = []
    for await (const event of target.follow(taskId, at)) after.push(event)
    const log = await target.log(taskId)
    expect(log).toContain('step 1 of 3\nstep 2 of 3\nstep 3 of 3\ndone\n')
    expect(textOf(before) + textOf(after)).toBe(log)
    expect((await target.finished(taskId)).status).toBe('succeeded')
  })

  test('of a task that has ended is followed from any byte, to its end', async () => {
    const { taskId, log } = await target.run(parameters('first'))
    for (const at of [undefined, 0, 5, log.length - 1]) {
      const events: LogEvent[] = []
      for await (const event of target.follow(taskId, at)) events.push(event)
      expect(textOf(events)).toBe(log.slice(at ?? 0))
      const last = events.filter(({ id }) => id !== undefined).at(-1)
      expect(last?.id).toBe(String(Buffer.byteLength(log)))
      expect(events.at(-1)?.event).toBe('end')
      expect(JSON.parse(events.at(-1)?.data ?? '')).toMatchObject({ status: 'succeeded' })
    }
  })
})

async function list(query: string): Promise<{ tasks: Json[]; next_cursor: unknown }> {
  const { status, text, body } = await target.get(`/tasks?${query}`)
  expect(status, text).toBe(200)
  expect(body).toEqual({ tasks: expect.any(Array), next_cursor: body.next_cursor ?? null })
  return { tasks: body.tasks as Json[], next_cursor: body.next_cursor }
}

function textOf(events: LogEvent[]): string {
  return events
    .filter(({ event }) => event === 'message')
    .map(({ data }) => data)
    .join('')
}
