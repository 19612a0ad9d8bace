import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { availableParallelism, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { describe, expect, test } from 'vitest'
import { withTable } from '../docs/readme-table.ts'
import { ConfigError, loadConfig, VARIABLES } from '../src/config.ts'

/** The message that stops the start. */
function problemsOf(env: Record<string, string>): string {
  try {
    loadConfig(env)
  } catch (err) {
    if (err instanceof ConfigError) return err.message
    throw err
  }
  return ''
}

describe('defaults', () => {
  test('an empty environment gives a service on loopback', () => {
    expect(loadConfig({})).toMatchObject({
      host: '127.0.0.1',
      port: 3000,
      basePath: '',
      apiTokens: [],
      authOff: false,
      dataDir: resolve('data'),
      tasksDir: resolve('tasks'),
      concurrency: 4 * availableParallelism(),
      queuedMax: 100_000,
      taskTimeoutSeconds: 86_400,
      provisioningTimeoutMs: 59_000,
      terminationGraceMs: 10_000,
      maxLogBytes: 1024 * 1024 * 1024,
      callbackTimeoutMs: 15_000,
      callbackRetryDelaysMs: [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400].map(
        (seconds) => seconds * 1000,
      ),
      callbackAllowedNetworks: ['loopback', 'private'],
      sealingKey: undefined,
      pythonCommand: 'python3',
      shellCommand: undefined,
      retentionMs: 30 * 86_400_000,
      keptWorkerMs: 24 * 3_600_000,
      shutdownGraceMs: 30_000,
      sampleCallbacks: true,
      logLevel: 'info',
    })
  })

  test('an empty variable counts as not set, and others are not looked at', () => {
    const empty = { HOST: '', PORT: '', API_TOKENS: '', MAX_LOG_MB: '', LOG_LEVEL: '', AUTH: '' }
    expect(loadConfig({ ...empty, SOMETHING_ELSE: 'x' })).toEqual(loadConfig({}))
  })

  test('a HOST that is not loopback may call public addresses only, and has no sample receivers', () => {
    const open = { HOST: '0.0.0.0', API_TOKENS: 'a' }
    expect(loadConfig(open)).toMatchObject({ callbackAllowedNetworks: [], sampleCallbacks: false })
    expect(loadConfig({ ...open, SAMPLE_CALLBACKS: 'true' }).sampleCallbacks).toBe(true)
  })
})

describe('values', () => {
  test('each is read in its unit', () => {
    expect(
      loadConfig({
        HOST: 'localhost',
        PORT: '0',
        BASE_PATH: '/apps/runner/',
        API_TOKENS: 'one, two\nthree,,',
        DATA_DIR: '/var/lib/runner',
        TASKS_DIR: 'here',
        MAX_CONCURRENT_TASKS: '7',
        MAX_QUEUED_TASKS: '9',
        TASK_TIMEOUT_SECONDS: '60',
        PROVISIONING_TIMEOUT_SECONDS: '5',
        TERMINATION_GRACE_SECONDS: '0.5',
        MAX_LOG_MB: '0.5',
        CALLBACK_TIMEOUT_SECONDS: '2.5',
        CALLBACK_RETRY_SECONDS: '0.1, 2',
        SEALING_KEY: Buffer.alloc(32, 7).toString('base64'),
        PYTHON_COMMAND: '/opt/python',
        SHELL_COMMAND: '/bin/dash',
        RETENTION_DAYS: '0.5',
        KEPT_WORKER_HOURS: '2',
        SHUTDOWN_GRACE_SECONDS: '0',
        SAMPLE_CALLBACKS: 'false',
        LOG_LEVEL: 'debug',
        TZ: 'Europe/Sarajevo',
        LANG: 'bs_BA.UTF-8',
      }),
    ).toMatchObject({
      host: 'localhost',
      port: 0,
      basePath: '/apps/runner',
      apiTokens: ['one', 'two', 'three'],
      dataDir: '/var/lib/runner',
      tasksDir: resolve('here'),
      concurrency: 7,
      queuedMax: 9,
      taskTimeoutSeconds: 60,
      provisioningTimeoutMs: 5_000,
      terminationGraceMs: 500,
      maxLogBytes: 512 * 1024,
      callbackTimeoutMs: 2_500,
      callbackRetryDelaysMs: [100, 2000],
      sealingKey: Buffer.alloc(32, 7),
      pythonCommand: '/opt/python',
      shellCommand: '/bin/dash',
      retentionMs: 43_200_000,
      keptWorkerMs: 7_200_000,
      shutdownGraceMs: 0,
      sampleCallbacks: false,
      logLevel: 'debug',
      locale: { LANG: 'bs_BA.UTF-8', TZ: 'Europe/Sarajevo' },
    })
  })

  test.each([
    ['PORT', '65536'],
    ['PORT', '-1'],
    ['PORT', '80.5'],
    ['PORT', 'http'],
    ['PORT', ' '],
    ['BASE_PATH', 'apps'],
    ['BASE_PATH', '/a//b'],
    ['BASE_PATH', '/a b'],
    ['BASE_PATH', '/:id'],
    ['AUTH', 'no'],
    ['WORKER_BACKEND', 'nomad'],
    ['WORKER_HOME', 'home'],
    ['WORKER_HOME', '/'],
    ['WORKER_HOME', '/home/../etc'],
    ['WORKER_HOME', '/home/a b'],
    ['WORKER_HOME', '/worker/home'],
    ['WORKER_HOME', '/tmp'],
    ['MAX_CONCURRENT_TASKS', '0'],
    ['MAX_CONCURRENT_TASKS', '1.5'],
    ['MAX_CONCURRENT_TASKS', 'many'],
    ['MAX_QUEUED_TASKS', '0'],
    ['TASK_TIMEOUT_SECONDS', '0'],
    ['TASK_TIMEOUT_SECONDS', '3000000'],
    ['PROVISIONING_TIMEOUT_SECONDS', '0'],
    ['TERMINATION_GRACE_SECONDS', '-1'],
    ['TERMINATION_GRACE_SECONDS', ' '],
    ['TERMINATION_GRACE_SECONDS', 'Infinity'],
    ['MAX_LOG_MB', '0'],
    ['MAX_LOG_MB', 'NaN'],
    ['CALLBACK_TIMEOUT_SECONDS', '0'],
    ['CALLBACK_RETRY_SECONDS', '5,soon'],
    ['CALLBACK_RETRY_SECONDS', '-5'],
    ['CALLBACK_SIGNING_SECRETS', 'not-a-secret'],
    ['CALLBACK_ALLOWED_NETWORKS', '10.0.0.0/99'],
    ['SEALING_KEY', 'c2hvcnQ='],
    ['SEALING_KEY', 'not base64!'],
    ['RETENTION_DAYS', '0'],
    ['KEPT_WORKER_HOURS', '-1'],
    ['SHUTDOWN_GRACE_SECONDS', '-1'],
    ['SAMPLE_CALLBACKS', 'maybe'],
    ['LOG_LEVEL', 'loud'],
    ['API_TOKENS', 'two words'],
    ['API_TOKENS', 'schlüssel'],
    ['API_TOKENS_FILE', '/nonexistent/tokens'],
  ])('%s=%j stops the start by name', (name, value) => {
    expect(problemsOf({ [name]: value })).toMatch(new RegExp(`^  - ${name}: .`, 'm'))
  })

  test.each(['/home/ubuntu', '/workers/.home'])('WORKER_HOME=%s is taken', (path) => {
    expect(loadConfig({ WORKER_HOME: path }).workerHome).toBe(path)
  })

  test('the name of the variable leads to what is wrong with an item of its list', () => {
    const message = problemsOf({ CALLBACK_RETRY_SECONDS: '5,soon,300' })
    expect(message.split('\n')).toHaveLength(2)
  })

  test('each problem says what the value must be, in the same words for each item of a list', () => {
    expect(
      problemsOf({
        ...{ PORT: '65536', AUTH: 'no', MAX_LOG_MB: '-1', TERMINATION_GRACE_SECONDS: 'soon' },
        ...{ PYTHON_COMMAND: ' ', CALLBACK_RETRY_SECONDS: '5,soon,later' },
      }),
    ).toBe(
      [
        'The configuration is not usable:',
        '  - PORT: must be a whole number from 0 to 65535',
        '  - AUTH: must be one of on, off',
        '  - TERMINATION_GRACE_SECONDS: must be a number from 0 to 3600',
        '  - MAX_LOG_MB: must be a number above 0, at most 1000000',
        '  - CALLBACK_RETRY_SECONDS: must be a number from 0 to 2000000',
        '  - PYTHON_COMMAND: is blank: set a value, or unset it',
      ].join('\n'),
    )
  })
})

describe('the table in README', () => {
  test('is what src/config.ts says; `npm run readme` renews it', async () => {
    const readme = await readFile(new URL('../README.md', import.meta.url), 'utf8')
    expect(withTable(readme)).toBe(readme)
  })

  test('has every variable, with its default as one would set it, and none twice', () => {
    const names = VARIABLES.map(({ name }) => name)
    expect(new Set(names).size).toBe(names.length)
    // The home of workers by default is not one that may be asked for.
    const others = VARIABLES.filter(({ name }) => name !== 'WORKER_HOME')
    const defaults = others.flatMap(({ name, unset }) => {
      const [, value] = /^`([^`]*)`$/.exec(unset) ?? []
      return value === undefined ? [] : [[name, value]]
    })
    expect(defaults.length).toBeGreaterThan(25)
    expect(loadConfig(Object.fromEntries(defaults))).toEqual(loadConfig({}))
  })
})

describe('several instances', () => {
  const shared = { DATABASE_URL: 'postgres://db/tasks', SEALING_KEY: `${'a'.repeat(43)}=` }

  test('have their limits, and what they do without', () => {
    expect(loadConfig(shared)).toMatchObject({
      ...{ clusterConcurrency: undefined, hostGraceMs: 300_000, databasePoolSize: 10 },
    })
    const limits = { MAX_CLUSTER_TASKS: '1', HOST_GRACE_SECONDS: '1', DATABASE_POOL_SIZE: '2' }
    expect(loadConfig({ ...shared, ...limits })).toMatchObject({
      ...{ clusterConcurrency: 1, hostGraceMs: 1_000, databasePoolSize: 2 },
    })
  })

  test('are refused all that cannot be meant, together', () => {
    const limits = { MAX_CLUSTER_TASKS: '0', HOST_GRACE_SECONDS: '0', DATABASE_POOL_SIZE: '1' }
    const message = problemsOf({ ...shared, ...limits })
    for (const name of Object.keys(limits))
      expect(message).toMatch(new RegExp(`^  - ${name}: `, 'm'))
    expect(message.match(/^ {2}- /gm)).toHaveLength(3)
  })

  test('need a key that all know; a limit over all means nothing to one alone', () => {
    expect(problemsOf({ DATABASE_URL: shared.DATABASE_URL })).toMatch(/- SEALING_KEY: is required/)
    expect(problemsOf({ MAX_CLUSTER_TASKS: '5' })).toMatch(
      /MAX_CLUSTER_TASKS: requires DATABASE_URL/,
    )
    expect(problemsOf({ HOST_GRACE_SECONDS: '5', DATABASE_POOL_SIZE: '5' })).toBe('')
  })
})

describe('problems', () => {
  test('a limit that was removed names what limits instead', () => {
    const message = problemsOf({ KUBERNETES_MAX_WORKERS: '10' })
    expect(message).toMatch(/- KUBERNETES_MAX_WORKERS: was removed; .*ResourceQuota.*MAX_CLUSTER/)
  })

  test('every bad variable is listed at once, one a line', () => {
    const message = problemsOf({
      PORT: 'http',
      AUTH: 'no',
      MAX_QUEUED_TASKS: '0',
      SEALING_KEY: 'short',
      LOG_LEVEL: 'loud',
      SAMPLE_CALLBACKS: 'maybe',
    })
    const names = [...message.matchAll(/^ {2}- (\w+): /gm)].map(([, name]) => name)
    expect([...new Set(names)].sort()).toEqual([
      ...['AUTH', 'LOG_LEVEL', 'MAX_QUEUED_TASKS', 'PORT', 'SAMPLE_CALLBACKS', 'SEALING_KEY'],
    ])
  })

  test('bad combinations are listed beside bad values, not after they are mended', () => {
    const message = problemsOf({
      PORT: 'http',
      HOST: '0.0.0.0',
      API_TOKENS_FILE: '/nonexistent/tokens',
      CALLBACK_SIGNING_SECRETS: 'nonsense',
    })
    for (const name of ['PORT', 'HOST', 'API_TOKENS_FILE', 'CALLBACK_SIGNING_SECRETS']) {
      expect(message).toContain(`- ${name}: `)
    }
  })

  test('no message repeats a value that may be secret', () => {
    const secret = 'hunter2-hunter2'
    const environments = [
      { API_TOKENS: `${secret} ü` },
      { SEALING_KEY: secret },
      { CALLBACK_SIGNING_SECRETS: secret },
      { DATABASE_URL: `mysql://user:${secret}@db/${secret}` },
      { API_TOKENS_FILE: `/nonexistent/${secret}` },
      { PORT: secret, MAX_LOG_MB: secret, AUTH: secret, LOG_LEVEL: secret, BASE_PATH: secret },
      { CALLBACK_RETRY_SECONDS: secret, SAMPLE_CALLBACKS: secret, WORKER_BACKEND: secret },
    ]
    for (const environment of environments) {
      const message = problemsOf(environment as Record<string, string>)
      expect(message).not.toBe('')
      expect(message).not.toContain('hunter2')
    }
  })

  test('tokens of a file are checked like others, and not repeated', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'task-runner-config-'))
    await writeFile(join(folder, 'tokens'), 'good\nhunter2 hunter2\n')
    const message = problemsOf({ API_TOKENS_FILE: join(folder, 'tokens') })
    expect(message).toMatch(/API_TOKENS/)
    expect(message).not.toContain('hunter2')
    await writeFile(join(folder, 'tokens'), 'good\nbetter, best\n')
    expect(
      loadConfig({ API_TOKENS: 'first', API_TOKENS_FILE: join(folder, 'tokens') }).apiTokens,
    ).toEqual(['first', 'good', 'better', 'best'])
    await rm(folder, { recursive: true })
  })
})

describe('the PATH of tasks', () => {
  const OWN = '/opt/node_modules/.bin:/usr/local/bin:/usr/bin'
  const ADDED =
    '/app/node_modules/.bin:/node_modules/.bin:/usr/lib/node_modules/npm/node_modules/@npmcli/run-script/lib/node-gyp-bin'

  test('has nothing of what npm put before it', () => {
    const path = (PATH: string, env = {}) => loadConfig({ PATH, ...env }).path
    const underNpm = { npm_lifecycle_event: 'start' }
    expect(path(`${ADDED}:/usr/bin:${OWN}`, underNpm)).toBe(`/usr/bin:${OWN}`)
    expect(path(`${ADDED}:${ADDED}:/usr/bin`, underNpm)).toBe('/usr/bin')
    expect(path(ADDED, underNpm)).toBe('/usr/local/bin:/usr/bin:/bin')
    expect(path('/usr/bin', underNpm)).toBe('/usr/bin')
    // Not npm's, then.
    expect(path(OWN)).toBe(OWN)
  })
})
