import { isIP } from 'node:net'
import { networkInterfaces } from 'node:os'
import fc from 'fast-check'
import { Agent, request } from 'undici'
import { describe, expect, test } from 'vitest'
import { ConfigError, loadConfig } from '../../src/config.ts'
import { AddressGuard, BlockedAddressError } from '../../src/net/address-guard.ts'
import { startApp, taskRequest } from '../helpers/app.ts'
import { answering, lookupOf, startRawServer, testSender } from '../helpers/hostile-servers.ts'
import { startReceiver } from '../helpers/receiver.ts'
import { startService } from '../helpers/service.ts'

const OK = 'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok'
const NOT_PUBLIC = /^may not be called: [0-9a-f.:]+ is not a public address/
const ITSELF = 'may not be called: it is this service itself'

/** First and last address of each range that no callback may reach (notes/callbacks.md, section 3). */
const DENIED_RANGES: Record<string, [first: string, last: string]> = {
  '0.0.0.0/8': ['0.0.0.0', '0.255.255.255'],
  '10.0.0.0/8': ['10.0.0.0', '10.255.255.255'],
  '100.64.0.0/10': ['100.64.0.0', '100.127.255.255'],
  '127.0.0.0/8': ['127.0.0.0', '127.255.255.255'],
  '169.254.0.0/16': ['169.254.0.0', '169.254.255.255'],
  '172.16.0.0/12': ['172.16.0.0', '172.31.255.255'],
  '192.0.0.0/24': ['192.0.0.0', '192.0.0.255'],
  '192.0.2.0/24': ['192.0.2.0', '192.0.2.255'],
  '192.31.196.0/24': ['192.31.196.0', '192.31.196.255'],
  '192.52.193.0/24': ['192.52.193.0', '192.52.193.255'],
  '192.88.99.0/24': ['192.88.99.0', '192.88.99.255'],
  '192.168.0.0/16': ['192.168.0.0', '192.168.255.255'],
  '192.175.48.0/24': ['192.175.48.0', '192.175.48.255'],
  '198.18.0.0/15': ['198.18.0.0', '198.19.255.255'],
  '198.51.100.0/24': ['198.51.100.0', '198.51.100.255'],
  '203.0.113.0/24': ['203.0.113.0', '203.0.113.255'],
  '224.0.0.0/4': ['224.0.0.0', '239.255.255.255'],
  '240.0.0.0/4': ['240.0.0.0', '255.255.255.255'],
  'Azure wire server': ['168.63.129.16', '168.63.129.16'],
  unspecified: ['::', '::'],
  '::1': ['::1', '::1'],
  'IPv4-compatible ::/96': ['::0.0.0.2', '::255.255.255.255'],
  'SIIT ::ffff:0:0:0/96': ['::ffff:0:0:0', '::ffff:0:ffff:ffff'],
  'NAT64 64:ff9b::/96': ['64:ff9b::', '64:ff9b::ffff:ffff'],
  'NAT64 64:ff9b:1::/48': ['64:ff9b:1::', '64:ff9b:1:ffff:ffff:ffff:ffff:ffff'],
  '100::/64': ['100::', '100::ffff:ffff:ffff:ffff'],
  '100:0:0:1::/64': ['100:0:0:1::', '100:0:0:1:ffff:ffff:ffff:ffff'],
  'Teredo 2001::/32': ['2001::', '2001:0:ffff:ffff:ffff:ffff:ffff:ffff'],
  '2001::/23': ['2001:1::1', '2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff'],
  '2001:db8::/32': ['2001:db8::', '2001:db8:ffff:ffff:ffff:ffff:ffff:ffff'],
  '6to4 2002::/16': ['2002::', '2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff'],
  '3fff::/20': ['3fff::', '3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff'],
  '5f00::/16': ['5f00::', '5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff'],
  'fc00::/7': ['fc00::', 'fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff'],
  'AWS metadata': ['fd00:ec2::254', 'fd00:ec2::254'],
  'fe80::/10': ['fe80::', 'febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff'],
  'fec0::/10': ['fec0::', 'feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff'],
  'ff00::/8': ['ff00::', 'ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff'],
}

