/** The service's own image: its Dockerfile, on a stand-in for its base, since there is no registry. */
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import {
  chmod,
  copyFile,
  cp,
  mkdir,
  mkdtemp,
  readFile,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { FIXTURE_TASKS } from '../helpers/app.ts'
import { docker, dockerSocket, newDeployment, TEST_IMAGE, whyNoDocker } from '../helpers/docker.ts'
import { startReceiver } from '../helpers/receiver.ts'

const skipped = await whyNoDocker()
const ROOT = new URL('../..', import.meta.url).pathname
const SLOW_MS = 120_000
const TOKEN = 'a-token-of-the-image-test'

/** Has what the Dockerfile's apt-get and npm would install; so these have nothing to do but to put it there. */
const STAND_IN = `FROM ${TEST_IMAGE}
COPY node_modules /stand-in/node_modules
COPY bin /usr/local/bin
RUN useradd --uid 1000 --create-home node
`
const APT_GET = `#!/bin/sh
case $1 in update | install) ;; *) exit 1 ;; esac
`
const NPM = `#!/bin/sh
case $1 in
  ci) [ -f package-lock.json ] && ln -s /stand-in/node_modules . ;;
  cache) ;;
  *) exit 1 ;;
esac
`

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  await new Promise((resolve) => server.close(resolve))
  if (typeof address !== 'object' || !address) throw new Error('no port')
  return address.port
}

/** What the web page is built with and from. */
const PAGE_MODULES = ['vite', 'preact', 'anser', '@tsconfig/node24', '@tsconfig/node-ts']

/** These modules of ours, and all that they need. */
async function withDependencies(names: string[], found = new Set<string>()): Promise<Set<string>> {
  for (const name of names) {
    const path = join(ROOT, 'node_modules', name)
    if (found.has(path) || !existsSync(path)) continue
    found.add(path)
    const { dependencies, optionalDependencies } = JSON.parse(
      await readFile(join(path, 'package.json'), 'utf8'),
    )
    await withDependencies(Object.keys({ ...dependencies, ...optionalDependencies }), found)
  }
  return found
}

/** The programs and modules of the stand-in. */
async function fillStandIn(folder: string): Promise<void> {
  const bin = join(folder, 'bin')
  await mkdir(bin)
  await writeFile(join(folder, 'Dockerfile'), STAND_IN)
  await writeFile(join(bin, 'apt-get'), APT_GET)
  await writeFile(join(bin, 'npm'), NPM)
  for (const name of ['apt-get', 'npm']) await chmod(join(bin, name), 0o755)
  // Docker's own init process is tini.
  const { stdout: init } = await promisify(execFile)('sh', [
    '-c',
    'command -v docker-init || command -v tini',
  ])
  await copyFile(init.trim(), join(bin, 'tini'))
  const list = ['ls', '--omit=dev', '--all', '--parseable']
  const { stdout } = await promisify(execFile)('npm', list, { cwd: ROOT })
  await mkdir(join(folder, 'node_modules'))
  const modules = await withDependencies(PAGE_MODULES, new Set(stdout.trim().split('\n').slice(1)))
  for (const path of modules) {
    await cp(path, join(folder, relative(ROOT, path)), { recursive: true })
  }
  await mkdir(join(folder, 'node_modules/.bin'))
  await symlink('../vite/bin/vite.js', join(folder, 'node_modules/.bin/vite'))
}

