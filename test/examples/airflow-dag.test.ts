import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { EXAMPLES, PYTHON, run, startExampleService } from './example-service.ts'

const FOLDER = join(EXAMPLES, 'airflow')
let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-runner-dag-'))
})
afterAll(() => rm(folder, { recursive: true, force: true }))

test('the files compile', async () => {
  for (const file of ['run_task_safe_dag.py', '../python/task_runner_client.py']) {
    const { code, stderr } = await run(
      PYTHON,
      ['-W', 'error', '-m', 'py_compile', join(FOLDER, file)],
      { env: { PYTHONDONTWRITEBYTECODE: '', PYTHONPYCACHEPREFIX: folder } },
    ).ended
    expect({ file, code, stderr }).toEqual({ file, code: 0, stderr: '' })
  }
})

/**
 * Stand-ins for Airflow, which keep what they are given. They prove that the file wires its operators as meant, and that
 * its checks and `run_safe` do what they say. `.ci/witnesses airflow` proves that real Airflows take it.
 */
const STUBS: Record<string, string> = {
  'airflow/__init__.py': '',
  'airflow/providers/http/hooks/http.py': `
import os, types
class HttpHook:
    def __init__(self, method="POST", http_conn_id="http_default"):
        assert http_conn_id == "task_runner"
    def get_conn(self, headers=None):
        self.base_url = os.environ["TASK_RUNNER_URL"]
        return types.SimpleNamespace(headers={"Authorization": "Bearer " + os.environ["TASK_RUNNER_TOKEN"]})`,
  'airflow/providers/http/operators/http.py': `
from airflow.stub import Operator
class HttpOperator(Operator): pass`,
  'airflow/providers/http/sensors/http.py': `
from airflow.stub import Operator
class HttpSensor(Operator): pass`,
  'airflow/stub.py': `
operators, callables, edges = {}, {}, []
class Operator:
    def __init__(self, *, task_id, **arguments):
        self.task_id, self.arguments = task_id, arguments
        operators[task_id] = self
    def __rshift__(self, other):
        edges.append([self.task_id, other.task_id])
        return other
    def as_teardown(self, *, setups):
        self.arguments["teardown_of"] = setups.task_id
        return self
class DAG:
    def __init__(self, **arguments):
        self.arguments = arguments
        operators[arguments["dag_id"]] = self
    def __enter__(self): return self
    def __exit__(self, *_): pass
def task(function=None, **arguments):
    def decorate(function):
        def call():
            callables[function.__name__] = function
            return Operator(task_id=function.__name__, **arguments)
        return call
    return decorate if function is None else decorate(function)`,
}
const EXCEPTIONS = 'class AirflowFailException(Exception): pass'
const SDK = { 'airflow/sdk/__init__.py': 'from airflow.stub import DAG, task' }
const VERSIONS: Record<string, Record<string, string>> = {
  '2': {
    'airflow/exceptions.py': EXCEPTIONS,
    'airflow/decorators.py': 'from airflow.stub import task',
    'airflow/models/dag.py': 'from airflow.stub import DAG',
  },
  '3.0': { ...SDK, 'airflow/exceptions.py': EXCEPTIONS, 'airflow/sdk/exceptions.py': '' },
  // `airflow.exceptions` has it as well, and warns that it will not have it much longer.
  '3.3': { ...SDK, 'airflow/exceptions.py': '', 'airflow/sdk/exceptions.py': EXCEPTIONS },
}

async function dag(version: string, code: string, env: Record<string, string> = {}) {
  const stubs = join(folder, version)
  for (const [path, text] of Object.entries({ ...STUBS, ...VERSIONS[version] })) {
    await mkdir(join(stubs, dirname(path)), { recursive: true })
    await writeFile(join(stubs, path), text)
  }
  const preamble =
    'import json, types\nimport run_task_safe_dag as module\nfrom airflow import stub\n'
  const result = await run(PYTHON, ['-c', preamble + code], {
    env: { PYTHONPATH: `${stubs}:${FOLDER}:${join(EXAMPLES, 'python')}`, ...env },
  }).ended
  expect(result.stderr).toBe('')
  return JSON.parse(result.stdout)
}

test.each(Object.keys(VERSIONS))('with Airflow %s the operators are wired', async (version) => {
  const { arguments: given, edges } = await dag(
    version,
    `
arguments = {id: each.arguments for id, each in stub.operators.items()}
print(json.dumps({"arguments": arguments, "edges": stub.edges}, default=lambda value: f"<{type(value).__name__}>"))`,
  )
  const task_path = "tasks/{{ ti.xcom_pull(task_ids='name') | urlencode }}"
  const judged = { extra_options: { check_response: false } }
  expect(given).toEqual({
    run_task_safe: {
      dag_id: 'run_task_safe',
      schedule: null,
      start_date: '<datetime>',
      catchup: false,
      default_args: {
        ...{ retries: 10, retry_delay: '<timedelta>' },
        ...{ retry_exponential_backoff: true, max_retry_delay: '<timedelta>' },
      },
    },
    name: {},
    submit: {
      http_conn_id: 'task_runner',
      endpoint: 'task-runner',
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      data: expect.any(String),
      response_check: '<function>',
      ...judged,
    },
    wait: {
      http_conn_id: 'task_runner',
      endpoint: task_path,
      method: 'GET',
      response_check: '<function>',
      silent_fail: true,
      deferrable: false,
      mode: 'reschedule',
      poke_interval: 15,
      timeout: 21600,
      ...judged,
    },
    cancel: {
      http_conn_id: 'task_runner',
      endpoint: `${task_path}/cancel`,
      method: 'POST',
      response_check: '<function>',
      teardown_of: 'name',
      ...judged,
    },
    run_safe: { retries: 0, execution_timeout: '<timedelta>', multiple_outputs: false },
  })
  expect(edges).toEqual([
    ['name', 'submit'],
    ['submit', 'wait'],
    ['wait', 'cancel'],
  ])
  expect(JSON.parse(given.submit.data)).toEqual({
    task_id: "{{ ti.xcom_pull(task_ids='name') }}",
    task_file_name: 'hello.py',
    worker_config: { worker_image: 'practicus', worker_size: 'X-Small' },
    timeout_seconds: 21600,
  })
})

