import { createHmac, randomBytes } from 'node:crypto'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import {
  EXAMPLES,
  type ExampleService,
  PYTHON,
  run,
  startExampleService,
} from './example-service.ts'

const newSecret = () => `whsec_${randomBytes(32).toString('base64')}`

async function startSigning(): Promise<{ service: ExampleService; secret: string }> {
  const secret = newSecret()
  // Two, as while they are rotated.
  const CALLBACK_SIGNING_SECRETS = `${newSecret()},${secret}`
  return { service: await startExampleService({ CALLBACK_SIGNING_SECRETS }), secret }
}

/** As Standard Webhooks has it, by hand. */
function sign(secret: string, id: string, body: string, at = Date.now()): Record<string, string> {
  const timestamp = String(Math.floor(at / 1000))
  const digest = createHmac('sha256', Buffer.from(secret.slice('whsec_'.length), 'base64'))
    .update(`${id}.${timestamp}.${body}`)
    .digest('base64')
  return {
    'webhook-id': id,
    'webhook-timestamp': timestamp,
    'webhook-signature': `v1,${digest}`,
  }
}

test('run_with_callback.py waits for its callback, prints the log, and exits by the outcome', async () => {
  const { service, secret } = await startSigning()
  await using _ = service
  const client = (...args: string[]) =>
    run(PYTHON, [join(EXAMPLES, 'python/run_with_callback.py'), ...args], {
      env: { ...service.env, CALLBACK_SIGNING_SECRET: secret },
    }).ended
  const good = client('parameters.sh', 'MY_FIRST_PARAM=one', 'MY_SECOND_PARAM=a=b')
  const bad = client('failing.py')
  expect(await good).toEqual({
    code: 0,
    stdout: 'MY_FIRST_PARAM=one\nMY_SECOND_PARAM=a=b\n',
    stderr: '',
  })
  const { code, stdout } = await bad
  expect(code).toBe(1)
  expect(stdout).toContain('ZeroDivisionError: division by zero\n')
  const { tasks } = await service.get('/tasks?callback_status=delivered')
  expect(tasks).toHaveLength(2)
  const refused = await client('nothere.py')
  expect(refused).toMatchObject({ code: 3, stdout: '' })
  expect(refused.stderr).toContain('the task was refused: 404: There is no task file "nothere.py"')
})

test('task_runner_client.py refuses what is not signed with the secret, or long ago', async () => {
  const secret = newSecret()
  const body = '{"success": true}'
  const good = sign(secret, 'msg_1', body)
  const cases: Array<[Record<string, string>, string]> = [
    [good, body],
    [{ ...good, 'webhook-signature': `v1,AAAA ${good['webhook-signature']}` }, body],
    [good, '{"success": false}'],
    [{ ...good, 'webhook-id': 'msg_2' }, body],
    [sign(newSecret(), 'msg_1', body), body],
    [sign(secret, 'msg_1', body, Date.now() - 302_000), body],
    [sign(secret, 'msg_1', body, Date.now() + 302_000), body],
    [{ ...good, 'webhook-signature': 'v1,ü' }, body],
    [{}, body],
  ]
  const code = `
import json, sys
from task_runner_client import verify
for headers, body in json.loads(sys.argv[1]):
    try:
        print("verified", verify(headers, body.encode(), sys.argv[2])["success"])
    except ValueError as err:
        print(err)
`
  const { stdout, stderr } = await run(PYTHON, ['-c', code, JSON.stringify(cases), secret], {
    env: { PYTHONPATH: join(EXAMPLES, 'python') },
  }).ended
  expect(stderr).toBe('')
  expect(stdout.trim().split('\n')).toEqual([
    'verified True',
    'verified True',
    'no signature matches',
    'no signature matches',
    'no signature matches',
    'its timestamp is more than five minutes away',
    'its timestamp is more than five minutes away',
    'no signature matches',
    'it is not signed',
  ])
})