/** Public addresses, most of them just outside of a denied range. */
const PUBLIC = [
  ...['1.1.1.1', '9.255.255.255', '11.0.0.0', '100.63.255.255', '100.128.0.0', '126.255.255.255'],
  ...['128.0.0.0', '169.253.255.255', '169.255.0.0', '172.15.255.255', '172.32.0.0', '192.0.1.0'],
  ...['192.0.3.0', '192.31.195.255', '192.31.197.0', '192.52.192.255', '192.52.194.0'],
  ...['192.88.98.255', '192.88.100.0', '192.167.255.255', '192.169.0.0', '192.175.47.255'],
  ...['192.175.49.0', '198.17.255.255', '198.20.0.0', '198.51.99.255', '198.51.101.0'],
  ...['203.0.112.255', '203.0.114.0', '223.255.255.255', '168.63.129.15', '168.63.129.17'],
  ...['2001:200::', '2001:db7:ffff::1', '2001:db9::1', '2003::1', '2606:4700::1111', '2a00::1'],
]

/** Ways to write an address that mean loopback, a private network, or metadata to whoever dials them. */
const SPELLINGS = [
  ...['127.0.0.1', '127.1', '127.0.1', '2130706433', '0x7f.1', '0x7F000001', '0177.0.0.1'],
  ...['017700000001', '0x7f.0x0.0x0.0x1', '127.0.0.1.', '%31%32%37.0.0.1', '127%2e0%2e0%2e1'],
  ...['１２７.０.０.１', '127。0。0。1', '①②⑦.0.0.1', '0', '0x', '0.0.0.0', '256', '00000000'],
  ...[
    '[::1]',
    '[0:0:0:0:0:0:0:1]',
    '[0000::0001]',
    '[::]',
    '[::ffff:127.0.0.1]',
    '[::FFFF:7f00:1]',
  ],
  ...['[0:0:0:0:0:ffff:7f00:0001]', '[::127.0.0.1]', '[::7f00:1]', '[::ffff:0:127.0.0.1]'],
  ...['[64:ff9b::127.0.0.1]', '[64:ff9b::a9fe:a9fe]', '[64:ff9b:1::7f00:1]', '[2002:7f00:1::]'],
  ...['[2002:a9fe:a9fe::1]', '[2001:0:4136:e378:8000:63bf:3fff:fdd2]', '[2001:0:7f00:1::]'],
  ...['localhost', 'LOCALHOST', 'localhost.', 'LocalHost.', 'a.localhost', 'a.b.localhost.'],
  ...['%6c%6f%63%61%6c%68%6f%73%74', 'ｌｏｃａｌｈｏｓｔ', 'local\thost', 'ⓛocalhost'],
  ...['169.254.169.254', '0xa9fea9fe', '2852039166', '0251.0376.0251.0376', '169.254.43518'],
  ...['[::ffff:169.254.169.254]', '[::ffff:a9fe:a9fe]', '[fd00:ec2::254]', '[FD00:EC2:0::0254]'],
  ...['168.63.129.16', '0xa83f8110', '100.100.100.200', '192.0.0.192', '[fe80::1]'],
]

