import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import {
  EXAMPLES,
  type ExampleService,
  PYTHON,
  run,
  startExampleService,
} from './example-service.ts'

let service: ExampleService
beforeAll(async () => {
  service = await startExampleService()
})
afterAll(async () => {
  await service[Symbol.asyncDispose]()
})

const PREAMBLE = `
import json, os
from task_runner_client import *
client = TaskRunner(os.environ["TASK_RUNNER_URL"], os.environ.get("TASK_RUNNER_TOKEN"))
def request(task_id, file, **worker_config):
    return {"task_id": task_id, "task_file_name": file, "worker_config": worker_config}
`

function python(code: string, env: Record<string, string> = service.env) {
  return run(PYTHON, ['-c', PREAMBLE + code], {
    env: { PYTHONPATH: join(EXAMPLES, 'python'), ...env },
  })
}

test('a task is run, and its final record returned', async () => {
  const { code, stdout, stderr } = await python(
    'print(json.dumps(run_task_safe(client, request("good", "hello.py"))))',
  ).ended
  expect(stderr).toBe('')
  expect(code).toBe(0)
  expect(JSON.parse(stdout)).toEqual(await service.task('good'))
  expect(JSON.parse(stdout)).toMatchObject({ status: 'succeeded', exit_code: 0 })
})

test('a log is followed until the task has ended', async () => {
  const { stdout, stderr } = await python(`
client.submit(request("followed", "progress.sh", env_variables={"STEPS": 3}))
text = "".join(client.follow("followed"))
print(json.dumps([text, client.logs("followed"), client.get_task("followed")["status"]]))
try:
    next(client.follow("unknown"))
except RequestRefused as err:
    print(json.dumps(err.status))
`).ended
  expect(stderr).toBe('')
  const [followed = '', unknown] = stdout.trim().split('\n')
  const [text, log, status] = JSON.parse(followed)
  expect(text).toBe(log)
  expect(text).toContain('done')
  expect([status, unknown]).toEqual(['succeeded', '404'])
})

test('a request that is too large is refused at once', async () => {
  const { stdout, stderr } = await python(`
try:
    client.submit(request("large", "hello.py", env_variables={"A": "x" * 20_000_000}))
except RequestRefused as err:
    print(json.dumps([err.status, str(err)]))
`).ended
  expect(stderr).toBe('')
  expect(JSON.parse(stdout)).toEqual([413, '413: The request body is too large'])
})

test('params of a run become a worker_config, names of secrets text or a list', async () => {
  const { stdout, stderr } = await python(`
print(json.dumps(worker_config_from_params({
    "worker_size": "Small", "service_url": "", "email": None, "refresh_token": "None", "log_level": "INFO",
    "personal_secrets": "one two", "shared_secrets": ["three"], "env_variables": {"A": ""},
    "capture_task_output": True, "python_venv_name": "mine", "startup_script": "echo a",
})))
`).ended
  expect(stderr).toBe('')
  expect(JSON.parse(stdout)).toEqual({
    ...{ worker_size: 'Small', log_level: 'INFO', startup_script: 'echo a' },
    ...{ personal_secrets: ['one', 'two'], shared_secrets: ['three'], env_variables: { A: '' } },
  })
})

test('a task that fails raises TaskFailed with reason, message and the end of its log', async () => {
  const { stdout, stderr } = await python(`
try:
    run_task_safe(client, request("bad", "failing.py"))
except TaskFailed as err:
    print(json.dumps([err.reason, err.task["exit_code"], str(err)]))
`).ended
  expect(stderr).toBe('')
  const [reason, exitCode, text] = JSON.parse(stdout)
  expect([reason, exitCode]).toEqual(['exit_code', 1])
  expect(text).toMatch(/^task bad failed: exit_code\n.+\n/)
  expect(text).toContain('ZeroDivisionError: division by zero')
})

test('a task that outlasts the wait is cancelled', async () => {
  const { stdout, stderr } = await python(`
try:
    run_task_safe(client, request("slow", "progress.sh"), timeout_seconds=0.5)
except WaitTimeout as err:
    print(err)
`).ended
  expect(stderr).toBe('')
  expect(stdout).toMatch(/^task slow is still \w+ after 0.5 s\n$/)
  await service.expectStatus('slow', 'cancelled')
})

test('whoever is terminated while waiting cancels the task', async () => {
  const waiting = python('run_task_safe(client, request("terminated", "progress.sh"))')
  await service.expectStatus('terminated', 'running')
  waiting.kill('SIGTERM')
  expect(await waiting.ended).toMatchObject({ code: 143, stderr: '' })
  await service.expectStatus('terminated', 'cancelled')
})

test('the same request again starts nothing new', async () => {
  const { stdout, stderr } = await python(`
for _ in range(2):
    answer = client.submit(request("twice", "hello.py"))
    client.wait_for_task("twice")
    print(answer["message"])
`).ended
  expect(stderr).toBe('')
  expect(stdout).toBe('Started Task successfully\nAlready accepted: succeeded\n')
})

