import { readFile } from 'node:fs/promises'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { STATUS_OF } from '../src/routes/error-handler.ts'
import { startApp, type TestApp, taskRequest } from './helpers/app.ts'
import { startReceiver } from './helpers/receiver.ts'

interface Schema {
  $ref?: string
  type?: string | string[]
  format?: string
  enum?: string[]
  pattern?: string
  minimum?: number
  maximum?: number
  anyOf?: Schema[]
  examples?: unknown[]
  required?: string[]
  properties?: Record<string, Schema>
  additionalProperties?: boolean | Schema
}
interface Content {
  content?: Record<string, { schema: Schema }>
}
interface Operation {
  summary?: string
  operationId?: string
  security?: unknown[]
  parameters?: Array<{ name: string; in: string; required?: boolean; schema: Schema }>
  requestBody?: Content & { required?: boolean }
  responses: Record<string, Content & { description: string }>
  callbacks?: Record<string, Record<string, Record<string, Operation>>>
}
interface Document {
  paths: Record<string, Record<string, Operation>>
  components: { schemas: Record<string, Schema>; securitySchemes?: object }
  security?: unknown[]
}

let app: TestApp
let document: Document

beforeAll(async () => {
  app = await startApp({ TASKS_DIR: new URL('../tasks', import.meta.url).pathname })
  document = await documentOf({ API_TOKENS: 'a-token' })
})
afterAll(() => app[Symbol.asyncDispose]())

async function documentOf(env: Record<string, string>): Promise<Document> {
  await using other = await startApp(env)
  return (await other.get('/openapi.json')).body as unknown as Document
}

const operations = () =>
  Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({
      name: `${method} ${path}`,
      ...operation,
    })),
  )

const component = (name: string) => {
  const schema = document.components.schemas[name]
  if (schema === undefined) throw new Error(`there is no component ${name}`)
  return schema
}
const refTo = (name: string) => ({ $ref: `#/components/schemas/${name}` })

/** Every schema of the document, with where it is. */
function schemas(): Array<{ at: string; schema: Schema }> {
  const found: Array<{ at: string; schema: Schema }> = []
  const visit = (node: unknown, at: string) => {
    if (node === null || typeof node !== 'object' || /\/examples?$/.test(at)) return
    found.push({ at, schema: node })
    for (const [name, child] of Object.entries(node)) visit(child, `${at}/${name}`)
  }
  visit(document.paths, 'paths')
  visit(document.components, 'components')
  return found
}

test('openapi/openapi.json is what the routes say; `npm run openapi` renews it', async () => {
  const committed = await readFile(new URL('../openapi/openapi.json', import.meta.url), 'utf8')
  expect(document).toEqual(JSON.parse(committed))
})

test('/docs/json is the same document as /openapi.json, with a server relative to itself', async () => {
  const { body } = await app.get('/openapi.json')
  expect((await app.get('/docs/json')).body).toEqual({ ...body, servers: [{ url: '..' }] })
})

test('every operation has a summary, an id of its own, and says what each answer means', () => {
  const all = operations()
  expect(all.length).toBeGreaterThan(15)
  // oapi-codegen calls what an operation answers by its name and "Response".
  const answers = all.map(({ operationId = '' }) => `${operationId}Response`.toLowerCase())
  const components = Object.keys(document.components.schemas).map((name) => name.toLowerCase())
  expect(answers.filter((name) => components.includes(name))).toEqual([])
  expect(new Set(all.map(({ operationId }) => operationId)).size).toBe(all.length)
  for (const { name, summary, responses } of all) {
    expect(summary, name).toMatch(/\w/)
    for (const [status, { description }] of Object.entries(responses)) {
      expect(description, `${name} ${status}`).not.toMatch(/^(Default Response)?$/)
    }
  }
})

test('component names are plain, and each object has an example', () => {
  for (const [name, { type, examples }] of Object.entries(document.components.schemas)) {
    expect(name).not.toMatch(/Input$|\d/)
    if (type === 'object') expect(examples, name).toHaveLength(1)
  }
})

test('the names of the old app are there', () => {
  for (const name of [
    ...['TaskRunnerRequest', 'TaskRunnerResponse', 'WorkerConfig', 'ImageConfig', 'GitConfig'],
    ...['TaskRunnerCallbackRequest', 'TaskRunnerCallbackResponse'],
  ]) {
    expect(component(name).type).toBe('object')
  }
})