describe('an address that is not public', () => {
  test.each(Object.entries(DENIED_RANGES))('%s is refused from end to end', (_, [first, last]) => {
    const guard = new AddressGuard([])
    for (const address of [first, last]) {
      expect(guard.allows(address), address).toBe(false)
      expect(guard.refusal(urlOf(address)), address).toMatch(NOT_PUBLIC)
      if (isIP(address) !== 4) continue
      expect(guard.refusal(urlOf(`::ffff:${address}`)), `mapped ${address}`).toMatch(NOT_PUBLIC)
      expect(guard.refusal(urlOf(`::${address}`)), `compatible ${address}`).toMatch(NOT_PUBLIC)
    }
  })

  test('its neighbours may be called', () => {
    const guard = new AddressGuard([])
    for (const address of PUBLIC) {
      expect(guard.allows(address), address).toBe(true)
      expect(guard.refusal(urlOf(address)), address).toBeUndefined()
      if (isIP(address) === 4) expect(guard.refusal(urlOf(`::ffff:${address}`))).toBeUndefined()
    }
  })

  test('embedding a public address in a transition address does not open it', () => {
    const guard = new AddressGuard([])
    for (const address of [
      '64:ff9b::8.8.8.8',
      '2002:808:808::1',
      '::8.8.8.8',
      '::ffff:0:8.8.8.8',
    ]) {
      expect(guard.refusal(urlOf(address)), address).toMatch(NOT_PUBLIC)
    }
  })

  test.each(SPELLINGS)('http://%s/ is refused', (host) => {
    const guard = new AddressGuard([])
    for (const scheme of ['http', 'https']) {
      expect(guard.refusal(new URL(`${scheme}://${host}/`))).toMatch(NOT_PUBLIC)
      expect(guard.refusal(new URL(`${scheme}:\\\\${host}:8080\\path`))).toMatch(NOT_PUBLIC)
    }
  })

  test('a link-local address with a zone, as resolvers give it, is refused', () => {
    expect(new AddressGuard([]).allows('fe80::1%eth0')).toBe(false)
    expect(new AddressGuard(['private', 'loopback', '::/0']).allows('fe80::1%eth0')).toBe(false)
  })

  test('names that only look like localhost are left to the resolver', () => {
    const guard = new AddressGuard([])
    for (const host of ['localhost.example', 'notlocalhost', 'example.com', '127.0.0.1.example']) {
      expect(guard.refusal(new URL(`http://${host}/`)), host).toBeUndefined()
    }
  })

  test('random ones are refused in random spellings, and open when named', () => {
    fc.assert(
      fc.property(privateV4, spelling, (octets, spell) => {
        const address = octets.join('.')
        const url = new URL(`http://${spell(octets)}:8080/hook`)
        expect(new AddressGuard([]).refusal(url), url.href).toMatch(NOT_PUBLIC)
        expect(new AddressGuard([`${address}/32`]).refusal(url), url.href).toBeUndefined()
      }),
      { numRuns: 500 },
    )
  })

  test('random IPv6 ones are refused in random spellings', () => {
    const start = fc
      .constantFrom('fc', 'fd', 'ff')
      .chain((high) =>
        fc.integer({ min: 0, max: 255 }).map((low) => high + low.toString(16).padStart(2, '0')),
      )
    const linkLocal = fc.integer({ min: 0xfe80, max: 0xfeff }).map((group) => group.toString(16))
    const group = fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 0xffff }))
    const rest = fc.array(group, { minLength: 7, maxLength: 7 })
    fc.assert(
      fc.property(
        fc.oneof(start, linkLocal),
        rest,
        fc.boolean(),
        fc.boolean(),
        (first, groups, upper, padded) => {
          const text = [
            first,
            ...groups.map((each) => each.toString(16).padStart(padded ? 4 : 1, '0')),
          ].join(':')
          const url = new URL(`http://[${upper ? text.toUpperCase() : text}]/`)
          expect(new AddressGuard([]).refusal(url), url.href).toMatch(NOT_PUBLIC)
        },
      ),
      { numRuns: 300 },
    )
  })
})

