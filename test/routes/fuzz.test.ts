import fc from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'

let app: TestApp

beforeAll(async () => {
  app = await startApp({ SAMPLE_CALLBACKS: 'true' })
})

afterAll(async () => {
  await app[Symbol.asyncDispose]()
})

/** Text with what parsers, shells, paths and terminals stumble over. */
const nasty = fc.oneof(
  fc.string({ unit: 'binary', maxLength: 20 }),
  fc.string({ unit: 'grapheme', maxLength: 20 }),
  fc.constantFrom(
    ...['', ' ', '\0', '\n', '\r\n', '..', '../..', '/', '//', '%', '%00', '%2e%2e', '__proto__'],
    ...['constructor', 'null', 'None', '-1', '1e999', '$(id)', '`id`', "'", '"', '\\', '\ud800'],
    ...['x'.repeat(300), 'x'.repeat(70_000), `${'x'.repeat(300)}.sh`, '🚀'.repeat(200)],
  ),
)
const anyJson = fc.oneof(
  fc.jsonValue({ maxDepth: 4 }),
  nasty,
  fc.constantFrom(null, true, 0, -1, 1.5, 1e21, 2 ** 53, [], {}, [[]], { a: { b: [null] } }),
)

const base64 = anyJson.map((value) => Buffer.from(JSON.stringify(value) ?? '').toString('base64'))
const workerConfig = fc.record(
  {
    worker_image: fc.oneof(fc.constantFrom('minimal', null), anyJson),
    worker_size: fc.oneof(fc.constantFrom('Small', 'x-LARGE', null), anyJson),
    env_variables: fc.oneof(
      fc.dictionary(
        fc.constantFrom('A', 'B', 'PATHS', 'code'),
        fc.oneof(nasty, fc.double(), fc.boolean()),
      ),
      fc.dictionary(nasty, anyJson),
    ),
    log_level: fc.oneof(fc.constantFrom('INFO', null), anyJson),
    modules_log_level: anyJson,
    image_config: anyJson,
    interactive: fc.oneof(fc.boolean(), anyJson),
    refresh_token: nasty,
    git_configs: fc.oneof(fc.constantFrom([], null), anyJson),
    personal_secrets: fc.oneof(fc.constantFrom([], null), anyJson),
    additional_params: fc.oneof(base64, nasty),
    distributed_config: fc.oneof(fc.constant(null), anyJson),
  },
  { requiredKeys: [] },
)

let ids = 0
/** Valid but for what is mutated; what starts is a script of one line. */
const nearValid = fc
  .tuple(
    fc.record(
      {
        task_id: fc.oneof(
          { weight: 3, arbitrary: fc.constant(null).map(() => `fuzz-${process.pid}-${ids++}`) },
          { weight: 1, arbitrary: nasty },
        ),
        task_file_name: fc.oneof(
          { weight: 3, arbitrary: fc.constant('echo.sh') },
          { weight: 1, arbitrary: nasty.map((text) => `${text}.sh`) },
          { weight: 1, arbitrary: anyJson },
        ),
        worker_config: fc.oneof(
          { weight: 3, arbitrary: workerConfig },
          { weight: 1, arbitrary: anyJson },
        ),
        callback_url: fc.oneof(fc.constantFrom(null, 'http://127.0.0.1:1/'), nasty),
        callback_url_token: fc.oneof(fc.constant(null), nasty),
        terminate_on_completion: fc.oneof(
          fc.constantFrom(true, null),
          fc.constantFrom(1, 'no', {}),
        ),
        timeout_seconds: fc.oneof(fc.constantFrom(60, null), anyJson),
      },
      { requiredKeys: ['task_id', 'task_file_name', 'worker_config'] },
    ),
    fc.oneof(
      { weight: 4, arbitrary: fc.constant({}) },
      { weight: 1, arbitrary: fc.dictionary(nasty, anyJson) },
    ),
  )
  .map(([request, extra]) => JSON.stringify({ ...extra, ...request }))

const callback = fc
  .record(
    { task_name: anyJson, task_id: anyJson, success: fc.boolean(), logs: nasty, more: anyJson },
    { requiredKeys: [] },
  )
  .map((body) => JSON.stringify(body))

const garbage = fc.oneof(
  fc.string({ unit: 'binary' }),
  anyJson.map((value) => JSON.stringify(value) ?? ''),
  anyJson.map((value) => (JSON.stringify(value) ?? '').slice(0, -1)),
  fc.constantFrom('', ' ', '{', '[', '"', 'null', '{"a":1,}', '{"__proto__":1}', '\ufeff{}', '\0'),
)

