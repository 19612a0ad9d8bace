import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { describe, expect, test } from 'vitest'
import { UnavailableError } from '../../src/core/errors.ts'
import { READ_AGAIN } from '../../src/workers/docker/container-log.ts'
import { Engine, EngineError } from '../../src/workers/docker/engine.ts'
import {
  type DockerHarness,
  docker,
  type EngineProxy,
  type Intercept,
  openDocker,
  provisionPatiently,
  refuse,
  startEngineProxy,
  whyNoDocker,
} from '../helpers/docker.ts'
import { logOf, marker, NEVER, spec, text, touch } from '../workers/contract.ts'

const skipped = await whyNoDocker()

/** A backend on the real engine, with a proxy between them. */
async function through(
  intercept: Intercept,
  use: (harness: DockerHarness, proxy: EngineProxy) => Promise<void>,
): Promise<void> {
  await using proxy = await startEngineProxy(intercept)
  const harness = await openDocker({ engine: { socketPath: proxy.socketPath } })
  try {
    await use(harness, proxy)
  } finally {
    await harness.dispose()
  }
}

/** Drops the engine's answer to the first request like this, once it has answered. */
function losing(like: RegExp): Intercept {
  let isLost = false
  return (request, response, forward) => {
    if (isLost || !like.test(`${request.method} ${request.url}`)) return false
    isLost = true
    forward().on('response', (answer) => {
      answer.resume()
      answer.on('end', () => response.destroy())
    })
    return true
  }
}