describe('an operator who allows networks', () => {
  test('`loopback` opens loopback, in every spelling, and nothing else', () => {
    const guard = new AddressGuard(['loopback'])
    for (const host of [
      '127.0.0.1',
      '127.255.0.3',
      '[::1]',
      'localhost',
      'a.localhost.',
      '0x7f.1',
      '[::ffff:7f00:1]',
    ]) {
      expect(guard.refusal(new URL(`http://${host}:8080/`)), host).toBeUndefined()
    }
    for (const host of [
      '0.0.0.0',
      '10.0.0.1',
      '192.168.0.1',
      '[fd00::1]',
      '169.254.169.254',
      '[::]',
      '[::7f00:1]',
      '[64:ff9b::7f00:1]',
    ]) {
      expect(guard.refusal(new URL(`http://${host}:8080/`)), host).toMatch(NOT_PUBLIC)
    }
  })

  test('`private` opens the private networks and nothing else', () => {
    const guard = new AddressGuard(['private'])
    for (const address of [
      '10.0.0.0',
      '10.255.255.255',
      '172.16.0.0',
      '172.31.255.255',
      '192.168.0.0',
      '192.168.255.255',
      'fc00::',
      'fdff::1',
      '::ffff:10.0.0.1',
    ]) {
      expect(guard.allows(address), address).toBe(true)
    }
    for (const address of [
      '127.0.0.1',
      '::1',
      '100.64.0.1',
      '169.254.1.1',
      'fe80::1',
      'fd00:ec2::254',
      '198.18.0.1',
    ]) {
      expect(guard.allows(address), address).toBe(false)
    }
  })

  test('a CIDR opens exactly its own addresses', () => {
    const guard = new AddressGuard([
      '192.0.2.128/25',
      '10.1.2.3',
      '2001:db8:1::/48',
      '100.64.0.0/10',
    ])
    for (const address of [
      '192.0.2.128',
      '192.0.2.255',
      '10.1.2.3',
      '2001:db8:1:ffff::1',
      '100.64.0.1',
      '::ffff:10.1.2.3',
    ]) {
      expect(guard.allows(address), address).toBe(true)
    }
    for (const address of [
      '192.0.2.127',
      '10.1.2.2',
      '10.1.2.4',
      '2001:db8:2::',
      '2001:db8::1',
      '127.0.0.1',
    ]) {
      expect(guard.allows(address), address).toBe(false)
    }
  })

  const METADATA = [
    ...['169.254.169.254', '169.254.170.2', 'fe80::1', 'fd00:ec2::254', '168.63.129.16'],
    ...['100.100.100.200', '192.0.0.192'],
  ]

  test.each(METADATA)('a wide CIDR does not open %s, its own does', (address) => {
    const wide = [
      '0.0.0.0/0',
      '::/0',
      '0.0.0.0/1',
      '128.0.0.0/1',
      '169.0.0.0/8',
      '169.254.0.0/15',
      '100.64.0.0/10',
      '192.0.0.0/24',
      'fd00::/8',
      'fe00::/8',
      'private',
      'loopback',
    ]
    expect(new AddressGuard(wide).allows(address)).toBe(false)
    expect(new AddressGuard([address]).allows(address)).toBe(true)
    expect(new AddressGuard([...wide, address]).allows(address)).toBe(true)
  })

  test('one metadata address named opens that one alone', () => {
    const guard = new AddressGuard(['169.254.169.254/32', '0.0.0.0/0'])
    expect(guard.allows('169.254.169.254')).toBe(true)
    expect(guard.allows('::ffff:a9fe:a9fe')).toBe(true)
    expect(guard.allows('169.254.169.253')).toBe(false)
    expect(guard.allows('168.63.129.16')).toBe(false)
  })

  test.each([
    ['mapped', '::ffff:169.254.169.254'],
    ['NAT64', '64:ff9b::169.254.169.254'],
    ['SIIT', '::ffff:0:169.254.169.254'],
    ['IPv4-compatible', '::169.254.169.254'],
    ['6to4', '2002:a9fe:a9fe::1'],
  ])('a wide CIDR does not open metadata inside of a %s address', (_, address) => {
    const guard = new AddressGuard(['0.0.0.0/0', '::/0'])
    expect(guard.refusal(urlOf(address))).toMatch(NOT_PUBLIC)
  })
})

