import { once } from 'node:events'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import type { Completion, Worker, WorkerSpec } from '../../src/core/ports.ts'
import { WorkerError } from '../../src/core/ports.ts'
import { DockerBackend } from '../../src/workers/docker/docker-backend.ts'
import {
  busyboxRoot,
  containers,
  type DockerHarness,
  docker,
  importImage,
  openDocker,
  TEST_IMAGE,
  whyNoDocker,
} from '../helpers/docker.ts'
import { fileThere, logOf, marker, NEVER, spec, text, touch } from '../workers/contract.ts'

const skipped = await whyNoDocker()
const MEGABYTE = 2 ** 20
const SMALL = { cpus: 1, memoryBytes: 64 * MEGABYTE, gpus: 0 }
const EAT_MEMORY = `python3 -c 'x = bytearray(500 * 2**20)'`
const LOG_BYTES = 5 * MEGABYTE

function tests(): void {
  let harness: DockerHarness
  let folder: string
  /** Images of this test alone. */
  const suffix = marker()
  const BUSYBOX = `task-runner-busybox-${suffix}`
  const NO_SHELL = `task-runner-no-shell-${suffix}`

  beforeAll(async () => {
    harness = await openDocker()
    folder = await mkdtemp(join(tmpdir(), 'docker-images-'))
    await busyboxRoot(join(folder, 'busybox'))
    await importImage(join(folder, 'busybox'), BUSYBOX)
    await mkdir(join(folder, 'no-shell'))
    await writeFile(join(folder, 'no-shell/file'), 'alone')
    await importImage(join(folder, 'no-shell'), NO_SHELL)
  })
  afterEach(() => harness.clean())
  afterAll(async () => {
    await harness.dispose()
    await docker('image', 'rm', '--force', BUSYBOX, NO_SHELL)
    await rm(folder, { recursive: true })
  })

  const provision = (wanted: WorkerSpec) => harness.backend.provision(wanted, NEVER)

  async function run(wanted: WorkerSpec): Promise<{ end: Completion; worker: Worker }> {
    const worker = await provision(wanted)
    return { end: await worker.completion(NEVER), worker }
  }

  /** Why a worker could not be had. Nothing may be left of it. */
  async function refusal(wanted: WorkerSpec, signal = NEVER): Promise<WorkerError> {
    const error = await harness.backend.provision(wanted, signal).then(
      () => undefined,
      (err: unknown) => err,
    )
    expect(error).toBeInstanceOf(WorkerError)
    expect(await containers(harness.settings.deployment)).toEqual([])
    return error as WorkerError
  }

  /** A task that runs until the file is there, and is known to have begun. */
  async function begun(script = 'exit 5', overrides: Partial<WorkerSpec> = {}) {
    const [ready, go] = [join(harness.sharedDir, marker()), join(harness.sharedDir, marker())]
    const waiting = `: >${ready}; until [ -e ${go} ]; do sleep 0.02; done; ${script}`
    const worker = await provision(spec(waiting, overrides))
    await fileThere(ready)
    return { worker, go: () => touch(go) }
  }

  describe('images', () => {
    test('one that is not there and must not be pulled', async () => {
      const wanted = spec('true', { image: 'not-here', imageConfig: { pullPolicy: 'Never' } })
      expect(await refusal(wanted)).toMatchObject({
        reason: 'image_pull_failed',
        message:
          'The image not-here:latest could not be pulled: it is not there, and pull_policy is Never',
      })
    })

    test("one that cannot be pulled fails in the engine's words", async () => {
      const wanted = spec('true', { image: '127.0.0.1:1/team/none' })
      // The registry may be back in a moment: it is asked until the time is over.
      const { reason, message } = await refusal(wanted, AbortSignal.timeout(1_000))
      expect(reason).toBe('image_pull_failed')
      expect(message).toContain('127.0.0.1:1/team/none:latest')
      expect(message).toContain('connection refused')
    })

    test('one without a shell', async () => {
      const { end, worker } = await run(spec('true', { image: NO_SHELL }))
      expect(end).toEqual({
        reason: 'startup_failed',
        exitCode: null,
        signal: null,
        message: 'The container could not be started: its image has no /bin/sh that runs',
      })
      expect(await logOf(worker)).toMatch(/exec \/bin\/sh failed: No such file/)
    })

    test('a registry is asked once, by Always each time, and with the password as it is', async () => {
      // Each length that base64 pads in its own way.
      for (const password of ['hunter2+?', 'hunter2+?>', 'hunter2+?>ÿ']) {
        await using registry = await startRegistry({ username: 'me', password })
        const image = `${registry.host}/team/busybox`
        const credential = { username: 'me', password }
        const withPolicy = (pullPolicy?: 'Always' | 'IfNotPresent') =>
          spec('echo "in $(echo /bin/busybox)"', {
            image,
            imageConfig: { credential, ...(pullPolicy ? { pullPolicy } : {}) },
          })
        try {
          const { worker } = await run(withPolicy())
          expect(await logOf(worker)).toMatch(
            /^\[task-runner\] pulled .*\/team\/busybox:latest in \d+ s\nin \/bin\/busybox\n$/,
          )
          expect(worker.image).toBe(`${image}:latest`)
          const once = registry.manifests()
          expect(once).toBeGreaterThan(0)
          await run(withPolicy())
          await run(withPolicy('IfNotPresent'))
          expect(registry.manifests()).toBe(once)
          await run(withPolicy('Always'))
          expect(registry.manifests()).toBeGreaterThan(once)
          await harness.clean()
          const wrong = { username: 'me', password: 'wrong' }
          const { reason } = await refusal(
            spec('true', { image, imageConfig: { pullPolicy: 'Always', credential: wrong } }),
          )
          expect(reason).toBe('image_pull_failed')
        } finally {
          await harness.clean()
          await docker('image', 'rm', '--force', image)
        }
      }
    }, 60_000)

    /** A registry with one image, `/team/busybox:latest`, for whoever has the password. */
    async function startRegistry(credential: { username: string; password: string }) {
      const exported = join(folder, `saved-${marker()}`)
      await mkdir(exported)
      await docker('save', '--output', join(exported, 'image.tar'), BUSYBOX)
      const { unpackTar } = await import('modern-tar')
      const files = await unpackTar(await readFile(join(exported, 'image.tar')))
      const blob = (name: string) => {
        const data = files.find(({ header }) => header.name === name)?.data
        return Buffer.from(data ?? [])
      }
      const [saved] = JSON.parse(blob('manifest.json').toString())
      const { createHash } = await import('node:crypto')
      const digest = (data: Buffer) => `sha256:${createHash('sha256').update(data).digest('hex')}`
      const config = blob(saved.Config)
      const layer = blob(saved.Layers[0])
      const part = (data: Buffer, type: string) => ({
        mediaType: `application/vnd.docker.${type}`,
        size: data.length,
        digest: digest(data),
      })
      const type = 'application/vnd.docker.distribution.manifest.v2+json'
      const manifest = Buffer.from(
        JSON.stringify({
          schemaVersion: 2,
          mediaType: type,
          config: part(config, 'container.image.v1+json'),
          layers: [part(layer, 'image.rootfs.diff.tar')],
        }),
      )
      const blobs = new Map([config, layer].map((data) => [digest(data), data]))
      const { username, password } = credential
      const expected = `Basic ${Buffer.from(`${username}:${password}`).toString('base64')}`
      let manifests = 0
      const server = createServer(({ url = '', headers }, response) => {
        if (headers.authorization !== expected) {
          response.writeHead(401, { 'www-authenticate': 'Basic realm="test"' }).end()
        } else if (url === '/v2/') response.end('{}')
        else if (url.includes('/manifests/')) {
          manifests += 1
          const head = {
            'content-type': type,
            'docker-content-digest': digest(manifest),
            'content-length': manifest.length,
          }
          response.writeHead(200, head).end(manifest)
        } else response.end(blobs.get(url.slice(url.lastIndexOf('/') + 1)))
      })
      server.listen(0, '127.0.0.1')
      await once(server, 'listening')
      return {
        host: `127.0.0.1:${(server.address() as AddressInfo).port}`,
        manifests: () => manifests,
        async [Symbol.asyncDispose]() {
          server.closeAllConnections()
          server.close()
          await rm(exported, { recursive: true })
        },
      }
    }
  })

  test('a network for workers that is missing is told, and is the outcome of no task', async () => {
    const other = await openDocker({ network: 'no-such-network' })
    try {
      await expect(other.backend.provision(spec('true'), NEVER)).rejects.toMatchObject({
        code: 'workers_unavailable',
        message:
          'The network for workers (DOCKER_NETWORK) is missing (network no-such-network not found)',
      })
      expect(await containers(other.settings.deployment)).toEqual([])
    } finally {
      await other.dispose()
    }
  })

  describe('an image that has busybox alone', () => {
    const image = BUSYBOX

    test.each([0, 3, 255])('its exit code %i is told, and its log', async (code) => {
      const script = `echo out; echo err >&2; exit ${code}`
      const { end, worker } = await run(spec(script, { image, notes: ['a note'] }))
      expect(end.exitCode).toBe(code)
      expect(await logOf(worker)).toBe('[task-runner] a note\nout\nerr\n')
    })

    test('a startup script runs, and its failure is told', async () => {
      const { worker } = await run(spec('cat ~/made', { image, startupScript: 'echo yes >made' }))
      expect(await logOf(worker)).toBe('yes\n')
      const { end } = await run(spec('true', { image, startupScript: 'exit 4' }))
      expect(end).toMatchObject({ reason: 'startup_failed', exitCode: 4 })
    })

    test('a stopped task ends in its own way', async () => {
      const tidy = await begun('true', { image })
      await tidy.worker.stop()
      expect(await tidy.worker.completion(NEVER)).toMatchObject({
        reason: 'signal',
        signal: 'SIGTERM',
      })
      const own = spec('unused', { image })
      own.environment.SCRIPT = `trap 'echo tidy; exit 7' TERM; echo ready; while :; do sleep 0.02; done`
      const worker = await provision(own)
      for await (const chunk of worker.follow({ from: 0, signal: NEVER })) {
        if (chunk.includes('ready')) await worker.stop()
      }
      expect(await worker.completion(NEVER)).toMatchObject({ reason: 'exit_code', exitCode: 7 })
    })

    test('what a task leaves behind ends with it', async () => {
      const mark = marker()
      const { end } = await run(spec(`setsid sleep ${mark} & sleep 0.05; exit 6`, { image }))
      expect(end).toMatchObject({ exitCode: 6 })
      expect(await harness.processes(mark)).toEqual([])
    })

    test.each(['w-environment.js', 'w-eval.py'])(
      'it has no interpreter for %s',
      async (taskFileName) => {
        const { end, worker } = await run(spec('print()', { image, taskFileName }))
        expect(end).toEqual({
          reason: 'exit_code',
          exitCode: 127,
          signal: null,
          message: 'Exit code 127: the interpreter, or a command, was not found',
        })
        expect(await logOf(worker)).toMatch(/(node|python3): not found/)
      },
    )
  })

  describe('memory', () => {
    const resources = SMALL

    test('a task beyond its limit ran out of memory', async () => {
      const { end } = await run(spec(`exec ${EAT_MEMORY}`, { resources }))
      expect(end).toEqual({
        reason: 'oom_killed',
        exitCode: 137,
        signal: 'SIGKILL',
        message:
          "Ran out of memory: the worker's limit of 64 MB was reached; ask for a larger worker_size",
      })
    })

    test('a task that fails for a killed child ran out of memory, with its own exit code', async () => {
      const { end } = await run(spec(`${EAT_MEMORY} || exit 3`, { resources }))
      expect(end).toMatchObject({ reason: 'oom_killed', exitCode: 3, signal: null })
    })

    test('a task that does without the killed child succeeds', async () => {
      const { end, worker } = await run(spec(`${EAT_MEMORY}; echo $?`, { resources }))
      expect(end).toEqual({ reason: 'completed', exitCode: 0, signal: null, message: null })
      expect(await logOf(worker)).toContain('137\n')
    })

    test('a worker that stays says so, too', async () => {
      const keepAfterwards = true
      const { end } = await run(spec(`exec ${EAT_MEMORY}`, { resources, keepAfterwards }))
      expect(end).toMatchObject({ reason: 'oom_killed', exitCode: 137, signal: 'SIGKILL' })
    })

    test('exit code 137 without a limit is a signal', async () => {
      const { end } = await run(spec('kill -KILL $$'))
      expect(end).toMatchObject({ reason: 'signal', exitCode: 137, signal: 'SIGKILL' })
    })
  })

  describe('from outside', () => {
    test('a killed container is lost: nobody knows how its task would have ended', async () => {
      const { worker } = await begun()
      await docker('kill', worker.name)
      const end = await worker.completion(NEVER)
      expect(end).toMatchObject({ reason: 'worker_lost', exitCode: null })
      expect(end.message).toContain('137')
      expect(end.message).toContain('killed from outside')
      expect(await worker.status()).toBe('Completed')
    })

    test('a stopped container ends its task by TERM, which is told', async () => {
      const { worker } = await begun()
      await docker('stop', worker.name)
      expect(await worker.completion(NEVER)).toMatchObject({
        reason: 'signal',
        exitCode: 143,
        signal: 'SIGTERM',
      })
    })

    test('a removed container is lost, and what it logged is there', async () => {
      const { worker } = await begun()
      const chatty = await provision(spec('echo before; exec sleep 1000'))
      await expect
        .poll(() => chatty.logs({ maxBytes: 6 }), { timeout: 15_000 })
        .toEqual({
          content: Buffer.from('before\n').subarray(-6),
          totalBytes: 7,
        })
      for (const { name } of [worker, chatty]) await docker('rm', '--force', name)
      expect(await logOf(chatty)).toBe('before\n')
      for (const each of [worker, chatty]) {
        expect(await each.completion(NEVER)).toEqual({
          reason: 'worker_lost',
          exitCode: null,
          signal: null,
          message: 'The container was removed from outside',
        })
        expect(await each.status()).toBe('Completed')
        await each.terminate()
        expect(await harness.backend.find(each.name)).toBeUndefined()
      }
    })

    test('a paused task runs, goes on, and can be stopped or terminated as it is', async () => {
      const { worker, go } = await begun()
      await docker('pause', worker.name)
      expect(await worker.status()).toBe('Running')
      await go()
      await docker('unpause', worker.name)
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })

      const stopped = (await begun()).worker
      await docker('pause', stopped.name)
      await stopped.stop()
      expect((await stopped.completion(NEVER)).reason).not.toBe('completed')

      const terminated = (await begun()).worker
      await docker('pause', terminated.name)
      await terminated.terminate()
      expect(await harness.backend.find(terminated.name)).toBeUndefined()
    })
  })

  describe('limits', () => {
    test('a worker gets the processors, memory and processes asked for, and no rights', async () => {
      const script = `
        cd /sys/fs/cgroup
        first() { for file; do [ ! -f "$file" ] || { tr ' ' / <"$file"; return; }; done; }
        echo memory $(first memory/memory.limit_in_bytes memory.max)
        [ -f cpu.max ] && echo cpu $(tr ' ' / <cpu.max) ||
          echo cpu $(cat cpu/cpu.cfs_quota_us)/$(cat cpu/cpu.cfs_period_us)
        echo pids $(first pids/pids.max pids.max)
        echo user $(id -u) $(id -g)
        sed -n 's/^\\(CapEff\\|CapBnd\\|NoNewPrivs\\|Seccomp\\):[[:space:]]*/\\1 /p' /proc/self/status
        echo first $(tr '\\0' ' ' </proc/1/cmdline)
        ls /var/run/docker.sock /run/docker.sock 2>/dev/null
        grep -c docker.sock /proc/self/mountinfo`
      const resources = { cpus: 0.5, memoryBytes: 128 * MEGABYTE, gpus: 0 }
      const { worker } = await run(spec(script, { resources }))
      const log = await logOf(worker)
      expect(log.split('\n')).toEqual(
        expect.arrayContaining([
          `memory ${128 * MEGABYTE}`,
          'cpu 50000/100000',
          'pids 4096',
          'user 10001 10001',
          'CapEff 0000000000000000',
          'CapBnd 0000000000000000',
          'NoNewPrivs 1',
          expect.stringMatching(/^first \S*(init|tini|catatonit)\b/),
        ]),
      )
      expect(log).toMatch(/\n0\n$/)
      expect(log).not.toContain('/docker.sock')
    })

    test('more processors than the machine has are all of them', async () => {
      const resources = { cpus: 1000, memoryBytes: 64 * MEGABYTE, gpus: 0 }
      expect((await run(spec('true', { resources }))).end.reason).toBe('completed')
    })

    test('a fork bomb stops at its limit, and harms nobody else', async () => {
      const bomb = `
import os, time
count = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(1000)
            os._exit(0)
        count += 1
except OSError as err:
    print(count, err.strerror)
`
      const { worker, end } = await run(
        spec('unused', { taskFileName: 'w-eval.py', environment: { SCRIPT: bomb } }),
      )
      expect(end.reason).toBe('completed')
      const [first, last, ...rest] = (await logOf(worker)).split('\n')
      const [, count] = /^(\d+) Resource temporarily unavailable$/.exec(first ?? '') ?? []
      expect(Number(count)).toBeGreaterThan(4000)
      expect(Number(count)).toBeLessThan(4096)
      expect([last, ...rest]).toEqual([
        expect.stringMatching(
          `^\\[task-runner\\] Ended ${count} processes that were still running: python3, .* and ${Number(count) - 5} more$`,
        ),
        '',
      ])
      expect((await run(spec('exit 3'))).end).toMatchObject({ exitCode: 3 })
    })

    test('tasks that end at once are seen to their end', async () => {
      const ends = await Promise.all(
        Array.from({ length: 5 }, (_, index) => run(spec(`echo ${index}; exit ${index}`))),
      )
      for (const [index, { end, worker }] of ends.entries()) {
        expect(end.exitCode).toBe(index)
        expect(await logOf(worker)).toBe(`${index}\n`)
      }
    })

    test('folders of the machine are mounted as configured', async () => {
      await writeFile(join(harness.sharedDir, 'data'), 'from outside')
      const mounts = [`${harness.sharedDir}:/mnt/all`, `${harness.sharedDir}:/mnt/read-only:ro`]
      const other = await openDocker({ mounts })
      try {
        const script = 'cat /mnt/read-only/data; echo made >/mnt/all/made; : >/mnt/read-only/made'
        const worker = await other.backend.provision(spec(script), NEVER)
        expect((await worker.completion(NEVER)).reason).toBe('exit_code')
        expect(await logOf(worker)).toMatch(/^from outside.*Read-only file system/)
        expect(await text(join(harness.sharedDir, 'made'))).toBe('made\n')
      } finally {
        await other.dispose()
      }
    })
  })

  describe('the log', () => {
    test('of 20 MB the last 5 MB are exact, also for a later instance', async () => {
      const LINES = 950_000
      const worker = await provision(spec(`seq -f 'line %015.0f' ${LINES}`))
      expect((await worker.completion(NEVER)).reason).toBe('completed')
      let whole = ''
      for (let line = LINES - 260_000; line <= LINES; line += 1) {
        whole += `line ${String(line).padStart(15, '0')}\n`
      }
      const last = Buffer.from(whole).subarray(-LOG_BYTES)
      const live = await worker.logs({ maxBytes: LOG_BYTES })
      expect(live.totalBytes).toBe(21 * LINES)
      expect(live.content.equals(last)).toBe(true)
      const found = await (await harness.reopen()).find(worker.name)
      expect((await found?.completion(NEVER))?.reason).toBe('completed')
      const later = await found?.logs({ maxBytes: LOG_BYTES })
      expect(later?.content.length).toBe(LOG_BYTES)
      expect(later?.content.equals(last)).toBe(true)
    }, 60_000)

    test.each([
      ['in one piece without a line end', ''],
      ['after a line end', '\n'],
    ])('every byte comes back as it was, %s', async (_, end) => {
      const wanted = spec('unused', {
        taskFileName: 'w-eval.py',
        environment: {
          SCRIPT: `import sys; sys.stdout.buffer.write(bytes(range(256)) * 500 + ${JSON.stringify(end)}.encode())`,
        },
      })
      const { worker } = await run(wanted)
      const bytes = Buffer.from(Array.from({ length: 256 * 500 }, (_, index) => index % 256))
      const whole = Buffer.concat([bytes, Buffer.from(end)])
      expect((await worker.logs({ maxBytes: MEGABYTE })).content.equals(whole)).toBe(true)
      const found = await (await harness.reopen()).find(worker.name)
      expect((await found?.logs({ maxBytes: MEGABYTE }))?.content.equals(whole)).toBe(true)
    })
  })

  test('nothing secret is to be seen by who asks the engine, or lists processes', async () => {
    const [variable, startup, password] = [marker(), marker(), marker()]
    const wanted = spec('unused', {
      environment: { SECRET: variable },
      startupScript: `: ${startup}\n`,
      repositories: [
        {
          url: 'http://127.0.0.1:1/none.git',
          directory: 'projects/none',
          branch: undefined,
          depth: undefined,
          sparseFolders: [],
          addresses: [],
          credential: { username: 'me', password },
          keepCredential: false,
        },
      ],
    })
    const cloned = await provision(wanted)
    const { worker } = await begun('true', {
      environment: { SECRET: variable },
      startupScript: `: ${startup}\n`,
    })
    for (const { name } of [cloned, worker]) {
      const told = await docker('inspect', name)
      for (const secret of [variable, startup, password]) expect(told).not.toContain(secret)
    }
    const commands = (await harness.processes(worker.name)).join('\n')
    expect(commands).toContain('bootstrap.sh')
    for (const secret of [variable, startup, password]) expect(commands).not.toContain(secret)
    // It holds the environment until the task has it.
    const { stdout, stderr } = await docker('exec', worker.name, 'ls', '/worker').then((out) => ({
      stdout: out,
      stderr: '',
    }))
    expect(stderr).toBe('')
    expect(stdout).not.toContain('environment.sh')
    expect(await cloned.completion(NEVER)).toMatchObject({ reason: 'startup_failed' })
    expect(await logOf(cloned)).not.toContain(password)
  })

  test('a worker that stays can be looked into after its task has ended, until it is terminated', async () => {
    const { worker, end } = await run(
      spec('echo kept >~/made; echo done; exit 4', { keepAfterwards: true }),
    )
    expect(end).toMatchObject({ reason: 'exit_code', exitCode: 4 })
    expect(await worker.status()).toBe('Completed')
    expect(await docker('inspect', '--format', '{{.State.Status}}', worker.name)).toBe('running\n')
    expect(await docker('exec', worker.name, 'cat', '/worker/home/made')).toBe('kept\n')
    const found = await (await harness.reopen()).find(worker.name)
    expect(await found?.status()).toBe('Completed')
    expect(await found?.completion(NEVER)).toEqual(end)
    expect(found && (await logOf(found))).toBe('done\n')
    expect(await docker('exec', worker.name, 'cat', '/worker/home/made')).toBe('kept\n')
    await found?.terminate()
    expect(await containers(harness.settings.deployment)).toEqual([])
  })

  test('two services on one engine never see workers of each other', async () => {
    const other = await openDocker()
    try {
      const { worker, go } = await begun()
      expect(await other.backend.list()).toEqual([])
      expect(await other.backend.find(worker.name)).toBeUndefined()
      const same = { ...spec('exit 9'), name: worker.name }
      await expect(other.backend.provision(same, NEVER)).rejects.toMatchObject({
        reason: 'startup_failed',
        message: `A container of another service has the name ${worker.name}`,
      })
      await go()
      expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
    } finally {
      await other.dispose()
    }
  })

  test('a container that was made and never started is made anew, and runs once', async () => {
    const runs = join(harness.sharedDir, marker())
    const wanted = spec(`echo ran >>${runs}; exit 5`)
    const labels = { instance: harness.settings.deployment, 'task-id': wanted.taskId }
    const marks = Object.entries(labels).map(
      ([name, value]) => `--label=task-runner.${name}=${value}`,
    )
    await docker('create', '--name', wanted.name, ...marks, TEST_IMAGE, 'true')
    const left = await harness.backend.find(wanted.name)
    expect(await left?.status()).toBe('Provisioning')
    // Whoever waits for it is not told that it has ended.
    const early = new AbortController()
    const waiting = left?.completion(early.signal)
    await expect(Promise.race([waiting, pause(100, 'still waiting')])).resolves.toBe(
      'still waiting',
    )
    early.abort(new Error('enough'))
    await expect(waiting).rejects.toThrow('enough')
    await harness.reopen()
    const { end } = await run(wanted)
    expect(end).toMatchObject({ reason: 'exit_code', exitCode: 5 })
    expect(await text(runs)).toBe('ran\n')
  })

  test('who only read a log forgets it with its worker: another one of that name is another', async () => {
    const reader = new DockerBackend(harness.settings)
    const wanted = spec('echo first; exec sleep 1000')
    const first = await provision(wanted)
    const read = async () => {
      const worker = await reader.find(wanted.name)
      return worker && (await logOf(worker))
    }
    await expect.poll(read).toBe('first\n')
    await first.terminate()
    await provision({ ...wanted, environment: { ...wanted.environment, SCRIPT: 'echo second' } })
    await expect.poll(read).toBe('second\n')
    await reader.close()
  })

  test('who is held up while it makes a worker leaves the one alone that others have made since', async () => {
    const wanted = spec('exit 5')
    const heldUp = Promise.withResolvers<void>()
    const isThere = Promise.withResolvers<void>()
    const isOthers = Promise.withResolvers<void>()
    const goesOn = Promise.withResolvers<void>()
    const first = harness.backend.provision(wanted, NEVER, () => {
      isThere.resolve()
      return heldUp.promise
    })
    await isThere.promise
    const other = new DockerBackend(harness.settings)
    const second = other.provision(wanted, NEVER, async () => {
      isOthers.resolve()
      await goesOn.promise
    })
    await isOthers.promise
    heldUp.reject(new Error('not ours any more'))
    await expect(first).rejects.toThrow('not ours any more')
    const late = async () => Promise.reject(new Error('nor now'))
    await expect(harness.backend.provision(wanted, NEVER, late)).rejects.toThrow('nor now')
    goesOn.resolve()
    expect(await (await second).completion(NEVER)).toMatchObject({ exitCode: 5 })
    await other.close()
  })

  test('a worker that is not wanted any more while it is made leaves nothing', async () => {
    for (let moment = 0; moment < 12; moment += 1) {
      const wanted = spec('exec sleep 1000')
      const cancel = new AbortController()
      const made = harness.backend.provision(wanted, cancel.signal).catch((err: unknown) => err)
      // At some moment of its making, a later one each time.
      await pause(moment * 20)
      cancel.abort(new Error('not wanted'))
      await made
      // As the task runner does.
      await (await harness.backend.find(wanted.name))?.terminate()
      await expect
        .poll(() => containers(harness.settings.deployment), { timeout: 15_000 })
        .toEqual([])
    }
  })
}

if (skipped === undefined) describe('DockerBackend, when things go wrong', tests)
else describe('DockerBackend, when things go wrong', () => test.skip(skipped, () => {}))
