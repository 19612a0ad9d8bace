import type { JsonSchema } from './api.ts'

/** A field of a form made from a JSON schema, with its input. Requests omit empty fields. */
export type Field = {
  name: string
  description: string
  isRequired: boolean
  /** Whether it is required or in the schema's example. Other fields are under "More fields". */
  isUsual: boolean
} & (
  | { kind: 'text'; value: string; isLong: boolean; isSecret: boolean; masked: string | undefined }
  | { kind: 'number'; value: string; min: number | undefined; max: number | undefined }
  | { kind: 'choice'; value: string; options: string[]; isBoolean: boolean }
  | { kind: 'object'; fields: Field[] }
  | { kind: 'list'; items: Field[]; newItem: () => Field }
  | { kind: 'map'; entries: Entry[] }
)

export type ObjectField = Extract<Field, { kind: 'object' }>

export interface Entry {
  name: string
  value: string
  /** Whether the API returned the name without the value, which must be entered again. */
  isMasked: boolean
}

type Schemas = Record<string, JsonSchema>

const LONG_TEXT = 100_000
/** Text that the API returns in place of a hidden value. */
const MASK = '***'

/** Returns an empty form, or undefined if the schema's type is not supported. */
export function fieldOf(
  name: string,
  given: JsonSchema,
  schemas: Schemas,
  options: { isRequired: boolean; isUsual: boolean } = { isRequired: true, isUsual: true },
): Field | undefined {
  const { schema, description } = resolved(given, schemas)
  const base = { name, description, ...options }
  if (schema.enum) {
    return { ...base, kind: 'choice', value: '', options: schema.enum, isBoolean: false }
  }
  switch (typeOf(schema)) {
    case 'string': {
      const isLong = (schema.maxLength ?? 0) >= LONG_TEXT
      const isSecret = name.endsWith('token')
      return { ...base, kind: 'text', value: '', isLong, isSecret, masked: undefined }
    }
    case 'number':
    case 'integer':
      return { ...base, kind: 'number', value: '', min: schema.minimum, max: schema.maximum }
    case 'boolean':
      return { ...base, kind: 'choice', value: '', options: ['true', 'false'], isBoolean: true }
    case 'array': {
      const items = schema.items ?? {}
      const newItem = () => fieldOf('', items, schemas)
      const first = newItem()
      if (!first) return undefined
      return { ...base, kind: 'list', items: [], newItem: () => newItem() ?? first }
    }
    case 'object':
      if (!schema.properties) return { ...base, kind: 'map', entries: [] }
      return { ...base, kind: 'object', fields: fieldsOf(schema, schemas) }
    default:
      return undefined
  }
}

function fieldsOf(schema: JsonSchema, schemas: Schemas): Field[] {
  const example = schema.examples?.[0]
  const usual = new Set(Object.keys(isObject(example) ? example : (schema.properties ?? {})))
  return Object.entries(schema.properties ?? {}).flatMap(([name, each]) => {
    const isRequired = schema.required?.includes(name) ?? false
    const isUsual = isRequired || usual.has(name)
    return fieldOf(name, each, schemas, { isRequired, isUsual }) ?? []
  })
}

/** Follows references, and takes the first alternative that is not null. */
function resolved(
  given: JsonSchema,
  schemas: Schemas,
): { schema: JsonSchema; description: string } {
  let schema = given
  let { description } = given
  for (;;) {
    const name = schema.$ref?.split('/').at(-1)
    const next =
      name === undefined
        ? schema.anyOf?.find((alternative) => typeOf(alternative) !== 'null')
        : (schemas[name] ?? {})
    if (!next) return { schema, description: description ?? '' }
    schema = next
    description ??= schema.description
  }
}

function typeOf({ type }: JsonSchema): string | undefined {
  return Array.isArray(type) ? type.find((each) => each !== 'null') : type
}

/** Returns the field's value for the request; undefined if the field is empty. */
export function requestOf(field: Field): unknown {
  switch (field.kind) {
    case 'text':
      return field.value === '' ? undefined : field.value
    case 'number':
      return field.value === '' ? undefined : Number(field.value)
    case 'choice':
      if (field.value === '') return undefined
      return field.isBoolean ? field.value === 'true' : field.value
    case 'object': {
      const given = field.fields
        .map((each) => [each.name, requestOf(each)] as const)
        .filter(([, value]) => value !== undefined)
      return given.length === 0 && !field.isRequired ? undefined : Object.fromEntries(given)
    }
    case 'list':
      return field.items.length === 0 ? undefined : field.items.map((item) => requestOf(item) ?? '')
    case 'map': {
      const given = field.entries.filter(({ name, value }) => name !== '' || value !== '')
      if (given.length === 0) return undefined
      return Object.fromEntries(given.map(({ name, value }) => [name, value]))
    }
  }
}

/** Returns the form with the values of an earlier task; masked values are empty and marked. */
export function filled<F extends Field>(field: F, value: unknown): F
export function filled(field: Field, value: unknown): Field {
  if (value === null || value === undefined) return field
  switch (field.kind) {
    case 'text': {
      const text = typeof value === 'string' ? value : JSON.stringify(value)
      return text.includes(MASK) ? { ...field, masked: text } : { ...field, value: text }
    }
    case 'number':
    case 'choice':
      return { ...field, value: String(value) }
    case 'object': {
      if (!isObject(value)) return field
      return { ...field, fields: field.fields.map((each) => filled(each, value[each.name])) }
    }
    case 'list':
      if (!Array.isArray(value)) return field
      return { ...field, items: value.map((each) => filled(field.newItem(), each)) }
    case 'map': {
      if (!isObject(value)) return field
      const entries = Object.entries(value).map(([name, each]) => {
        const isMasked = each === MASK
        return { name, value: isMasked ? '' : String(each), isMasked }
      })
      return { ...field, entries }
    }
  }
}

/** Returns the paths of values that must be entered again. */
export function maskedPaths(field: Field, path = ''): string[] {
  switch (field.kind) {
    case 'text':
      return field.masked === undefined ? [] : [path]
    case 'map':
      return field.entries.filter(({ isMasked }) => isMasked).map(({ name }) => below(path, name))
    case 'object':
      return field.fields.flatMap((each) => maskedPaths(each, below(path, each.name)))
    case 'list':
      return field.items.flatMap((each, index) => maskedPaths(each, below(path, String(index))))
    default:
      return []
  }
}

/** Returns the paths that have a place for error messages. */
export function pathsOf(field: Field, path = ''): string[] {
  const own = path === '' ? [] : [path]
  switch (field.kind) {
    case 'map':
      return [...own, ...field.entries.map(({ name }) => below(path, name))]
    case 'object':
      return [...own, ...field.fields.flatMap((each) => pathsOf(each, below(path, each.name)))]
    case 'list':
      return [...own, ...field.items.flatMap((each, at) => pathsOf(each, below(path, String(at))))]
    default:
      return own
  }
}

export function isFilled(field: Field): boolean {
  return requestOf(field) !== undefined || maskedPaths(field).length > 0
}

/** Returns a path in the form that the API uses in errors. */
export function below(path: string, name: string): string {
  return path === '' ? name : `${path}.${name}`
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