describe('the address that is dialled', () => {
  test('a name that is pointed at loopback after the submit check gets no connection', async () => {
    await using target = await startRawServer(answering(OK))
    const answers = [['93.184.215.14'], ['127.0.0.1']]
    const lookup = lookupOf({ 'rebinds.example': () => answers.shift() ?? ['127.0.0.1'] })
    await using callbacks = testSender({ allowed: [], lookup })
    const url = `http://rebinds.example:${target.port}/hook`
    expect(callbacks.guard.refusal(new URL(url))).toBeUndefined()
    // What a check by name would have seen.
    answers.shift()

    // A passing wrong answer of a resolver looks the same: it is tried again.
    expect(await callbacks.send(url)).toEqual({
      statusCode: null,
      error: 'blocked: the name resolves to an address that may not be called',
      retryAfterMs: null,
    })
    expect(target.connections).toHaveLength(0)

    await using allowing = testSender({ lookup })
    expect(await allowing.send(url)).toMatchObject({ statusCode: 200 })
    expect(target.connections).toHaveLength(1)
  })

  test('each new connection is judged anew', async () => {
    await using target = await startRawServer(
      answering('HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n'),
    )
    const answers = [['127.0.0.2'], ['127.0.0.1']]
    await using allowed = await startRawServer(
      answering('HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n'),
      { host: '127.0.0.2', port: target.port },
    )
    const lookup = lookupOf({ 'moves.example': () => answers.shift() ?? [] })
    await using callbacks = testSender({ allowed: ['127.0.0.2'], lookup })
    const url = `http://moves.example:${target.port}/`
    expect(await callbacks.send(url)).toMatchObject({ statusCode: 200 })
    expect(await callbacks.send(url)).toMatchObject({
      statusCode: null,
      error: expect.stringMatching(/^blocked/),
    })
    expect(allowed.connections).toHaveLength(1)
    expect(target.connections).toHaveLength(0)
  })

  test.each([
    ['first', ['127.0.0.1', '127.0.0.2']],
    ['last', ['127.0.0.2', '127.0.0.1']],
    ['of another family', ['::1', '127.0.0.2', '::ffff:127.0.0.1']],
  ])(
    'of a mixed answer only the allowed address is dialled (the denied one comes %s)',
    async (_, addresses) => {
      await using denied = await startRawServer(answering(OK))
      await using allowed = await startRawServer(answering(OK), {
        host: '127.0.0.2',
        port: denied.port,
      })
      const lookup = lookupOf({ 'mixed.example': addresses })
      await using callbacks = testSender({ allowed: ['127.0.0.2/32'], lookup })
      const url = `http://mixed.example:${denied.port}/`
      expect(await callbacks.send(url)).toMatchObject({ statusCode: 200 })
      expect(allowed.connections).toHaveLength(1)

      // Also when the allowed one is dead, there is no falling back to the other.
      await allowed[Symbol.asyncDispose]()
      await using fresh = testSender({ allowed: ['127.0.0.2/32'], lookup })
      expect(await fresh.send(url)).toMatchObject({ statusCode: null, error: 'no connection' })
      expect(denied.connections).toHaveLength(0)
    },
  )

  test.each(['127.0.0.1', '2130706433', '0x7f.1', '127.1', '[::ffff:127.0.0.1]'])(
    'a literal %s is refused by the connector itself',
    async (host) => {
      await using target = await startRawServer(answering(OK))
      const url = `http://${host}:${target.port}/`
      const connect = new AddressGuard([]).connector({ timeoutMs: 2_000 })
      const agent = new Agent({ allowH2: false, connect })
      try {
        await expect(request(url, { dispatcher: agent })).rejects.toThrow(BlockedAddressError)
      } finally {
        await agent.destroy()
      }
      expect(target.connections).toHaveLength(0)

      const allowing = new AddressGuard(['loopback']).connector({ timeoutMs: 2_000 })
      const control = new Agent({ allowH2: false, connect: allowing })
      try {
        expect((await request(url, { dispatcher: control })).statusCode).toBe(200)
      } finally {
        await control.destroy()
      }
      expect(target.connections).toHaveLength(1)
    },
  )

  test('no dns answer at all is a failure that is tried again, not a refusal', async () => {
    await using callbacks = testSender({ lookup: lookupOf({}) })
    expect(await callbacks.send('http://nobody.example/')).toEqual({
      statusCode: null,
      error: 'the name could not be resolved',
      retryAfterMs: null,
    })
  })

  test('a name that leads to where it may not is tried again by the schedule, and no address is told', async () => {
    await using target = await startRawServer(answering(OK))
    const lookup = lookupOf({ 'rebinds.example': ['127.0.0.1'] })
    await using app = await startApp(
      { CALLBACK_ALLOWED_NETWORKS: 'private' },
      {
        wrapPorts: (ports) => ({ ...ports, sender: testSender({ allowed: [], lookup }).sender }),
      },
    )
    const task = taskRequest({ callback_url: `http://rebinds.example:${target.port}/` })
    expect((await app.submit(task)).status).toBe(200)
    await app.finished(task.task_id)
    await expect
      .poll(async () => (await app.get(`/tasks/${task.task_id}/callback`)).body, {
        timeout: 10_000,
      })
      .toMatchObject({ status: 'given_up', next_attempt_at: null })
    const { body } = await app.get(`/tasks/${task.task_id}/callback`)
    expect(body.attempts).toEqual(
      [1, 2, 3, 4].map((number) =>
        expect.objectContaining({
          ...{ number, status_code: null },
          error: 'blocked: the name resolves to an address that may not be called',
        }),
      ),
    )
    expect(JSON.stringify(body)).not.toContain('127.0.0.1')
    expect(target.connections).toHaveLength(0)
  })
})

