import { once } from 'node:events'
import { chmod, mkdir, mkdtemp, rm, symlink } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { END_UNSEEN } from '../../src/workers/docker/container-watch.ts'
import {
  busyboxRoot,
  docker,
  importImage,
  startDockerd,
  TEST_IMAGE,
  whyNoDocker,
} from '../helpers/docker.ts'
import { startGitServer } from '../helpers/git-server.ts'
import { startReceiver } from '../helpers/receiver.ts'
import { eventually, exitAfter, finalTask, get, logOf, post } from '../helpers/recovery.ts'
import { type Service, startService } from '../helpers/service.ts'
import { fileThere, touch } from '../workers/contract.ts'

const skipped = await whyNoDocker()
const TASKS = 200
const SLOW_MS = 240_000
/** How long the engine is down. */
const DOWN_MS = 30_000

/** A data folder and its services, with Docker workers. Nothing of them may be left. */
async function startStage(env: Record<string, string> = {}) {
  const folder = await mkdtemp(join(tmpdir(), 'docker-recovery-'))
  const services: Service[] = []
  const receiver = await startReceiver()
  // Those of this service have names of its tasks, which have this one.
  const mark = `r${process.pid}x${Date.now() % 1e6}`
  return {
    folder,
    receiver,
    mark,
    containers: () => docker('ps', '--all', '--filter', `name=${mark}`, '--format', '{{.Names}}'),
    async start(more: Record<string, string> = {}) {
      const service = await startService({
        WORKER_BACKEND: 'docker',
        WORKER_IMAGE: TEST_IMAGE,
        DOCKER_NETWORK: 'none',
        DOCKER_HOST: process.env.DOCKER_HOST ?? '',
        DATA_DIR: join(folder, 'data'),
        ...env,
        ...more,
      })
      services.push(service)
      return service
    },
    async [Symbol.asyncDispose]() {
      for (const service of services) await service.kill()
      // Those that a killed service was removing cannot be removed by another at that moment.
      await eventually(async () => {
        const left = (await this.containers()).split('\n').filter(Boolean)
        if (left.length > 0) await docker('rm', '--force', ...left)
      })
      await receiver[Symbol.asyncDispose]()
      await rm(folder, { recursive: true, force: true, maxRetries: 10 })
    },
  }
}

const codeOf = (index: number) => [0, 0, 1, 42, 255][index % 5] as number