test("run_with_callback.py takes no callback without its task's token", async () => {
  const secret = newSecret()
  const code = `
import queue, sys
from run_with_callback import start_receiver
callbacks = queue.Queue()
print(start_receiver("127.0.0.1", 0, "the-token", sys.argv[1], callbacks).server_port, flush=True)
print(callbacks.get())
`
  const receiver = run(PYTHON, ['-c', code, secret], {
    env: { PYTHONPATH: join(EXAMPLES, 'python') },
  })
  await expect.poll(() => receiver.stdout).toMatch(/^\d+\n/)
  const body = '{"success": true}'
  const post = async (token: string, text: string) => {
    const headers = { ...sign(secret, 'msg_1', body), authorization: `Bearer ${token}` }
    const url = `http://127.0.0.1:${Number.parseInt(receiver.stdout, 10)}/callback`
    return (await fetch(url, { method: 'POST', headers, body: text })).status
  }
  expect(await post('another', body)).toBe(401)
  expect(await post('the-token', body.replace('true', '1234'))).toBe(401)
  expect(await post('the-token', body)).toBe(204)
  expect((await receiver.ended).stdout).toMatch(/\n\{'success': True\}\n$/)
})

test('callback-receiver.ts takes a signed callback once', async () => {
  const { service, secret } = await startSigning()
  await using _ = service
  const receiver = run(process.execPath, [join(EXAMPLES, 'callback-receiver.ts')], {
    env: { CALLBACK_SIGNING_SECRETS: `${newSecret()},${secret}`, PORT: '0' },
  })
  try {
    await expect.poll(() => receiver.stdout + receiver.stderr, { timeout: 20_000 }).not.toBe('')
    const url = `${/http:\/\/\S+/.exec(receiver.stdout)?.[0]}/callback`
    const headers = {
      authorization: `Bearer ${service.token}`,
      'content-type': 'application/json',
    }
    const task = { task_id: 'received', task_file_name: 'hello.py', worker_config: {} }
    await fetch(`${service.url}/task-runner`, {
      method: 'POST',
      headers,
      body: JSON.stringify({ ...task, callback_url: url }),
    })
    const delivered = { callback_status: 'delivered' }
    await expect.poll(() => service.task('received'), { timeout: 20_000 }).toMatchObject(delivered)
    await expect
      .poll(() => receiver.stdout)
      .toMatch(/received succeeded\nHello from Python .*, task received\n/)

    // The same webhook-id again; then a callback of our own, so that the first would have been printed by now.
    const redeliver = `${service.url}/tasks/received/callback/redeliver`
    expect(
      (
        await fetch(redeliver, {
          method: 'POST',
          headers: { authorization: headers.authorization },
        })
      ).status,
    ).toBe(200)
    const attempts = async () =>
      ((await service.get('/tasks/received/callback')).attempts as unknown[]).length
    await expect.poll(attempts, { timeout: 20_000 }).toBe(2)
    const own = JSON.stringify({ task_name: 'a.sh', task_id: 'own', success: false, logs: 'ö\n' })
    const post = async (signed: Record<string, string>, body: string, type = 'application/json') =>
      (await fetch(url, { method: 'POST', headers: { ...signed, 'content-type': type }, body }))
        .status
    expect(await post(sign(newSecret(), 'msg_own', own), own)).toBe(401)
    expect(await post(sign(secret, 'msg_own', own), own.replace('own', 'win'))).toBe(401)
    expect(await post(sign(secret, 'msg_own', own), own, 'text/plain')).toBe(415)
    expect(await post(sign(secret, 'msg_own', own), own)).toBe(200)
    await expect.poll(() => receiver.stdout).toContain('own failed\nö\n')
    expect(receiver.stdout.match(/received succeeded/g)).toHaveLength(1)
    expect(receiver.stdout).not.toContain('win failed')
  } finally {
    receiver.kill('SIGTERM')
    await receiver.ended
  }
})
