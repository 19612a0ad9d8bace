import { isDeepStrictEqual } from 'node:util'
import { ApiError, badRequest } from './status.ts'

type Json = unknown
type JsonObject = { [key: string]: Json }

const isObject = (value: Json): value is JsonObject =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

/** RFC 7396. */
export function mergePatch(target: Json, patch: Json): Json {
  if (!isObject(patch)) return patch
  const merged: JsonObject = isObject(target) ? { ...target } : {}
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete merged[key]
    else merged[key] = mergePatch(merged[key], value)
  }
  return merged
}

interface Operation {
  op: 'add' | 'remove' | 'replace' | 'test' | 'copy' | 'move'
  path: string
  from?: string
  value?: Json
}

/** RFC 6902; 422 where an operation does not apply, as the API answers. */
export function jsonPatch(target: Json, operations: Json): Json {
  if (!Array.isArray(operations)) throw badRequest('json: cannot unmarshal object into patch')
  const document = { root: structuredClone(target) }
  for (const operation of operations as Operation[]) apply(document, operation)
  return document.root
}

function apply(document: JsonObject, { op, path, from, value }: Operation): void {
  if (op === 'copy' || op === 'move') {
    const [holder, key] = locate(document, from ?? '')
    const taken = structuredClone((holder as JsonObject)[key])
    if (op === 'move') apply(document, { op: 'remove', path: from ?? '' })
    apply(document, { op: 'add', path, value: taken })
    return
  }
  const [holder, key] = locate(document, path)
  const there = Array.isArray(holder) ? Number(key) < holder.length : Object.hasOwn(holder, key)
  if (op !== 'add' && !there) throw inapplicable(`${op} operation does not apply: missing ${path}`)
  if (op === 'test') {
    if (!isDeepStrictEqual((holder as JsonObject)[key], value)) {
      throw inapplicable(`testing path ${path} failed`)
    }
  } else if (Array.isArray(holder)) {
    const index = key === '-' ? holder.length : Number(key)
    if (op === 'add') holder.splice(index, 0, value)
    else if (op === 'remove') holder.splice(index, 1)
    else holder[index] = value
  } else if (op === 'remove') delete holder[key]
  else holder[key] = value
}

function locate(document: JsonObject, path: string): [JsonObject | Json[], string] {
  const keys = ['root', ...path.split('/').slice(1)].map((key) =>
    key.replaceAll('~1', '/').replaceAll('~0', '~'),
  )
  const last = keys.pop() ?? 'root'
  let at: Json = document
  for (const key of keys) at = (at as JsonObject)[key]
  if (!isObject(at) && !Array.isArray(at)) throw inapplicable(`doc is missing path: ${path}`)
  return [at, last]
}

const inapplicable = (why: string) =>
  new ApiError(
    422,
    'Invalid',
    `the server rejected our request due to an error in our request: ${why}`,
  )
