import { readFileSync, statSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { delimiter, isAbsolute, join, relative } from 'node:path'
import { z } from 'zod'
import {
  dnsLabel,
  list,
  listInFile,
  listOf,
  networks,
  number,
  oneOf,
  path,
  positive,
  refuse,
  SECONDS_MAX,
  sizesFile,
  text,
  times,
  toMs,
  WORKER_HOME,
  whole,
} from './config-values.ts'
import { isLoopbackName } from './core/loopback.ts'
import { DEFAULT_WORKER_SIZES } from './core/worker-sizes.ts'
import { signingKey } from './wire/signature.ts'
import type { EngineAddress } from './workers/docker/engine.ts'

/** Lists every problem of the environment. */
export class ConfigError extends Error {
  override name = 'ConfigError'
}

/** `unset`: default, as README shows it. */
const variables = z.registry<{ name: string; unset: string }>()

/** Registers the variable of a setting, whose description is for README. */
function setting<T extends z.ZodType>(name: string, schema: T, unset?: string): T {
  const variable = schema.clone()
  const value = schema instanceof z.ZodPrefault ? `\`${schema.def.defaultValue}\`` : 'none'
  variables.add(variable, { name, unset: unset ?? value })
  return variable
}

const SECRET_PREFIX = 'SECRET_'
const PATH_DEFAULT = '/usr/local/bin:/usr/bin:/bin'
const RETRY_DEFAULT = '5,300,1800,7200,18000,36000,50400,72000,86400'

const settings = z.object({
  host: setting('HOST', text.prefault('127.0.0.1')).describe(
    'address to listen on; one that is not loopback needs `API_TOKENS`',
  ),
  port: setting('PORT', whole(0, 65535).prefault('3000')).describe(
    "port to listen on; `0` takes a free one, which the log's `listening` line names",
  ),
  basePath: setting(
    'BASE_PATH',
    text
      .regex(/^(\/[A-Za-z0-9._~-]+)*\/?$/, 'must look like /apps/task-runner')
      .transform((path) => path.replace(/\/$/, ''))
      .default(''),
  ).describe('prefix of every route, such as `/apps/task-runner`'),
  apiTokens: setting('API_TOKENS', list.default([])).describe(
    'accepted bearer tokens, comma or line separated; several for rotation',
  ),
  apiTokensFile: setting('API_TOKENS_FILE', listInFile.default([])).describe(
    'file with more of them',
  ),
  authOff: setting(
    'AUTH',
    oneOf('on', 'off')
      .transform((value) => value === 'off')
      .prefault('on'),
  ).describe('`off` allows a non-loopback `HOST` without tokens'),
  dataDir: setting('DATA_DIR', path.prefault('./data')).describe(
    'folder of the SQLite file, the workers and the key',
  ),
  tasksDir: setting('TASKS_DIR', path.prefault('./tasks')).describe('folder of the task files'),
  databaseUrl: setting(
    'DATABASE_URL',
    text
      .refine(
        (url) => /^postgres(ql)?:\/\//.test(url) && URL.canParse(url),
        'must be postgres://user:password@host/database',
      )
      .optional(),
  ).describe('`postgres://…`: database where instances share their tasks; needs `SEALING_KEY`'),
  databasePoolSize: setting('DATABASE_POOL_SIZE', whole(2, 200).prefault('10')).describe(
    'connections of an instance, besides 2 of its own',
  ),
  clusterConcurrency: setting('MAX_CLUSTER_TASKS', whole(1, 1_000_000).optional()).describe(
    'tasks that run at a time on all instances together',
  ),
  hostGraceMs: setting(
    'HOST_GRACE_SECONDS',
    whole(1, SECONDS_MAX).transform(toMs).prefault('300'),
  ).describe(
    'how long (at least 15) a machine may be away before its local tasks end as `worker_lost`',
  ),
  workerBackend: setting(
    'WORKER_BACKEND',
    oneOf('local', 'docker', 'kubernetes').prefault('local'),
  ).describe('kind of workers: `local`, `docker`, `kubernetes`'),
  workerImage: setting('WORKER_IMAGE', text.prefault('task-runner')).describe(
    'image of container workers that name none',
  ),
  workerImagePrefix: setting('WORKER_IMAGE_PREFIX', text.default('')).describe(
    'prefix of short image names',
  ),
  workerSizes: setting(
    'WORKER_SIZES_FILE',
    sizesFile.default(DEFAULT_WORKER_SIZES),
    'built in',
  ).describe('file with the table of sizes'),
  workerMounts: setting(
    'WORKER_MOUNTS',
    listOf(
      z.string().regex(/^[^:]+:\/[^:]*(:ro)?$/, 'each must be source:/target or source:/target:ro'),
    ).default([]),
  ).describe('mounts of every Docker worker: `source:/target[:ro]`, comma separated'),
  workerHome: setting(
    'WORKER_HOME',
    text
      .regex(WORKER_HOME, 'must be a path such as /home/ubuntu, outside /worker and /tmp')
      .optional(),
    '`/worker/home`',
  ).describe(
    'home of container workers, say `/home/ubuntu`; on Kubernetes it hides that of the image',
  ),
  dockerHost: setting(
    'DOCKER_HOST',
    text
      .regex(/^(unix:\/\/\/.+|tcp:\/\/[^/]+:\d+)$/, 'must be unix:///path or tcp://host:port')
      .prefault('unix:///var/run/docker.sock'),
  ).describe("address of the engine, as for Docker's own command"),
  dockerTlsVerify: setting('DOCKER_TLS_VERIFY', text.optional()).describe(
    'any value: connect to the engine with TLS',
  ),
  dockerCertPath: setting('DOCKER_CERT_PATH', text.optional()).describe(
    'folder of `ca.pem`, `cert.pem` and `key.pem` for that',
  ),
  dockerNetwork: setting('DOCKER_NETWORK', text.prefault('bridge')).describe(
    "network of workers: `bridge`, `none`, `host` or a network's name",
  ),
  kubernetesNamespace: setting(
    'KUBERNETES_NAMESPACE',
    dnsLabel.optional(),
    'that of the kubeconfig',
  ).describe('namespace of workers; give them one of their own'),
  kubernetesServiceAccount: setting(
    'KUBERNETES_SERVICE_ACCOUNT',
    dnsLabel.prefault('default'),
  ).describe('service account of workers; its token is not mounted'),
  kubernetesQueue: setting('KUBERNETES_QUEUE', dnsLabel.optional()).describe(
    'Kueue queue for workers; to limit workers, use it or a ResourceQuota (`count/jobs.batch`)',
  ),
  concurrency: setting(
    'MAX_CONCURRENT_TASKS',
    whole(1, 10_000).prefault(String(4 * availableParallelism())),
    '4 per CPU',
  ).describe('tasks that run at a time on one instance'),
  queuedMax: setting('MAX_QUEUED_TASKS', whole(1, 10_000_000).prefault('100000')).describe(
    'tasks that wait at a time; the next one gets a 429',
  ),
  taskTimeoutSeconds: setting(
    'TASK_TIMEOUT_SECONDS',
    whole(1, SECONDS_MAX).prefault('86400'),
  ).describe('default and upper limit of `timeout_seconds`'),
  provisioningTimeoutMs: setting(
    'PROVISIONING_TIMEOUT_SECONDS',
    whole(1, SECONDS_MAX).transform(toMs).prefault('59'),
  ).describe(
    'after it a task fails as `provisioning_timeout`; not counted while workers are unavailable',
  ),
  terminationGraceMs: setting(
    'TERMINATION_GRACE_SECONDS',
    number(0, 3_600).transform(toMs).prefault('10'),
  ).describe('time between TERM and KILL'),
  maxLogBytes: setting(
    'MAX_LOG_MB',
    positive(1_000_000)
      .transform((megabytes) => Math.round(megabytes * 1024 * 1024))
      .prefault('1024'),
  ).describe('a task that logs more is ended (TERM; KILL at twice as much)'),
  callbackTimeoutMs: setting(
    'CALLBACK_TIMEOUT_SECONDS',
    number(0.1, 300).transform(toMs).prefault('15'),
  ).describe('time limit of one whole attempt'),
  callbackRetryDelaysMs: setting(
    'CALLBACK_RETRY_SECONDS',
    list
      .refine((delays) => delays.length <= 100, 'must be at most 100 numbers')
      .pipe(z.array(number(0, SECONDS_MAX).transform(toMs)))
      .prefault(RETRY_DEFAULT),
  ).describe('pause after each failed attempt, ±20 %'),
  callbackSigningKeys: setting(
    'CALLBACK_SIGNING_SECRETS',
    listOf(
      z.string().transform((secret, ctx) => {
        const hint = 'each must be whsec_ and 24 to 64 bytes in base64'
        return signingKey(secret) ?? refuse(ctx, hint)
      }),
    ).default([]),
  ).describe('`whsec_…`, comma separated: signs with each'),
  callbackAllowedNetworks: setting(
    'CALLBACK_ALLOWED_NETWORKS',
    networks.optional(),
    '`loopback,private` when `HOST` is loopback, else none',
  ).describe(
    'allowed besides public addresses: CIDRs, `private`, `loopback`; link-local only as CIDR',
  ),
  gitAllowedNetworks: setting('GIT_ALLOWED_NETWORKS', networks.optional(), 'as above').describe(
    'the same for the hosts of repositories',
  ),
  secretsDir: setting(
    'SECRETS_DIR',
    path
      .refine(
        (path) => statSync(path, { throwIfNoEntry: false })?.isDirectory(),
        'must be a folder',
      )
      .optional(),
  ).describe('folder of named secrets, a file for each'),
  secretVariables: setting(`${SECRET_PREFIX}<NAME>`, z.record(z.string(), z.string())).describe(
    'a named secret as a variable',
  ),
  sealingKey: setting(
    'SEALING_KEY',
    text
      .pipe(z.base64('must be 32 bytes in base64'))
      .transform((key) => Buffer.from(key, 'base64'))
      .refine((key) => key.length === 32, 'must be 32 bytes in base64')
      .optional(),
    'made once in `DATA_DIR`',
  ).describe('32 bytes, base64: encrypts stored tokens and parameters'),
  pythonCommand: setting('PYTHON_COMMAND', text.prefault('python3')).describe(
    'interpreter of `.py` files',
  ),
  shellCommand: setting('SHELL_COMMAND', text.optional(), '`bash`, else `sh`').describe(
    "interpreter of `.sh` files without a `#!` line; `.js` and `.ts` run on the service's own Node",
  ),
  retentionMs: setting(
    'RETENTION_DAYS',
    positive(36_500).transform(times(86_400_000)).prefault('30'),
  ).describe('how long finished tasks and their logs are kept'),
  keptWorkerMs: setting(
    'KEPT_WORKER_HOURS',
    positive(87_600).transform(times(3_600_000)).prefault('24'),
  ).describe('how long `terminate_on_completion: false` keeps a worker'),
  shutdownGraceMs: setting(
    'SHUTDOWN_GRACE_SECONDS',
    number(0, 3_600).transform(toMs).prefault('30'),
  ).describe(
    'from SIGTERM to the end of the service; callback attempts under way get nine tenths of it',
  ),
  sampleCallbacks: setting(
    'SAMPLE_CALLBACKS',
    oneOf('true', 'false', '1', '0', 'on', 'off')
      .transform((value) => ['true', '1', 'on'].includes(value))
      .optional(),
    'on where `HOST` is loopback',
  ).describe('whether the two sample receivers are served'),
  logLevel: setting(
    'LOG_LEVEL',
    oneOf('trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent').prefault('info'),
  ).describe("level of the service's own log, JSON lines on stdout"),
  path: setting('PATH', text.prefault(PATH_DEFAULT)).describe(
    'where commands are looked up, by tasks as well',
  ),
  lang: setting('LANG', text.prefault('C.UTF-8')).describe('language of tasks'),
  tz: setting('TZ', text.optional()).describe('time zone of tasks'),
})

/** Validates combinations of settings and derives others from them. */
const schema = settings.transform((given, ctx) => {
  const { apiTokensFile, dockerHost, dockerTlsVerify, dockerCertPath, lang, tz, ...rest } = given
  const problem = (key: keyof typeof given, message: string) =>
    ctx.addIssue({ code: 'custom', path: [key], message })
  const { host, authOff, dataDir, tasksDir } = rest
  const isLoopback = isLoopbackName(host)
  const whenUnset = isLoopback ? ['loopback', 'private'] : []
  const apiTokens = [...rest.apiTokens, ...apiTokensFile]
  if (apiTokens.some((token) => !/^[\x21-\x7e]+$/.test(token))) {
    problem('apiTokens', 'a token holds white space or characters outside ASCII')
  }
  if (!isLoopback && !authOff && apiTokens.length === 0) {
    problem(
      'host',
      `"${host}" is not loopback and there are no API_TOKENS; set tokens, or AUTH=off`,
    )
  }
  if (rest.databaseUrl !== undefined && rest.sealingKey === undefined) {
    problem('sealingKey', 'is required with DATABASE_URL, the same for all instances')
  }
  if (rest.databaseUrl === undefined && rest.clusterConcurrency !== undefined) {
    problem('clusterConcurrency', 'requires DATABASE_URL')
  }
  const inside = relative(tasksDir, dataDir)
  if (!inside.startsWith('..') && !isAbsolute(inside)) {
    problem('dataDir', 'must not be in TASKS_DIR, which is copied to every worker')
  }
  /** Reads the variables as Docker's own command does. */
  const engineAddress = (): EngineAddress => {
    const address = dockerHost.replace(/^\w+:\/\//, '')
    if (dockerHost.startsWith('unix:')) return { socketPath: address }
    if (dockerTlsVerify === undefined) return { url: `http://${address}` }
    const read = (name: string) => readFileSync(join(dockerCertPath ?? '', name), 'utf8')
    try {
      const tls = { ca: read('ca.pem'), cert: read('cert.pem'), key: read('key.pem') }
      return { url: `https://${address}`, tls }
    } catch {
      problem('dockerCertPath', 'ca.pem, cert.pem and key.pem cannot be read there')
      return {}
    }
  }
  return {
    ...rest,
    apiTokens: authOff ? [] : apiTokens,
    callbackAllowedNetworks: rest.callbackAllowedNetworks ?? whenUnset,
    gitAllowedNetworks: rest.gitAllowedNetworks ?? whenUnset,
    sampleCallbacks: rest.sampleCallbacks ?? isLoopback,
    dockerEngine: engineAddress(),
    locale: { LANG: lang, ...(tz === undefined ? {} : { TZ: tz }) },
  }
})

/** Settings of the service. Only this file reads the environment. */
export type Config = Readonly<z.output<typeof schema>>

const variableOf = new Map(
  Object.entries(settings.shape).flatMap(([key, field]) => {
    const variable = variables.get(field)
    return variable ? [[key, { ...variable, description: field.description ?? '' }]] : []
  }),
)
/** All variables, in the order of README. */
export const VARIABLES = [...variableOf.values()]

/** Removed variables with their replacements: ignoring a limit could flood a cluster. */
const REMOVED: Readonly<Record<string, string>> = {
  KUBERNETES_MAX_WORKERS:
    'was removed; limit workers with a ResourceQuota (count/jobs.batch), KUBERNETES_QUEUE or MAX_CLUSTER_TASKS, and unset it',
}

/** Reads the settings of the command line. */
export function loadClientConfig(env: NodeJS.ProcessEnv = process.env): {
  url: string | undefined
  token: string | undefined
  traceparent: string | undefined
} {
  return {
    url: env.TASK_RUNNER_URL || undefined,
    token: env.TASK_RUNNER_TOKEN || undefined,
    traceparent: env.TRACEPARENT || undefined,
  }
}

/**
 * Reads the environment. Throws `ConfigError` with every problem but no values, since some are
 * secret. `serves`: false if the process does not listen and so needs no tokens.
 */
export function loadConfig(
  env: NodeJS.ProcessEnv = process.env,
  { serves = true }: { serves?: boolean } = {},
): Config {
  const given = valuesOf(env)
  const wrong = settings.safeParse(given).error?.issues ?? []
  // Combinations are checked for valid settings only.
  for (const { path } of wrong) delete given[String(path[0])]
  if (!serves) given.authOff = 'off'
  const whole = schema.safeParse(given)
  const removed = Object.entries(REMOVED).filter(([name]) => env[name])
  if (wrong.length === 0 && removed.length === 0 && whole.success) return whole.data
  const issues = [...wrong, ...(whole.error?.issues ?? [])]
  const problems = [
    ...issues.map(({ path, message }) => [variableOf.get(String(path[0]))?.name, message]),
    ...removed,
  ]
  const lines = problems.map(([name, message]) => `  - ${name}: ${message}`)
  throw new ConfigError(['The configuration is not usable:', ...new Set(lines)].join('\n'))
}

/** Returns the values by the keys of their settings. */
function valuesOf(env: NodeJS.ProcessEnv): Record<string, unknown> {
  // Many tools set an empty variable for "not set".
  const given = [...variableOf].map(([key, { name }]) => [key, env[name] || undefined] as const)
  const secrets = Object.entries(env).flatMap(([name, value]) =>
    value !== undefined && name.startsWith(SECRET_PREFIX)
      ? [[name.slice(SECRET_PREFIX.length), value]]
      : [],
  )
  const path = env.npm_lifecycle_event === undefined ? env.PATH : withoutNpm(env.PATH ?? '')
  return {
    ...Object.fromEntries(given),
    path: path || undefined,
    secretVariables: Object.fromEntries(secrets),
  }
}

/** Removes the folders of the service's own packages, which npm puts first. */
function withoutNpm(path: string): string {
  const folders = path.split(delimiter)
  const first = folders.findIndex((folder) => !/\/(node_modules\/\.bin|node-gyp-bin)$/.test(folder))
  return first < 0 ? PATH_DEFAULT : folders.slice(first).join(delimiter)
}