function tests(): void {
  describe('answers that get lost', () => {
    test('a container whose making was not heard of is made anew, and runs once', async () => {
      await through(
        losing(/^POST .*\/containers\/create/),
        async ({ backend, sharedDir }, proxy) => {
          const runs = join(sharedDir, marker())
          const wanted = spec(`echo ran >>${runs}; exit 5`)
          await expect(backend.provision(wanted, NEVER)).rejects.toThrow(UnavailableError)
          const worker = await backend.provision(wanted, NEVER)
          expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
          expect(await text(runs)).toBe('ran\n')
          const creates = proxy.requests.filter((request) => request.includes('/containers/create'))
          expect(creates).toHaveLength(2)
        },
      )
    })

    test('a task whose start was not heard of runs once, and its log is whole', async () => {
      await through(losing(/^POST .*\/start/), async ({ backend, sharedDir }) => {
        const runs = join(sharedDir, marker())
        const wanted = spec(`echo ran | tee -a ${runs}; exit 5`)
        await expect(backend.provision(wanted, NEVER)).rejects.toThrow(UnavailableError)
        const worker = await backend.provision(wanted, NEVER)
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
        expect(await text(runs)).toBe('ran\n')
        expect(await logOf(worker)).toBe('ran\n')
      })
    })

    test.each([
      ['files', /^PUT .*\/archive/],
      ['the image', /^GET .*\/images\//],
      ['what there is', /^GET .*\/containers\/[^/]+\/json/],
      ['the end', /^POST .*\/wait/],
      ['the exit', /^GET .*\/archive/],
    ])('a lost answer about %s is asked for again', async (_, like) => {
      await through(losing(like), async ({ backend }) => {
        const worker = await provisionPatiently(backend, spec('echo ran; exit 5'))
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
        expect(await logOf(worker)).toBe('ran\n')
      })
    })

    test('a removal that was not heard of can be repeated', async () => {
      await through(losing(/^DELETE /), async ({ backend }) => {
        const worker = await backend.provision(spec('true'), NEVER)
        await expect(worker.terminate()).rejects.toThrow(EngineError)
        await worker.terminate()
        expect(await backend.list()).toEqual([])
      })
    })
  })

  test('a log goes on where it was when its stream is cut, again and again', async () => {
    await through(
      () => false,
      async ({ backend, sharedDir }, proxy) => {
        const next = [marker(), marker(), marker()].map((name) => join(sharedDir, name))
        const steps = next.map((file) => `until [ -e ${file} ]; do sleep 0.02; done; echo step`)
        const worker = await backend.provision(spec(`echo step; ${steps.join('; ')}`), NEVER)
        let seen = ''
        for await (const chunk of worker.follow({ from: 0, signal: NEVER })) {
          seen += chunk
          proxy.cut()
          const file = next.shift()
          if (file) await touch(file)
        }
        expect(seen).toBe('step\n'.repeat(4))
        expect((await worker.completion(NEVER)).reason).toBe('completed')
        expect(await logOf(worker)).toBe('step\n'.repeat(4))
      },
    )
  })

  test('a line whose stream is cut comes again to followers, and once in the log', async () => {
    await through(
      () => false,
      async ({ backend, sharedDir }, proxy) => {
        const go = join(sharedDir, marker())
        const script = `echo one; printf two; until [ -e ${go} ]; do sleep 0.02; done; echo ' three'`
        const worker = await backend.provision(spec(script), NEVER)
        let seen = ''
        for await (const chunk of worker.follow({ from: 0, signal: NEVER })) {
          seen += chunk
          if (seen !== 'one\ntwo') continue
          proxy.cut()
          await touch(go)
        }
        expect(seen).toBe(`one\ntwo\n${READ_AGAIN}two three\n`)
        expect((await worker.completion(NEVER)).reason).toBe('completed')
        expect(await logOf(worker)).toBe('one\ntwo three\n')
      },
    )
  })

  test('a log whose beginning the engine has dropped has its end, and followers miss none of it', async () => {
    let drops = false
    // As an engine that rotates: the second reading begins in the middle.
    const intercept: Intercept = (request, response, forward) => {
      if (!(drops && /\/logs\?/.test(request.url ?? ''))) return false
      forward().on('response', async (answer) => {
        response.writeHead(200)
        let toDrop = 2_000_000
        let unread = Buffer.alloc(0)
        for await (const chunk of answer) {
          unread = Buffer.concat([unread, chunk as Buffer])
          while (unread.length >= 8 && unread.length >= 8 + unread.readUInt32BE(4)) {
            const frame = unread.subarray(0, 8 + unread.readUInt32BE(4))
            unread = unread.subarray(frame.length)
            toDrop -= frame.length - 8
            if (toDrop < 0) response.write(frame)
          }
        }
        response.end()
      })
      return true
    }
    await through(intercept, async ({ backend, sharedDir }, proxy) => {
      const go = join(sharedDir, marker())
      const script = `seq -f %099.0f 60000; until [ -e ${go} ]; do sleep 0.02; done; echo end`
      const worker = await backend.provision(spec(script), NEVER)
      const total = async () => (await worker.logs({ maxBytes: 0 })).totalBytes
      await expect.poll(total, { timeout: 20_000 }).toBe(6_000_000)
      const line = (index: number) => `${String(index).padStart(99, '0')}\n`
      const chunks: Buffer[] = []
      const following = (async () => {
        for await (const chunk of worker.follow({ from: 5_999_900, signal: NEVER })) {
          chunks.push(chunk)
        }
      })()
      await expect.poll(() => chunks.length).toBe(1)
      drops = true
      proxy.cut()
      await touch(go)
      expect((await worker.completion(NEVER)).reason).toBe('completed')
      expect(await total()).toBe(4_000_004)
      expect(await logOf(worker, 104)).toBe(`${line(60_000)}end\n`)
      await following
      const kept = Array.from({ length: 40_000 }, (_, index) => line(20_001 + index))
      const seen = Buffer.concat(chunks).toString()
      expect(seen === `${line(60_000)}${READ_AGAIN}${kept.join('')}end\n`).toBe(true)
    })
  })

  test('an engine that fails for a while does not judge a task', async () => {
    let failing = false
    const intercept: Intercept = (_, response) => {
      if (failing) response.writeHead(500).end('{"message":"containerd is away"}')
      return failing
    }
    await through(intercept, async ({ backend, sharedDir }, proxy) => {
      const go = join(sharedDir, marker())
      const script = `until [ -e ${go} ]; do sleep 0.02; done; echo ran; exit 5`
      const worker = await backend.provision(spec(script), NEVER)
      const end = worker.completion(NEVER)
      failing = true
      proxy.cut()
      const asked = proxy.requests.length
      await touch(go)
      await expect.poll(() => proxy.requests.length, { timeout: 15_000 }).toBeGreaterThan(asked + 2)
      failing = false
      expect(await end).toMatchObject({ exitCode: 5 })
      expect(await logOf(worker)).toBe('ran\n')
    })
  })

  test('without the flag in its state, the event tells that a task ran out of memory', async () => {
    const intercept: Intercept = (request, response, forward) => {
      if (!/^\/v[\d.]+\/containers\/[^/]+\/json/.test(request.url ?? '')) return false
      forward().on('response', async (answer) => {
        let body = ''
        for await (const chunk of answer) body += chunk
        response.writeHead(answer.statusCode ?? 0)
        response.end(body.replace('"OOMKilled":true', '"OOMKilled":false'))
      })
      return true
    }
    const resources = { cpus: 1, memoryBytes: 64 * 2 ** 20, gpus: 0 }
    await through(intercept, async ({ backend }) => {
      const script = `exec python3 -c 'x = bytearray(500 * 2**20)'`
      const worker = await backend.provision(spec(script, { resources }), NEVER)
      expect(await worker.completion(NEVER)).toMatchObject({ reason: 'oom_killed', exitCode: 137 })
      const killed = await backend.provision(spec('kill -KILL $$', { resources }), NEVER)
      expect(await killed.completion(NEVER)).toMatchObject({ reason: 'signal' })
    })
  })

  describe('other engines', () => {
    const withVersion =
      (version: string): Intercept =>
      (request, response) => {
        if (request.url !== '/_ping') return false
        response.writeHead(200, { 'api-version': version }).end('OK')
        return true
      }

    test.each([
      ['1.40', 'v1.40'],
      ['1.24', 'v1.24'],
      ['1.47', 'v1.47'],
      ['1.99', 'v1.47'],
      ['2.0', 'v1.47'],
    ])('one that speaks %s is spoken to in %s', async (version, spoken) => {
      await using proxy = await startEngineProxy((request, response, forward) => {
        if (withVersion(version)(request, response, forward)) return true
        response.end('OK')
        return true
      })
      const engine = new Engine({ socketPath: proxy.socketPath })
      await engine.text('GET', '/_ping')
      await engine.text('GET', '/info')
      expect(proxy.requests).toEqual([
        'GET /_ping',
        `GET /${spoken}/_ping?`,
        `GET /${spoken}/info?`,
      ])
      await engine.close()
    })

    test('an older one runs tasks', async () => {
      await through(withVersion('1.30'), async ({ backend }, proxy) => {
        const worker = await backend.provision(spec('echo ran; exit 5'), NEVER)
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
        expect(await logOf(worker)).toBe('ran\n')
        const others = proxy.requests.filter((request) => !/ \/(v1\.30\/|_ping)/.test(request))
        expect(others).toEqual([])
      })
    })

    test('Podman is asked for its own log driver, Docker for the one that keeps every byte', async () => {
      const podman = { Components: [{ Name: 'Podman Engine', Version: '4.3.1' }] }
      const asPodman: Intercept = (request, response) => {
        if (!request.url?.includes('/version')) return false
        response.end(JSON.stringify(podman))
        return true
      }
      const driverThrough = async (intercept: Intercept) => {
        let driver = ''
        await through(intercept, async ({ backend }) => {
          const worker = await backend.provision(spec('echo ran'), NEVER)
          expect((await worker.completion(NEVER)).reason).toBe('completed')
          expect(await logOf(worker)).toBe('ran\n')
          driver = await docker('inspect', '-f', '{{.HostConfig.LogConfig.Type}}', worker.name)
        })
        return driver.trim()
      }
      expect(await driverThrough(asPodman)).toBe('json-file')
      expect(await driverThrough(() => false)).toBe('local')
    })

    test('one at an address is reached with TLS, which knows both sides', async () => {
      const folder = await mkdtemp(join(tmpdir(), 'engine-tls-'))
      const make = promisify(execFile)
      const openssl = (...args: string[]) => make('openssl', args, { cwd: folder })
      const subject = (name: string) => ['-nodes', '-subj', `/CN=${name}`, '-keyout', `${name}.key`]
      await openssl('req', '-x509', '-newkey', 'rsa:2048', ...subject('ca'), '-out', 'ca.pem')
      await writeFile(join(folder, 'names'), 'subjectAltName=IP:127.0.0.1')
      for (const name of ['server', 'client']) {
        await openssl('req', '-newkey', 'rsa:2048', ...subject(name), '-out', `${name}.req`)
        const signing = [
          '-CA',
          'ca.pem',
          '-CAkey',
          'ca.key',
          '-CAcreateserial',
          '-extfile',
          'names',
        ]
        await openssl('x509', '-req', '-in', `${name}.req`, ...signing, '-out', `${name}.pem`)
      }
      const read = (name: string) => readFile(join(folder, name), 'utf8')
      const [ca, key, cert] = await Promise.all(['ca.pem', 'client.key', 'client.pem'].map(read))
      if (!ca || !key || !cert) throw new Error('no certificates')
      await using proxy = await startEngineProxy(() => false, {
        ...{ ca, key: await read('server.key'), cert: await read('server.pem') },
        ...{ requestCert: true, rejectUnauthorized: true },
      })
      const url = `https://127.0.0.1:${proxy.port}`
      const harness = await openDocker({ engine: { url, tls: { ca, key, cert } } })
      try {
        const worker = await harness.backend.provision(spec('echo ran; exit 5'), NEVER)
        expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 5 })
        expect(await logOf(worker)).toBe('ran\n')
        const stranger = await openssl(
          'req',
          '-x509',
          ...['-newkey', 'rsa:2048'],
          ...subject('other'),
        )
        const otherCa = { ca: stranger.stdout, key, cert }
        const otherKey = { ca, key: await read('other.key'), cert: stranger.stdout }
        for (const tls of [otherCa, otherKey]) {
          const engine = new Engine({ url, tls })
          await expect(engine.text('GET', '/_ping')).rejects.toThrow(EngineError)
          await engine.close()
        }
      } finally {
        await harness.dispose()
        await rm(folder, { recursive: true })
      }
    })
  })

  describe('pulling', () => {
    /** An engine without the image, whose pulls say these lines, each time the next ones. */
    async function pulling(
      answers: string[][],
      image: string,
      use: (result: Promise<string>, proxy: EngineProxy) => Promise<void>,
      signal = NEVER,
    ): Promise<void> {
      let isThere = false
      const intercept: Intercept = (request, response) => {
        if (/\/images\/[^?]*\/json/.test(request.url ?? '')) {
          if (isThere) response.writeHead(200).end('{}')
          else refuse(response, 404, 'No such image: x')
          return true
        }
        if (!request.url?.includes('/images/create')) return false
        const lines = answers.shift() ?? []
        response.writeHead(200, { 'content-type': 'application/json' })
        for (const line of lines) response.write(line)
        if (lines.at(-1)?.endsWith('\n')) {
          isThere = true
          response.end()
        } else response.socket?.end()
        return true
      }
      await through(intercept, async ({ backend }, proxy) => {
        const wanted = spec('echo ran', { image })
        const made =
          signal === NEVER ? provisionPatiently(backend, wanted) : backend.provision(wanted, signal)
        const result = made.then(async (worker) => {
          await worker.completion(NEVER)
          return logOf(worker)
        })
        // Whoever uses it looks at it.
        result.catch(() => {})
        await use(result, proxy)
      })
    }
    const PROGRESS = ['{"status":"Pulling fs layer","id":"a"}\r\n{"stat', 'us":"Downloading"}\r\n']

    test('progress in pieces is read over, and how long it took is told', async () => {
      await pulling([PROGRESS], 'task-runner-test', async (result, proxy) => {
        expect(await result).toMatch(
          /^\[task-runner\] pulled task-runner-test:latest in \d+ s\nran\n$/,
        )
        const pulls = proxy.requests.filter((request) => request.includes('/images/create'))
        expect(pulls).toEqual([expect.stringContaining('fromImage=task-runner-test%3Alatest')])
      })
    })

    test("a failure in the middle of it is told in the registry's words", async () => {
      const failure = `${JSON.stringify({ errorDetail: { message: 'x' }, error: 'toomanyrequests: slow down' })}\n`
      const told = async (result: Promise<string>) => {
        await expect(result).rejects.toMatchObject({
          reason: 'image_pull_failed',
          message: 'The image private/image:latest could not be pulled: toomanyrequests: slow down',
        })
      }
      const answers = Array.from({ length: 5 }, () => [...PROGRESS, failure])
      await pulling(answers, 'private/image', told, AbortSignal.timeout(1_000))
    })

    test('one that is cut is made again', async () => {
      await pulling(
        [[PROGRESS[0] as string], PROGRESS],
        'task-runner-test',
        async (result, proxy) => {
          expect(await result).toMatch(/ran\n$/)
          const pulls = proxy.requests.filter((request) => request.includes('/images/create'))
          expect(pulls).toHaveLength(2)
        },
      )
    })
  })
}

