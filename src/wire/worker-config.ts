import { z } from 'zod'
import { InvalidRequestError } from '../core/errors.ts'
import { mergeWorkerConfigs, type WorkerConfig } from '../core/worker-config.ts'
import { DEFAULT_WORKER_SIZES, knownSize, type WorkerSizes } from '../core/worker-sizes.ts'
import { line, parseWith, present, secretName, text } from './fields.ts'
import { fromGitConfig, gitConfigSchema, toWireGitConfig } from './git-config.ts'
import { JSON_NAMES_MAX, limitJson } from './json.ts'

/** Linux takes no single `NAME=value` longer than this (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h). */
const VARIABLE_BYTES_MAX = 131_071
/** All variables together; the kernel's limit for arguments and environment is 2 MB on common systems. */
const VARIABLES_BYTES_MAX = 1_000_000
/** Set by the service, or read-only or numeric in shells, which would refuse to start the task. */
const RESERVED_VARIABLES = new Set([
  ...['TASK_ID', 'TASK_FILE_NAME', 'TASK_RUNNER_FOLDER', 'WORKER_NAME'],
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
    .describe(
      `Environment of the task, at most ${JSON_NAMES_MAX} variables; numbers and booleans are passed as text`,
    ),
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

function decodeParams(base64: string, path: string[]): object {
  const wrong = (message: string) => new InvalidRequestError([{ path: path.join('.'), message }])
  if (!/^[A-Za-z0-9+/\s]*={0,2}\s*$/.test(base64)) throw wrong('is not base64')
  const bytes = Buffer.from(base64, 'base64')
  limitJson(bytes, path)
  let whole: unknown
  try {
    const json = new TextDecoder('utf-8', { fatal: true }).decode(bytes)
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