test('requests are closed, answers and the callback are open to new fields', () => {
  const closed = schemas().filter(({ schema }) => schema.additionalProperties === false)
  expect(closed.map(({ at }) => at).sort()).toEqual(
    ['CleanupRequest', 'GitConfig', 'SignInRequest', 'TaskRunnerRequest', 'WorkerConfig'].map(
      (name) => `components/schemas/${name}`,
    ),
  )
})

test('each list of names is a component, once, and everything refers to it', () => {
  const lists = schemas().filter(({ schema }) => Array.isArray(schema.enum))
  expect(lists.map(({ at }) => at).sort()).toEqual(
    [
      ...['CallbackStatus', 'NetworkProtocol', 'PullPolicy', 'ServiceType', 'TaskReason'],
      ...['TaskStatus', 'WorkerStatus'],
    ].map((name) => `components/schemas/${name}`),
  )
  const { properties } = component('Task')
  expect(properties?.status).toMatchObject(refTo('TaskStatus'))
  expect(properties?.reason?.anyOf).toEqual([refTo('TaskReason'), { type: 'null' }])
  expect(properties?.callback_status).toMatchObject(refTo('CallbackStatus'))
  const filter = document.paths['/tasks']?.get?.parameters
  expect(filter?.find(({ name }) => name === 'status')?.schema).toEqual(refTo('TaskStatus'))
})

test('an object that may be null or lies in a list is a component', () => {
  const nameless = schemas().filter(
    ({ at, schema }) => /\/(anyOf\/\d|items)$/.test(at) && schema.type === 'object',
  )
  expect(nameless.map(({ at }) => at)).toEqual([])
})

test('numbers say how large they can be, and nothing of JavaScript', () => {
  const numbers = schemas().filter(({ schema }) => /^(integer|number)$/.test(String(schema.type)))
  expect(numbers.length).toBeGreaterThan(10)
  for (const { at, schema } of numbers) {
    const formats = schema.type === 'number' ? ['double'] : ['int32', 'int64']
    expect(formats, at).toContain(schema.format)
  }
  expect(component('TaskRunnerRequest').properties?.priority?.anyOf?.[0]?.format).toBe('int32')
  expect(JSON.stringify(document)).not.toContain(String(Number.MAX_SAFE_INTEGER))
})

test('nothing of the schema library is in it', () => {
  const names = new Set(schemas().flatMap(({ schema }) => Object.keys(schema)))
  for (const name of ['~standard', '$schema', '$id', '$defs', 'def', '_zod']) {
    expect(names).not.toContain(name)
  }
  const times = schemas().filter(({ schema }) => schema.format === 'date-time')
  expect(times.filter(({ schema }) => schema.pattern !== undefined)).toEqual([])
})

test.each([
  ['task_id', ['a', 'None', '...', '.a', 'a/../b', 'ü 🚀'], ['', '.', '..', 'a\nb', '\u0085']],
  [
    'task_file_name',
    ['a.sh', '.sh', '..a.py', '.../b.ts', 'a b/c-1.cjs', 'ü/ñ.mjs'],
    ['', 'a.txt', '/a.sh', './a.sh', 'a/../b.sh', 'a//b.sh', 'a\\b.sh', 'a.sh/', 'a\n.sh', 'sh'],
  ],
])('the pattern of %s is the rule itself', async (field, good, bad) => {
  const { pattern = '' } = component('TaskRunnerRequest').properties?.[field] ?? {}
  for (const value of [...good, ...bad]) {
    const request = { task_id: 'a', task_file_name: 'a.sh', worker_config: {}, [field]: value }
    const { body } = await app.submit({ ...request, priority: 10 })
    const paths = (body.errors as Array<{ path: string }>).map(({ path }) => path)
    const isTaken = !paths.includes(field)
    expect([value, isTaken]).toEqual([value, good.includes(value)])
    expect([value, new RegExp(pattern).test(value) && value !== '']).toEqual([value, isTaken])
  }
})

test('a cursor and the name of a worker have patterns', () => {
  for (const [path, name, value] of [
    ['/tasks', 'cursor', 'before-17'],
    ['/workers/{name}', 'name', 'task-a-0123'],
  ] as const) {
    const parameter = document.paths[path]?.get?.parameters?.find((one) => one.name === name)
    const pattern = new RegExp(parameter?.schema.pattern ?? '^$')
    expect([pattern.test(value), pattern.test('A b')]).toEqual([true, false])
  }
})

