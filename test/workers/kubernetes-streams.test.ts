/** What the API server streams, and how its streams break. */
import { readdir, readlink } from 'node:fs/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { KubeConfig } from '@kubernetes/client-node'
import { describe, expect, test, vi } from 'vitest'
import { KubernetesApi } from '../../src/workers/kubernetes/api.ts'
import { ApiUnavailableError } from '../../src/workers/kubernetes/failures.ts'
import { PodLog } from '../../src/workers/kubernetes/pod-log.ts'
import { Reflector } from '../../src/workers/kubernetes/reflector.ts'
import { LogRing } from '../../src/workers/log-ring.ts'
import { presets } from '../fakes/kubernetes/presets.ts'
import { type FakeKubernetes, startFakeKubernetes } from '../fakes/kubernetes/server.ts'
import { QUIET } from '../helpers/stores.ts'

const NAMESPACE = 'workers'
const PODS = `/api/v1/namespaces/${NAMESPACE}/pods`
const CONFIG_MAPS = `/api/v1/namespaces/${NAMESPACE}/configmaps`
const LABELS = { app: 'runner' }
const SLOW_MS = 60_000

interface Named {
  metadata: { name: string; uid?: string; resourceVersion?: string; managedFields?: unknown }
  data?: Record<string, string>
}

/** As `expect.poll`, which tests that run together cannot use. */
const soon = (check: () => void | Promise<void>) =>
  vi.waitFor(check, { timeout: 20_000, interval: 10 })

function apiOf(fake: FakeKubernetes): KubernetesApi {
  const load = () => {
    const config = new KubeConfig()
    config.loadFromFile(fake.kubeconfig.path)
    return config
  }
  return new KubernetesApi(load, { callsPerSecond: 1_000, callsAtOnce: 1_000 })
}

async function startReflector(
  options: { idleMs?: number; onChange?: (name: string) => void } = {},
) {
  const fake = await startFakeKubernetes({ namespace: NAMESPACE })
  const api = apiOf(fake)
  const deleted: string[] = []
  const reflector = new Reflector<Named>(api, {
    ...{ path: CONFIG_MAPS, answer: 'ConfigMapList' },
    labelSelector: 'app=runner',
    onChange: ({ metadata }) => options.onChange?.(metadata.name),
    onDeleted: ({ metadata }) => deleted.push(metadata.name),
    log: QUIET,
    idleMs: options.idleMs,
  })
  const make = (name: string, data: Record<string, string> = {}) =>
    fake.create('configmaps', { metadata: { name, labels: LABELS }, data })
  const names = () => [...reflector.objects.values()].map(({ metadata }) => metadata.name).sort()
  const watchThere = () => soon(() => expect(fake.watches.open.size).toBe(1))
  await reflector.synced()
  await watchThere()
  return {
    ...{ fake, api, reflector, deleted, make, names, watchThere },
    calls: (watch: boolean) =>
      fake.requests.filter(({ query }) => (query.watch === 'true') === watch).length,
    breakWatch() {
      for (const watch of fake.watches.open) watch.cut()
    },
    async [Symbol.asyncDispose]() {
      await reflector.stop()
      await api.close()
      await fake[Symbol.asyncDispose]()
    },
  }
}