function tests(): void {
  test(
    `${TASKS} tasks end as they did, call back and leave nothing, though the service is killed amid them`,
    async () => {
      await using stage = await startStage({ MAX_CONCURRENT_TASKS: '6' })
      const { receiver, mark } = stage
      let service = await stage.start()
      const ids = Array.from({ length: TASKS }, (_, index) => `${mark}-${index}`)
      for (const [index, taskId] of ids.entries()) {
        const answer = await post(service, '/task-runner', {
          task_id: taskId,
          task_file_name: 'w-eval.sh',
          callback_url: receiver.url,
          worker_config: {
            env_variables: { SCRIPT: `echo "ran $TASK_ID"; exit ${codeOf(index)}` },
          },
        })
        expect(answer).toMatchObject({ status: 200 })
      }
      for (const share of [0.25, 0.5]) {
        await eventually(
          () => expect(receiver.received.length).toBeGreaterThan(TASKS * share),
          SLOW_MS,
        )
        await exitAfter(service, 'SIGKILL')
        service = await stage.start()
      }
      const called = () => new Set(receiver.received.map(({ body }) => body.task_id)).size
      await eventually(() => expect(called()).toBe(TASKS), SLOW_MS)
      for (const [index, taskId] of ids.entries()) {
        const code = codeOf(index)
        expect(await finalTask(service, taskId)).toMatchObject({
          status: code === 0 ? 'succeeded' : 'failed',
          reason: code === 0 ? 'completed' : 'exit_code',
          exit_code: code,
        })
        expect(await logOf(service, taskId)).toBe(`ran ${taskId}\n`)
        const callbacks = receiver.received.filter(({ body }) => body.task_id === taskId)
        expect(new Set(callbacks.map(({ headers }) => headers['webhook-id'])).size).toBe(1)
        for (const { body } of callbacks) {
          expect(body).toEqual({
            task_name: 'w-eval.sh',
            task_id: taskId,
            success: code === 0,
            logs: `ran ${taskId}\n`,
          })
        }
      }
      await eventually(async () => {
        expect((await get(service, '/workers')).body).toEqual({ workers: [] })
        expect(await stage.containers()).toBe('')
      })
    },
    SLOW_MS,
  )

  test('a repository is cloned in a container, with a secret that shows nowhere', async () => {
    const password = 'a-token-of-the-git-server'
    await using git = await startGitServer({ username: 'x-access-token', password })
    git.create('private/code', { 'task.sh': 'echo "from the repository"; echo "has $API_KEY"\n' })
    await using stage = await startStage({
      DOCKER_NETWORK: 'host',
      SECRET_GIT: password,
      SECRET_API_KEY: 'a-key-of-an-api',
    })
    const service = await stage.start()
    const run = async (taskId: string, gitConfig: object) => {
      const answer = await post(service, '/task-runner', {
        task_id: taskId,
        task_file_name: 'code/task.sh',
        callback_url: stage.receiver.url,
        worker_config: {
          git_configs: [{ remote_url: `${git.url}/private/code.git`, ...gitConfig }],
          shared_secrets: ['API_KEY'],
        },
      })
      expect(answer).toMatchObject({ status: 200 })
      return finalTask(service, taskId)
    }
    const good = `${stage.mark}-good`
    expect(await run(good, { secret_name: 'GIT' })).toMatchObject({ status: 'succeeded' })
    expect(await logOf(service, good)).toMatch(/from the repository\nhas \*\*\*\n$/)
    const refused = `${stage.mark}-refused`
    expect(await run(refused, {})).toMatchObject({ status: 'failed', reason: 'startup_failed' })
    expect(await logOf(service, refused)).toMatch(/git clone of .* failed: fatal: /)
    await eventually(() => expect(stage.receiver.received).toHaveLength(2))
    await eventually(async () => expect(await stage.containers()).toBe(''))
    const all = JSON.stringify(stage.receiver.received) + service.log.join('\n')
    expect(all).not.toContain(password)
  })

  test('without an engine the service starts, says that workers are not ready, and is when one is there', async () => {
    await using stage = await startStage()
    const socket = join(stage.folder, 'engine.sock')
    const service = await stage.start({ DOCKER_HOST: `unix://${socket}` })
    const ready = () => get(service, '/health/ready')
    const notReady = {
      status: 503,
      body: {
        success: false,
        message: 'not ready: workers',
        parts: { workers: expect.stringContaining('does not answer') },
      },
    }
    expect(await ready()).toMatchObject(notReady)
    expect(service.log.join('\n')).toContain('The Docker engine does not answer (ENOENT)')
    // A task that is accepted now has its worker when there is an engine.
    const taskId = `${stage.mark}-early`
    await post(service, '/task-runner', {
      task_id: taskId,
      task_file_name: 'w-eval.sh',
      worker_config: { env_variables: { SCRIPT: 'echo at last' } },
    })
    const engine = createServer((client) => {
      client.resume().end('no engine')
    })
    engine.listen(socket)
    await once(engine, 'listening')
    expect(await ready()).toMatchObject(notReady)
    engine.close()
    await once(engine, 'close')

    await symlink((process.env.DOCKER_HOST ?? '').replace('unix://', ''), socket)
    await eventually(async () => expect(await ready()).toMatchObject({ status: 200 }))
    expect(await finalTask(service, taskId)).toMatchObject({ status: 'succeeded' })
  })

  test(
    'tasks whose engine is down for half a minute end as they did, those that ended meanwhile, too',
    async () => {
      await using dockerd = await startDockerd('--live-restore')
      await using stage = await startStage()
      const { folder, receiver, mark } = stage
      const host = `unix://${dockerd.socketPath}`
      const image = 'task-runner-busybox'
      await busyboxRoot(join(folder, 'image'))
      await importImage(join(folder, 'image'), image, ['--host', host])
      const shared = join(folder, 'shared')
      await mkdir(shared)
      // Workers run as a user of their own.
      await chmod(folder, 0o755)
      await chmod(shared, 0o777)
      const service = await stage.start({
        ...{ DOCKER_HOST: host, WORKER_IMAGE: image, WORKER_MOUNTS: `${shared}:${shared}` },
      })
      const id = (name: string) => `${mark}-${name}`
      const file = (name: string) => join(shared, name)
      const untilThere = (name: string) => `until [ -e ${file(name)} ]; do sleep 0.05; done`
      const submit = async (name: string, script: string) => {
        const answer = await post(service, '/task-runner', {
          task_id: id(name),
          task_file_name: 'w-eval.sh',
          callback_url: receiver.url,
          worker_config: { env_variables: { SCRIPT: script } },
        })
        expect(answer).toMatchObject({ status: 200 })
      }
      const lines = (count: number) =>
        Array.from({ length: count }, (_, index) => `${index + 1}\n`).join('')
      /** What they do before and while the engine is down, and when it is back. */
      const tasks: Record<string, [before: string, meanwhile: string, afterwards?: string]> = {
        fails: ['seq 1 20000', 'echo lost; : >$FOLDER/fails-ended; exit 11'],
        succeeds: ['echo before', ': >$FOLDER/succeeds-ended; exit 0'],
        // More than the pipe to the engine holds: it has to wait for the engine.
        floods: ['echo before', 'seq 1 30000; exit 12'],
        outlives: ['printf "a line"', 'echo " and its end"', 'echo late; exit 13'],
      }
      const outcomes: Record<string, { code: number; log: string }> = {
        fails: { code: 11, log: lines(20_000) + END_UNSEEN },
        succeeds: { code: 0, log: `before\n${END_UNSEEN}` },
        floods: { code: 12, log: `before\n${lines(30_000)}` },
        // The engine had not stored the line that it was killed in.
        outlives: { code: 13, log: ' and its end\nlate\n' },
        new: { code: 14, log: 'new\n' },
      }
      for (const [name, [before, meanwhile, afterwards]] of Object.entries(tasks)) {
        const steps = [
          `FOLDER=${shared}`,
          before,
          `: >${file(name)}`,
          untilThere('down'),
          meanwhile,
        ]
        if (afterwards) steps.push(untilThere('back'), afterwards)
        await submit(name, steps.join('; '))
      }
      for (const name of Object.keys(tasks)) await fileThere(file(name))
      await eventually(async () => expect(await logOf(service, id('outlives'))).toContain('a line'))

      await dockerd.kill('SIGKILL')
      const backAt = performance.now() + DOWN_MS
      await touch(file('down'))
      for (const name of ['fails', 'succeeds']) await fileThere(file(`${name}-ended`))
      await submit('new', 'echo new; exit 14')
      // The only real time that a test waits for: a clock moved by hand would not move the engine's, the kernel's
      // pipes and the timeouts of connections, and these are what half a minute is about.
      const seen = new Set<string>()
      await eventually(async () => {
        const { status } = await get(service, '/health/ready')
        seen.add(`ready: ${status}`)
        for (const name of Object.keys(tasks)) {
          seen.add(`${name}: ${(await get(service, `/tasks/${id(name)}`)).body.status}`)
        }
        expect(performance.now()).toBeGreaterThan(backAt)
      }, SLOW_MS)
      expect([...seen]).toEqual([
        'ready: 503',
        ...Object.keys(tasks).map((name) => `${name}: running`),
      ])
      expect(receiver.received).toEqual([])

      await dockerd.start()
      await touch(file('back'))
      for (const [name, { code, log }] of Object.entries(outcomes)) {
        expect(await finalTask(service, id(name)), name).toMatchObject({
          status: code === 0 ? 'succeeded' : 'failed',
          reason: code === 0 ? 'completed' : 'exit_code',
          exit_code: code,
        })
        // What is lost may be kept by an engine to come.
        const logged = (await logOf(service, id(name))).replace('lost\n', '')
        expect(logged, name).toBe(log)
        const { body } = await receiver.callbackOf(id(name))
        expect(body).toMatchObject({ task_id: id(name), success: code === 0 })
        expect(body.logs.replace('lost\n', '')).toBe(log)
      }
      expect(receiver.received).toHaveLength(Object.keys(outcomes).length)
      await eventually(async () => {
        expect((await get(service, '/health/ready')).status).toBe(200)
        expect((await get(service, '/workers')).body).toEqual({ workers: [] })
      })
      expect(await dockerd.docker('ps', '--all', '--quiet')).toBe('')
    },
    SLOW_MS,
  )
}

if (skipped === undefined) describe('the service with Docker workers', tests)
else describe('the service with Docker workers', () => test.skip(skipped, () => {}))
