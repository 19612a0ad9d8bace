import { isObject, parseWith } from './fields.ts'
import {
  hiddenFields,
  toWorkerConfig,
  type WorkerConfigInput,
  workerConfigSchema,
} from './worker-config.ts'

export type { WorkerConfigInput } from './worker-config.ts'

/** Fields the SDK writes outside `additional_params`, in its order (practicuscore 25.5.2). */
const PLAIN = [
  'worker_image',
  'worker_size',
  'service_type',
  'network_protocol',
  'service_url',
  'email',
  'refresh_token',
] as const

/** Fields of `image_config` and `git_configs` in the SDK's order. */
const IMAGE = ['repo_username', 'repo_password', 'repo_secret_name', 'pull_policy']
const GIT = [
  'remote_url',
  'secret_name',
  'save_secret',
  'username',
  'local_path',
  'branch',
  'sparse_checkout_folders',
  'fetch_depth',
]

/**
 * Returns a worker file byte for byte as the Practicus SDK writes it: unset fields are left out,
 * and `additional_params` holds most others under the SDK's names. Throws `invalid_request` for an
 * invalid field.
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

/** Decodes `additional_params`, and removes unset fields. Throws `invalid_request`. */
export function decodeWorkerFile(config: WorkerConfigInput): WorkerConfigInput {
  const fields = parseWith(workerConfigSchema, config)
  // Validates `additional_params`.
  toWorkerConfig(fields, { path: [] })
  const { additional_params, ...direct } = fields
  const hidden = additional_params
    ? hiddenFields(additional_params, ['additional_params'])
    : undefined
  // The values before parsing, which changes how numbers are written.
  const env = {
    ...(isObject(hidden?.json.env_variables) ? hidden.json.env_variables : {}),
    ...(isObject(config.env_variables) ? config.env_variables : {}),
  }
  return withoutNulls({
    ...hidden?.wire,
    ...direct,
    // Safe: both were validated above.
    env_variables: Object.keys(env).length > 0 ? (env as WorkerConfigInput['env_variables']) : null,
  })
}

/** Renames `username` as the SDK does; fields that the SDK does not know are kept. */
function imageOf({ username, ...image }: Record<string, unknown>): Record<string, unknown> {
  return inOrder(IMAGE, username === undefined ? image : { repo_username: username, ...image })
}

/** Returns the same fields, those in `names` first and in that order. */
function inOrder(names: string[], fields: Record<string, unknown>): Record<string, unknown> {
  const first = names.flatMap((name) => (name in fields ? [[name, fields[name]] as const] : []))
  return { ...Object.fromEntries(first), ...fields }
}

/** Removes members that are null or undefined, at any depth. */
function withoutNulls<T>(value: T): T {
  if (Array.isArray(value)) return value.map(withoutNulls) as T
  if (!isObject(value) || JSON.isRawJSON(value)) return value
  const present = Object.entries(value).filter(([, child]) => child != null)
  // Safe: in our types, a member that may be null may also be absent.
  return Object.fromEntries(present.map(([name, child]) => [name, withoutNulls(child)])) as T
}

/** Writes JSON like Python's `json.dumps`: a space after `,` and `:`, and ASCII only. */
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
