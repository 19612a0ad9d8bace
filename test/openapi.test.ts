import { readFile } from 'node:fs/promises'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { STATUS_OF } from '../src/routes/error-handler.ts'
import { startApp, type TestApp } from './helpers/app.ts'

interface Operation {
  summary?: string
  operationId?: string
  responses: Record<string, { description: string }>
  requestBody?: { content: { 'application/json': { schema: { $ref?: string } } } }
}
interface Document {
  paths: Record<string, Record<string, Operation>>
  components: { schemas: Record<string, { examples?: unknown[] }> }
}

let app: TestApp
let document: Document

beforeAll(async () => {
  app = await startApp({ TASKS_DIR: new URL('../tasks', import.meta.url).pathname })
  document = (await app.get('/docs/json')).body as unknown as Document
})
afterAll(() => app[Symbol.asyncDispose]())

const operations = () =>
  Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({
      name: `${method} ${path}`,
      ...operation,
    })),
  )

test('openapi/openapi.json is what the routes say; `npm run openapi` renews it', async () => {
  const committed = await readFile(new URL('../openapi/openapi.json', import.meta.url), 'utf8')
  expect(document).toEqual(JSON.parse(committed))
})

test('/openapi.json is the same document as /docs/json', async () => {
  expect((await app.get('/openapi.json')).body).toEqual(document)
})

test('every operation has a summary, an id of its own, and says what each answer means', () => {
  const all = operations()
  expect(all.length).toBeGreaterThan(15)
  expect(new Set(all.map(({ operationId }) => operationId)).size).toBe(all.length)
  for (const { name, summary, responses } of all) {
    expect(summary, name).toMatch(/\w/)
    for (const [status, { description }] of Object.entries(responses)) {
      expect(description, `${name} ${status}`).not.toMatch(/^(Default Response)?$/)
    }
  }
})

test('component names are plain, and each has an example', () => {
  for (const [name, schema] of Object.entries(document.components.schemas)) {
    expect(name).not.toMatch(/Input$/)
    if (name !== 'GitConfig') expect(schema.examples, name).toHaveLength(1)
  }
})

test('the status of every error code is declared by some operation', () => {
  const declared = new Set(operations().flatMap(({ responses }) => Object.keys(responses)))
  const beforeAnyRoute = [
    ...['bad_request', 'host_refused', 'site_refused', 'method_not_allowed', 'request_timeout'],
    ...['expectation_failed', 'headers_too_large'],
  ]
  for (const [code, status] of Object.entries(STATUS_OF)) {
    if (!beforeAnyRoute.includes(code)) expect(declared, code).toContain(String(status))
  }
})

test('the example of "Run a task" runs as it is against the sample tasks', async () => {
  const [example] = document.components.schemas.TaskRunnerRequest?.examples ?? []
  const { status, body } = await app.submit(example as object)
  expect(status, JSON.stringify(body)).toBe(200)
  expect(await app.finished(String(body.task_id))).toMatchObject({ status: 'succeeded' })
  expect(await app.text(`/tasks/${body.task_id}/logs`)).toBe(
    'MY_FIRST_PARAM=VALUE1\nMY_SECOND_PARAM=123\n',
  )
})

test('the sample tasks end as their names say', async () => {
  const outcomes = { 'hello.py': 'succeeded', 'hello.ts': 'succeeded', 'failing.py': 'failed' }
  for (const [file, status] of Object.entries(outcomes)) {
    await app.submit({ task_id: file, task_file_name: file, worker_config: {} })
    expect(await app.finished(file)).toMatchObject({ status })
  }
  expect(await app.text('/tasks/hello.py/logs')).toContain('Hello from Python')
  expect(await app.text('/tasks/hello.ts/logs')).toContain('Hello from Node')
  expect(await app.text('/tasks/failing.py/logs')).toMatch(/Traceback.*ZeroDivisionError/s)
})