test('a token is wanted where it is, and only by a service that has tokens', async () => {
  expect(document.security).toEqual([{ bearer: [] }])
  const open = operations().filter(({ security }) => security !== undefined)
  expect(open.map(({ name, security }) => [name, security])).toEqual(
    [
      ...['get /health/live', 'get /health/ready', 'get /session', 'post /session'],
      ...['delete /session', 'post /sample-task-runner-callback', 'post /task-runner-callback'],
      'post /sample-task-runner-callback2',
    ].map((name) => [name, []]),
  )
  const without = await documentOf({})
  expect(JSON.stringify(without)).not.toMatch(/"security(Schemes)?"/)
  expect(Object.keys(without.paths)).toEqual(Object.keys(document.paths))
})

test('a body that may be left out is said to be optional', () => {
  const optional = operations().filter(({ requestBody }) => requestBody?.required === false)
  expect(optional.map(({ name }) => name)).toEqual(['post /workers/cleanup'])
  expect(optional[0]?.requestBody?.content?.['application/json']?.schema).toEqual(
    refTo('CleanupRequest'),
  )
})

test('follow is a boolean, and the events of the stream are typed', () => {
  const operation = document.paths['/tasks/{task_id}/logs']?.get
  const follow = operation?.parameters?.find(({ name }) => name === 'follow')
  expect(follow?.schema).toEqual({ type: 'boolean' })
  const content = operation?.responses['200']?.content ?? {}
  expect(content['text/plain']?.schema).toEqual({ type: 'string' })
  expect(content['text/event-stream']?.schema).toEqual({
    anyOf: [refTo('LogPieceEvent'), refTo('LogEndEvent')],
  })
  expect(component('LogEndEvent').properties?.data).toMatchObject({
    type: 'string',
    contentMediaType: 'application/json',
    contentSchema: refTo('LogEnd'),
  })
})

test('errors have a code, which may be one that a client does not know', () => {
  const { required, properties } = component('ErrorResponse')
  expect(required).toEqual(['success', 'code', 'message'])
  expect(properties?.code).toMatchObject({ type: 'string' })
  expect(properties?.code?.examples?.toSorted()).toEqual(Object.keys(STATUS_OF).sort())
  expect(properties?.code).not.toHaveProperty('enum')
})

test('the callback of a task is described as it is sent', async () => {
  const callback = document.paths['/task-runner']?.post?.callbacks?.outcome
  const operation = callback?.['{$request.body#/callback_url}']?.post
  // It brings a token of its own, or none.
  expect(operation?.security).toEqual([])
  expect(operation?.requestBody).toMatchObject({
    required: true,
    content: { 'application/json': { schema: refTo('TaskRunnerCallbackRequest') } },
  })
  await using receiver = await startReceiver()
  await using signing = await startApp({
    CALLBACK_SIGNING_SECRETS: `whsec_${btoa('x'.repeat(32))}`,
  })
  const { headers: plain } = await received(app, {}, {})
  const { headers: all } = await received(
    signing,
    { callback_url_token: 'a-token' },
    { traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01' },
  )
  const ofHttp = ['host', 'connection', 'user-agent', 'content-type', 'content-length']
  const sent = (headers: object) => Object.keys(headers).filter((name) => !ofHttp.includes(name))
  const told = operation?.parameters ?? []
  expect(told.map(({ name }) => name).sort()).toEqual(sent(all).sort())
  // A task that never ran has less to tell.
  const ofRun = ['task-reason', 'task-exit-code', 'task-duration-ms']
  expect(told.filter(({ required }) => required).map(({ name }) => name)).toEqual(
    sent(plain).filter((name) => !ofRun.includes(name)),
  )

  async function received(service: TestApp, fields: object, headers: Record<string, string>) {
    const request = taskRequest({
      ...fields,
      callback_url: receiver.url,
      task_file_name: 'hello.py',
    })
    const payload = service === app ? request : { ...request, task_file_name: 'echo.sh' }
    await service.http.inject({ method: 'POST', url: '/task-runner', headers, payload })
    return receiver.callbackOf(request.task_id)
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
  const [example] = component('TaskRunnerRequest').examples ?? []
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