describe.concurrent('a watch', () => {
  test.each(['http', 'stream', 'close'] as const)(
    'whose past is forgotten (%s) begins with a list, and tells what was deleted meanwhile',
    async (how) => {
      await using it = await startReflector()
      it.make('stays')
      it.make('goes')
      await soon(() => expect(it.names()).toEqual(['goes', 'stays']))
      it.fake.watches.whenExpired = how
      await it.fake.down()
      it.fake.delete('configmaps', 'goes')
      it.make('comes')
      it.fake.compact()
      await it.fake.up()
      await soon(() => expect(it.names()).toEqual(['comes', 'stays']))
      expect(it.deleted).toEqual(['goes'])
      // One that only closes is not asked again and again.
      expect(it.calls(true)).toBeLessThan(8)
      it.make('later')
      await soon(() => expect(it.names()).toContain('later'))
    },
    SLOW_MS,
  )

  test('that is told of its end by an event of another kind begins with a list', async () => {
    await using it = await startReflector()
    const lists = it.calls(false)
    for (const watch of it.fake.watches.open) {
      watch.error({
        kind: 'Status',
        apiVersion: 'v1',
        metadata: {},
        status: 'Failure',
        code: 500,
        reason: 'InternalError',
        message: 'etcd',
      } as never)
    }
    it.make('one')
    await soon(() => expect(it.names()).toEqual(['one']))
    await soon(() => expect(it.calls(false)).toBeGreaterThan(lists))
  })

  test('that is cut goes on where it was: nothing is told again that is over', async () => {
    const told: string[] = []
    await using it = await startReflector({ onChange: (name) => told.push(name) })
    it.make('first')
    await soon(() => expect(told).toEqual(['first']))
    const lists = it.calls(false)
    it.breakWatch()
    it.make('second')
    await soon(() => expect(told).toEqual(['first', 'second']))
    expect(it.calls(false)).toBe(lists)
  })

  test('that has gone silent is made anew', async () => {
    await using it = await startReflector({ idleMs: 300 })
    for (const watch of it.fake.watches.open) watch.freeze()
    it.make('unheard')
    await soon(() => expect(it.names()).toEqual(['unheard']))
  })

  test('that is never answered is made anew', async () => {
    await using it = await startReflector({ idleMs: 300 })
    const isWatch = (query: URLSearchParams) => query.get('watch') === 'true'
    const hole = it.fake.faults.inject({ blackhole: true, query: isWatch, times: 2 })
    it.breakWatch()
    it.make('unheard')
    await soon(() => expect(it.names()).toEqual(['unheard']))
    expect(hole.hits).toBe(2)
  })

  test(
    'takes 5000 events at once',
    async () => {
      await using it = await startReflector()
      it.fake.watches.hold()
      for (let index = 0; index < 5_000; index += 1) it.make(`many-${index}`)
      it.fake.watches.release()
      await soon(() => expect(it.reflector.objects.size).toBe(5_000))
      expect(it.calls(false)).toBe(1)
    },
    SLOW_MS,
  )

  test(
    'that is cut soon after an outage is made anew within two seconds',
    async () => {
      const asked: number[] = []
      const away = new ApiUnavailableError('unreachable', 'away')
      const api = fakeWatches((count) => {
        asked.push(performance.now())
        if (count <= 4) throw away
        return count === 5 ? [Promise.reject(away)] : undefined
      })
      const reflector = new Reflector<Named>(api, {
        ...{ path: CONFIG_MAPS, answer: 'ConfigMapList', labelSelector: '', log: QUIET },
        ...{ onChange: () => {}, onDeleted: () => {} },
      })
      await reflector.synced()
      await vi.waitFor(() => expect(asked).toHaveLength(6), { timeout: SLOW_MS })
      const [answered = 0, next = 0] = asked.slice(-2)
      expect(next - answered).toBeLessThan(2_000)
      await reflector.stop()
    },
    SLOW_MS,
  )

  test('takes them byte by byte, through characters of several', async () => {
    await using it = await startReflector()
    it.fake.watches.pieceBytes = 1
    for (const name of ['one', 'two', 'three']) it.make(name, { text: 'Grüße, 世界 🎉' })
    await soon(() => expect(it.names()).toEqual(['one', 'three', 'two']))
    for (const { data, metadata } of it.reflector.objects.values()) {
      expect(data).toEqual({ text: 'Grüße, 世界 🎉' })
      expect(metadata).not.toHaveProperty('managedFields')
    }
  })

  test('a listener that throws does not keep others from being told', async () => {
    const told: string[] = []
    await using it = await startReflector({
      onChange: (name) => {
        told.push(name)
        if (name === 'malformed') throw new TypeError('no status')
      },
    })
    for (const name of ['before', 'malformed', 'after']) it.make(name)
    await soon(() => expect(told).toEqual(['before', 'malformed', 'after']))
    expect(it.calls(true)).toBe(1)
  })

  test('an event that is no JSON does not keep others from being told, and is not asked for again', async () => {
    const events = [
      '{"type":"ADDED","object":{"metadata":{"name":"a","uid":"1","resourceVersion":"2"}}}\n',
      'broken\n{"type":"ADDED"}\n{"type":"ADDED","object":{}}\n\n',
      '{"type":"ADDED","object":{"metadata":{"name":"b","uid":"2","resourceVersion":"3"}}}\n',
    ]
    const versions: string[] = []
    const api = fakeWatches((count, version) => {
      versions.push(version)
      return count === 1 ? events.map((event) => Buffer.from(event)) : undefined
    })
    const reflector = new Reflector<Named>(api, {
      ...{ path: CONFIG_MAPS, answer: 'ConfigMapList', labelSelector: '', log: QUIET },
      ...{ onChange: () => {}, onDeleted: () => {} },
    })
    await reflector.synced()
    await soon(() => expect([...reflector.objects.keys()]).toEqual(['1', '2']))
    await soon(() => expect(versions).toEqual(['1', '3']))
    await reflector.stop()
  })
})

