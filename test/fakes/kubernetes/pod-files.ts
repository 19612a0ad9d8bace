import { mkdir, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import type { Container, KeyedData, KeyFile, KeySelector, Pod } from './resources.ts'
import type { Store } from './store.ts'

/** A Secret, ConfigMap or key that is not there (yet). */
export class Missing extends Error {
  readonly volume: string

  constructor(message: string, volume = '') {
    super(message)
    this.volume = volume
  }
}

type Source = 'secrets' | 'configmaps'
const WORDS: Record<Source, string> = { secrets: 'secret', configmaps: 'configmap' }

function contentsOf(object: KeyedData): Record<string, Buffer> {
  const decode = (data: Record<string, string> = {}, encoding: BufferEncoding) =>
    Object.entries(data).map(([key, value]) => [key, Buffer.from(value, encoding)])
  const plain = object.kind === 'Secret' ? 'base64' : 'utf8'
  return Object.fromEntries([...decode(object.data, plain), ...decode(object.binaryData, 'base64')])
}

/** Makes every volume a folder: `volumes/<name>`. Throws `Missing` before anything can start. */
export async function makeVolumes(store: Store, pod: Pod, folder: string): Promise<void> {
  const { namespace = '' } = pod.metadata
  for (const { name, secret, configMap } of pod.spec.volumes ?? []) {
    const to = join(folder, 'volumes', name)
    await mkdir(to, { recursive: true })
    const files = secret ?? configMap
    if (!files) continue
    const source: Source = secret ? 'secrets' : 'configmaps'
    const from = secret?.secretName ?? configMap?.name ?? ''
    const object = store.get(source, namespace, from)
    if (!object && files.optional) continue
    if (!object) throw new Missing(`${WORDS[source]} "${from}" not found`, name)
    const contents = contentsOf(object)
    const items: KeyFile[] = files.items ?? Object.keys(contents).map((key) => ({ key, path: key }))
    for (const item of items) {
      const content = contents[item.key]
      if (!content && files.optional) continue
      if (!content)
        throw new Missing(`references non-existent ${WORDS[source]} key: ${item.key}`, name)
      const mode = item.mode ?? files.defaultMode ?? 0o644
      await mkdir(dirname(join(to, item.path)), { recursive: true })
      await writeFile(join(to, item.path), content, { mode })
    }
  }
}

/**
 * Turns the paths that the container sees into those of this machine, in one pass over a text, so that what
 * was put in is not replaced again. A path counts as such where nothing that could belong to it stands beside it.
 */
export async function replacer(
  container: Container,
  folder: string,
  files: Record<string, string>,
): Promise<(text: string) => string> {
  const paths = new Map<string, string>()
  for (const { name, mountPath, subPath = '' } of container.volumeMounts ?? []) {
    const to = join(folder, 'volumes', name, subPath)
    if (subPath && !subPath.includes('.')) await mkdir(to, { recursive: true })
    paths.set(mountPath.replace(/(.)\/+$/, '$1'), to)
  }
  const mounts = [...paths.keys()].sort((a, b) => b.length - a.length)
  for (const [path, to] of Object.entries(files)) {
    // A file inside a mount is that volume's.
    if (!mounts.some((mount) => path.startsWith(`${mount}/`))) paths.set(path, to)
  }
  const longestFirst = [...paths.keys()].sort((a, b) => b.length - a.length)
  if (longestFirst.length === 0) return (text) => text
  const escaped = longestFirst.map((path) => path.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'))
  const pattern = new RegExp(`(?<![\\w./-])(?:${escaped.join('|')})(?![\\w.-])`, 'g')
  return (text) => text.replace(pattern, (path) => paths.get(path) ?? path)
}

export interface Environment {
  values: Record<string, string>
  /** Replaces `$(NAME)`, as the kubelet does in commands; `$$(NAME)` stays as `$(NAME)`. */
  expand(text: string): string
}

export function environmentOf(
  store: Store,
  pod: Pod,
  container: Container,
  replace: (text: string) => string,
): Environment {
  const { namespace = '', name, uid, labels = {}, annotations = {} } = pod.metadata
  const values: Record<string, string> = {}
  const expand = (text: string) =>
    text.replace(/\$\$|\$\(([^)\s]+)\)/g, (whole, key) =>
      whole === '$$' ? '$' : (values[key] ?? whole),
    )
  const read = (source: Source, reference: KeySelector) => {
    const object = store.get(source, namespace, reference.name)
    const value = object && contentsOf(object)[reference.key]
    if (value || reference.optional) return value?.toString()
    if (!object) throw new Missing(`${WORDS[source]} "${reference.name}" not found`)
    const what = source === 'secrets' ? 'Secret' : 'ConfigMap'
    throw new Missing(
      `couldn't find key ${reference.key} in ${what} ${namespace}/${reference.name}`,
    )
  }
  const fields: Record<string, string> = {
    'metadata.name': name,
    'metadata.namespace': namespace,
    'metadata.uid': uid,
    'spec.nodeName': pod.spec.nodeName ?? '',
    'status.podIP': '10.1.0.1',
    'status.hostIP': '10.0.0.1',
  }
  const field = (path: string) => {
    const [, kind, key = ''] = /^metadata\.(labels|annotations)\['(.+)'\]$/.exec(path) ?? []
    if (kind) return (kind === 'labels' ? labels : annotations)[key] ?? ''
    return fields[path] ?? ''
  }
  for (const { prefix = '', secretRef, configMapRef } of container.envFrom ?? []) {
    const source: Source = secretRef ? 'secrets' : 'configmaps'
    const reference = secretRef ?? configMapRef
    const object = store.get(source, namespace, reference?.name ?? '')
    if (!object && !reference?.optional) {
      throw new Missing(`${WORDS[source]} "${reference?.name}" not found`)
    }
    for (const [key, value] of Object.entries(object ? contentsOf(object) : {})) {
      values[prefix + key] = replace(value.toString())
    }
  }
  for (const { name: key, value = '', valueFrom } of container.env ?? []) {
    const { secretKeyRef, configMapKeyRef, fieldRef } = valueFrom ?? {}
    const found = secretKeyRef
      ? read('secrets', secretKeyRef)
      : configMapKeyRef
        ? read('configmaps', configMapKeyRef)
        : fieldRef
          ? field(fieldRef.fieldPath)
          : expand(value)
    if (found !== undefined) values[key] = replace(found)
  }
  return { values, expand }
}
