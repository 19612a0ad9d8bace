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
  for (const file of ['run_task_safe_dag.py', 'task_runner.py']) {
    const { code, stderr } = await run(
      PYTHON,
      ['-W', 'error', '-m', 'py_compile', join(FOLDER, file)],
      { env: { PYTHONDONTWRITEBYTECODE: '', PYTHONPYCACHEPREFIX: folder } },
    ).ended
    expect({ file, code, stderr }).toEqual({ file, code: 0, stderr: '' })
  }
})

/**
 * Stand-ins for Airflow, which is not installed here: they keep what they are given. They prove that the file imports
 * and wires its operators as meant, and that `deploy` runs; not that Airflow takes it. The arguments were checked
 * against the documentation of apache-airflow-providers-http by hand.
 */
const STUBS: Record<string, string> = {
  'airflow/__init__.py': '',
  'airflow/exceptions.py': `
class AirflowException(Exception): pass
class AirflowFailException(AirflowException): pass`,
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
def task(**arguments):
    def decorate(function):
        def call(): callables[function.__name__] = function
        return call
    return decorate`,
}
const VERSIONS: Record<string, Record<string, string>> = {
  '2': {
    'airflow/decorators.py': 'from airflow.stub import task',
    'airflow/models/dag.py': 'from airflow.stub import DAG',
  },
  '3': { 'airflow/sdk.py': 'from airflow.stub import DAG, task' },
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
    env: { PYTHONPATH: `${stubs}:${FOLDER}`, ...env },
  }).ended
  expect(result.stderr).toBe('')
  return JSON.parse(result.stdout)
}

test.each(['2', '3'])('with Airflow %s the operators are wired', async (version) => {
  const { arguments: given, edges } = await dag(
    version,
    `
arguments = {id: each.arguments for id, each in stub.operators.items()}
print(json.dumps({"arguments": arguments, "edges": stub.edges}, default=lambda value: f"<{type(value).__name__}>"))`,
  )
  const task_path = "tasks/{{ ti.xcom_pull(task_ids='submit') | urlencode }}"
  expect(given).toEqual({
    run_task_safe: {
      dag_id: 'run_task_safe',
      schedule: null,
      start_date: '<datetime>',
      catchup: false,
      default_args: { retries: 5, retry_delay: '<timedelta>' },
      user_defined_macros: { task_id_for: '<function>' },
    },
    submit: {
      http_conn_id: 'task_runner',
      endpoint: 'task-runner',
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      data: expect.any(String),
      response_filter: '<function>',
    },
    wait: {
      http_conn_id: 'task_runner',
      endpoint: task_path,
      method: 'GET',
      response_check: '<function>',
      response_error_codes_allowlist: ['429', '500', '502', '503', '504'],
      deferrable: false,
      mode: 'reschedule',
      poke_interval: 15,
      timeout: 21600,
    },
    cancel: {
      http_conn_id: 'task_runner',
      endpoint: `${task_path}/cancel`,
      method: 'POST',
      teardown_of: 'submit',
    },
  })
  expect(edges).toEqual([
    ['submit', 'wait'],
    ['wait', 'cancel'],
  ])
  expect(JSON.parse(given.submit.data)).toEqual({
    task_id: '{{ task_id_for(dag.dag_id, run_id, task.task_id, ti.max_tries) }}',
    task_file_name: 'hello.py',
    worker_config: { worker_image: 'practicus', worker_size: 'X-Small' },
    timeout_seconds: 21600,
  })
})

test('what submit sends is accepted, and its checks read the real answers', async () => {
  await using service = await startExampleService()
  const answers = await dag(
    '3',
    `
import os
from airflow.exceptions import AirflowFailException
from task_runner import TaskRunner
client = TaskRunner(os.environ["TASK_RUNNER_URL"], os.environ["TASK_RUNNER_TOKEN"])
arguments = stub.operators["submit"].arguments
request = json.loads(arguments["data"])
request["task_id"] = module.task_id_for("run_task_safe", "manual__2024-01-01T00:00:00+00:00", "submit", 5)
answer = lambda body: types.SimpleNamespace(json=lambda: body)
task_id = arguments["response_filter"](answer(client.submit(request)))
check = stub.operators["wait"].arguments["response_check"]
succeeded = client.wait_for_task(task_id)
results = [check(answer(succeeded)), check(answer({**succeeded, "status": "running"}))]
for status in ("failed", "cancelled"):
    try:
        check(answer({**succeeded, "status": status}))
    except AirflowFailException as err:
        results.append(str(err).replace(task_id, "ID"))
print(json.dumps(results))`,
    service.env,
  )
  expect(answers).toEqual([
    true,
    false,
    'task ID failed: completed, None',
    'task ID cancelled: completed, None',
  ])
})

test('deploy runs the deployer with its worker file, and ends what an earlier try left', async () => {
  const tasks = join(folder, 'tasks')
  await mkdir(tasks)
  // Stands in for the deployer, whose own tests hold what it does.
  await writeFile(
    join(tasks, 'deployer_task.py'),
    'import os\nprint(os.environ["DEPLOYMENT_KEY"])\n',
  )
  await writeFile(join(tasks, 'endless.sh'), 'sleep 60\n')
  await using service = await startExampleService({ TASKS_DIR: tasks })
  const [earlier, record] = await dag(
    '3',
    `
import os
from task_runner import TaskRunner
client = TaskRunner(os.environ["TASK_RUNNER_URL"], os.environ["TASK_RUNNER_TOKEN"])
ti = types.SimpleNamespace(dag_id="d", run_id="r", task_id="deploy", try_number=2, map_index=-1)
earlier = module.task_id_for("d", "r", "deploy", 1)
client.submit({"task_id": earlier, "task_file_name": "endless.sh", "worker_config": {}})
print(json.dumps([earlier, stub.callables["deploy"](ti)]))`,
    service.env,
  )
  expect(record).toMatchObject({ task_file_name: 'deployer_task.py', status: 'succeeded' })
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
