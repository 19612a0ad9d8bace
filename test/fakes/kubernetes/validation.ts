import type { Container, Job, KeyedData, KubernetesObject, Pod, PodSpec } from './resources.ts'
import type { Invalid } from './status.ts'

export const DATA_BYTES_MAX = 1024 * 1024
const LABEL = /^[a-z0-9]([-a-z0-9]*[a-z0-9])?$/
const SUBDOMAIN = /^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$/
const QUALIFIED =
  /^([a-z0-9]([-a-z0-9.]*[a-z0-9])?\/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$/
const LABEL_VALUE = /^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$/
const QUANTITY = /^[+-]?(\d+|\d+\.\d*|\.\d+)(m|[kMGTPE]|[KMGTPE]i|[eE][+-]?\d+)?$/
const ANNOTATION_BYTES_MAX = 256 * 1024
const SUBDOMAIN_RULE =
  "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character"
const LABEL_RULE =
  "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character"

const IMMUTABLE = 'field is immutable when `immutable` is set'

/** Collects what a real server's validation would find, with its field paths. */
export type Report = (field: string, problem: string, detail?: string) => void

export function problemsOf(check: (report: Report) => void): Invalid[] {
  const problems: Invalid[] = []
  check((field, problem, detail) => problems.push({ field, problem, ...(detail && { detail }) }))
  return problems
}

const bad = (value: unknown) => `Invalid value: ${JSON.stringify(value)}`

export function validateMetadata(
  metadata: Partial<KubernetesObject['metadata']>,
  path: string,
  report: Report,
): void {
  const { name, labels = {}, annotations = {}, ownerReferences = [], finalizers = [] } = metadata
  if (name !== undefined && (name.length > 253 || !SUBDOMAIN.test(name))) {
    report(`${path}.name`, bad(name), SUBDOMAIN_RULE)
  }
  for (const [key, value] of Object.entries(labels)) {
    if (!QUALIFIED.test(key)) report(`${path}.labels`, bad(key), 'name part must consist of …')
    if (value.length > 63) {
      report(`${path}.labels`, bad(value), 'must be no more than 63 characters')
    } else if (!LABEL_VALUE.test(value)) {
      report(`${path}.labels`, bad(value), 'a valid label must be an empty string or consist of …')
    }
  }
  for (const key of Object.keys(annotations)) {
    if (!QUALIFIED.test(key.toLowerCase())) {
      report(`${path}.annotations`, bad(key), 'name part must consist of …')
    }
  }
  const bytes = Object.entries(annotations).reduce((sum, [key, value]) => {
    return sum + Buffer.byteLength(key) + Buffer.byteLength(value)
  }, 0)
  if (bytes > ANNOTATION_BYTES_MAX) {
    report(`${path}.annotations`, 'Too long', `may not be more than ${ANNOTATION_BYTES_MAX} bytes`)
  }
  ownerReferences.forEach((owner, index) => {
    for (const field of ['apiVersion', 'kind', 'name', 'uid'] as const) {
      if (!owner[field]) {
        report(`${path}.ownerReferences[${index}].${field}`, bad(''), 'must not be empty')
      }
    }
  })
  for (const finalizer of finalizers) {
    if (!QUALIFIED.test(finalizer)) report(`${path}.finalizers`, bad(finalizer), 'name part …')
  }
}

export function validateJob({ metadata, spec }: Job, report: Report): void {
  // The controller copies it to the pods' label `job-name`.
  if ((metadata.name?.length ?? 0) > 63) {
    report('spec.template.labels', bad(metadata.name), 'must be no more than 63 characters')
  }
  for (const field of [
    'backoffLimit',
    'completions',
    'parallelism',
    'activeDeadlineSeconds',
    'ttlSecondsAfterFinished',
  ] as const) {
    if ((spec[field] ?? 0) < 0) {
      report(`spec.${field}`, bad(spec[field]), 'must be greater than or equal to 0')
    }
  }
  const podSpec = spec.template?.spec
  if (!podSpec) {
    report('spec.template.spec.containers', 'Required value')
    return
  }
  validateMetadata(spec.template.metadata ?? {}, 'spec.template.metadata', report)
  validatePodSpec(podSpec, 'spec.template.spec', report)
  const policy = podSpec.restartPolicy
  if (policy === undefined || policy === 'Always') {
    const problem = policy ? `Unsupported value: "${policy}"` : 'Required value'
    report(
      'spec.template.spec.restartPolicy',
      problem,
      policy ? 'supported values: "OnFailure", "Never"' : 'valid values: "OnFailure", "Never"',
    )
  }
  if (!spec.podFailurePolicy) return
  if (policy !== 'Never') {
    report(
      'spec.template.spec.restartPolicy',
      bad(policy),
      'only "Never" is supported when podFailurePolicy is specified',
    )
  }
  if (spec.podReplacementPolicy && spec.podReplacementPolicy !== 'Failed') {
    report(
      'spec.podReplacementPolicy',
      `Unsupported value: "${spec.podReplacementPolicy}"`,
      'supported values: "Failed"',
    )
  }
  const names = [...(podSpec.initContainers ?? []), ...podSpec.containers].map(({ name }) => name)
  spec.podFailurePolicy.rules.forEach(({ action, onExitCodes, onPodConditions }, index) => {
    const path = `spec.podFailurePolicy.rules[${index}]`
    if (!['FailJob', 'Ignore', 'Count'].includes(action)) {
      report(`${path}.action`, `Unsupported value: "${action}"`)
    }
    if (!onExitCodes === !onPodConditions?.length) {
      report(path, bad(index), 'specifying one of OnExitCodes and OnPodConditions is required')
    }
    if (!onExitCodes) return
    const { containerName, operator, values } = onExitCodes
    if (containerName && !names.includes(containerName)) {
      report(
        `${path}.onExitCodes.containerName`,
        bad(containerName),
        'must be one of the containers',
      )
    }
    if (operator === 'In' && values.includes(0)) {
      report(`${path}.onExitCodes.values`, bad(0), 'must not be 0 for the In operator')
    }
    if (!values?.length)
      report(`${path}.onExitCodes.values`, bad(values), 'at least one value is required')
  })
}

export function validatePodSpec(spec: PodSpec, path: string, report: Report): void {
  if (!spec.containers?.length) report(`${path}.containers`, 'Required value')
  if (spec.activeDeadlineSeconds !== undefined && spec.activeDeadlineSeconds < 1) {
    report(
      `${path}.activeDeadlineSeconds`,
      bad(spec.activeDeadlineSeconds),
      'must be greater than 0',
    )
  }
  if ((spec.terminationGracePeriodSeconds ?? 0) < 0) {
    report(
      `${path}.terminationGracePeriodSeconds`,
      bad(spec.terminationGracePeriodSeconds),
      'must be greater than or equal to 0',
    )
  }
  if (spec.restartPolicy && !['Always', 'OnFailure', 'Never'].includes(spec.restartPolicy)) {
    report(`${path}.restartPolicy`, `Unsupported value: "${spec.restartPolicy}"`)
  }
  const volumes = new Set<string>()
  spec.volumes?.forEach(({ name, ...sources }, index) => {
    const at = `${path}.volumes[${index}]`
    if (!LABEL.test(name ?? '')) report(`${at}.name`, bad(name), LABEL_RULE)
    if (volumes.has(name)) report(`${at}.name`, `Duplicate value: "${name}"`)
    if (Object.keys(sources).length > 1)
      report(at, 'Forbidden', 'may not specify more than 1 volume type')
    volumes.add(name)
  })
  const names = new Set<string>()
  for (const kind of ['initContainers', 'containers'] as const) {
    spec[kind]?.forEach((container, index) => {
      const at = `${path}.${kind}[${index}]`
      if (names.has(container.name)) report(`${at}.name`, `Duplicate value: "${container.name}"`)
      names.add(container.name)
      validateContainer(container, at, volumes, report)
    })
  }
}

function validateContainer(
  { name, image, env, volumeMounts, resources }: Container,
  at: string,
  volumes: Set<string>,
  report: Report,
): void {
  if (!name) report(`${at}.name`, 'Required value')
  else if (name.length > 63 || !LABEL.test(name)) report(`${at}.name`, bad(name), LABEL_RULE)
  if (!image) report(`${at}.image`, 'Required value')
  env?.forEach((variable, index) => {
    if (!variable.name) report(`${at}.env[${index}].name`, 'Required value')
    else if (!/^[ -<>-~]+$/.test(variable.name)) {
      report(`${at}.env[${index}].name`, bad(variable.name), 'a valid environment variable name …')
    }
    if (variable.value && variable.valueFrom) {
      report(
        `${at}.env[${index}].valueFrom`,
        bad(''),
        'may not be specified when `value` is not empty',
      )
    }
  })
  const paths = new Set<string>()
  volumeMounts?.forEach((mount, index) => {
    const field = `${at}.volumeMounts[${index}]`
    if (!volumes.has(mount.name)) report(`${field}.name`, `Not found: "${mount.name}"`)
    if (!mount.mountPath) report(`${field}.mountPath`, 'Required value')
    if (paths.has(mount.mountPath))
      report(`${field}.mountPath`, bad(mount.mountPath), 'must be unique')
    paths.add(mount.mountPath)
  })
  for (const kind of ['requests', 'limits'] as const) {
    for (const [resource, quantity] of Object.entries(resources?.[kind] ?? {})) {
      if (!QUANTITY.test(quantity)) {
        report(`${at}.resources.${kind}[${resource}]`, bad(quantity), 'quantities must match …')
      }
      const limit = resources?.limits?.[resource]
      if (kind === 'requests' && limit && amount(quantity) > amount(limit)) {
        report(
          `${at}.resources.requests`,
          bad(quantity),
          `must be less than or equal to ${resource} limit of ${limit}`,
        )
      }
    }
  }
}

/** A quantity as a number: `500m`, `1Gi`, `2k`. */
export function amount(quantity: string): number {
  const [, number = '0', suffix = ''] = /^([+-]?[\d.]+)(.*)$/.exec(quantity) ?? []
  if (suffix === 'm') return Number(number) / 1000
  const power = 'kMGTPE'.indexOf(suffix.charAt(0) === 'K' ? 'k' : suffix.charAt(0)) + 1
  if (suffix === '' || power === 0) return Number(`${number}${suffix}`)
  return Number(number) * (suffix.endsWith('i') ? 1024 : 1000) ** power
}

export function validateData(object: KeyedData, report: Report): void {
  const encoded = object.kind === 'Secret' ? object.data : object.binaryData
  const plain = object.kind === 'Secret' ? {} : object.data
  let bytes = 0
  for (const [key, value] of Object.entries({ ...encoded, ...plain })) {
    if (!/^[-._a-zA-Z0-9]{1,253}$/.test(key) || key === '.' || key.startsWith('..')) {
      report(
        `data[${key}]`,
        bad(key),
        'a valid config key must consist of alphanumeric characters …',
      )
    }
    bytes +=
      plain?.[key] === undefined ? Buffer.from(value, 'base64').length : Buffer.byteLength(value)
  }
  for (const key of Object.keys(encoded ?? {})) {
    if (plain?.[key] !== undefined)
      report(`data[${key}]`, bad(key), 'duplicate of key present in binaryData')
  }
  if (bytes > DATA_BYTES_MAX) {
    report('data', 'Too long', `may not be more than ${DATA_BYTES_MAX} bytes`)
  }
}

export function validateDataUpdate(next: KeyedData, old: KeyedData, report: Report): void {
  if ((next.type ?? 'Opaque') !== (old.type ?? 'Opaque')) {
    report('type', bad(next.type), 'field is immutable')
  }
  if (!old.immutable) return
  if (!next.immutable) report('immutable', 'Forbidden', IMMUTABLE)
  for (const field of ['data', 'binaryData'] as const) {
    if (JSON.stringify(next[field]) !== JSON.stringify(old[field])) {
      report(field, 'Forbidden', IMMUTABLE)
    }
  }
}

export function validateJobUpdate(next: Job, old: Job, report: Report): void {
  const fixed = ['selector', 'completions', 'podFailurePolicy', 'backoffLimitPerIndex'] as const
  const template = old.spec.suspend && !old.status.startTime ? [] : (['template'] as const)
  for (const field of [...fixed, ...template]) {
    if (JSON.stringify(next.spec[field]) !== JSON.stringify(old.spec[field])) {
      report(`spec.${field}`, bad(next.spec[field]), 'field is immutable')
    }
  }
}

export function validatePodUpdate(next: Pod, old: Pod, report: Report): void {
  const fixed = ({ spec }: Pod) => ({
    ...spec,
    activeDeadlineSeconds: 0,
    tolerations: 0,
    schedulingGates: 0,
    containers: spec.containers.map((container) => ({ ...container, image: '' })),
  })
  if (JSON.stringify(fixed(next)) !== JSON.stringify(fixed(old))) {
    report(
      'spec',
      'Forbidden',
      'pod updates may not change fields other than `spec.containers[*].image`,…',
    )
  }
}