describe('what an operator can do', () => {
  const env = { CALLBACK_ALLOWED_NETWORKS: 'private', GIT_ALLOWED_NETWORKS: 'private' }

  test('is named in the refusal', async () => {
    await using app = await startApp(env)
    const { body } = await app.submit(taskRequest({ callback_url: 'http://127.0.0.1:9/hook' }))
    expect(body.errors).toEqual([
      {
        path: 'callback_url',
        message:
          'may not be called: 127.0.0.1 is not a public address; the operator can allow it with CALLBACK_ALLOWED_NETWORKS',
      },
    ])
    const git_configs = [{ remote_url: 'http://127.0.0.1:9/repo.git' }]
    const other = await app.submit(taskRequest({ worker_config: { git_configs } }))
    expect(JSON.stringify(other.body)).toContain('can allow it with GIT_ALLOWED_NETWORKS')
  })

  test('sample receivers that are on may be called, where nothing else at loopback may', async () => {
    await using app = await startApp({ ...env, SAMPLE_CALLBACKS: 'true' })
    const { port } = new URL(await app.http.listen({ host: '127.0.0.1', port: 0 }))
    for (const host of ['127.0.0.1', 'localhost']) {
      const at = (path: string, of = port) =>
        app.submit(taskRequest({ callback_url: `http://${host}:${of}${path}` }))
      expect(await at('/workers/cleanup')).toMatchObject({ status: 422 })
      expect(await at('/sample-task-runner-callback', '9')).toMatchObject({ status: 422 })
      const { body, status } = await at('/sample-task-runner-callback')
      expect(status, JSON.stringify(body)).toBe(200)
      await app.finished(String(body.task_id))
      await expect
        .poll(async () => (await app.get(`/tasks/${body.task_id}/callback`)).body.status)
        .toBe('delivered')
    }
  })
})

describe('the service itself', () => {
  test('takes callbacks of its tasks on its sample routes alone', async () => {
    await using app = await startApp()
    const address = await app.http.listen({ host: '127.0.0.1', port: 0 })
    const { port } = new URL(address)
    for (const host of ['127.0.0.1', 'localhost', '[::1]', '0x7f.1', '[::ffff:127.0.0.1]']) {
      for (const path of [
        '/',
        '/task-runner',
        '/tasks/x/cancel',
        '/workers/cleanup',
        '/tasks/x?/sample-task-runner-callback',
        '/sample-task-runner-callback/../workers/cleanup',
      ]) {
        const url = `http://${host}:${port}${path}`
        const refused = await app.submit(taskRequest({ callback_url: url }))
        expect(refused, url).toMatchObject({
          status: 422,
          body: { errors: [{ path: 'callback_url', message: ITSELF }] },
        })
      }
    }
    const tasks = ['', '/', '2', '2/', '?a=b'].map((tail) =>
      taskRequest({ callback_url: `http://127.0.0.1:${port}/sample-task-runner-callback${tail}` }),
    )
    for (const task of tasks) expect((await app.submit(task)).status).toBe(200)
    for (const { task_id } of tasks) {
      await app.finished(task_id)
      await expect
        .poll(async () => (await app.get(`/tasks/${task_id}/callback`)).body.status)
        .toBe('delivered')
    }
  })

  test.each([
    ['a name', 'me.example', ['127.0.0.1'], '127.0.0.1'],
    ['a name with another loopback address', 'me.example', ['127.0.0.2'], '0.0.0.0'],
    ['a name with a mapped address', 'me.example', ['::ffff:127.0.0.1'], '127.0.0.1'],
    ['a name with the address of a network card', 'me.example', [cardAddress()], '0.0.0.0'],
    ['the address of a network card', cardAddress(), [], '0.0.0.0'],
    ['a mapped address', '[::ffff:127.0.0.1]', [], '127.0.0.1'],
    ['a mapped address of a network card', `[::ffff:${cardAddress()}]`, [], '0.0.0.0'],
    ['the unspecified address', '0.0.0.0', [], '127.0.0.1'],
    ['the unspecified IPv6 address', '[::]', [], '::'],
  ])('is not called through %s', async (_, host, addresses, listenOn) => {
    await using service = await startRawServer(answering(OK), { host: listenOn })
    await using other = await startRawServer(answering(OK), { host: listenOn })
    const lookup = lookupOf({ 'me.example': addresses })
    await using callbacks = testSender({ allowed: ['loopback', '0.0.0.0/0', '::/0'], lookup })
    callbacks.guard.ownPort = service.port
    for (const path of ['/workers/cleanup', '/tasks/x/cancel']) {
      expect(await callbacks.send(`http://${host}:${service.port}${path}`)).toMatchObject({
        statusCode: null,
        error: expect.stringMatching(/^blocked/),
      })
    }
    expect(service.connections).toHaveLength(0)
    // Only our own port is special.
    expect(await callbacks.send(`http://${host}:${other.port}/x`)).toMatchObject({
      statusCode: 200,
    })
  })

  test.each([
    ['http:', 80],
    ['https:', 443],
  ])(
    'is not called through a name when it listens on the default port of %s',
    async (protocol, port) => {
      const lookup = lookupOf({ 'me.example': ['127.0.0.1'] })
      const guard = new AddressGuard(['loopback'], { lookup })
      guard.ownPort = port
      const connect = guard.connector({ timeoutMs: 2_000 })
      // As undici calls it: a default port is an empty one.
      const err = await new Promise((resolve) => {
        connect(
          { hostname: 'me.example', host: 'me.example', protocol, port: '' },
          (err, socket) => {
            socket?.destroy()
            resolve(err)
          },
        )
      })
      expect(err).toBeInstanceOf(BlockedAddressError)
    },
  )
})

