import { isObject, parseWith } from './fields.ts'
import {
  hiddenFields,
  toWorkerConfig,
  type WorkerConfigInput,
  workerConfigSchema,
} from './worker-config.ts'

export type { WorkerConfigInput } from './worker-config.ts'

/** What the Practicus SDK leaves plain when it writes a configuration, in its order (practicuscore 25.5.2). */
const PLAIN = [
  'worker_image',
  'worker_size',
  'service_type',
  'network_protocol',
  'service_url',
  'email',
  'refresh_token',
] as const

/** The SDK's order of what is in `image_config` and in each of `git_configs`. */
const IMAGE = ['repo_username', 'repo_password', 'repo_secret_name', 'pull_policy']
const GIT = [
  ...['remote_url', 'secret_name', 'save_secret', 'username'],
  ...['local_path', 'branch', 'sparse_checkout_folders', 'fetch_depth'],
]

/**
 * A worker file as the Practicus SDK writes it, byte for byte: fields that are not set left out, most of the others under
 * names of its own as base64 of JSON in `additional_params`. Throws `invalid_request` for a wrong field.
 */
export function encodeWorkerFile(config: WorkerConfigInput): string {
  const fields = decodeWorkerFile(config)
  const { image_config, startup_script, modules_log_level } = fields
  const hidden = {
    image_conf_dict: image_config && imageOf(image_config),
    git_configs: fields.git_configs?.map((git) => inOrder(GIT, { secret_name: '', ...git })),
    startup_script_b64: startup_script && Buffer.from(startup_script.trim()).toString('base64'),
    PRT_LOG_LEVEL: fields.log_level,
    PRT_MODULES_LOG_LEVEL: isObject(modules_log_level)
      ? JSON.stringify(modules_log_level)
      : modules_log_level,
    bypass_ssl_verification: fields.bypass_ssl_verification,
    PRT_INTERACTIVE: fields.interactive,
    env_variables: fields.env_variables,
    personal_secrets: fields.personal_secrets,
    shared_secrets: fields.shared_secrets,
  }
  const plain = Object.fromEntries(PLAIN.map((name) => [name, fields[name]]))
  const additional_params = Buffer.from(pythonJson(hidden)).toString('base64')
  return JSON.stringify({ ...plain, additional_params })
}

/**
 * The configuration with `additional_params` written out, as people read it, without what is not set. Throws
 * `invalid_request`.
 */
export function decodeWorkerFile(config: WorkerConfigInput): WorkerConfigInput {
  const fields = parseWith(workerConfigSchema, config)
  // Judges what `additional_params` holds.
  toWorkerConfig(fields, { path: [] })
  const { additional_params, ...outright } = fields
  const hidden = additional_params
    ? hiddenFields(additional_params, ['additional_params'])
    : undefined
  // As they were written: parsed, a number is not what it was.
  const env = {
    ...(isObject(hidden?.json.env_variables) ? hidden.json.env_variables : {}),
    ...(isObject(config.env_variables) ? config.env_variables : {}),
  }
  return withoutNulls({
    ...hidden?.wire,
    ...outright,
    // Holds: both were judged above.
    env_variables: Object.keys(env).length > 0 ? (env as WorkerConfigInput['env_variables']) : null,
  })
}

/** Our own names for what the SDK calls otherwise become its own; others stay, for us to read. */
function imageOf({ username, ...image }: Record<string, unknown>): Record<string, unknown> {
  return inOrder(IMAGE, username === undefined ? image : { repo_username: username, ...image })
}

/** The same fields: those that are named first, in this order. */
function inOrder(names: string[], fields: Record<string, unknown>): Record<string, unknown> {
  const first = names.flatMap((name) => (name in fields ? [[name, fields[name]] as const] : []))
  return { ...Object.fromEntries(first), ...fields }
}

/** Leaves out members that are null or undefined, at any depth. */
function withoutNulls<T>(value: T): T {
  if (Array.isArray(value)) return value.map(withoutNulls) as T
  if (!isObject(value) || JSON.isRawJSON(value)) return value
  const present = Object.entries(value).filter(([, child]) => child != null)
  // Holds for our types: a member that may be null may be absent as well.
  return Object.fromEntries(present.map(([name, child]) => [name, withoutNulls(child)])) as T
}

/** As Python's `json.dumps` writes it: a space after `,` and `:`, and ASCII only. */
function pythonJson(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(pythonJson).join(', ')}]`
  if (isObject(value) && !JSON.isRawJSON(value)) {
    const members = Object.entries(value)
      .filter(([, child]) => child !== undefined)
      .map(([name, child]) => `${pythonJson(name)}: ${pythonJson(child)}`)
    return `{${members.join(', ')}}`
  }
  return JSON.stringify(value).replace(
    /[\u007f-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`,
  )
}