const contentType = fc.oneof(
  { weight: 6, arbitrary: fc.constant('application/json') },
  {
    weight: 1,
    arbitrary: fc.constantFrom(
      ...[
        'text/plain',
        'application/xml',
        'application/x-www-form-urlencoded',
        'nonsense',
        ';',
        '/',
      ],
      ...[
        'application/json; charset=utf-16',
        'application/json;;',
        'multipart/form-data',
        undefined,
      ],
    ),
  },
)

const segment = fc.oneof(
  nasty.filter((text) => text.isWellFormed()).map(encodeURIComponent),
  fc.constantFrom('nobody', '%', '%E0%A4%A', '%00', '..', '%2F', '*', ':task_id', 'x'.repeat(5000)),
)
const query = fc.oneof(
  fc.constant(''),
  fc
    .dictionary(
      fc.constantFrom(
        'status',
        'limit',
        'cursor',
        'task_file_name',
        'tail_mb',
        'follow',
        '__proto__',
      ),
      fc.oneof(nasty, fc.constantFrom('failed', '10', '1', 'true', 'YmVmb3JlOjE')),
      { maxKeys: 3 },
    )
    .map((fields) => {
      const parts = Object.entries(fields)
        .filter(([, value]) => value.isWellFormed() && value.length < 1000)
        .map(([name, value]) => `${name}=${encodeURIComponent(value)}`)
      return `?${parts.join('&')}`
    }),
  fc.constantFrom(
    '?',
    '?&&',
    '?=',
    '?limit',
    '?limit[]=1',
    '?limit=1&limit=2',
    '?%',
    '?%E0%A4%A=1',
  ),
)

const posted = fc.record({
  method: fc.constant('POST' as const),
  path: fc.oneof(
    { weight: 5, arbitrary: fc.constantFrom('/task-runner', '/task-runner/') },
    { weight: 1, arbitrary: fc.constant('/workers/cleanup') },
    {
      weight: 1,
      arbitrary: fc.constantFrom('/sample-task-runner-callback', '/sample-task-runner-callback2'),
    },
    { weight: 1, arbitrary: segment.map((id) => `/tasks/${id}/cancel`) },
    { weight: 1, arbitrary: segment.map((id) => `/tasks/${id}/callback/redeliver`) },
  ),
  payload: fc.oneof(
    { weight: 4, arbitrary: nearValid },
    { weight: 2, arbitrary: garbage },
    { weight: 1, arbitrary: callback },
  ),
  type: contentType,
})
const fetched = fc.record({
  method: fc.constantFrom(
    'GET' as const,
    'GET' as const,
    'HEAD' as const,
    'DELETE' as const,
    'PUT' as const,
  ),
  path: fc.oneof(
    fc.constantFrom('/tasks', '/workers', '/health/live', '/health/ready', '/docs/json', '/', '//'),
    segment.map((id) => `/tasks/${id}`),
    segment.map((id) => `/tasks/${id}/logs`),
    segment.map((id) => `/tasks/${id}/callback`),
    segment.map((name) => `/workers/${name}`),
    segment.map((name) => `/workers/${name}/logs`),
    segment.map((anything) => `/${anything}`),
  ),
  payload: fc.constant(undefined),
  type: fc.constant(undefined),
})

test('whatever is sent to any route is answered with 2xx or 4xx in the one shape, and work goes on', async () => {
  const answered = new Set<number>()
  await fc.assert(
    fc.asyncProperty(
      fc.oneof({ weight: 3, arbitrary: posted }, { weight: 1, arbitrary: fetched }),
      query,
      async ({ method, path, payload, type }, search) => {
        const reply = await app.http.inject({
          method,
          url: method === 'POST' ? path : path + search,
          ...(type === undefined ? {} : { headers: { 'content-type': type } }),
          ...(payload === undefined ? {} : { payload }),
        })
        answered.add(reply.statusCode)
        const isGood = reply.statusCode >= 200 && reply.statusCode < 400
        const isRefusal = reply.statusCode >= 400 && reply.statusCode < 500
        expect({ status: reply.statusCode, isAnswered: isGood || isRefusal }).toMatchObject({
          isAnswered: true,
        })
        if (!isRefusal || method === 'HEAD') return
        const { errors, ...rest } = reply.json() as Record<string, unknown>
        expect(rest).toEqual({
          success: false,
          code: expect.stringMatching(/^[a-z_]+$/),
          message: expect.stringMatching(/./),
        })
        for (const error of (errors ?? []) as unknown[]) {
          expect(error).toEqual({
            path: expect.any(String),
            message: expect.stringMatching(/./),
          })
        }
      },
    ),
    { numRuns: 300, interruptAfterTimeLimit: 20_000, markInterruptAsFailure: false },
  )
  expect([...answered]).toEqual(expect.arrayContaining([200, 404, 422]))

  const request = taskRequest()
  await app.submit(request)
  expect(await app.finished(request.task_id)).toMatchObject({ status: 'succeeded' })
  expect((await app.get('/health/ready')).status).toBe(200)
})