test(
  'a watch that is started and stopped a thousand times leaves no connection and no memory',
  async () => {
    // The limits of calls stay for their 30 seconds, whatever has become of the call: they are not what is measured.
    vi.spyOn(AbortSignal, 'timeout').mockImplementation(() => new AbortController().signal)
    await using fake = await startFakeKubernetes({ namespace: NAMESPACE })
    const rounds = async (count: number) => {
      for (let round = 0; round < count; round += 1) {
        const api = apiOf(fake)
        const reflector = new Reflector<Named>(api, {
          ...{ path: CONFIG_MAPS, answer: 'ConfigMapList', labelSelector: '', log: QUIET },
          ...{ onChange: () => {}, onDeleted: () => {} },
        })
        // Stopped at other moments each time: before, during and after list and watch.
        const synced = reflector.synced()
        if (round % 3 !== 0) await synced
        else synced.catch(() => {})
        await reflector.stop()
        await api.close()
      }
      await soon(() => expect(fake.watches.open.size).toBe(0))
      // The fake's memory of them is not what is measured.
      fake.requests.length = 0
    }
    const sockets = async () => {
      const links = (await readdir('/proc/self/fd')).map((fd) =>
        readlink(`/proc/self/fd/${fd}`).catch(() => ''),
      )
      return (await Promise.all(links)).filter((link) => link.startsWith('socket:')).length
    }
    // What is made once is made by then.
    await rounds(100)
    const socketsBefore = await sockets()
    const heapBefore = heapBytes()
    await rounds(1_000)
    await soon(async () => expect(await sockets()).toBeLessThanOrEqual(socketsBefore))
    // One that is kept holds 25 KB. What is held weakly goes only with a later collection.
    await soon(() => expect(heapBytes() - heapBefore).toBeLessThan(1_000 * 1024))
  },
  SLOW_MS,
)

/** Of what is still in use. */
function heapBytes(): number {
  setFlagsFromString('--expose-gc')
  runInNewContext('gc')()
  return process.memoryUsage().heapUsed
}

/** An API server without objects; undefined: that watch says nothing. */
function fakeWatches(
  answer: (count: number, version: string) => Iterable<Buffer | Promise<Buffer>> | undefined,
): KubernetesApi {
  let count = 0
  const api = {
    json: async () => ({ metadata: { resourceVersion: '1' }, items: [] }),
    async stream(_: string, { query = {}, signal }: { query?: object; signal?: AbortSignal }) {
      count += 1
      return (
        answer(count, Object(query).resourceVersion) ??
        new Promise((_, reject) => {
          signal?.addEventListener('abort', () => reject(signal.reason))
        })
      )
    },
  }
  // Holds: the reflector calls nothing else.
  return api as unknown as KubernetesApi
}

