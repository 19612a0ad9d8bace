import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { startApp, taskRequest } from './helpers/app.ts'
import { startReceiver } from './helpers/receiver.ts'

test('a task is accepted, runs, calls back with exactly four fields, and leaves no worker', async () => {
  await using receiver = await startReceiver()
  await using app = await startApp()
  const request = taskRequest({ callback_url: receiver.url, callback_url_token: 'a-token' })

  const accepted = await app.submit(request)
  expect(accepted).toEqual({
    status: 200,
    body: { success: true, message: 'Started Task successfully', task_id: request.task_id },
  })

  const { headers, body } = await receiver.callbackOf(request.task_id)
  expect(body).toEqual({
    task_name: 'echo.sh',
    task_id: request.task_id,
    success: true,
    logs: 'hi\n',
  })
  expect(headers).toMatchObject({
    authorization: 'Bearer a-token',
    'content-type': 'application/json',
    'webhook-id': expect.stringMatching(/^msg_[0-9a-f]{32}$/),
    'webhook-timestamp': expect.stringMatching(/^\d{10}$/),
  })
  expect(await app.finished(request.task_id)).toMatchObject({
    status: 'succeeded',
    reason: 'completed',
    exit_code: 0,
  })
  expect(await readdir(join(app.dataDir, 'workers'))).toEqual([])
})
