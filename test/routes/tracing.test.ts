import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { startApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'
import { startService } from '../helpers/service.ts'

const TRACEPARENT = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'

/** Submits a task that prints its own, and waits for the callback. */
async function traced(header: string | undefined, more: object = {}) {
  await using receiver = await startReceiver()
  await using app = await startApp()
  const env = { SCRIPT: 'echo "trace $(printenv TRACEPARENT || echo none)"' }
  const request = taskRequest({
    task_file_name: 'w-eval.sh',
    worker_config: { env_variables: env },
    callback_url: receiver.url,
    ...more,
  })
  const submit = () =>
    app.http.inject({
      method: 'POST',
      url: '/task-runner',
      headers: header === undefined ? {} : { traceparent: header },
      payload: request,
    })
  expect((await submit()).statusCode).toBe(200)
  const callback = await receiver.callbackOf(request.task_id)
  const { body } = await app.get(`/tasks/${request.task_id}`)
  return { callback, body, again: await submit() }
}

test('the trace of the caller goes to the task and to the receiver', async () => {
  const { callback, body, again } = await traced(TRACEPARENT)
  expect(callback.body.logs).toBe(`trace ${TRACEPARENT}\n`)
  expect(callback.headers.traceparent).toBe(TRACEPARENT)
  expect(body.traceparent).toBe(TRACEPARENT)
  expect(again.json()).toMatchObject({ message: 'Already accepted: succeeded' })
})

test.each([undefined, 'nonsense', `${TRACEPARENT}-more`])('%j is no trace', async (header) => {
  const { callback, body } = await traced(header)
  expect(callback.body.logs).toBe('trace none\n')
  expect(callback.headers).not.toHaveProperty('traceparent')
  expect(body.traceparent).toBeNull()
})

test('a variable of the request comes before it', async () => {
  const env_variables = { SCRIPT: 'echo "trace $TRACEPARENT"', TRACEPARENT: 'of the caller' }
  const { callback } = await traced(TRACEPARENT, { worker_config: { env_variables } })
  expect(callback.body.logs).toBe('trace of the caller\n')
})

test('every line that the service logs of a task names its trace', async () => {
  await using receiver = await startReceiver()
  const dataDir = await mkdtemp(join(tmpdir(), 'task-runner-test-'))
  const service = await startService({ DATA_DIR: dataDir })
  try {
    const request = taskRequest({ callback_url: receiver.url })
    const answer = await fetch(`${service.url}/task-runner`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', traceparent: TRACEPARENT },
      body: JSON.stringify(request),
    })
    expect(answer.status).toBe(200)
    const lines = () =>
      service.log
        .filter((line) => line.includes(request.task_id))
        .map((line): { msg: string; traceId?: string } => JSON.parse(line))
    await expect
      .poll(() => lines().map(({ msg }) => msg), { timeout: 20_000 })
      .toEqual(
        expect.arrayContaining([
          ...['task accepted', 'task running', 'task finished', 'callback delivered'],
        ]),
      )
    for (const { msg, traceId } of lines()) expect(traceId, msg).toBe(TRACEPARENT.split('-')[1])
  } finally {
    await service.kill('SIGTERM')
    await rm(dataDir, { recursive: true, force: true, maxRetries: 10 })
  }
})
