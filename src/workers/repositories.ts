/** What bootstrap.sh needs to clone a worker's repositories. Pure; shared by all backends. */
import { isIP } from 'node:net'
import type { Repository } from '../core/ports.ts'
import { encodedForGit } from '../core/worker-setup.ts'
import { quote } from './quote.ts'

/**
 * The files for the worker's folder: `repositories.sh`, and a secret for each repository that has one, which
 * bootstrap.sh removes when the clones are done.
 */
export function repositoryFiles(
  repositories: readonly Repository[],
): Array<{ name: string; content: string }> {
  const secrets = repositories.flatMap((repository, index) => {
    const content = secretFile(repository)
    return content === undefined ? [] : [{ name: `secret-${index}`, content }]
  })
  const lines = repositories.map((repository, index) => {
    const { url, directory, branch = '', depth = '', sparseFolders } = repository
    const secret = repository.credential ? `"$__tr_folder"/secret-${index}` : "''"
    const keep = repository.keepCredential ? 'keep' : ''
    const where = [url, directory, branch, `${depth}`, pinOf(repository)].map(quote).join(' ')
    const rest = [keep, ...sparseFolders].map(quote).join(' ')
    return `clone ${where} ${secret} ${rest}\ncloned $? ${quote(url)}\n`
  })
  return [{ name: 'repositories.sh', content: lines.join('') }, ...secrets]
}

/** http(s): a line of git-credential-store(1). ssh: the key, with the line end that OpenSSH wants. */
function secretFile({ url, credential }: Repository): string | undefined {
  if (!credential) return undefined
  const { protocol, host, pathname } = new URL(url)
  if (protocol === 'ssh:') return `${credential.password.trimEnd()}\n`
  const [username, password] = [credential.username, credential.password].map(encodedForGit)
  return `${protocol}//${username}:${password}@${host}${pathname}\n`
}

/** http(s): as git's `http.curloptResolve` wants it, empty when the URL holds an address. ssh: `host=address`. */
function pinOf({ url, addresses }: Repository): string {
  const { protocol, hostname, port } = new URL(url)
  const host = hostname.replace(/^\[|\]$/g, '')
  if (protocol === 'ssh:') return `${host}=${addresses[0] ?? host}`
  if (isIP(host) !== 0) return ''
  const spelled = addresses.map((address) => (isIP(address) === 6 ? `[${address}]` : address))
  return `${hostname}:${port || (protocol === 'https:' ? 443 : 80)}:${spelled.join(',')}`
}
