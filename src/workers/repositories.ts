/** The files with which bootstrap.sh prepares a task; the same on all backends. */
import { readFileSync } from 'node:fs'
import { isIP } from 'node:net'
import type { Repository, WorkerSpec } from '../core/ports.ts'
import { encodedForGit } from '../core/worker-setup.ts'
import { quote } from './quote.ts'

export interface NamedContent {
  name: string
  content: string
}

const CLONE = readFileSync(new URL('./clone.sh', import.meta.url), 'utf8')

/** Returns the files for a worker's startup script and repositories, if it has any. */
export function preparationFiles({
  startupScript,
  repositories,
}: Pick<WorkerSpec, 'startupScript' | 'repositories'>): NamedContent[] {
  const startup = { name: 'startup.sh', content: startupScript ?? '' }
  return [
    ...(startupScript === undefined ? [] : [startup]),
    ...(repositories.length === 0 ? [] : repositoryFiles(repositories)),
  ]
}

/** Returns `repositories.sh` and the secrets; bootstrap.sh removes these after the last clone. */
function repositoryFiles(repositories: readonly Repository[]): NamedContent[] {
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
    return `clone ${where} ${secret} ${rest}\ncheck_clone $? ${quote(url)}\n`
  })
  return [{ name: 'repositories.sh', content: CLONE + lines.join('') }, ...secrets]
}

/**
 * Returns the content of a secret's file. http(s): a line of git-credential-store(1). ssh: the key,
 * with the line end that OpenSSH requires.
 */
function secretFile({ url, credential }: Repository): string | undefined {
  if (!credential) return undefined
  const { protocol, host, pathname } = new URL(url)
  if (protocol === 'ssh:') return `${credential.password.trimEnd()}\n`
  const [username, password] = [credential.username, credential.password].map(encodedForGit)
  return `${protocol}//${username}:${password}@${host}${pathname}\n`
}

/**
 * Returns the checked address of a host, for clone.sh. http(s): a value of git's
 * `http.curloptResolve`, empty when the URL holds an address. ssh: `host=address`.
 */
function pinOf({ url, addresses }: Repository): string {
  const { protocol, hostname, port } = new URL(url)
  const host = hostname.replace(/^\[|\]$/g, '')
  if (protocol === 'ssh:') return `${host}=${addresses[0] ?? host}`
  if (isIP(host) !== 0) return ''
  const bracketed = addresses.map((address) => (isIP(address) === 6 ? `[${address}]` : address))
  return `${hostname}:${port || (protocol === 'https:' ? 443 : 80)}:${bracketed.join(',')}`
}