describe('an engine that does not answer', () => {
  test('is unreachable after a while, also at its first question', async () => {
    const server = createServer(() => {})
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    const engine = new Engine({ url: `http://127.0.0.1:${port}` }, 100)
    await expect(engine.text('GET', '/info')).rejects.toThrow(EngineError)
    server.removeAllListeners('request')
    server.on('request', ({ url }, response) => {
      if (url === '/_ping') response.writeHead(200, { 'api-version': '1.41' }).end()
    })
    await expect(engine.text('GET', '/info')).rejects.toMatchObject({ kind: 'timeout' })
    await expect(engine.text('GET', '/info')).rejects.toThrow(EngineError)
    await engine.close()
    server.closeAllConnections()
    server.close()
  })

  test.skipIf(process.getuid?.() !== 0)('says so when its socket is not for us', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'engine-socket-'))
    const socketPath = join(folder, 'socket')
    const server = createServer().listen(socketPath)
    await once(server, 'listening')
    await chmod(folder, 0o755)
    await chmod(socketPath, 0o600)
    const module = new URL('../../src/workers/docker/engine.ts', import.meta.url).pathname
    const script = `import { Engine } from ${JSON.stringify(module)}
      const engine = new Engine({ socketPath: ${JSON.stringify(socketPath)} })
      await engine.text('GET', '/info').catch((err) => console.log(err.name, err.message))`
    const args = ['--input-type=module', '--eval', script]
    const nobody = { uid: 65_534, gid: 65_534 }
    const { stdout } = await promisify(execFile)(process.execPath, args, nobody)
    expect(stdout).toBe('EngineError The Docker engine does not answer (EACCES)\n')
    server.close()
    await rm(folder, { recursive: true })
  })

  test('is unreachable where nothing listens', async () => {
    const engine = new Engine({ socketPath: '/nowhere/docker.sock' })
    await expect(engine.text('GET', '/info')).rejects.toThrow(
      'The Docker engine does not answer (ENOENT)',
    )
    await engine.close()
  })
})

if (skipped === undefined) describe('DockerBackend and its engine', tests)
else describe('DockerBackend and its engine', () => test.skip(skipped, () => {}))
