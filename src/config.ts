import { readFileSync, statSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { delimiter, isAbsolute, join, relative, resolve } from 'node:path'
import { z } from 'zod'
import { isNetwork } from './callbacks/address-guard.ts'
import { isLoopbackName } from './core/loopback.ts'
import { DEFAULT_WORKER_SIZES, type WorkerSizes } from './core/worker-sizes.ts'
import { signingKey } from './wire/signature.ts'
import type { EngineAddress } from './workers/docker/engine.ts'

/** What the service needs to know. Immutable, read once. Nothing but this file reads the environment. */
export interface Config {
  host: string
  port: number
  /** Prefix of every route: empty, or `/apps/task-runner`. */
  basePath: string
  apiTokens: readonly string[]
  authOff: boolean
  dataDir: string
  tasksDir: string
  workerBackend: 'local' | 'docker' | 'kubernetes'
  /** Undefined: a file in the data folder. */
  databaseUrl: string | undefined
  databasePoolSize: number
  /** How long the host of local workers may be away before their tasks are lost. */
  hostGraceMs: number
  /** For container workers that name none. */
  workerImage: string
  workerImagePrefix: string
  workerSizes: WorkerSizes
  /** `source:/target[:ro]`, in container workers. */
  workerMounts: readonly string[]
  /** Home of container workers; undefined: in the worker's folder. */
  workerHome: string | undefined
  dockerEngine: EngineAddress
  dockerNetwork: string
  kubernetes: {
    namespace: string | undefined
    /** Of workers. */
    serviceAccount: string
    /** Kueue's. */
    queue: string | undefined
  }
  concurrency: number
  /** Of all instances together. */
  clusterConcurrency: number | undefined
  queuedMax: number
  taskTimeoutSeconds: number
  provisioningTimeoutMs: number
  terminationGraceMs: number
  maxLogBytes: number
  callbackTimeoutMs: number
  callbackRetryDelaysMs: readonly number[]
  /** Decoded `whsec_…` secrets. */
  callbackSigningKeys: readonly Buffer[]
  /** CIDRs, `private`, `loopback`: what may be called besides public addresses. */
  callbackAllowedNetworks: readonly string[]
  /** The same for the hosts of git repositories. */
  gitAllowedNetworks: readonly string[]
  secretsDir: string | undefined
  /** Named secrets given as variables: value by what stands after `SECRET_`. */
  secretVariables: Readonly<Record<string, string>>
  sealingKey: Buffer | undefined
  pythonCommand: string
  /** Undefined: bash where there is one, else sh. */
  shellCommand: string | undefined
  retentionMs: number
  keptWorkerMs: number
  shutdownGraceMs: number
  sampleCallbacks: boolean
  logLevel: string
  /** Where commands are looked up, for tasks as for ourselves. */
  path: string
  /** What tasks are told about language and time zone. */
  locale: Record<string, string>
}

/** Every problem of the environment at once. */
export class ConfigError extends Error {
  override name = 'ConfigError'
}

const flag = z
  .enum(['true', 'false', '1', '0', 'on', 'off'])
  .transform((value) => value === 'true' || value === '1' || value === 'on')
const list = z.string().transform((value) =>
  value
    .split(/[,\n]/)
    .map((item) => item.trim())
    .filter((item) => item !== ''),
)
const int = (min: number, max: number) => z.coerce.number().int().min(min).max(max)
/** setTimeout takes no more than 2^31 ms, 24.8 days. */
const SECONDS_MAX = 2_000_000

const DNS_LABEL = /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/
const MOUNT = /^[^:]+:\/[^:]*(:ro)?$/
/** Not what the container or its engine needs. */
const WORKER_HOME = /^(?!\/(worker|tmp|dev|proc|sys)\b)(\/(?!\.{1,2}(\/|$))[\w.-]+)+$/
const MOUNT_HINT = 'each must be source:/target or source:/target:ro'

const PATH_DEFAULT = '/usr/local/bin:/usr/bin:/bin'

const schema = z.object({
  HOST: z.string().default('127.0.0.1'),
  PORT: int(0, 65535).default(3000),
  BASE_PATH: z
    .string()
    .regex(/^(\/[A-Za-z0-9._~-]+)*\/?$/, 'must look like /apps/task-runner')
    .default(''),
  API_TOKENS: list.default([]),
  API_TOKENS_FILE: z.string().optional(),
  AUTH: z.enum(['on', 'off']).default('on'),
  DATA_DIR: z.string().default('./data'),
  TASKS_DIR: z.string().default('./tasks'),
  DATABASE_URL: z
    .string()
    .refine(
      (url) => /^postgres(ql)?:\/\//.test(url) && URL.canParse(url),
      'must be postgres://user:password@host/database',
    )
    .optional(),
  DATABASE_POOL_SIZE: int(2, 200).default(10),
  HOST_GRACE_SECONDS: int(1, SECONDS_MAX).default(300),
  WORKER_BACKEND: z.enum(['local', 'docker', 'kubernetes']).default('local'),
  WORKER_IMAGE: z.string().default('task-runner'),
  WORKER_IMAGE_PREFIX: z.string().default(''),
  WORKER_SIZES_FILE: z.string().optional(),
  WORKER_MOUNTS: list.pipe(z.array(z.string().regex(MOUNT, MOUNT_HINT))).default([]),
  WORKER_HOME: z
    .string()
    .regex(WORKER_HOME, 'must be a path such as /home/ubuntu, outside /worker and /tmp')
    .optional(),
  DOCKER_HOST: z
    .string()
    .regex(/^(unix:\/\/\/.+|tcp:\/\/[^/]+:\d+)$/, 'must be unix:///path or tcp://host:port')
    .default('unix:///var/run/docker.sock'),
  DOCKER_TLS_VERIFY: z.string().optional(),
  DOCKER_CERT_PATH: z.string().optional(),
  DOCKER_NETWORK: z.string().default('bridge'),
  KUBERNETES_NAMESPACE: z.string().regex(DNS_LABEL, 'is not the name of a namespace').optional(),
  KUBERNETES_SERVICE_ACCOUNT: z.string().regex(DNS_LABEL, 'is not a name').default('default'),
  KUBERNETES_QUEUE: z.string().regex(DNS_LABEL, 'is not the name of a queue').optional(),
  MAX_CONCURRENT_TASKS: int(1, 10_000).default(4 * availableParallelism()),
  MAX_CLUSTER_TASKS: int(1, 1_000_000).optional(),
  MAX_QUEUED_TASKS: int(1, 10_000_000).default(100_000),
  TASK_TIMEOUT_SECONDS: int(1, SECONDS_MAX).default(86_400),
  PROVISIONING_TIMEOUT_SECONDS: int(1, SECONDS_MAX).default(59),
  TERMINATION_GRACE_SECONDS: z.coerce.number().min(0).max(3_600).default(10),
  MAX_LOG_MB: z.coerce.number().positive().max(1_000_000).default(1024),
  CALLBACK_TIMEOUT_SECONDS: z.coerce.number().min(0.1).max(300).default(15),
  CALLBACK_RETRY_SECONDS: list
    .pipe(z.array(z.coerce.number<string>().min(0).max(SECONDS_MAX)).max(100))
    .default([5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]),
  CALLBACK_SIGNING_SECRETS: list.default([]),
  CALLBACK_ALLOWED_NETWORKS: list.optional(),
  GIT_ALLOWED_NETWORKS: list.optional(),
  SECRETS_DIR: z.string().optional(),
  SEALING_KEY: z
    .base64()
    .transform((key) => Buffer.from(key, 'base64'))
    .refine((key) => key.length === 32, 'must be 32 bytes in base64')
    .optional(),
  PYTHON_COMMAND: z.string().min(1).default('python3'),
  SHELL_COMMAND: z.string().min(1).optional(),
  RETENTION_DAYS: z.coerce.number().positive().max(36_500).default(30),
  KEPT_WORKER_HOURS: z.coerce.number().positive().max(87_600).default(24),
  SHUTDOWN_GRACE_SECONDS: z.coerce.number().min(0).max(3_600).default(30),
  SAMPLE_CALLBACKS: flag.optional(),
  LOG_LEVEL: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent']).default('info'),
  PATH: z.string().default(PATH_DEFAULT),
  LANG: z.string().default('C.UTF-8'),
  TZ: z.string().optional(),
})

/** Where the command line finds a service, and what it hands on to it. */
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
 * Throws `ConfigError` that lists every problem, and repeats no value: some are secret. `serves`: false for who only
 * runs tasks, to whom it does not matter who could reach a service.
 */
export function loadConfig(
  env: NodeJS.ProcessEnv = process.env,
  { serves = true }: { serves?: boolean } = {},
): Config {
  // An empty variable is how many tools write "not set".
  const set = Object.fromEntries(
    Object.entries(env)
      .filter(([, value]) => value !== '')
      .map(([name, value]) => [name, value?.trim()]),
  )
  const blank = Object.keys(schema.shape).filter((name) => set[name] === '')
  for (const name of blank) delete set[name]
  const issues = schema.safeParse(set).error?.issues ?? []
  const problems = [
    ...blank.map((name) => `${name}: is blank`),
    ...issues.map((issue) => `${String(issue.path[0])}: ${issue.message}`),
  ]
  // Combinations are judged as far as their parts are right.
  for (const issue of issues) delete set[String(issue.path[0])]
  const values = schema.parse(set)
  const apiTokens = [...values.API_TOKENS, ...tokensFromFile(values.API_TOKENS_FILE, problems)]
  if (apiTokens.some((token) => !/^[\x21-\x7e]+$/.test(token))) {
    problems.push('API_TOKENS: a token holds white space or characters outside ASCII')
  }
  const isOpen =
    serves && apiTokens.length === 0 && values.AUTH === 'on' && !isLoopbackName(values.HOST)
  if (isOpen) {
    problems.push(
      `HOST: "${values.HOST}" is not loopback and there are no API_TOKENS; set tokens, or AUTH=off`,
    )
  }
  if (values.DATABASE_URL !== undefined && values.SEALING_KEY === undefined) {
    problems.push('SEALING_KEY: is required with DATABASE_URL, the same for all instances')
  }
  if (values.DATABASE_URL === undefined && values.MAX_CLUSTER_TASKS !== undefined) {
    problems.push('MAX_CLUSTER_TASKS: has no meaning without DATABASE_URL')
  }
  if (set.KUBERNETES_MAX_WORKERS !== undefined) {
    problems.push(
      'KUBERNETES_MAX_WORKERS: was removed; limit workers with a ResourceQuota (count/jobs.batch), KUBERNETES_QUEUE or MAX_CLUSTER_TASKS, and unset it',
    )
  }
  const inside = relative(resolve(values.TASKS_DIR), resolve(values.DATA_DIR))
  if (!inside.startsWith('..') && !isAbsolute(inside)) {
    problems.push('DATA_DIR: must not lie in TASKS_DIR, of which every worker gets a copy')
  }
  const secretsDir = values.SECRETS_DIR === undefined ? undefined : resolve(values.SECRETS_DIR)
  if (secretsDir && !statSync(secretsDir, { throwIfNoEntry: false })?.isDirectory()) {
    problems.push('SECRETS_DIR: is not a folder')
  }
  const signingKeys = values.CALLBACK_SIGNING_SECRETS.map(signingKey)
  if (signingKeys.includes(undefined)) {
    problems.push('CALLBACK_SIGNING_SECRETS: each must be whsec_ and 24 to 64 bytes in base64')
  }
  const allowed = (name: 'CALLBACK_ALLOWED_NETWORKS' | 'GIT_ALLOWED_NETWORKS') => {
    const networks = values[name] ?? (isLoopbackName(values.HOST) ? ['loopback', 'private'] : [])
    for (const network of networks.filter((network) => !isNetwork(network))) {
      problems.push(`${name}: "${network}" is not a CIDR, "private" or "loopback"`)
    }
    return networks
  }
  const callbackAllowedNetworks = allowed('CALLBACK_ALLOWED_NETWORKS')
  const gitAllowedNetworks = allowed('GIT_ALLOWED_NETWORKS')
  const workerSizes = sizesFromFile(values.WORKER_SIZES_FILE, problems)
  const dockerEngine = engineAddress(values, problems)
  if (problems.length > 0) throw new ConfigError(listed(problems))
  return {
    host: values.HOST,
    port: values.PORT,
    basePath: values.BASE_PATH.replace(/\/$/, ''),
    apiTokens: values.AUTH === 'off' ? [] : apiTokens,
    authOff: values.AUTH === 'off',
    dataDir: resolve(values.DATA_DIR),
    tasksDir: resolve(values.TASKS_DIR),
    workerBackend: values.WORKER_BACKEND,
    databaseUrl: values.DATABASE_URL,
    databasePoolSize: values.DATABASE_POOL_SIZE,
    hostGraceMs: values.HOST_GRACE_SECONDS * 1000,
    workerImage: values.WORKER_IMAGE,
    workerImagePrefix: values.WORKER_IMAGE_PREFIX,
    workerSizes,
    workerMounts: values.WORKER_MOUNTS,
    workerHome: values.WORKER_HOME,
    dockerEngine,
    dockerNetwork: values.DOCKER_NETWORK,
    kubernetes: {
      namespace: values.KUBERNETES_NAMESPACE,
      serviceAccount: values.KUBERNETES_SERVICE_ACCOUNT,
      queue: values.KUBERNETES_QUEUE,
    },
    concurrency: values.MAX_CONCURRENT_TASKS,
    clusterConcurrency: values.MAX_CLUSTER_TASKS,
    queuedMax: values.MAX_QUEUED_TASKS,
    taskTimeoutSeconds: values.TASK_TIMEOUT_SECONDS,
    provisioningTimeoutMs: values.PROVISIONING_TIMEOUT_SECONDS * 1000,
    terminationGraceMs: values.TERMINATION_GRACE_SECONDS * 1000,
    maxLogBytes: Math.round(values.MAX_LOG_MB * 1024 * 1024),
    callbackTimeoutMs: values.CALLBACK_TIMEOUT_SECONDS * 1000,
    callbackRetryDelaysMs: values.CALLBACK_RETRY_SECONDS.map((seconds) => seconds * 1000),
    callbackSigningKeys: signingKeys.filter((key) => key !== undefined),
    callbackAllowedNetworks,
    gitAllowedNetworks,
    secretsDir,
    secretVariables: Object.fromEntries(
      Object.entries(env).flatMap(([name, value]) =>
        value !== undefined && name.startsWith('SECRET_')
          ? [[name.slice('SECRET_'.length), value]]
          : [],
      ),
    ),
    sealingKey: values.SEALING_KEY,
    pythonCommand: values.PYTHON_COMMAND,
    shellCommand: values.SHELL_COMMAND,
    retentionMs: values.RETENTION_DAYS * 86_400_000,
    keptWorkerMs: values.KEPT_WORKER_HOURS * 3_600_000,
    shutdownGraceMs: values.SHUTDOWN_GRACE_SECONDS * 1000,
    sampleCallbacks: values.SAMPLE_CALLBACKS ?? isLoopbackName(values.HOST),
    logLevel: values.LOG_LEVEL,
    path: env.npm_lifecycle_event === undefined ? values.PATH : withoutNpm(values.PATH),
    locale: { LANG: values.LANG, ...(values.TZ === undefined ? {} : { TZ: values.TZ }) },
  }
}

/** npm puts the service's own packages before what the machine has: they are not for tasks. */
function withoutNpm(path: string): string {
  const folders = path.split(delimiter)
  const first = folders.findIndex((folder) => !/\/(node_modules\/\.bin|node-gyp-bin)$/.test(folder))
  return first < 0 ? PATH_DEFAULT : folders.slice(first).join(delimiter)
}

function tokensFromFile(path: string | undefined, problems: string[]): string[] {
  if (path === undefined) return []
  try {
    return list.parse(readFileSync(path, 'utf8'))
  } catch {
    problems.push('API_TOKENS_FILE: the file cannot be read')
    return []
  }
}

const sizesSchema = z.record(
  z.string().min(1).max(100),
  z.strictObject({
    cpus: z.number().positive(),
    memory_mb: z.number().positive(),
    gpus: z.int().min(0).default(0),
  }),
)

function sizesFromFile(path: string | undefined, problems: string[]): WorkerSizes {
  if (path === undefined) return DEFAULT_WORKER_SIZES
  try {
    const table = sizesSchema.parse(JSON.parse(readFileSync(path, 'utf8')))
    const sizes = Object.entries(table).map(([name, { cpus, memory_mb, gpus }]) => {
      return [name, { cpus, memoryBytes: Math.round(memory_mb * 1024 * 1024), gpus }] as const
    })
    return Object.fromEntries(sizes)
  } catch {
    const shape = '{"Small": {"cpus": 1, "memory_mb": 2048}, …}'
    problems.push(`WORKER_SIZES_FILE: the file cannot be read, or is not JSON like ${shape}`)
    return DEFAULT_WORKER_SIZES
  }
}

/** As Docker's own command takes it from these variables. */
function engineAddress(values: z.output<typeof schema>, problems: string[]): EngineAddress {
  const { DOCKER_HOST, DOCKER_TLS_VERIFY, DOCKER_CERT_PATH } = values
  if (DOCKER_HOST.startsWith('unix://')) return { socketPath: DOCKER_HOST.slice('unix://'.length) }
  const address = DOCKER_HOST.slice('tcp://'.length)
  if (DOCKER_TLS_VERIFY === undefined) return { url: `http://${address}` }
  const read = (name: string) => readFileSync(join(DOCKER_CERT_PATH ?? '', name), 'utf8')
  try {
    const tls = { ca: read('ca.pem'), cert: read('cert.pem'), key: read('key.pem') }
    return { url: `https://${address}`, tls }
  } catch {
    problems.push('DOCKER_CERT_PATH: ca.pem, cert.pem and key.pem cannot be read there')
    return {}
  }
}

function listed(problems: string[]): string {
  return `The configuration is not usable:\n${problems.map((problem) => `  - ${problem}`).join('\n')}`
}
