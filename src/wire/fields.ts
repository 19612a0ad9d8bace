import { z } from 'zod'
import { type FieldError, InvalidRequestError } from '../core/errors.ts'

/** Control characters for a character class. Regular expressions of all languages know `\x`. */
export const CONTROL = '\\x00-\\x1f\\x7f-\\x9f'
const CONTROL_CHARACTERS = new RegExp(`[${CONTROL}]`)
const LINE = new RegExp(`^[^${CONTROL}]*$`)

/** Rule for a line of text. OpenAPI shows the pattern, so it excludes control characters. */
interface LineRule {
  pattern: RegExp
  /** Explains why a text does not match. */
  message: (text: string) => string
}

/** Returns the schema of one line of text: no control characters, no lone surrogates. */
export function line(max: number, rule: LineRule = { pattern: LINE, message: () => '' }) {
  return z
    .string()
    .min(1)
    .max(max)
    .regex(rule.pattern, {
      error: ({ input }) =>
        CONTROL_CHARACTERS.test(String(input))
          ? 'must not contain control characters'
          : rule.message(String(input)),
    })
    .refine((text) => text.isWellFormed(), 'must be well-formed Unicode')
}

/** Returns the schema of text with several lines, without NUL, which no process can receive. */
export function text(max: number) {
  return z
    .string()
    .max(max)
    .refine((value) => !value.includes('\0'), 'must not contain NUL characters')
    .refine((value) => value.isWellFormed(), 'must be well-formed Unicode')
}

/** Any line of text: whether the secret exists is checked where it is read. */
export const secretName = line(255)

/**
 * Returns a schema of an object whose fields count as absent when they are null, `""` or `"None"`:
 * the Practicus SDK and Airflow write unset fields so. Items of lists and maps are kept.
 */
export function sparse<T extends z.ZodObject>(schema: T) {
  return z.preprocess((value: z.input<T>) => withoutAbsent(value), schema)
}

function withoutAbsent<T>(value: T): unknown {
  if (!isObject(value)) return value
  const isPresent = ([, child]: [string, unknown]) =>
    child !== null && child !== '' && child !== 'None'
  return Object.fromEntries(Object.entries(value).filter(isPresent))
}

/** Maps zod's issues to one error per field path, in our words. Messages never repeat the value. */
export function fieldErrors(error: z.core.$ZodError, prefix: PropertyKey[] = []): FieldError[] {
  const errors = new Map<string, string>()
  for (const issue of error.issues) {
    const path = [...prefix, ...issue.path]
    const paths =
      issue.code === 'unrecognized_keys' ? issue.keys.map((key) => [...path, key]) : [path]
    for (const one of paths.map(joined)) {
      if (!errors.has(one)) errors.set(one, messageOf(issue))
    }
  }
  return Array.from(errors, ([path, message]) => ({ path, message }))
}

/** Names of zod's types in messages. */
const KINDS: Readonly<Record<string, string>> = {
  string: 'a string',
  number: 'a number',
  int: 'a whole number',
  boolean: 'true or false',
  array: 'a list',
  object: 'an object',
  record: 'an object',
}

function messageOf(issue: z.core.$ZodIssue): string {
  switch (issue.code) {
    case 'unrecognized_keys':
      return 'unknown field'
    case 'invalid_key':
      return issue.issues[0]?.message ?? 'is not a valid name'
    case 'invalid_type':
      if (issue.message.endsWith('received undefined')) return 'is required'
      return `must be ${KINDS[issue.expected] ?? issue.expected}`
    case 'too_small':
      return isLength(issue.origin) && issue.minimum === 1
        ? 'must not be empty'
        : `must be ${bound(issue.origin, issue.inclusive === false ? 'more than' : 'at least', issue.minimum)}`
    case 'too_big':
      return `must be ${bound(issue.origin, 'at most', issue.maximum)}`
    case 'invalid_value':
      return `must be one of ${issue.values.map(String).join(', ')}`
    default:
      // The schemas write the messages of all other issues.
      return issue.message
  }
}

function isLength(origin: string): boolean {
  return origin === 'string' || origin === 'array'
}

function bound(origin: string, limit: string, value: number | bigint): string {
  if (origin === 'string') return `${limit} ${value} characters long`
  return origin === 'array' ? `a list of ${limit} ${value}` : `${limit} ${value}`
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

/** Returns a field's path as text, cut to 200 characters: a client may send names of any length. */
export function joined(path: PropertyKey[]): string {
  const whole = path.map(String).join('.')
  return whole.length > 200 ? `${whole.slice(0, 200)}…` : whole
}

/** Returns the name of an unknown field for a message: cut, and without control characters. */
export function shownName(name: string): string {
  const line = name.replace(new RegExp(CONTROL_CHARACTERS, 'g'), '?').toWellFormed()
  return line.length > 100 ? `${line.slice(0, 100)}…` : line
}

/** Returns whether a value is a JSON object: neither a list nor null. */
export function isObject(value: unknown): value is Record<string, unknown> {
  return value !== null && typeof value === 'object' && !Array.isArray(value)
}

/** Returns an object without the fields that are null or undefined. */
export function present<T extends object>(object: T): Present<T> {
  const entries = Object.entries(object).filter(
    ([, value]) => value !== null && value !== undefined,
  )
  // Safe: exactly the null and undefined properties were removed.
  return Object.fromEntries(entries) as Present<T>
}
type Present<T> = { [K in keyof T as undefined extends T[K] ? never : K]: T[K] } & {
  [K in keyof T as undefined extends T[K] ? K : never]?: NonNullable<T[K]>
}