describe('CALLBACK_ALLOWED_NETWORKS', () => {
  test.each([
    ...[
      '10.0.0.0/33',
      '::/129',
      '10.0.0.0/-1',
      '10.0.0.0/8/8',
      '10.0.0/8/',
      'example.com',
      'PRIVATE',
    ],
    ...['constructor', '__proto__', '10.0.0.0/', '/8', '10.0.0.0 /8', '256.0.0.1', '[::1]', '*'],
  ])('refuses %s at start', (network) => {
    expect(() => loadConfig({ CALLBACK_ALLOWED_NETWORKS: `private,${network}` })).toThrow(
      ConfigError,
    )
    expect(() => loadConfig({ CALLBACK_ALLOWED_NETWORKS: network })).toThrow(
      `CALLBACK_ALLOWED_NETWORKS: "${network}" is not a CIDR`,
    )
  })

  // Read as 8.0.0.0/8, 10.0.0.1/16, 0.0.0.10 and 127.0.0.1/8, which nobody who writes this means.
  test.each(['010.0.0.0/8', '10.1/16', '10', '0x7f.1/8'])(
    'refuses %s, which would open another network than it seems to',
    (network) => {
      expect(() => loadConfig({ CALLBACK_ALLOWED_NETWORKS: network })).toThrow(ConfigError)
    },
  )

  test('a process with a bad one ends before it listens, and says why', async () => {
    const service = await startService({ CALLBACK_ALLOWED_NETWORKS: 'loopback,10.0.0.0/99' })
    try {
      expect(await service.ended).toBe(1)
      expect(service.url).toBe('')
      expect(service.log.join('\n')).toContain('CALLBACK_ALLOWED_NETWORKS: "10.0.0.0/99"')
    } finally {
      await service.kill()
    }
  })

  test('takes CIDRs and names, comma or line separated', () => {
    const { callbackAllowedNetworks } = loadConfig({
      CALLBACK_ALLOWED_NETWORKS: ' private, 100.64.0.0/10\n2001:db8::/32,169.254.169.254',
    })
    expect(callbackAllowedNetworks).toEqual([
      'private',
      '100.64.0.0/10',
      '2001:db8::/32',
      '169.254.169.254',
    ])
  })

  test('is loopback and private on a loopback HOST, and nothing elsewhere', () => {
    for (const HOST of ['127.0.0.1', 'localhost', '::1', '127.0.0.5']) {
      expect(loadConfig({ HOST }).callbackAllowedNetworks).toEqual(['loopback', 'private'])
    }
    for (const HOST of ['0.0.0.0', '::', '192.0.2.1', 'example.com']) {
      expect(loadConfig({ HOST, API_TOKENS: 'a' }).callbackAllowedNetworks).toEqual([])
      expect(
        loadConfig({ HOST, API_TOKENS: 'a', CALLBACK_ALLOWED_NETWORKS: 'loopback' })
          .callbackAllowedNetworks,
      ).toEqual(['loopback'])
    }
    expect(loadConfig({}).callbackAllowedNetworks).toEqual(['loopback', 'private'])
  })

  test('a service that may call nothing but public addresses refuses the others when it is asked', async () => {
    await using receiver = await startReceiver()
    await using app = await startApp({ CALLBACK_ALLOWED_NETWORKS: '192.0.2.0/24' })
    for (const host of SPELLINGS) {
      const answer = await app.submit(
        taskRequest({ callback_url: `http://${host}:${new URL(receiver.url).port}/` }),
      )
      expect(answer, host).toMatchObject({
        status: 422,
        body: {
          success: false,
          errors: [{ path: 'callback_url', message: expect.stringMatching(NOT_PUBLIC) }],
        },
      })
    }
    expect(receiver.received).toEqual([])
  })
})

