import { z } from 'zod'
import { type FieldError, InvalidRequestError } from '../core/errors.ts'
import { mergeWorkerConfigs, secretReference, type WorkerConfig } from '../core/worker-config.ts'
import { DEFAULT_WORKER_SIZES, knownSize, type WorkerSizes } from '../core/worker-sizes.ts'
import {
  isObject,
  joined,
  line,
  parseWith,
  present,
  secretName,
  shownName,
  sparse,
  text,
} from './fields.ts'
import { fromGitConfig, gitConfigSchema, toWireGitConfig } from './git-config.ts'
import { JSON_NAMES_MAX, parseJson, type RawJson } from './json.ts'

/** Maximum bytes of a `NAME=value` on Linux (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h). */
const VARIABLE_BYTES_MAX = 131_071
/** Maximum bytes of all variables; Linux usually allows 2 MB for arguments and environment. */
const VARIABLES_BYTES_MAX = 1_000_000
/** Maximum ignored fields that the task's log names. */
const NOTED_MAX = 20
/** Variables that the service sets, and those that shells declare read-only or numeric. */
const RESERVED_VARIABLES = new Set([
  'TASK_ID',
  'TASK_FILE_NAME',
  'TASK_RUNNER_FOLDER',
  'WORKER_NAME',
  'OPTIND',
  'PPID',
  'UID',
  'EUID',
  'SHELLOPTS',
  'BASHOPTS',
  'BASH_VERSINFO',
  '_',
])

const variableName = z
  .string()
  .regex(/^[A-Za-z_][A-Za-z0-9_]*$/, 'is not a variable name: letters, digits and _ only')
  .refine((name) => !RESERVED_VARIABLES.has(name), 'is reserved')

/** A value of a variable. A number may arrive as raw JSON, which keeps its digits. */
const variableValue = z.preprocess(
  (value: string | number | boolean | bigint | RawJson) =>
    JSON.isRawJSON(value) ? value.rawJSON : typeof value === 'bigint' ? String(value) : value,
  z.union(
    [text(VARIABLE_BYTES_MAX), z.number(), z.boolean()],
    'must be a string, number or boolean',
  ),
)

const envVariables = z
  .record(variableName, variableValue)
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
  .meta({ id: 'EnvVariables', examples: [{ MY_FIRST_PARAM: 'VALUE1', MY_SECOND_PARAM: 123 }] })

const secretReferences = z
  .array(
    secretName.superRefine((reference, context) => {
      const { variable } = secretReference(reference)
      const { error } = variableName.safeParse(variable)
      if (!error) return
      const message = `gives the variable "${variable}", which ${error.issues[0]?.message}`
      context.addIssue({ code: 'custom', message })
    }),
  )
  .max(1000)

const modulesLogLevels = z
  .record(z.string(), z.string())
  .meta({ id: 'ModulesLogLevels', examples: [{ urllib3: 'DEBUG' }] })

const pullPolicy = z.enum(['Always', 'IfNotPresent', 'Never']).meta({ id: 'PullPolicy' })

/** Fields of `image_config` that the service uses; those for building images have no effect. */
const imageFields = {
  pull_policy: pullPolicy.nullish().describe('When the image is pulled; default `IfNotPresent`'),
  repo_username: line(255).nullish().describe('User name for the registry'),
  repo_password: text(65_536)
    .nullish()
    .describe('Password for the registry; sealed, and never shown again'),
  repo_secret_name: line(253)
    .nullish()
    .describe('Kubernetes: name of a pull secret in the namespace of the workers'),
  username: line(255).nullish().describe('The same as `repo_username`'),
  secret_name: secretName
    .nullish()
    .describe('Name of the secret that is the password, instead of `repo_password`'),
}

const imageConfig = sparse(
  z.looseObject(imageFields).meta({
    id: 'ImageConfig',
    description: 'How the image of a worker is pulled',
    examples: [{ repo_username: 'robot', secret_name: 'registry_password' }],
  }),
)

