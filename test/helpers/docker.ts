import { execFile, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { chmod, copyFile, mkdir, mkdtemp, readFile, realpath, rm, symlink } from 'node:fs/promises'
import http from 'node:http'
import https from 'node:https'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { promisify } from 'node:util'
import { expect, vi } from 'vitest'
import { UnavailableError } from '../../src/core/errors.ts'
import type { Worker, WorkerBackend, WorkerSpec } from '../../src/core/ports.ts'
import { DockerBackend, type DockerSettings } from '../../src/workers/docker/docker-backend.ts'
import type { BackendHarness } from '../workers/contract.ts'
import { FIXTURE_TASKS } from './app.ts'
import { processesWith } from './processes.ts'
import { TEST_IMAGE, whyNot } from './programs.ts'
import { QUIET } from './stores.ts'

export { TEST_IMAGE }

export const docker = async (...args: string[]) =>
  (await promisify(execFile)('docker', args, { maxBuffer: 2 ** 28 })).stdout

/** Returns why there are no tests with Docker here; undefined when there are. */
export async function whyNoDocker(): Promise<string | undefined> {
  return whyNot('docker')
}

/** Of a service whose workers are containers of the tests' engine. */
export function dockerEnv(mounts: readonly string[] = []): Record<string, string> {
  return {
    ...{ WORKER_BACKEND: 'docker', WORKER_IMAGE: TEST_IMAGE, DOCKER_NETWORK: 'none' },
    ...{ DOCKER_HOST: `unix://${dockerSocket()}`, WORKER_MOUNTS: mounts.join(',') },
  }
}

/** Where the engine of the tests listens. */
export function dockerSocket(): string {
  return (process.env.DOCKER_HOST ?? 'unix:///var/run/docker.sock').replace('unix://', '')
}

/** Keeps the containers of one test file from those of others. */
export function newDeployment(): string {
  return `test-${randomBytes(6).toString('hex')}`
}

export interface DockerHarness extends BackendHarness {
  backend: DockerBackend
  settings: DockerSettings
}

export async function openDocker(overrides: Partial<DockerSettings> = {}): Promise<DockerHarness> {
  const folder = await realpath(await mkdtemp(join(tmpdir(), 'docker-workers-')))
  const sharedDir = join(folder, 'shared')
  await mkdir(sharedDir)
  // Workers run as a user of their own.
  await chmod(folder, 0o755)
  await chmod(sharedDir, 0o777)
  const settings: DockerSettings = {
    engine: { socketPath: dockerSocket() },
    deployment: newDeployment(),
    legacyInstance: newDeployment(),
    tasksDir: FIXTURE_TASKS,
    images: { default: TEST_IMAGE, prefix: '' },
    network: 'none',
    mounts: [`${sharedDir}:${sharedDir}`],
    terminationGraceMs: 400,
    logBytesKept: 6 * 1024 * 1024,
    now: Date.now,
    log: QUIET,
    ...overrides,
  }
  const harness: DockerHarness = {
    backend: new DockerBackend(settings),
    graceMs: settings.terminationGraceMs,
    sharedDir,
    settings,
    async reopen() {
      const before = harness.backend
      harness.backend = new DockerBackend(settings)
      await before.close()
      return harness.backend
    },
    processes: processesWith,
    async clean() {
      for (const worker of await harness.backend.list()) await worker.terminate()
      if (settings.engine.socketPath === dockerSocket()) {
        expect(await containers(settings.deployment)).toEqual([])
      }
    },
    async dispose() {
      await harness.clean()
      await harness.backend.close()
      await rm(folder, { recursive: true })
    },
  }
  return harness
}

export async function containers(deployment: string): Promise<string[]> {
  const filter = `label=task-runner.instance=${deployment}`
  const names = await docker('ps', '--all', '--filter', filter, '--format', '{{.Names}}')
  return names.split('\n').filter((name) => name !== '')
}

/** What `command` does with a file system as tar on its standard input. */
async function pipe(tar: [string, ...string[]], command: [string, ...string[]]): Promise<void> {
  const from = spawn(tar[0], tar.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] })
  const to = spawn(command[0], command.slice(1), { stdio: [from.stdout, 'ignore', 'inherit'] })
  const [[code]] = await Promise.all([once(to, 'exit'), once(from, 'exit')])
  if (code !== 0) throw new Error(`${command.join(' ')} failed`)
}

/** An image of the files in a folder, on the engine that the Docker command is told by `host`. */
export async function importImage(
  folder: string,
  name: string,
  host: string[] = [],
): Promise<void> {
  await pipe(['tar', '-C', folder, '-c', '.'], ['docker', ...host, 'import', '-', name])
}

/** A folder with busybox alone, as everything that it can be. */
export async function busyboxRoot(folder: string): Promise<void> {
  const { stdout } = await promisify(execFile)('sh', ['-c', 'command -v busybox; busybox --list'])
  const [path = '', ...applets] = stdout.trim().split('\n')
  await mkdir(join(folder, 'bin'), { recursive: true })
  await mkdir(join(folder, 'tmp'))
  await copyFile(await realpath(path), join(folder, 'bin/busybox'))
  for (const applet of applets.filter((name) => name !== 'busybox')) {
    await symlink('busybox', join(folder, 'bin', applet))
  }
}

