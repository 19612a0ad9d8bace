import { z } from 'zod'
import { type FieldError, InvalidRequestError } from '../core/errors.ts'

// biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what it looks for
const CONTROL_CHARACTERS = /[\u0000-\u001f\u007f-\u009f]/

/** A line of text: no control characters, no half of a surrogate pair. */
export function line(max: number) {
  return z
    .string()
    .min(1)
    .max(max)
    .refine((text) => !CONTROL_CHARACTERS.test(text), 'must not contain control characters')
    .refine((text) => text.isWellFormed(), 'must be well-formed Unicode')
}

/** Text of several lines; NUL cannot be passed to a process. */
export function text(max: number) {
  return z
    .string()
    .max(max)
    .refine((value) => !value.includes('\0'), 'must not contain NUL characters')
    .refine((value) => value.isWellFormed(), 'must be well-formed Unicode')
}

/** As files of `SECRETS_DIR` and variables can be called. */
export const secretName = line(255).regex(
  /^[A-Za-z0-9_][A-Za-z0-9._-]*$/,
  'is not the name of a secret: letters, digits, _ - . only',
)

/** zod's issues in the API's shape: each wrong field by its path. Messages never repeat the value. */
export function fieldErrors(error: z.core.$ZodError, prefix: PropertyKey[] = []): FieldError[] {
  return error.issues.flatMap((issue) => {
    const path = [...prefix, ...issue.path]
    if (issue.code === 'unrecognized_keys') {
      return issue.keys.map((key) => ({ path: joined([...path, key]), message: 'unknown field' }))
    }
    if (issue.code === 'invalid_key') {
      const message = issue.issues[0]?.message ?? 'invalid name'
      return [{ path: joined(path), message }]
    }
    const missing = issue.code === 'invalid_type' && issue.message.endsWith('received undefined')
    return [{ path: joined(path), message: missing ? 'is required' : issue.message }]
  })
}

/** Parses or throws `invalid_request` with each wrong field named. */
export function parseWith<T extends z.ZodType>(
  schema: T,
  value: unknown,
  prefix: PropertyKey[] = [],
): z.output<T> {
  const result = schema.safeParse(value)
  if (!result.success) throw new InvalidRequestError(fieldErrors(result.error, prefix))
  return result.data
}

/** A field's path as people write it; a hostile name of any length stays readable. */
export function joined(path: PropertyKey[]): string {
  const whole = path.map(String).join('.')
  return whole.length > 200 ? `${whole.slice(0, 200)}…` : whole
}

/** Without the fields that are null or undefined. */
export function present<T extends object>(object: T): Present<T> {
  const entries = Object.entries(object).filter(
    ([, value]) => value !== null && value !== undefined,
  )
  // Holds: exactly the null and undefined properties are gone.
  return Object.fromEntries(entries) as Present<T>
}
type Present<T> = { [K in keyof T as undefined extends T[K] ? never : K]: T[K] } & {
  [K in keyof T as undefined extends T[K] ? K : never]?: NonNullable<T[K]>
}