test('a task of the same id that another request started is not cancelled', async () => {
  const { stdout } = await python(`
client.submit(request("theirs", "progress.sh"))
try:
    run_task_safe(client, request("theirs", "hello.py"))
except RequestRefused as err:
    print(err.status)
`).ended
  expect(stdout).toBe('409\n')
  await service.expectStatus('theirs', 'running')
})

test('a service that is not there yet is tried again', async () => {
  const port = await freePort()
  const url = `http://127.0.0.1:${port}`
  const token = randomBytes(24).toString('hex')
  const env = { TASK_RUNNER_URL: url, TASK_RUNNER_TOKEN: token }
  const early = python('print(run_task_safe(client, request("early", "hello.py"))["status"])', env)
  await expect.poll(() => early.stderr).toContain('trying again')
  await using _ = await startExampleService({ PORT: String(port), API_TOKENS: token })
  expect(await early.ended).toMatchObject({ code: 0, stdout: 'succeeded\n' })
})

test('a busy service is asked again with the same request, not before Retry-After', async () => {
  const posts: Array<{ at: number; body: string }> = []
  const server = createServer(async (incoming, response) => {
    let body = ''
    for await (const chunk of incoming) body += chunk
    posts.push({ at: Date.now(), body })
    if (posts.length === 1) response.writeHead(429, { 'retry-after': '2' }).end('{}')
    else if (posts.length === 2) response.writeHead(503).end('<html>')
    else if (posts.length === 3) incoming.socket.destroy()
    else response.end('{"message": "at last"}')
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const { stdout } = await python('print(client.submit(request("busy", "a.py"))["message"])', {
    TASK_RUNNER_URL: `http://127.0.0.1:${port}`,
  }).ended
  server.close()
  expect(stdout).toBe('at last\n')
  expect(new Set(posts.map(({ body }) => body)).size).toBe(1)
  const [first, second] = posts
  expect((second?.at ?? 0) - (first?.at ?? 0)).toBeGreaterThanOrEqual(1900)
})

test('a service that stays away is given up', async () => {
  const url = `http://127.0.0.1:${await freePort()}`
  const { stdout } = await python(
    `
client.retry_seconds = 1
try:
    client.get_task("any")
except TaskRunnerError as err:
    print(err)
`,
    { TASK_RUNNER_URL: url },
  ).ended
  expect(stdout).toMatch(new RegExp(`^GET ${url}/tasks/any: .*refused`))
})

test('a redirect is not followed: the token would go with it', async () => {
  let followed = 0
  const server = createServer((incoming, response) => {
    if (incoming.url === '/elsewhere') followed += 1
    response.writeHead(302, { location: '/elsewhere' }).end()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const { stdout } = await python(
    `
try:
    client.get_task("any")
except RequestRefused as err:
    print(err.status)
`,
    { TASK_RUNNER_URL: `http://127.0.0.1:${port}`, TASK_RUNNER_TOKEN: 'made-up' },
  ).ended
  server.close()
  expect(stdout).toBe('302\n')
  expect(followed).toBe(0)
})

test('ids are valid, at most 255 characters, and differ where anything differs', async () => {
  const { stdout } = await python(`
cases = [("d", "r", "t", 1), ("d", "r", "t", 2), ("d.t", "r", "", 1), ("d", "r", "t", 1, 0), ("ü" * 300, "r" * 300, "t", 1), ("ü" * 300, "r" * 300, "t", 2)]
print(json.dumps([task_id_for(*case) for case in cases] + [task_id_for("d", "r", "t", 1)]))
`).ended
  const ids = JSON.parse(stdout) as string[]
  expect(ids.at(-1)).toBe(ids[0])
  expect(new Set(ids).size).toBe(ids.length - 1)
  for (const id of ids) expect(id).toMatch(/^[A-Za-z0-9._:+~-]{1,255}$/)
  expect(ids[4]).toHaveLength(255)
})

test('a worker file is read as the Practicus SDK writes it, and its variables reach the task', async () => {
  const params = Buffer.from('{"env_variables": {"MY_FIRST_PARAM": "one"}}').toString('base64')
  const file = JSON.stringify({
    worker_image: 'practicus',
    worker_size: 'X-Small',
    log_level: 'None',
    startup_script: '',
    email: null,
    additional_params: params,
  })
  const { stdout, stderr } = await python(`
import tempfile
with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    file.write(${JSON.stringify(file)})
    file.flush()
    config = worker_config_from_file(file.name)
print(json.dumps(sorted(config)))
run_task_safe(client, request("file", "parameters.sh", **config, env_variables={"MY_SECOND_PARAM": 2}))
print(client.logs("file"))
`).ended
  expect(stderr).toBe('')
  expect(stdout).toContain('["additional_params", "worker_image", "worker_size"]')
  expect(stdout).toContain('MY_FIRST_PARAM=one\nMY_SECOND_PARAM=2\n')
})

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}