export interface EngineProxy extends AsyncDisposable {
  socketPath: string
  /** `GET /containers/…`, one for each request, as they came. */
  requests: string[]
  /** Ends all connections. */
  cut(): void
}

/** What a proxy does with a request: true when it has seen to it itself. */
export type Intercept = (
  request: http.IncomingMessage,
  response: http.ServerResponse,
  forward: () => http.ClientRequest,
) => boolean

/** Stands before the engine of the tests, and answers or fails where `intercept` says so. With TLS it is on a port. */
export async function startEngineProxy(
  intercept: Intercept,
  tls?: https.ServerOptions,
): Promise<EngineProxy & { port: number }> {
  const folder = await mkdtemp(join(tmpdir(), 'engine-proxy-'))
  const socketPath = join(folder, 'socket')
  const requests: string[] = []
  const onRequest: http.RequestListener = (request, response) => {
    requests.push(`${request.method} ${request.url}`)
    const forward = () => {
      const { method, url: path, headers } = request
      const onward = http.request({
        socketPath: dockerSocket(),
        method,
        path,
        headers,
        agent: false,
      })
      request.pipe(onward)
      response.on('close', () => onward.destroy())
      onward.on('error', () => response.destroy())
      return onward
    }
    if (intercept(request, response, forward)) return
    forward().on('response', (answer) => {
      response.writeHead(answer.statusCode ?? 500, answer.headers)
      // The head of a stream may be all there is for long.
      response.flushHeaders()
      answer.pipe(response)
      answer.on('error', () => response.destroy())
    })
  }
  const server = tls ? https.createServer(tls, onRequest) : http.createServer(onRequest)
  if (tls) server.listen(0, '127.0.0.1')
  else server.listen(socketPath)
  await once(server, 'listening')
  return {
    socketPath,
    requests,
    port: tls ? (server.address() as AddressInfo).port : 0,
    cut: () => server.closeAllConnections(),
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
      await rm(folder, { recursive: true, force: true })
    },
  }
}

export interface Dockerd extends AsyncDisposable {
  socketPath: string
  docker(...args: string[]): Promise<string>
  /** Ends the engine, and what it runs with it unless it was started with `--live-restore`. */
  kill(signal: NodeJS.Signals): Promise<void>
  start(): Promise<void>
}

/** An engine of one's own, as .ci/docker starts one, which may be killed. */
export async function startDockerd(...flags: string[]): Promise<Dockerd> {
  const folder = await mkdtemp(join(tmpdir(), 'dockerd-'))
  const socketPath = join(folder, 'socket')
  const host = `unix://${socketPath}`
  let engine: ReturnType<typeof spawn> | undefined
  const dockerd: Dockerd = {
    socketPath,
    docker: (...args) => docker('--host', host, ...args),
    async start() {
      const paths = ['--data-root', 'data', '--exec-root', 'exec', '--pidfile', 'pid']
      const absolute = paths.map((word) => (word.startsWith('--') ? word : join(folder, word)))
      const args = ['--iptables=false', '--bridge=none', '--host', host, ...absolute, ...flags]
      // Killed, it takes its containerd along, whose process is still to be seen where nobody reaps it.
      await rm(join(folder, 'exec/containerd/containerd.pid'), { force: true })
      engine = spawn('dockerd', args, { stdio: 'ignore' })
      await vi.waitFor(() => dockerd.docker('info'), { timeout: 60_000, interval: 100 })
    },
    async kill(signal) {
      if (!engine) return
      const ended = once(engine, 'exit')
      engine.kill(signal)
      await ended
      engine = undefined
    },
    async [Symbol.asyncDispose]() {
      if (!engine) await dockerd.start()
      const ids = (await dockerd.docker('ps', '--all', '--quiet')).split('\n').filter(Boolean)
      if (ids.length > 0) await dockerd.docker('rm', '--force', ...ids)
      await dockerd.kill('SIGTERM')
      // Of those that were killed.
      const mounts = (await readFile('/proc/mounts', 'utf8')).split('\n')
      const ours = mounts
        .flatMap((line) => line.split(' ')[1] ?? [])
        .filter((path) => path.startsWith(folder))
      for (const path of ours.reverse()) await promisify(execFile)('umount', ['--lazy', path])
      await rm(folder, { recursive: true, force: true })
    },
  }
  await dockerd.start()
  return dockerd
}

/** Answers in the engine's own form. */
export function refuse(response: http.ServerResponse, status: number, message: string): void {
  const head = { 'content-type': 'application/json' }
  response.writeHead(status, head).end(JSON.stringify({ message }))
}

/** Provisions as the core does: again while a failure is none of the task's. */
export async function provisionPatiently(
  backend: WorkerBackend,
  wanted: WorkerSpec,
): Promise<Worker> {
  for (;;) {
    try {
      return await backend.provision(wanted, new AbortController().signal)
    } catch (err) {
      if (!(err instanceof UnavailableError)) throw err
      await pause(50)
    }
  }
}

/** What a test that has failed may have left behind, by the beginning of its name. */
export async function removeContainers(prefix: string): Promise<void> {
  const ids = await docker('ps', '--all', '--quiet', '--filter', `name=^${prefix}`)
  const left = ids.split('\n').filter((id) => id !== '')
  if (left.length > 0) await docker('rm', '--force', ...left)
}
