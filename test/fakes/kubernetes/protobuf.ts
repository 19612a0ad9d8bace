const MAGIC = Buffer.from('k8s\0')
const ATTRIBUTES = ['', 'namespace', 'verb', 'group', 'version', 'resource', 'subresource', 'name']

/**
 * The one body that stock kubectl sends as protobuf: `auth can-i`. Undefined for anything else.
 * k8s.io/api/authorization/v1/generated.proto, in the envelope of k8s.io/apimachinery/pkg/runtime.
 */
export function decodeAccessReview(body: Buffer): object | undefined {
  if (!body.subarray(0, 4).equals(MAGIC)) return undefined
  const envelope = fieldsOf(body.subarray(4))
  const kind = fieldsOf(envelope.get(1) ?? Buffer.alloc(0)).get(2)
  if (kind?.toString() !== 'SelfSubjectAccessReview') return undefined
  const spec = fieldsOf(envelope.get(2) ?? Buffer.alloc(0)).get(2)
  const attributes = fieldsOf(fieldsOf(spec ?? Buffer.alloc(0)).get(1) ?? Buffer.alloc(0))
  const resourceAttributes = Object.fromEntries(
    [...attributes].map(([number, value]) => [ATTRIBUTES[number], value.toString()]),
  )
  return { kind: 'SelfSubjectAccessReview', spec: { resourceAttributes } }
}

/** The length-delimited fields of a message, by number; these messages have no others that matter. */
function fieldsOf(message: Buffer): Map<number, Buffer> {
  const fields = new Map<number, Buffer>()
  let at = 0
  const varint = () => {
    let value = 0
    for (let shift = 1; at < message.length; shift *= 128) {
      const byte = message[at] ?? 0
      at += 1
      value += (byte & 0x7f) * shift
      if (byte < 0x80) break
    }
    return value
  }
  while (at < message.length) {
    const key = varint()
    const value = varint()
    if ((key & 7) !== 2) continue
    fields.set(key >> 3, message.subarray(at, at + value))
    at += value
  }
  return fields
}
