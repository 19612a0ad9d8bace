import type { z } from 'zod'
import { parseWith } from './fields.ts'
import { toWorkerConfig, workerConfigSchema } from './worker-config.ts'

export type WorkerConfigInput = z.input<typeof workerConfigSchema>

/** What the Practicus SDK moves into `additional_params` when it writes a configuration. */
const MOVED = [
  'env_variables',
  'personal_secrets',
  'shared_secrets',
  'git_configs',
  'image_config',
  'startup_script',
] as const

/**
 * A worker file as the Practicus SDK writes it: fields that are null left out, those with structure as base64
 * of JSON in `additional_params`, byte for byte as Python would. Throws `invalid_request` for a wrong field.
 */
export function encodeWorkerFile(config: WorkerConfigInput): string {
  const fields = Object.entries(decodeWorkerFile(config))
  const isMoved = ([name]: [string, unknown]) => (MOVED as readonly string[]).includes(name)
  const plain = Object.fromEntries(fields.filter((field) => !isMoved(field)))
  const moved = fields.filter(isMoved)
  if (moved.length === 0) return JSON.stringify(plain)
  const json = pythonJson(Object.fromEntries(moved))
  return JSON.stringify({ ...plain, additional_params: Buffer.from(json).toString('base64') })
}

/** The configuration with `additional_params` written out, as people read it. Throws `invalid_request`. */
export function decodeWorkerFile(config: WorkerConfigInput): WorkerConfigInput {
  const fields = parseWith(workerConfigSchema, config)
  // Judges what `additional_params` holds.
  toWorkerConfig(fields, { path: [] })
  const { additional_params, ...outright } = withoutNulls(fields)
  const hidden = additional_params ? withoutNulls(decoded(additional_params)) : {}
  const env = { ...hidden.env_variables, ...outright.env_variables }
  return {
    ...hidden,
    ...outright,
    ...(Object.keys(env).length > 0 ? { env_variables: env } : {}),
  }
}

function decoded(base64: string): WorkerConfigInput {
  // Holds: `toWorkerConfig` has read it before.
  return JSON.parse(Buffer.from(base64, 'base64').toString()) as WorkerConfigInput
}

/** Without members that are null, at any depth. */
function withoutNulls<T>(value: T): T {
  if (Array.isArray(value)) return value.map(withoutNulls) as T
  if (value === null || typeof value !== 'object') return value
  const present = Object.entries(value).filter(([, child]) => child != null)
  // Holds for our types: a member that may be null may be absent as well.
  return Object.fromEntries(present.map(([name, child]) => [name, withoutNulls(child)])) as T
}

/** As Python's `json.dumps` writes it: a space after `,` and `:`, and ASCII only. */
function pythonJson(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(pythonJson).join(', ')}]`
  if (value !== null && typeof value === 'object') {
    const members = Object.entries(value).map(
      ([name, child]) => `${pythonJson(name)}: ${pythonJson(child)}`,
    )
    return `{${members.join(', ')}}`
  }
  return JSON.stringify(value).replace(
    /[\u007f-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`,
  )
}