const fields = {
  worker_image: line(512).nullish().describe('Container image; local workers do not use it'),
  worker_size: line(100)
    .nullish()
    .describe(
      `One of ${Object.keys(DEFAULT_WORKER_SIZES).join(', ')}, or a size that the operator defined; case does not matter. Local workers accept any size and enforce none`,
    ),
  env_variables: envVariables
    .nullish()
    .describe(
      `Environment of the task, at most ${JSON_NAMES_MAX} variables; numbers and booleans are passed as text, exactly as written`,
    ),
  personal_secrets: secretReferences
    .nullish()
    .describe(
      'Names of secrets. Each becomes an environment variable of the same name, with `_` in place of all but letters and digits; `NAME:VARIABLE` sets the name of the variable',
    ),
  shared_secrets: secretReferences
    .nullish()
    .describe('Like `personal_secrets`, which win if both set a variable'),
  git_configs: z.array(sparse(gitConfigSchema)).max(100).nullish(),
  startup_script: text(1_000_000).nullish().describe('Shell script run before the task'),
  image_config: imageConfig.nullish(),
  log_level: line(50).nullish().describe('Reaches the task as `LOG_LEVEL` and `PRT_LOG_LEVEL`'),
  modules_log_level: z
    .union([line(10_000), modulesLogLevels, z.null()])
    .optional()
    .describe(
      'Reaches the task as `MODULES_LOG_LEVEL` and `PRT_MODULES_LOG_LEVEL`; an object as JSON',
    ),
  service_type: z.enum(['cloud_worker', 'workspace']).meta({ id: 'ServiceType' }).nullish(),
  network_protocol: z.enum(['http', 'https']).meta({ id: 'NetworkProtocol' }).nullish(),
  interactive: z.boolean().nullish(),
  bypass_ssl_verification: z.boolean().nullish(),
  service_url: line(2048).nullish(),
  email: line(320).nullish(),
  refresh_token: text(65_536).nullish(),
  distributed_config: z
    .unknown()
    .refine((value) => !isSet(value), 'not supported')
    .optional()
    .meta({ type: 'null', description: 'Not supported: must be null or absent' }),
}

/** Fields accepted so that existing files load. The task's log names those that are set. */
const WITHOUT_EFFECT = [
  'service_type',
  'network_protocol',
  'interactive',
  'bypass_ssl_verification',
  'service_url',
  'email',
  'refresh_token',
] as const

const scriptInBase64 = z
  .string()
  .max(2_000_000)
  .transform((base64, context) => {
    try {
      const bytes = fromBase64(base64)
      if (bytes) return new TextDecoder('utf-8', { fatal: true }).decode(bytes)
    } catch {
      // Reported below.
    }
    context.addIssue({ code: 'custom', message: 'is not base64 of UTF-8 text' })
    return z.NEVER
  })
  .pipe(text(1_000_000))

/** Fields of `additional_params`, under our names and those of the Practicus SDK. */
const additionalSchema = sparse(
  z.looseObject({
    ...fields,
    distributed_conf_dict: fields.distributed_config,
    image_conf_dict: fields.image_config,
    PRT_LOG_LEVEL: fields.log_level,
    PRT_MODULES_LOG_LEVEL: fields.modules_log_level,
    PRT_INTERACTIVE: fields.interactive,
    startup_script_b64: scriptInBase64.nullish(),
    /** Written by older SDKs. */
    image_pull_policy: pullPolicy.nullish(),
  }),
)

const directSchema = z
  .strictObject({
    ...fields,
    additional_params: z
      .string()
      .max(2_000_000)
      .nullish()
      .describe(
        'Base64 of a JSON object with further fields of this table, as the Practicus SDK writes it. Fields outside it win; `env_variables` are merged by name',
      ),
  })
  .meta({
    id: 'WorkerConfig',
    description:
      'The worker that runs the task. For every field, absent, null, an empty string and "None" mean the same.',
    examples: [{ worker_size: 'Small', env_variables: { MY_FIRST_PARAM: 'VALUE1' } }],
  })

export const workerConfigSchema = sparse(directSchema)

