import type http from 'node:http'
import { describe, expect, test } from 'vitest'
import { startFakeKubernetes } from '../fakes/kubernetes/server.ts'
import {
  dockerEnv,
  type Intercept,
  refuse,
  startEngineProxy,
  whyNoDocker,
} from '../helpers/docker.ts'
import { eventually, finalTask, get, logOf, type Stage, startStage } from '../helpers/recovery.ts'
import type { Service } from '../helpers/service.ts'

const TASKS = 20
const TIMEOUT_MS = 180_000
const skipped = await whyNoDocker()

const ids = Array.from({ length: TASKS }, (_, index) => `waiting-${index}`)

/**
 * Brings a trouble over a service with one running and many waiting tasks: none ends by it, all say what they wait for, and
 * all have their true outcome once it has passed.
 */
async function expectOutlasted(
  stage: Stage,
  service: Service,
  trouble: { begin: () => Promise<void> | void; end: () => Promise<void> | void },
): Promise<void> {
  const script = 'echo begun; sleep 2; echo over; exit 7'
  const { body: accepted } = await submit(stage, service, 'running', script)
  expect(accepted).toMatchObject({ success: true })
  await eventually(async () =>
    expect((await get(service, '/tasks/running')).body.status).toBe('running'),
  )
  await trouble.begin()
  for (const taskId of ids) await submit(stage, service, taskId, 'echo hi')
  await eventually(async () => {
    const { body } = await get(service, `/tasks/${ids[0]}`)
    expect(body.waiting_for).toEqual(expect.any(String))
  })
  // Others are not even begun.
  await eventually(async () => {
    const { body } = await get(service, `/tasks/${ids.at(-1)}`)
    expect(body).toMatchObject({ status: 'queued', waiting_for: expect.any(String) })
  })
  const { body: list } = await get(service, '/tasks?limit=100')
  for (const { status } of list.tasks as Array<{ status: string }>) {
    expect(['queued', 'provisioning', 'running']).toContain(status)
  }
  await trouble.end()
  expect(await finalTask(service, 'running')).toMatchObject({ reason: 'exit_code', exit_code: 7 })
  expect(await logOf(service, 'running')).toBe('begun\nover\n')
  await eventually(async () => {
    const { body } = await get(service, '/tasks?status=succeeded&limit=100')
    expect(body.tasks).toHaveLength(TASKS)
  }, TIMEOUT_MS / 2)
  for (const taskId of [ids[0], ids.at(-1)]) {
    expect((await get(service, `/tasks/${taskId}`)).body.waiting_for).toBeNull()
  }
  await eventually(async () =>
    expect((await get(service, '/workers')).body).toEqual({ workers: [] }),
  )
}

function submit(stage: Stage, service: Service, taskId: string, script: string) {
  return fetch(`${service.url}/task-runner`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(stage.request(taskId, 'w-eval.sh', { env: { SCRIPT: script } })),
  }).then(async (answer) => ({ status: answer.status, body: Object(await answer.json()) }))
}

const isCreate = ({ url = '' }: http.IncomingMessage) => url.includes('/containers/create')

const ENGINE_TROUBLES: Record<string, Intercept> = {
  'does not answer': (_, response) => {
    response.destroy()
    return true
  },
  'answers garbage': (_, response) => {
    response.end('<html>Welcome!</html>')
    return true
  },
  'answers null': (_, response) => {
    response.setHeader('content-type', 'application/json').end('null')
    return true
  },
  fails: (_, response) => {
    refuse(response, 500, 'something went wrong')
    return true
  },
  'lets nobody in': (_, response) => {
    refuse(response, 403, 'forbidden')
    return true
  },
  'has too many requests': (_, response) => {
    refuse(response, 429, 'too many requests')
    return true
  },
  'has a full disk': (request, response) => {
    if (isCreate(request)) refuse(response, 500, 'mkdir /var/lib: no space left on device')
    return isCreate(request)
  },
}

if (skipped) test.skip(`waiting for a Docker engine: ${skipped}`, () => {})
else
  describe('tasks outlast a Docker engine that', () => {
    test.each(Object.keys(ENGINE_TROUBLES))(
      '%s',
      async (name) => {
        let isOn = false
        const trouble = ENGINE_TROUBLES[name]
        await using proxy = await startEngineProxy((...given) =>
          isOn ? (trouble?.(...given) ?? false) : false,
        )
        const env = {
          ...dockerEnv(),
          DOCKER_HOST: `unix://${proxy.socketPath}`,
          MAX_CONCURRENT_TASKS: '4',
        }
        await using stage = await startStage({ env })
        const service = await stage.start()
        await expectOutlasted(stage, service, {
          begin() {
            isOn = true
            proxy.cut()
          },
          end() {
            isOn = false
          },
        })
      },
      TIMEOUT_MS,
    )
  })

describe('tasks outlast a Kubernetes API that', () => {
  test.each([
    ['does not answer', { drop: 'request' }],
    ['fails', { status: { code: 500, message: 'etcd has no leader' } }],
    ['lets nobody in', { status: { code: 403, message: 'RBAC is not there yet' } }],
    ['has too many requests', { status: { code: 429, retryAfterSeconds: 1 } }],
    ['is a page of a proxy', { html: '<html>Bad gateway</html>' }],
    [
      'answers garbage',
      { answer: { code: 200, contentType: 'text/html', body: '<html>Hi</html>' } },
    ],
  ] as const)(
    '%s',
    async (_, fault) => {
      await using fake = await startFakeKubernetes({
        ...{ tls: true, runProcesses: true, namespace: 'workers' },
      })
      await using stage = await startStage({
        env: {
          ...{ WORKER_BACKEND: 'kubernetes', KUBECONFIG: fake.kubeconfig.path },
          MAX_CONCURRENT_TASKS: '4',
        },
      })
      const service = await stage.start()
      await expectOutlasted(stage, service, {
        begin: () => void fake.faults.inject({ path: /^\/apis?\//, ...fault }),
        end: () => fake.faults.clear(),
      })
    },
    TIMEOUT_MS,
  )
})
