import { cp, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { EXAMPLES, type ExampleService, ROOT, startExampleService } from './example-service.ts'

const SECRET = 'canary-of-the-vault'
let folder: string
let tasks: string
let service: ExampleService

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-runner-practicus-'))
  tasks = join(folder, 'tasks')
  await cp(join(EXAMPLES, 'practicus/tasks'), tasks, { recursive: true })
  await cp(join(ROOT, 'tasks/deployer_task.py'), join(tasks, 'deployer_task.py'))
  service = await startExampleService({ TASKS_DIR: tasks, SECRET_API_KEY: SECRET })
})
afterAll(async () => {
  await service[Symbol.asyncDispose]()
  await rm(folder, { recursive: true, force: true })
})

let count = 0

/** Runs a task file that begins as those for Practicus AI do. */
async function runTask(code: string, worker_config: object = {}) {
  count += 1
  const name = `task${count}`
  await writeFile(join(tasks, `${name}.py`), `import practicuscore as prt\n${code}\n`)
  const answer = await fetch(`${service.url}/task-runner/`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: `Bearer ${service.token}` },
    body: JSON.stringify({ task_id: name, task_file_name: `${name}.py`, worker_config }),
  })
  expect(answer.status, await answer.text()).toBe(200)
  await expect
    .poll(async () => (await service.task(name)).finished_at, { timeout: 30_000 })
    .not.toBeNull()
  const headers = { authorization: `Bearer ${service.token}` }
  const log = await fetch(`${service.url}/tasks/${name}/logs`, { headers })
  return { task: await service.task(name), log: await log.text() }
}

test('the logger writes to the log, as verbose as log_level says', async () => {
  const code = 'prt.logger.info("a line")\nprt.logger.debug("a detail")'
  const plain = await runTask(code)
  expect(plain).toMatchObject({ task: { status: 'succeeded' } })
  expect(plain.log).toMatch(/ INFO a line\n$/)
  expect((await runTask(code, { log_level: 'DEBUG' })).log).toMatch(
    /INFO a line\n.* DEBUG a detail\n/,
  )
  expect((await runTask(code, { log_level: 'LOUD' })).log).toMatch(/INFO a line\n$/)
})

test('the vault has the secrets that the worker_config names', async () => {
  const code = 'value, age = prt.vault.get_secret("API-KEY")\nprint(len(value), age)'
  const { log } = await runTask(code, { personal_secrets: ['API-KEY'] })
  expect(log).toMatch(new RegExp(`\n${SECRET.length} 0\n$`))
  const without = await runTask(code)
  expect(without.task).toMatchObject({ status: 'failed', exit_code: 1 })
  expect(without.log).toContain(
    "the secret 'API-KEY' is not on this worker: name it in personal_secrets",
  )
})

test('a model is deployed into the repository, and its URLs are returned', async () => {
  const repository = join(folder, 'repository')
  await mkdir(repository)
  const code = `
import os
os.mkdir("model")
open("model/weights", "w").write("1")
print(prt.models.deploy(deployment_key="depl", prefix="models", model_name="mine", model_dir="model"))`
  const { task, log } = await runTask(code, { env_variables: { MODEL_REPOSITORY: repository } })
  expect(task, log).toMatchObject({ status: 'succeeded' })
  expect(log).toContain('published version 1: 1 files, 1 bytes\n')
  const api = 'http://127.0.0.1:8000/depl/models/mine/'
  expect(log).toContain(`('${api}', '${api}1/', '${api}1/metadata.json')\n`)
  const refused = await runTask('prt.models.deploy("depl", "models", "mine")')
  expect(refused.task).toMatchObject({ status: 'failed' })
  expect(refused.log).toContain('RuntimeError: cannot deploy: set MODEL_REPOSITORY')
})

test('a notebook runs with papermill, or says that it needs it', async () => {
  const code = 'print(prt.notebooks.execute_notebook("report", parameters={"a": 1}))'
  const without = await runTask(code)
  expect(without.log).toContain('notebooks need papermill')
  // Another package of that name, which keeps what it is given.
  await writeFile(
    join(tasks, 'papermill.py'),
    `class PapermillExecutionError(Exception): pass
def execute_notebook(*arguments, **named):
    print(arguments, named["parameters"])
    if "fails" in arguments[0]: raise PapermillExecutionError("cell 3")`,
  )
  const { log } = await runTask(
    `${code}\nprint(prt.notebooks.execute_notebook("fails.ipynb"))\nprt.notebooks.execute_notebook("fails", raise_on_failure=True)`,
  )
  await rm(join(tasks, 'papermill.py'))
  expect(log).toContain("('report.ipynb', 'report_output.ipynb') {'a': 1}\n")
  expect(log).toMatch(/True\n.*False\n/s)
  expect(log).toContain('PapermillExecutionError: cell 3')
})

test.each(['run_task', 'models.list', 'vault.create_or_update_secret', 'workflows'])(
  '%s says that it is not here',
  async (name) => {
    const { task, log } = await runTask(`prt.${name}("a")`)
    expect(task).toMatchObject({ status: 'failed' })
    expect(log).toContain(`practicuscore.${name} is not here: this is the task runner's stand-in`)
  },
)

test('where the SDK is installed, the stand-in steps aside', async () => {
  const site = join(folder, 'site')
  await mkdir(join(site, 'practicuscore'), { recursive: true })
  await writeFile(join(site, 'practicuscore/__init__.py'), 'from . import part\n')
  await writeFile(join(site, 'practicuscore/part.py'), 'import practicuscore\nname = "real"\n')
  const { log } = await runTask('print(prt.part.name, prt.__file__)', {
    env_variables: { PYTHONPATH: `practicus_standin:${site}` },
  })
  expect(log).toContain(`\nreal ${site}/practicuscore/__init__.py\n`)
})