/** Names of all fields, as requests spell them. */
export const WORKER_CONFIG_FIELDS = Object.keys(directSchema.shape)

export type WorkerConfigInput = z.input<typeof directSchema>
type WireFields = Omit<z.output<typeof directSchema>, 'additional_params'>

/** What the backend accepts in a configuration. */
export interface BackendRules {
  backend: 'local' | 'docker' | 'kubernetes'
  sizes: WorkerSizes
}

/**
 * Maps wire to domain; fields outside `additional_params` win over those inside. Without `rules`,
 * any size is accepted. Throws `invalid_request` that names the field below `path`.
 */
export function toWorkerConfig(
  { additional_params, ...direct }: z.output<typeof workerConfigSchema>,
  { path, rules }: { path: string[]; rules?: BackendRules | undefined },
): WorkerConfig {
  const given = fromFields(direct, path, rules)
  if (additional_params == null) return given
  const below = [...path, 'additional_params']
  const { wire, unknown } = hiddenFields(additional_params, below)
  const hidden = fromFields(wire, below, rules)
  const withoutEffect = [...(hidden.withoutEffect ?? []), ...noted('additional_params', unknown)]
  return mergeWorkerConfigs(
    { ...hidden, ...(withoutEffect.length > 0 && { withoutEffect }) },
    given,
  )
}

/**
 * Returns the fields of `additional_params` under our names, the names of unknown fields, and the
 * JSON itself. Throws `invalid_request` that names the field below `path`.
 */
export function hiddenFields(base64: string, path: string[]) {
  const json = decodeParams(base64, path)
  const {
    startup_script_b64,
    image_pull_policy,
    image_conf_dict,
    distributed_conf_dict: _refused,
    PRT_LOG_LEVEL,
    PRT_MODULES_LOG_LEVEL,
    PRT_INTERACTIVE,
    ...plain
  } = parseWith(additionalSchema, json, path)
  const image = image_conf_dict ?? plain.image_config
  const known = Object.entries(plain).filter(([name]) => Object.hasOwn(fields, name))
  const wire: WireFields = {
    // Safe: only known fields are left, as they were parsed.
    ...(Object.fromEntries(known) as WireFields),
    image_config: image_pull_policy ? { pull_policy: image_pull_policy, ...image } : image,
    startup_script: startup_script_b64 ?? plain.startup_script,
    log_level: PRT_LOG_LEVEL ?? plain.log_level,
    modules_log_level: PRT_MODULES_LOG_LEVEL ?? plain.modules_log_level,
    interactive: PRT_INTERACTIVE ?? plain.interactive,
  }
  const unknown = Object.keys(plain).filter((name) => !Object.hasOwn(fields, name))
  return { wire: present(wire), unknown, json }
}

/** Parses a JSON object. Throws an error that quotes nothing of it: "it is not valid JSON". */
export function parseFile(content: Buffer): Record<string, unknown> {
  let whole: unknown
  try {
    whole = parseJson(content)
  } catch (err) {
    if (!(err instanceof SyntaxError)) throw err
    throw new Error(`it ${err.message}`)
  }
  if (!isObject(whole)) throw new Error('it does not hold a JSON object')
  return whole
}

/** Parses a worker defaults file like the `worker_config` of a request. */
export function parseWorkerFile(content: Buffer, rules?: BackendRules): WorkerConfig {
  const fields = parseWith(workerConfigSchema, parseFile(content))
  return toWorkerConfig(fields, { path: [], rules })
}

/** Maps domain to wire for responses, with the values of variables and the password masked. */
export function maskedWorkerConfig(config: WorkerConfig): Record<string, unknown> {
  const { imageConfig } = config
  return present({
    worker_image: config.workerImage,
    worker_size: config.workerSize,
    env_variables:
      config.envVariables &&
      Object.fromEntries(Object.keys(config.envVariables).map((name) => [name, '***'])),
    image_config:
      imageConfig &&
      present({
        pull_policy: imageConfig.pullPolicy,
        repo_username: imageConfig.username,
        repo_password: imageConfig.password === undefined ? undefined : '***',
        repo_secret_name: imageConfig.pullSecretName,
        secret_name: imageConfig.secretName,
      }),
    personal_secrets: config.personalSecrets,
    shared_secrets: config.sharedSecrets,
    git_configs: config.gitConfigs?.map(toWireGitConfig),
    startup_script: config.startupScript,
    log_level: config.logLevel,
    modules_log_level: config.modulesLogLevel,
  })
}