function urlOf(address: string): URL {
  return new URL(`http://${address.includes(':') ? `[${address}]` : address}/`)
}

/** An IPv4 address of this machine that is not loopback, or loopback where there is no network card. */
function cardAddress(): string {
  const all = Object.values(networkInterfaces()).flatMap((card) => card ?? [])
  return all.find(({ family, internal }) => family === 'IPv4' && !internal)?.address ?? '127.0.0.1'
}

type Octets = [number, number, number, number]

const octet = fc.integer({ min: 0, max: 255 })
const privateV4: fc.Arbitrary<Octets> = fc.oneof(
  fc.tuple(fc.constantFrom(0, 10, 127), octet, octet, octet),
  fc.tuple(fc.constant(172), fc.integer({ min: 16, max: 31 }), octet, octet),
  fc.tuple(fc.constant(192), fc.constant(168), octet, octet),
  fc.tuple(
    fc.constant(100),
    fc.integer({ min: 64, max: 127 }),
    octet,
    fc.integer({ min: 0, max: 199 }),
  ),
)

/** One of the many ways to write the same IPv4 address in a URL. */
const spelling: fc.Arbitrary<(octets: Octets) => string> = fc.oneof(
  fc
    .record({
      parts: fc.integer({ min: 1, max: 4 }),
      bases: fc.array(fc.constantFrom(8, 10, 16), { minLength: 4, maxLength: 4 }),
      dot: fc.constantFrom('.', '%2e', '。', '．'),
      tail: fc.constantFrom('', '.'),
      digits: fc.constantFrom(
        (text: string) => text,
        (text: string) => text.toUpperCase(),
        (text: string) =>
          text.replace(/\d/g, (digit) => String.fromCharCode(0xff10 + Number(digit))),
        (text: string) => text.replace(/\d/g, (digit) => `%3${digit}`),
        (text: string) => text.replace(/(?<=\d)(?=\d)/g, '\t'),
      ),
    })
    .map(({ parts, bases, dot, tail, digits }) => (octets: Octets) => {
      const head: number[] = octets.slice(0, parts - 1)
      const last = octets.slice(parts - 1).reduce((sum, each) => sum * 256 + each, 0)
      const numbers = [...head, last].map((number, index) => {
        if (bases[index] === 8) return `0${number.toString(8)}`
        return bases[index] === 16 ? `0x${number.toString(16)}` : String(number)
      })
      return digits(numbers.join('.')).replaceAll('.', dot) + tail
    }),
  fc
    .constantFrom('::ffff:', '::FFFF:', '0:0:0:0:0:ffff:', '0000::ffff:')
    .map((prefix) => (octets: Octets) => `[${prefix}${octets.join('.')}]`),
  fc.constantFrom('::ffff:', '0:0:0:0:0:FFFF:').map(
    (prefix) =>
      ([a, b, c, d]: Octets) =>
        `[${prefix}${(a * 256 + b).toString(16)}:${(c * 256 + d).toString(16).padStart(4, '0')}]`,
  ),
)