async function startLog({
  silentMs,
  capacity = 5 * 2 ** 20,
}: {
  silentMs?: number
  capacity?: number
} = {}) {
  const fake = await startFakeKubernetes({ namespace: NAMESPACE, behave: () => presets.runs() })
  fake.admission.podSecurity = 'privileged'
  const api = apiOf(fake)
  const ring = new LogRing(capacity)
  fake.create('pods', {
    metadata: { name: 'p' },
    spec: { restartPolicy: 'Never', containers: [{ name: 'task', image: 'i' }] },
  })
  await soon(() => expect(fake.object('pods', 'p')?.status.phase).toBe('Running'))
  const log = new PodLog(api, { path: `${PODS}/p/log`, container: 'task', ring, silentMs })
  const stop = new AbortController()
  const following = log.follow(stop.signal)
  const handle = fake.kubelet.handle('p')
  await soon(() => expect(fake.logs.streams.size).toBe(1))
  return {
    ...{ fake, ring, log, handle, following },
    say: (output: string | Buffer) => handle.log(output),
    text: () => ring.tail(capacity).content.toString('latin1'),
    /** Waits for the next stream after something was done to this one. */
    async broken(how: 'cut' | 'end' | 'stall') {
      const before = [...fake.logs.streams]
      for (const stream of before) stream[how]()
      await soon(() => {
        expect([...fake.logs.streams].filter((stream) => !before.includes(stream))).toHaveLength(1)
      })
    },
    async ended() {
      handle.exit(0)
      log.over()
      await following
      await log.rest(AbortSignal.timeout(5_000))
    },
    async [Symbol.asyncDispose]() {
      stop.abort()
      await following
      await api.close()
      await fake[Symbol.asyncDispose]()
    },
  }
}

const lines = (from: number, to: number) =>
  Array.from({ length: to - from }, (_, index) => `line ${from + index}\n`).join('')

