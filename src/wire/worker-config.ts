import { z } from 'zod'
import { InvalidRequestError } from '../core/errors.ts'
import { type GitConfig, mergeWorkerConfigs, type WorkerConfig } from '../core/worker-config.ts'
import { DEFAULT_WORKER_SIZES, knownSize, type WorkerSizes } from '../core/worker-sizes.ts'
import { line, parseWith, text } from './fields.ts'

/** Linux takes no single `NAME=value` longer than this (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h). */
const VARIABLE_BYTES_MAX = 131_071
/** All variables together; the kernel's limit for arguments and environment is 2 MB on common systems. */
const VARIABLES_BYTES_MAX = 1_000_000
/** Set by the service, or read-only or numeric in shells, which would refuse to start the task. */
const RESERVED_VARIABLES = new Set([
  ...['TASK_ID', 'TASK_FILE_NAME', 'WORKER_NAME'],
  ...['OPTIND', 'PPID', 'UID', 'EUID', 'SHELLOPTS', 'BASHOPTS'],
  ...['BASH_VERSINFO', '_'],
])

const variableName = z
  .string()
  .regex(/^[A-Za-z_][A-Za-z0-9_]*$/, 'is not a variable name: letters, digits and _ only')
  .refine((name) => !RESERVED_VARIABLES.has(name), 'is reserved')

const envVariables = z
  .record(
    variableName,
    z.union(
      [text(VARIABLE_BYTES_MAX), z.number(), z.boolean()],
      'must be a string, number or boolean',
    ),
  )
  .superRefine((variables, context) => {
    let total = 0
    for (const [name, value] of Object.entries(variables)) {
      const bytes = Buffer.byteLength(`${name}=${value}`)
      total += bytes + 1
      if (bytes > VARIABLE_BYTES_MAX) {
        const message = `is too long: at most ${VARIABLE_BYTES_MAX} bytes with its name`
        context.addIssue({ code: 'custom', path: [name], message })
      }
    }
    if (total > VARIABLES_BYTES_MAX) {
      const message = `are too long: at most ${VARIABLES_BYTES_MAX} bytes together`
      context.addIssue({ code: 'custom', message })
    }
  })

/** Of ssh URLs, whose hosts no parser looks at, as of others. */
const HOST = /^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])$/
const gitRemote = line(2048).superRefine((value, context) => {
  const wrong = (message: string) => context.addIssue({ code: 'custom', message })
  const url = URL.parse(value)
  // A backslash is a slash to some readers, and part of the host to others.
  if (!url || !/^(https?|ssh):\/\/[^\s\\]+$/.test(value) || !HOST.test(url.hostname)) {
    wrong('must be an http(s) or ssh URL, such as ssh://git@host/path.git')
  } else if (url.password !== '' || (url.username !== '' && url.protocol !== 'ssh:')) {
    wrong('must not contain a user name or password; use username and secret_name')
  } else if (url.search !== '' || url.hash !== '') {
    wrong('must not contain a query or a fragment')
  } else if (!isRepositoryPath(url.pathname)) wrong('must end in the name of a repository')
})

