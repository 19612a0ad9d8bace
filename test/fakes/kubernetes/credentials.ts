import { execFile } from 'node:child_process'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'

const run = promisify(execFile)

const SETTINGS = `
[req]
distinguished_name = name
prompt = no
[name]
CN = fake-kubernetes
[ca]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,digitalSignature
[server]
basicConstraints = critical,CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = IP:127.0.0.1,DNS:localhost
`

export interface Certificates {
  ca: string
  cert: string
  key: string
}

/** A CA of this server's own, and a certificate by it for 127.0.0.1 and localhost. */
export async function makeCertificates(folder: string): Promise<Certificates> {
  const at = (name: string) => join(folder, name)
  await writeFile(at('openssl.cnf'), SETTINGS)
  const request = ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes']
  const common = [...request, '-days', '2', '-config', at('openssl.cnf')]
  await run('openssl', [
    ...common,
    ...['-extensions', 'ca', '-subj', '/CN=fake-kubernetes-ca'],
    ...['-keyout', at('ca.key'), '-out', at('ca.crt')],
  ])
  await run('openssl', [
    ...common,
    ...['-extensions', 'server', '-CA', at('ca.crt'), '-CAkey', at('ca.key')],
    ...['-keyout', at('server.key'), '-out', at('server.crt')],
  ])
  const [ca, cert, key] = await Promise.all(
    ['ca.crt', 'server.crt', 'server.key'].map((name) => readFile(at(name), 'utf8')),
  )
  return { ca: ca ?? '', cert: cert ?? '', key: key ?? '' }
}

export function kubeconfigOf(
  url: string,
  { token, namespace, ca }: { token: string; namespace: string; ca: string | undefined },
): string {
  const trust = ca
    ? `certificate-authority-data: ${Buffer.from(ca).toString('base64')}`
    : 'insecure-skip-tls-verify: true'
  return `apiVersion: v1
kind: Config
current-context: fake
clusters:
- name: fake
  cluster:
    server: ${url}
    ${trust}
contexts:
- name: fake
  context:
    cluster: fake
    user: fake
    namespace: ${namespace}
users:
- name: fake
  user:
    token: ${token}
`
}
