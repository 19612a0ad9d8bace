import type { KubernetesObject, Resource } from './resources.ts'
import { badRequest } from './status.ts'

export type Matcher = (object: KubernetesObject) => boolean

const LABEL_TERM =
  /^\s*(?:(?<not>!)\s*(?<absent>[^\s=!,()]+)|(?<key>[^\s=!,()]+)\s*(?:(?<operator>==?|!=)\s*(?<value>[^\s=!,()]*)|\s(?<set>in|notin)\s*\((?<values>[^)]*)\))?)\s*(?:,|$)/

/** `a=b,c!=d,e in (f,g),h notin (i),j,!k` */
export function labelMatcher(selector: string): Matcher {
  const terms: ((labels: Record<string, string>) => boolean)[] = []
  for (let rest = selector; rest.trim() !== ''; ) {
    const groups = LABEL_TERM.exec(rest)
    if (!groups?.groups) {
      throw badRequest(`unable to parse requirement: found '${rest}', expected: identifier`)
    }
    const { absent, key = '', operator, value, set, values } = groups.groups
    rest = rest.slice(groups[0].length)
    if (absent) terms.push((labels) => labels[absent] === undefined)
    else if (operator === '!=') terms.push((labels) => labels[key] !== value)
    else if (operator) terms.push((labels) => labels[key] === value)
    else if (set) {
      const wanted = (values ?? '').split(',').map((word) => word.trim())
      terms.push((labels) => {
        const found = labels[key] !== undefined && wanted.includes(labels[key])
        return set === 'in' ? found : !found
      })
    } else terms.push((labels) => labels[key] !== undefined)
  }
  return ({ metadata }) => terms.every((matches) => matches(metadata.labels ?? {}))
}

const FIELDS: Record<Resource, string[]> = {
  jobs: ['status.successful'],
  pods: ['spec.nodeName', 'spec.restartPolicy', 'spec.serviceAccountName', 'status.phase'],
  events: ['reason', 'type', 'source', 'reportingComponent'].concat(
    ['kind', 'namespace', 'name', 'uid', 'apiVersion', 'resourceVersion', 'fieldPath'].map(
      (field) => `involvedObject.${field}`,
    ),
  ),
  secrets: ['type'],
  configmaps: [],
  namespaces: ['status.phase'],
}

function fieldOf(object: KubernetesObject, path: string): string {
  if (path === 'status.successful') path = 'status.succeeded'
  if (path === 'source') path = 'source.component'
  const value = path
    .split('.')
    .reduce<unknown>((at, key) => (at as Record<string, unknown> | undefined)?.[key], object)
  return value === undefined || value === null ? '' : String(value)
}

/** `metadata.name=a,status.phase!=Running`: only the fields the API indexes, others are refused as there. */
export function fieldMatcher(resource: Resource, selector: string): Matcher {
  const supported = ['metadata.name', 'metadata.namespace', ...FIELDS[resource]]
  const terms = selector
    .split(',')
    .filter((term) => term !== '')
    .map((term) => {
      const [, field = '', operator, value] = /^([^=!]+)(==?|!=)(.*)$/.exec(term) ?? []
      if (!operator) throw badRequest(`invalid selector: '${term}'; can't understand '${term}'`)
      if (!supported.includes(field)) throw badRequest(`field label not supported: ${field}`)
      return (object: KubernetesObject) =>
        (fieldOf(object, field) === value) === (operator !== '!=')
    })
  return (object) => terms.every((matches) => matches(object))
}

export function matcherOf(resource: Resource, query: URLSearchParams): Matcher {
  const byLabel = labelMatcher(query.get('labelSelector') ?? '')
  const byField = fieldMatcher(resource, query.get('fieldSelector') ?? '')
  return (object) => byLabel(object) && byField(object)
}