function isRepositoryPath(pathname: string): boolean {
  const path = /%(00|2f)/i.test(pathname) ? undefined : decoded(pathname)
  const name = path
    ?.replace(/\/+$/, '')
    .replace(/\.git$/, '')
    .replace(/^.*\//, '')
  return name !== undefined && !['', '.', '..', '.git'].includes(name)
}

function decoded(encoded: string): string | undefined {
  try {
    return decodeURIComponent(encoded)
  } catch {
    return undefined
  }
}

const isInside = (path: string) => !path.split('/').includes('..')
const localPath = line(1024)
  .refine(
    (path) => isInside(path) && /^(~\/+)?[^/~]/.test(path),
    'must be a path below the home of the worker, such as ~/projects/name',
  )
  .refine(
    (path) =>
      path
        .replace(/^~\/+/, '')
        .split('/')
        .some((part) => part !== '' && part !== '.'),
    'must name a folder of its own',
  )
/** git would take it for an option. */
const notAnOption = (text: string) => !text.startsWith('-')

const secretName = line(255).regex(
  /^[A-Za-z0-9_][A-Za-z0-9._-]*$/,
  'is not the name of a secret: letters, digits, _ - . only',
)

export const gitConfigSchema = z
  .strictObject({
    remote_url: gitRemote.describe('What to clone: http, https or ssh'),
    secret_name: secretName
      .nullish()
      .describe('Name of the secret that is the password; for ssh, the private key'),
    save_secret: z
      .boolean()
      .nullish()
      .describe(
        'Leaves the secret on the worker, so that the task can pull and push; http(s) only',
      ),
    username: line(255)
      .nullish()
      .describe('Default `x-access-token`, which suits tokens; http(s) only'),
    local_path: localPath
      .nullish()
      .describe('Where to, below the home of the worker; default `~/projects/<repository>`'),
    branch: line(255)
      .refine(notAnOption, 'must not begin with -')
      .nullish()
      .describe('A branch or tag; default: the one that the repository names'),
    sparse_checkout_folders: z
      .array(
        line(1024)
          .refine(notAnOption, 'must not begin with -')
          .refine(isInside, 'must be inside the repository'),
      )
      .max(1000)
      .nullish()
      .describe('Only these folders, and the files at the top'),
    fetch_depth: z.int().positive().nullish().describe('Only so many of the last commits'),
  })
  .superRefine((config, context) => {
    for (const field of ['save_secret', 'username'] as const) {
      if (config[field] && config.remote_url.startsWith('ssh:')) {
        const message = 'is for http(s) repositories'
        context.addIssue({ code: 'custom', path: [field], message })
      }
    }
    if (config.save_secret === true && config.secret_name == null) {
      const message = 'there is no secret_name'
      context.addIssue({ code: 'custom', path: ['save_secret'], message })
    }
  })
  .meta({
    id: 'GitConfig',
    description: 'A repository cloned before the task runs',
    examples: [{ remote_url: 'https://git.example.com/team/repo.git', secret_name: 'git_secret' }],
  })

/** Put in the environment, so it is a name for variables as well. */
const secretVariable = line(255).pipe(variableName)

const imageConfig = z.looseObject({
  pull_policy: z
    .enum(['Always', 'IfNotPresent', 'Never'])
    .nullish()
    .describe('When the image is pulled; default `IfNotPresent`'),
  username: line(255).nullish().describe('For the registry'),
  secret_name: secretName.nullish().describe('Name of the secret that is the password'),
})

const fields = {
  worker_image: line(512).nullish().describe('Container image; local workers do not use it'),
  worker_size: line(100)
    .nullish()
    .describe(
      `One of ${Object.keys(DEFAULT_WORKER_SIZES).join(', ')}, or of the operator's own table, in any case; local workers do not enforce it`,
    ),
  env_variables: envVariables
    .nullish()
    .describe('Environment of the task; numbers and booleans are passed as text'),
  personal_secrets: z
    .array(secretVariable)
    .max(1000)
    .nullish()
    .describe('Names of secrets; each reaches the task as the variable of that name'),
  shared_secrets: z
    .array(secretVariable)
    .max(1000)
    .nullish()
    .describe('As personal_secrets, which win over these'),
  git_configs: z.array(gitConfigSchema).max(100).nullish(),
  startup_script: text(1_000_000).nullish().describe('Shell script run before the task'),
  image_config: imageConfig.nullish().describe('How the image is had; local workers have none'),
  log_level: line(50).nullish().describe('Reaches the task as `LOG_LEVEL`'),
  modules_log_level: z
    .union([line(10_000), z.record(z.string(), z.string())])
    .nullish()
    .describe('Reaches the task as `MODULES_LOG_LEVEL`; an object as JSON'),
  service_type: z.enum(['cloud_worker', 'workspace']).nullish(),
  network_protocol: z.enum(['http', 'https']).nullish(),
  interactive: z.boolean().nullish(),
  bypass_ssl_verification: z.boolean().nullish(),
  service_url: line(2048).nullish(),
  email: line(320).nullish(),
  refresh_token: text(65_536).nullish(),
  distributed_config: z
    .unknown()
    .optional()
    .describe('Not supported: any value but null is refused'),
}

/** Accepted so that existing files load; each that is set is noted in the task's log. */
const WITHOUT_EFFECT = [
  'service_type',
  'network_protocol',
  'interactive',
  'bypass_ssl_verification',
  'service_url',
  'email',
  'refresh_token',
] as const
const NOT_SUPPORTED = ['distributed_config'] as const

/** What base64 `additional_params` may hold: the same fields, but not itself again. */
const additionalSchema = z.strictObject(fields)

export const workerConfigSchema = z
  .strictObject({
    ...fields,
    additional_params: z
      .string()
      .max(2_000_000)
      .nullish()
      .describe(
        'Base64 of a JSON object with further fields of this table, as the Practicus SDK writes it. Fields given outright win; `env_variables` merge name by name',
      ),
  })
  .meta({
    id: 'WorkerConfig',
    description: 'What kind of worker runs the task. Every field may be left out or null.',
    examples: [{ worker_size: 'Small', env_variables: { MY_FIRST_PARAM: 'VALUE1' } }],
  })

type WireFields = z.output<typeof additionalSchema>

/**
 * Wire -> domain, with `additional_params` decoded and laid under the fields given outright.
 * Throws `invalid_request` naming the field below `path`.
 */
export function toWorkerConfig(
  { additional_params, ...outright }: z.output<typeof workerConfigSchema>,
  options: {
    path: string[]
    /** The names that `worker_size` may be; undefined: any. */
    sizes?: WorkerSizes | undefined
    prepare?: (fields: object) => object
  },
): WorkerConfig {
  const { path, sizes, prepare = (fields) => fields } = options
  const given = fromFields(outright, path, sizes)
  if (additional_params == null || additional_params === '') return given
  const hidden = [...path, 'additional_params']
  return mergeWorkerConfigs(
    fromFields(
      parseWith(additionalSchema, prepare(decodeParams(additional_params, hidden)), hidden),
      hidden,
      sizes,
    ),
    given,
  )
}

/** A worker defaults file: in it `null`, `""` and `"None"` count as absent. */
export function parseWorkerFile(json: string, sizes?: WorkerSizes): WorkerConfig {
  let whole: unknown
  try {
    whole = JSON.parse(json)
  } catch {
    // The parser's own words would repeat a piece of the file.
    throw new Error('it is not valid JSON')
  }
  if (whole === null || typeof whole !== 'object' || Array.isArray(whole)) {
    throw new Error('it does not hold a JSON object')
  }
  const fields = parseWith(workerConfigSchema, withoutAbsent(whole))
  return toWorkerConfig(fields, { path: [], sizes, prepare: withoutAbsent })
}

function withoutAbsent(fields: object): object {
  const present = Object.entries(fields).filter(
    ([, value]) => value !== null && value !== '' && value !== 'None',
  )
  return Object.fromEntries(present)
}

/** Domain -> wire for answers: values of variables are masked, secrets are not there at all. */
export function maskedWorkerConfig(config: WorkerConfig): Record<string, unknown> {
  const masked = {
    worker_image: config.workerImage,
    worker_size: config.workerSize,
    env_variables:
      config.envVariables &&
      Object.fromEntries(Object.keys(config.envVariables).map((name) => [name, '***'])),
    image_config: config.imageConfig && {
      pull_policy: config.imageConfig.pullPolicy,
      username: config.imageConfig.username,
      secret_name: config.imageConfig.secretName,
    },
    personal_secrets: config.personalSecrets,
    shared_secrets: config.sharedSecrets,
    git_configs: config.gitConfigs?.map(toWireGitConfig),
    startup_script: config.startupScript,
    log_level: config.logLevel,
    modules_log_level: config.modulesLogLevel,
  }
  return Object.fromEntries(Object.entries(masked).filter(([, value]) => value !== undefined))
}

function fromFields(
  wire: WireFields,
  path: string[],
  sizes: WorkerSizes | undefined,
): WorkerConfig {
  const refused = NOT_SUPPORTED.filter((field) => isSet(wire[field])).map((field) => ({
    path: [...path, field].join('.'),
    message: 'not supported',
  }))
  const size = wire.worker_size && sizes ? knownSize(wire.worker_size, sizes) : wire.worker_size
  if (wire.worker_size && size === undefined && sizes) {
    const message = `must be one of ${Object.keys(sizes).join(', ')}`
    refused.push({ path: [...path, 'worker_size'].join('.'), message })
  }
  if (refused.length > 0) throw new InvalidRequestError(refused)
  const { pull_policy, username, secret_name, ...unknown } = wire.image_config ?? {}
  const withoutEffect = [
    ...WITHOUT_EFFECT.filter((field) => isSet(wire[field])),
    ...Object.keys(unknown).map((field) => `image_config.${field}`),
  ]
  const modules = wire.modules_log_level
  return present({
    workerImage: wire.worker_image,
    workerSize: size,
    imageConfig:
      wire.image_config && present({ pullPolicy: pull_policy, username, secretName: secret_name }),
    envVariables:
      wire.env_variables &&
      Object.fromEntries(
        Object.entries(wire.env_variables).map(([name, value]) => [name, String(value)]),
      ),
    personalSecrets: wire.personal_secrets,
    sharedSecrets: wire.shared_secrets,
    startupScript: wire.startup_script,
    logLevel: wire.log_level,
    modulesLogLevel:
      typeof modules === 'object' && modules !== null ? JSON.stringify(modules) : modules,
    gitConfigs: wire.git_configs?.map(fromGitConfig),
    withoutEffect: withoutEffect.length > 0 ? withoutEffect : undefined,
  })
}

function fromGitConfig(wire: z.output<typeof gitConfigSchema>): GitConfig {
  return present({
    // As it is judged, so is it used: git reads some spellings otherwise.
    remoteUrl: new URL(wire.remote_url).href,
    secretName: wire.secret_name,
    saveSecret: wire.save_secret,
    username: wire.username,
    localPath: wire.local_path,
    branch: wire.branch,
    sparseCheckoutFolders: wire.sparse_checkout_folders,
    fetchDepth: wire.fetch_depth,
  })
}

function toWireGitConfig(config: GitConfig): z.input<typeof gitConfigSchema> {
  return present({
    remote_url: config.remoteUrl,
    secret_name: config.secretName,
    save_secret: config.saveSecret,
    username: config.username,
    local_path: config.localPath,
    branch: config.branch,
    sparse_checkout_folders: config.sparseCheckoutFolders,
    fetch_depth: config.fetchDepth,
  })
}

function decodeParams(base64: string, path: string[]): object {
  const wrong = (message: string) => new InvalidRequestError([{ path: path.join('.'), message }])
  if (!/^[A-Za-z0-9+/\s]*={0,2}\s*$/.test(base64)) throw wrong('is not base64')
  let whole: unknown
  try {
    const json = new TextDecoder('utf-8', { fatal: true }).decode(Buffer.from(base64, 'base64'))
    whole = JSON.parse(json, (key, value) => {
      // The HTTP body's parser refuses this name as well: it would set a prototype.
      if (key === '__proto__') throw new SyntaxError('forbidden name')
      return value
    })
  } catch {
    throw wrong('does not hold JSON')
  }
  if (whole === null || typeof whole !== 'object' || Array.isArray(whole)) {
    throw wrong('does not hold a JSON object')
  }
  return whole
}

function isSet(value: unknown): boolean {
  if (value === null || value === undefined || value === '') return false
  return !(Array.isArray(value) && value.length === 0)
}

/** Without the fields that are null or undefined. */
function present<T extends object>(object: T): Present<T> {
  const entries = Object.entries(object).filter(
    ([, value]) => value !== null && value !== undefined,
  )
  // Holds: exactly the null and undefined properties are gone.
  return Object.fromEntries(entries) as Present<T>
}
type Present<T> = { [K in keyof T as undefined extends T[K] ? never : K]: T[K] } & {
  [K in keyof T as undefined extends T[K] ? K : never]?: NonNullable<T[K]>
}