describe.concurrent('a log', () => {
  test.each(['cut', 'end', 'stall'] as const)(
    'whose stream breaks (%s), again and again within one second, has each line once',
    async (how) => {
      await using it = await startLog({ silentMs: 400 })
      for (let round = 0; round < 4; round += 1) {
        it.say(lines(round * 500, round * 500 + 500))
        await it.broken(how)
      }
      it.say(lines(2_000, 2_100))
      await it.ended()
      expect(it.text()).toBe(lines(0, 2_100))
    },
    SLOW_MS,
  )

  test(
    'that is cut amid a line, at every place',
    async () => {
      await using it = await startLog()
      const whole = lines(0, 8)
      it.say(whole)
      await soon(() => expect(it.text()).toBe(whole))
      for (const bytes of [1, 20, 31, 32, 36, 45, 100]) {
        const fault = it.fake.faults.inject({
          path: `${PODS}/p/log`,
          cutAfterBytes: bytes,
          times: 1,
        })
        await it.broken('cut')
        expect(fault.hits).toBe(1)
      }
      it.say('the end\n')
      await it.ended()
      expect(it.text()).toBe(`${whole}the end\n`)
    },
    SLOW_MS,
  )

  test.each(['trimmed', 'fixed'] as const)('with times that are %s', async (format) => {
    await using it = await startLog()
    it.fake.logs.timestampFormat = format
    it.say(lines(0, 50))
    await it.broken('cut')
    it.say(lines(50, 100))
    await it.ended()
    expect(it.text()).toBe(lines(0, 100))
  })

  test(
    'with lines longer than the pieces of a container’s runtime, and cut within',
    async () => {
      await using it = await startLog()
      const long = `${'x'.repeat(100_000)}\n`
      it.say(long)
      const fault = it.fake.faults.inject({
        path: `${PODS}/p/log`,
        cutAfterBytes: 40_000,
        times: 1,
      })
      await it.broken('cut')
      await it.broken('end')
      expect(fault.hits).toBe(1)
      it.say(`${'y'.repeat(70_000)}`)
      await it.broken('cut')
      it.say(`${'z'.repeat(30_000)}\nshort\n`)
      await it.ended()
      expect(it.text()).toBe(`${long}${'y'.repeat(70_000)}${'z'.repeat(30_000)}\nshort\n`)
    },
    SLOW_MS,
  )

  test('with bytes that are no text', async () => {
    await using it = await startLog()
    const bytes = Buffer.from([...Array(256).keys(), 0, 0xff, 0xfe, 0x0a])
    it.say(bytes)
    await it.broken('cut')
    it.say(Buffer.concat([bytes, Buffer.from('no newline at the end')]))
    await it.ended()
    expect(it.text()).toBe(
      `${Buffer.concat([bytes, bytes]).toString('latin1')}no newline at the end`,
    )
  })

  test(
    'of 20 MB, rotated on the way, ends with the last 5 MB to the byte',
    async () => {
      await using it = await startLog()
      it.fake.logs.rotateAtBytes = 10 * 2 ** 20
      const filler = ` ${'.'.repeat(1_000)} `
      const written: string[] = []
      for (let block = 0; block < 20; block += 1) {
        const text = lines(block * 1_000, block * 1_000 + 1_000).replaceAll(' ', filler)
        written.push(text)
        it.say(text)
        const total = written.join('').length
        // As fast as it is followed: what a node has rotated away is gone.
        await soon(() => expect(it.ring.totalBytes).toBe(total))
        if (block % 7 === 3) await it.broken('cut')
      }
      await it.ended()
      const whole = written.join('')
      expect(whole.length).toBeGreaterThan(20 * 10 ** 6)
      expect(it.ring.totalBytes).toBe(whole.length)
      expect(it.text() === whole.slice(-5 * 2 ** 20)).toBe(true)
    },
    SLOW_MS,
  )

  test(
    'that a node cannot give at the moment is asked for again, and its words are no log',
    async () => {
      await using it = await startLog()
      it.say('one\n')
      await soon(() => expect(it.text()).toBe('one\n'))
      it.fake.logs.unavailable.add('p')
      for (const stream of it.fake.logs.streams) stream.end()
      const asked = () => it.fake.requests.filter(({ path }) => path.endsWith('/log')).length
      const before = asked()
      await soon(() => expect(asked()).toBeGreaterThan(before + 1))
      await expect(it.log.rest(AbortSignal.timeout(5_000))).rejects.toThrow(
        /unable to retrieve container logs/,
      )
      it.fake.logs.unavailable.clear()
      await soon(() => expect(it.fake.logs.streams.size).toBe(1))
      it.say('two\n')
      await it.ended()
      expect(it.text()).toBe('one\ntwo\n')
    },
    SLOW_MS,
  )

  test('in the time zone of its node', async () => {
    const ring = new LogRing(1_000)
    const asked: Array<string | undefined> = []
    const bodies = [
      '2026-01-01T12:00:00.5+02:00 one\n2026-01-01T12:00:01+02:00 tw',
      '2026-01-01T12:00:01+02:00 two\n2026-01-01T12:00:01.25+02:00 three\n',
    ]
    const api = {
      async stream(_: string, { query = {} }: { query?: { sinceTime?: string } }) {
        asked.push(query.sinceTime)
        return [Buffer.from(bodies[asked.length - 1] ?? '')]
      },
    } as unknown as KubernetesApi
    const log = new PodLog(api, { path: '', container: 'task', ring })
    for (const _ of bodies) await log.rest(AbortSignal.timeout(1_000))
    expect(asked).toEqual([undefined, '2026-01-01T10:00:01Z'])
    expect(ring.tail(1_000).content.toString()).toBe('one\ntwo\nthree\n')
  })

  test('a line that began before what was asked for: its rest is passed over', async () => {
    const ring = new LogRing(1_000)
    const bodies = [
      '2026-01-01T10:00:00.9Z a long line\n2026-01-01T10:00:01Z two\n',
      'ong line\n2026-01-01T10:00:01Z two\n2026-01-01T10:00:02Z three\n',
    ]
    let calls = 0
    const api = {
      stream: async () => [Buffer.from(bodies[calls++] ?? '')],
    } as unknown as KubernetesApi
    const log = new PodLog(api, { path: '', container: 'task', ring })
    for (const _ of bodies) await log.rest(AbortSignal.timeout(1_000))
    expect(ring.tail(1_000).content.toString()).toBe('a long line\ntwo\nthree\n')
  })
})