function tests(): void {
  const id = newDeployment()
  const [base, image, other, volume] = ['base', 'image', 'other', 'data'].map(
    (what) => `task-runner-${what}-${id}`,
  ) as [string, string, string, string]
  const names: string[] = []
  let folder: string

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'image-'))
    await fillStandIn(folder)
    const build = (...args: string[]) =>
      promisify(execFile)('docker', ['build', '--network', 'none', ...args], {
        env: { ...process.env, DOCKER_BUILDKIT: '0' },
        maxBuffer: 2 ** 26,
      })
    await build('--tag', base, folder)
    await build('--tag', image, '--build-arg', `BASE=${base}`, ROOT)
  }, SLOW_MS)

  afterAll(async () => {
    for (const name of names) await docker('rm', '--force', '--volumes', name)
    await docker('volume', 'rm', '--force', volume)
    await docker('image', 'rm', '--force', image, base, other)
    await rm(folder, { recursive: true })
  }, SLOW_MS)

  /** The image as a container that can write its data and nothing else. */
  async function start(options: string[], env: Record<string, string> = {}) {
    const name = `${id}-${names.length}`
    const port = await freePort()
    const variables = {
      PORT: String(port),
      API_TOKENS: TOKEN,
      CALLBACK_ALLOWED_NETWORKS: 'loopback',
      SAMPLE_CALLBACKS: 'true',
      ...env,
    }
    const settings = Object.entries(variables).flatMap((pair) => ['--env', pair.join('=')])
    const confined = ['--read-only', '--tmpfs', '/tmp', '--cap-drop', 'ALL', '--network', 'host']
    names.push(name)
    await docker('run', '--detach', '--name', name, ...confined, ...settings, ...options, image)
    const url = `http://127.0.0.1:${port}`
    const curl = async (...args: string[]) => {
      const head = ['-sS', '-H', `authorization: Bearer ${TOKEN}`]
      return (await promisify(execFile)('curl', [...head, ...args])).stdout
    }
    const get = async (path: string) => JSON.parse(await curl(url + path))
    const submit = async (request: object) => {
      const json = ['-H', 'content-type: application/json', '-d', JSON.stringify(request)]
      return JSON.parse(await curl(`${url}/task-runner`, ...json))
    }
    const isReady = () =>
      expect
        .poll(() => get('/health/ready').catch(String), { timeout: 30_000 })
        .toMatchObject({ success: true })
    await isReady()
    return { name, url, get, submit, curl, isReady }
  }

  test(
    'it runs a task as nobody special, calls back, and has its data after a kill',
    async () => {
      const data = ['--volume', `${volume}:/data`]
      const { name, url, get, submit, isReady } = await start(data)
      expect(await docker('exec', name, 'id', '-u')).toBe('1000\n')
      expect(await (await fetch(url)).text()).toContain('<title>Task runner</title>')
      const accepted = await submit({
        task_id: 'first',
        task_file_name: 'hello.py',
        worker_config: {},
        callback_url: `${url}/sample-task-runner-callback`,
      })
      expect(accepted).toMatchObject({ success: true })
      const wanted = { status: 'succeeded', exit_code: 0, callback_status: 'delivered' }
      await expect.poll(() => get('/tasks/first'), { timeout: 20_000 }).toMatchObject(wanted)
      await docker('kill', name)
      await docker('start', name)
      await isReady()
      expect(await get('/tasks/first')).toMatchObject(wanted)
      // By the image's own check, which begins after its first interval.
      await expect
        .poll(() => docker('inspect', '--format', '{{.State.Health.Status}}', name), {
          timeout: 40_000,
          interval: 200,
        })
        .toBe('healthy\n')
      await docker('stop', name)
      expect(await docker('inspect', '--format', '{{.State.ExitCode}}', name)).toBe('0\n')
    },
    SLOW_MS,
  )

  test(
    "with the engine's socket, one curl runs a task in a container of the image and size it asks for",
    async () => {
      await using receiver = await startReceiver()
      await docker('tag', TEST_IMAGE, other)
      const socket = dockerSocket()
      const group = String((await stat(socket)).gid)
      const mounts = [
        ...['--volume', `${socket}:/var/run/docker.sock`, '--group-add', group],
        ...['--volume', `${FIXTURE_TASKS}:/app/tasks:ro`],
      ]
      const { get, submit, curl, url } = await start(mounts, {
        WORKER_BACKEND: 'docker',
        WORKER_IMAGE: 'not-this-one',
        DOCKER_NETWORK: 'none',
      })
      const taskId = `${id}-task`
      const accepted = await submit({
        task_id: taskId,
        task_file_name: 'w-eval.sh',
        worker_config: {
          worker_image: other,
          worker_size: 'Small',
          env_variables: { SCRIPT: 'echo in a container of user $(id -u); exit 3' },
        },
        callback_url: receiver.url,
        terminate_on_completion: false,
      })
      expect(accepted).toMatchObject({ success: true })
      const { body } = await receiver.callbackOf(taskId)
      expect(body).toEqual({
        task_name: 'w-eval.sh',
        task_id: taskId,
        success: false,
        logs: 'in a container of user 10001\n',
      })
      const { worker_name: worker } = await get(`/tasks/${taskId}`)
      names.push(worker)
      const format = '{{.Config.Image}} {{.HostConfig.Memory}} {{.HostConfig.NanoCpus}}'
      expect(await docker('inspect', '--format', format, worker)).toBe(
        `${other}:latest ${2 * 2 ** 30} 1000000000\n`,
      )
      await curl('-X', 'DELETE', `${url}/workers/${worker}`)
      await expect
        .poll(() => docker('ps', '--all', '--quiet', '--filter', `name=${worker}`), {
          timeout: 20_000,
        })
        .toBe('')
      names.pop()
    },
    SLOW_MS,
  )
}

if (skipped === undefined) describe('the image of the service', tests)
else describe('the image of the service', () => test.skip(skipped, () => {}))
