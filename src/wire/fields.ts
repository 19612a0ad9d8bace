import { z } from 'zod'
import { type FieldError, InvalidRequestError } from '../core/errors.ts'

/** Control characters, to stand in brackets. `\x` is what the regular expressions of all languages know. */
export const CONTROL = '\\x00-\\x1f\\x7f-\\x9f'
const CONTROL_CHARACTERS = new RegExp(`[${CONTROL}]`)
const LINE = new RegExp(`^[^${CONTROL}]*$`)

/** What a line of text may be. The API's description has the pattern, which is to match no control characters. */
interface LineRule {
  pattern: RegExp
  /** What is wrong with a text that does not match. */
  message: (text: string) => string
}

/** A line of text: no control characters, no half of a surrogate pair. */
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

/** Text of several lines; NUL cannot be passed to a process. */
export function text(max: number) {
  return z
    .string()
    .max(max)
    .refine((value) => !value.includes('\0'), 'must not contain NUL characters')
    .refine((value) => value.isWellFormed(), 'must be well-formed Unicode')
}

/** Any text: what there is decides. */
export const secretName = line(255)

/**
 * An object in whose fields null, `""` and `"None"` count as absent: so the Practicus SDK and Airflow write a field that
 * was not set. What is in lists and maps stays as it is.
 */
export function sparse<T extends z.ZodObject>(schema: T) {
  return z.preprocess((value: z.input<T>) => withoutAbsent(value), schema)
}

function withoutAbsent<T>(value: T): unknown {
  if (!isObject(value)) return value
  const isThere = ([, child]: [string, unknown]) =>
    child !== null && child !== '' && child !== 'None'
  return Object.fromEntries(Object.entries(value).filter(isThere))
}

/** zod's issues in the API's shape and our words: one for each wrong field, by its path. Messages never repeat the value. */
export function fieldErrors(error: z.core.$ZodError, prefix: PropertyKey[] = []): FieldError[] {
  const errors = new Map<string, string>()
  for (const issue of error.issues) {
    const path = [...prefix, ...issue.path]
    const paths =
      issue.code === 'unrecognized_keys' ? issue.keys.map((key) => [...path, key]) : [path]
    for (const one of paths.map(joined)) {
      if (!errors.has(one)) errors.set(one, wordsOf(issue))
    }
  }
  return Array.from(errors, ([path, message]) => ({ path, message }))
}

/** What is expected, as people say it. */
const KINDS: Readonly<Record<string, string>> = {
  string: 'a string',
  number: 'a number',
  int: 'a whole number',
  boolean: 'true or false',
  array: 'a list',
  object: 'an object',
  record: 'an object',
}

function wordsOf(issue: z.core.$ZodIssue): string {
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
      // Of these, each schema says what is wrong.
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

/** A field's path as people write it; a hostile name of any length stays readable. */
export function joined(path: PropertyKey[]): string {
  const whole = path.map(String).join('.')
  return whole.length > 200 ? `${whole.slice(0, 200)}…` : whole
}

/** The name of an unknown field in a line of text: cut, and without control characters. */
export function shownName(name: string): string {
  const line = name.replace(new RegExp(CONTROL_CHARACTERS, 'g'), '?').toWellFormed()
  return line.length > 100 ? `${line.slice(0, 100)}…` : line
}

/** Whether it is a JSON object: no list, and not null. */
export function isObject(value: unknown): value is Record<string, unknown> {
  return value !== null && typeof value === 'object' && !Array.isArray(value)
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