function fromFields(
  wire: WireFields,
  path: string[],
  rules: BackendRules | undefined,
): WorkerConfig {
  const refused: FieldError[] = []
  const refuse = (field: string, message: string) =>
    refused.push({ path: joined([...path, field]), message })
  const size = wire.worker_size && rules ? knownSize(wire.worker_size, rules.sizes) : undefined
  if (wire.worker_size && rules && rules.backend !== 'local' && size === undefined) {
    refuse('worker_size', `must be one of ${Object.keys(rules.sizes).join(', ')}`)
  }
  const image = wire.image_config ?? {}
  if (image.repo_secret_name && rules?.backend === 'docker') {
    const message = 'names a secret of Kubernetes; use repo_username with repo_password'
    refuse('image_config.repo_secret_name', message)
  }
  if (refused.length > 0) throw new InvalidRequestError(refused)
  const hasPassword = image.repo_password ?? image.secret_name
  const hasEffect = (name: string) =>
    Object.hasOwn(imageFields, name) && (hasPassword || !name.endsWith('username'))
  const withoutEffect = [
    ...WITHOUT_EFFECT.filter((field) => isSet(wire[field])),
    ...noted(
      'image_config',
      Object.keys(image).filter((name) => !hasEffect(name)),
    ),
  ]
  const modules = wire.modules_log_level
  return present({
    workerImage: wire.worker_image,
    workerSize: size ?? wire.worker_size,
    imageConfig:
      wire.image_config &&
      present({
        pullPolicy: image.pull_policy,
        username: image.repo_username ?? image.username,
        password: image.repo_password,
        pullSecretName: image.repo_secret_name,
        secretName: image.secret_name,
      }),
    envVariables:
      wire.env_variables &&
      Object.fromEntries(
        Object.entries(wire.env_variables).map(([name, value]) => [name, String(value)]),
      ),
    personalSecrets: wire.personal_secrets,
    sharedSecrets: wire.shared_secrets,
    startupScript: wire.startup_script,
    logLevel: wire.log_level,
    modulesLogLevel: typeof modules === 'object' && modules ? JSON.stringify(modules) : modules,
    gitConfigs: wire.git_configs?.map(fromGitConfig),
    withoutEffect: withoutEffect.length > 0 ? withoutEffect : undefined,
  })
}

/** Returns the names of fields without effect for the task's log: cleaned, and not too many. */
function noted(parent: string, names: readonly string[]): string[] {
  const more = names.length - NOTED_MAX
  return [
    ...names.slice(0, NOTED_MAX).map((name) => `${parent}.${shownName(name)}`),
    ...(more > 0 ? [`${parent} (${more} more fields)`] : []),
  ]
}

function decodeParams(base64: string, path: string[]): Record<string, unknown> {
  const wrong = (message: string) => new InvalidRequestError([{ path: joined(path), message }])
  const bytes = fromBase64(base64)
  if (!bytes) throw wrong('is not base64')
  let whole: unknown
  try {
    whole = parseJson(bytes, path)
  } catch (err) {
    if (!(err instanceof SyntaxError)) throw err
    throw wrong(`its content ${err.message}`)
  }
  if (!isObject(whole)) throw wrong('does not hold a JSON object')
  return whole
}

function fromBase64(text: string): Buffer | undefined {
  return /^[A-Za-z0-9+/\s]*={0,2}\s*$/.test(text) ? Buffer.from(text, 'base64') : undefined
}

function isSet(value: unknown): boolean {
  if (value === null || value === undefined || value === '') return false
  return !(Array.isArray(value) && value.length === 0)
}
