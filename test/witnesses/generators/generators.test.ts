/** Clients made from the running service's document: each compiles, and runs a task. */
import { cp, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { type Stage, startStage } from '../../helpers/recovery.ts'
import type { Service } from '../../helpers/service.ts'
import { installed, outputOf } from '../clients.ts'

const TOKEN = 'token-of-the-test'
const TASKS = new URL('../../../tasks', import.meta.url).pathname
const GO_ENV = { GOFLAGS: '-mod=mod', GOPROXY: 'off' }

let stage: Stage
let service: Service
let folder: string
let document: string

beforeAll(async () => {
  stage = await startStage({ env: { TASKS_DIR: TASKS, API_TOKENS: TOKEN } })
  service = await stage.start()
  folder = await mkdtemp(join(tmpdir(), 'task-runner-generators-'))
  document = join(folder, 'openapi.json')
  await writeFile(document, await (await fetch(`${service.url}/openapi.json`)).text())
})

afterAll(async () => {
  await stage?.[Symbol.asyncDispose]()
  if (folder) await rm(folder, { recursive: true })
})

/** Copies the programs of a language beside its installed generator, and returns where they are. */
async function workshop(language: 'python' | 'typescript' | 'go'): Promise<string> {
  const to = join(folder, language)
  await cp(installed(`generators/${language}`), to, {
    recursive: true,
    // Large, and found by its path.
    filter: (path) => !path.endsWith('/venv'),
    verbatimSymlinks: true,
  })
  await cp(new URL(language, import.meta.url).pathname, to, { recursive: true })
  return to
}

const outcome = (second: string, who: string) => ({
  message: 'Started Task successfully',
  status: 'succeeded',
  exit_code: 0,
  log: `MY_FIRST_PARAM=from ${who}\nMY_SECOND_PARAM=${second}\n`,
  refused: [404, 'task_file_not_found'],
})

test('openapi-python-client', async () => {
  const cwd = await workshop('python')
  const bin = installed('generators/python/venv/bin')
  // It formats what it made with ruff, which is in its own environment.
  const env = { PATH: `${bin}:${process.env.PATH}` }
  await outputOf(
    join(bin, 'openapi-python-client'),
    ['generate', '--path', document, '--meta', 'none', '--output-path', 'generated'],
    { cwd, env },
  )
  const said = await outputOf(join(bin, 'python'), ['run_task.py', service.url, TOKEN], { cwd })
  expect(JSON.parse(said)).toEqual(outcome('123', 'Python'))
})

test('datamodel-code-generator: its models read a callback and a task, with fields of tomorrow', async () => {
  const cwd = await workshop('python')
  const bin = installed('generators/python/venv/bin')
  await outputOf(
    join(bin, 'datamodel-codegen'),
    [
      ...['--input', document, '--input-file-type', 'openapi', '--output', 'models.py'],
      ...['--output-model-type', 'pydantic_v2.BaseModel'],
    ],
    { cwd },
  )
  const taskId = 'models'
  const headers = { authorization: `Bearer ${TOKEN}`, 'content-type': 'application/json' }
  const request = { ...stage.request(taskId, 'hello.py'), worker_config: {} }
  await fetch(`${service.url}/task-runner`, {
    method: 'POST',
    headers,
    body: JSON.stringify(request),
  })
  const { body: callback } = await stage.callbackOf(taskId)
  const task = await (await fetch(`${service.url}/tasks/${taskId}`, { headers })).json()
  const input = JSON.stringify({ callback, task })
  const said = JSON.parse(await outputOf(join(bin, 'python'), ['read_models.py'], { cwd, input }))
  expect(said).toEqual({ task_id: taskId, finished: expect.any(String) })
  expect(new Date(said.finished)).toEqual(new Date(Object(task).finished_at))
})

test('openapi-typescript', async () => {
  const cwd = await workshop('typescript')
  const run = (args: string[]) => outputOf(process.execPath, args, { cwd })
  await run(['node_modules/openapi-typescript/bin/cli.js', document, '--output', 'api.d.ts'])
  await run(['node_modules/typescript/bin/tsc'])
  const said = await run(['run-task.js', service.url, TOKEN])
  expect(JSON.parse(said)).toEqual(outcome('123', 'TypeScript'))
})

test('oapi-codegen', async () => {
  const cwd = await workshop('go')
  const go = (args: string[]) => outputOf('go', args, { cwd, env: GO_ENV })
  const client = await go([
    ...['tool', 'oapi-codegen', '-generate', 'types,client', '-package', 'main', document],
  ])
  await writeFile(join(cwd, 'client.go'), client)
  await go(['build', '-o', 'run-task', '.'])
  const said = await outputOf(join(cwd, 'run-task'), [service.url, TOKEN])
  expect(JSON.parse(said)).toEqual(outcome('16777217', 'Go'))
})
