import { expect, test } from 'vitest'
import { startApp, taskRequest } from '../helpers/app.ts'
import { startReceiver } from '../helpers/receiver.ts'

test('tasks are listed by the state of their callback, so that those given up can be found and redelivered', async () => {
  await using receiver = await startReceiver((_, response) => {
    response.writeHead(410).end()
  })
  await using healthy = await startReceiver()
  await using app = await startApp()
  const gone = taskRequest({ callback_url: receiver.url })
  const told = taskRequest({ callback_url: healthy.url })
  const silent = taskRequest()
  for (const request of [gone, told, silent]) {
    await app.submit(request)
    await app.finished(request.task_id)
  }
  const waiting = taskRequest({
    callback_url: healthy.url,
    task_file_name: 'bad-waits.sh',
    worker_config: { env_variables: { GATE: app.dataDir } },
  })
  await app.submit(waiting)

  const listed = async (status: string) =>
    (
      (await app.get(`/tasks?callback_status=${status}`)).body.tasks as Array<{ task_id: string }>
    ).map(({ task_id }) => task_id)
  const all = { given_up: gone, delivered: told, none: silent, pending: waiting }
  for (const [status, request] of Object.entries(all)) {
    expect(await listed(status), status).toEqual([request.task_id])
  }
  expect((await app.get('/tasks?callback_status=lost')).status).toBe(422)
  await app.post(`/tasks/${waiting.task_id}/cancel`)
  await app.finished(waiting.task_id)
})
