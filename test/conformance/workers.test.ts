/** Workers: how long they are there, and how they are ended. */
import { describe, expect, test } from 'vitest'
import { expectDone, expectError } from './expectations.ts'
import { useReceiver } from './receiver.ts'
import { type Json, LONG_RUNNING, POLL, useTarget } from './target.ts'

const target = useTarget()
const receiver = useReceiver()

describe('a worker', () => {
  test('of a running task is listed, shown and read', async () => {
    const taskId = await target.start(LONG_RUNNING)
    await target.running(taskId)
    const { worker_name: name } = await target.task(taskId)
    const { status, body } = await target.get(`/workers/${name}`)
    expect(status).toBe(200)
    expect(body).toEqual({
      name,
      status: 'Running',
      creation_time: expect.stringMatching(/^\d{4}-.*Z$/),
      backend: expect.stringMatching(/\S/),
      image: body.image === null ? null : expect.any(String),
      size: body.size === null ? null : expect.any(String),
      task_id: taskId,
    })
    expect((await target.get('/workers')).body.workers).toContainEqual(body)
    const log = async () => (await target.get(`/workers/${name}/logs`)).text
    await expect.poll(log, POLL).toContain('step 1 of 600\n')
    const { headers } = await target.get(`/workers/${name}/logs`)
    expect(headers.get('content-type')).toMatch(/^text\/plain/)
  })

  test('that is deleted takes its running task with it', async () => {
    const taskId = await target.start(LONG_RUNNING)
    await target.running(taskId)
    const { worker_name: name } = await target.task(taskId)
    expectDone(await target.request('DELETE', `/workers/${name}`))
    expect((await target.finished(taskId)).status).not.toBe('succeeded')
    await target.workerGone(name)
  })

  test('stays with terminate_on_completion=false, until it is deleted', async () => {
    const overrides = { terminate_on_completion: false, callback_url: receiver.url }
    const { taskId, task, log } = await target.run(overrides)
    await receiver.callbackOf(taskId)
    // A task after it has run and lost its worker: this one would have lost its own by now.
    await target.workerGone((await target.run()).task.worker_name)
    const path = `/workers/${task.worker_name}`
    expect((await target.get(path)).body).toMatchObject({ task_id: taskId })
    expect(await target.workersOf([taskId])).toEqual([task.worker_name])
    expect((await target.get(`${path}/logs`)).text).toBe(log)

    expectDone(await target.request('DELETE', path))
    await target.workerGone(task.worker_name)
    expect(await target.workersOf([taskId])).toEqual([])
    expectError(await target.request('DELETE', path), 404)
    expect(await target.log(taskId)).toBe(log)
  })

  test.each<[string, Json]>([
    ['succeeds', {}],
    ['has terminate_on_completion null', { terminate_on_completion: null }],
    ['fails', { task_file_name: 'failing.py' }],
    ['fails to start', { worker_config: { startup_script: 'exit 1' } }],
    ['runs out of time', { ...LONG_RUNNING, timeout_seconds: 1 }],
  ])('is not left behind by a task that %s', async (_how, overrides) => {
    const { taskId, task } = await target.run(overrides)
    await target.workerGone(task.worker_name)
    expect(await target.workersOf([taskId])).toEqual([])
  })

  test('is not left behind by a task that is cancelled', async () => {
    const taskId = await target.start(LONG_RUNNING)
    await target.running(taskId)
    await target.request('POST', `/tasks/${taskId}/cancel`)
    const { worker_name: name } = await target.finished(taskId)
    await target.workerGone(name)
  })
})

describe('POST /workers/cleanup', () => {
  // No worker provisions for a year: a live service loses nothing.
  const YEAR = 365 * 86_400

  test('lists what it terminated, and leaves running workers alone', async () => {
    const taskId = await target.start(LONG_RUNNING)
    await target.running(taskId)
    const json = { older_than_seconds: YEAR }
    const answer = await target.request('POST', '/workers/cleanup', { json })
    expectDone(answer, { workers: [] })
    expect(await target.task(taskId)).toMatchObject({ status: 'running' })
    expect(await target.workersOf([taskId])).toHaveLength(1)
  })

  test.each<[string, unknown]>([
    ['older_than_seconds', -1],
    ['older_than_seconds', 'a year'],
    ['older_than', YEAR],
  ])('refuses %s %j, naming it', async (field, value) => {
    const json = { [field]: value }
    expectError(await target.request('POST', '/workers/cleanup', { json }), 422, field)
  })
})