test('what submit sends is accepted, and its checks read the real answers', async () => {
  await using service = await startExampleService()
  const answers = await dag(
    '3.3',
    `
import os, urllib.error, urllib.request
AirflowFailException = module.AirflowFailException
from task_runner_client import TaskRunner
client = TaskRunner(os.environ["TASK_RUNNER_URL"], os.environ["TASK_RUNNER_TOKEN"])
ti = types.SimpleNamespace(dag_id="run_task_safe", run_id="manual__2024-01-01T00:00:00+00:00", task_id="name", max_tries=5)
task_id = stub.callables["name"](ti)
sent = json.loads(stub.operators["submit"].arguments["data"])
def response(method, path, body=None):
    headers = {**client._headers, "Content-Type": "application/json"}
    request = urllib.request.Request(client.url + path, body and json.dumps(body).encode(), headers, method=method)
    try:
        answer = urllib.request.urlopen(request)
    except urllib.error.HTTPError as err:
        answer = err
    text = answer.read().decode()
    return types.SimpleNamespace(status_code=answer.status, text=text, json=lambda: json.loads(text))
def judged(operator, response):
    try:
        return stub.operators[operator].arguments["response_check"](response)
    except AirflowFailException as err:
        return str(err).replace(task_id, "ID")
answer = lambda code, **body: types.SimpleNamespace(status_code=code, text=json.dumps(body), json=lambda: body)
submitted = judged("submit", response("POST", "/task-runner", {**sent, "task_id": task_id}))
succeeded = client.wait_for_task(task_id)
print(json.dumps({
    "submit": [submitted, judged("submit", answer(503)), judged("submit", answer(429)),
        judged("submit", response("POST", "/task-runner", {**sent, "task_id": "other", "task_file_name": "nothere.py"}))],
    "wait": [judged("wait", response("GET", "/tasks/" + task_id)), judged("wait", answer(200, **{**succeeded, "status": "running"})),
        judged("wait", answer(502)), judged("wait", response("GET", "/tasks/unknown")), judged("wait", answer(401)),
        *(judged("wait", answer(200, **{**succeeded, "status": status})) for status in ("failed", "cancelled"))],
    "cancel": [judged("cancel", response("POST", "/tasks/unknown/cancel")), judged("cancel", response("POST", "/tasks/" + task_id + "/cancel")),
        judged("cancel", answer(500)), judged("cancel", answer(401))],
}))`,
    service.env,
  )
  const refused = (status: number, why = '') =>
    expect.stringContaining(`the service refused it with ${status}: ${why}`)
  expect(answers).toEqual({
    submit: [true, false, false, refused(404, '{"success":false,"code":"task_file_not_found"')],
    wait: [
      ...[true, false, false, refused(404), refused(401)],
      ...['task ID failed: completed, None', 'task ID cancelled: completed, None'],
    ],
    cancel: [true, true, false, refused(401)],
  })
})

test('run_safe runs its file, and ends what an earlier try left', async () => {
  const tasks = join(folder, 'tasks')
  await mkdir(tasks)
  await writeFile(join(tasks, 'hello.py'), 'print("hello")\n')
  await writeFile(join(tasks, 'endless.sh'), 'sleep 60\n')
  await using service = await startExampleService({ TASKS_DIR: tasks })
  const [earlier, record] = await dag(
    '3.3',
    `
import os
from task_runner_client import TaskRunner
client = TaskRunner(os.environ["TASK_RUNNER_URL"], os.environ["TASK_RUNNER_TOKEN"])
ti = types.SimpleNamespace(dag_id="d", run_id="r", task_id="run_safe", try_number=2, map_index=-1)
earlier = module.task_id_for("d", "r", "run_safe", 1)
client.submit({"task_id": earlier, "task_file_name": "endless.sh", "worker_config": {}})
print(json.dumps([earlier, stub.callables["run_safe"](ti)]))`,
    service.env,
  )
  expect(record).toMatchObject({ task_file_name: 'hello.py', status: 'succeeded' })
  await service.expectStatus(earlier, 'cancelled')
})

test('deploy_worker.json sets all that the deployer needs', async () => {
  const file = JSON.parse(await readFile(join(FOLDER, 'deploy_worker.json'), 'utf8'))
  const { env_variables } = JSON.parse(Buffer.from(file.additional_params, 'base64').toString())
  expect(Object.keys(env_variables)).toEqual([
    'DEPLOYMENT_KEY',
    'PREFIX',
    'MODEL_NAME',
    'MODEL_DIR',
    'MODEL_REPOSITORY',
  ])
})
