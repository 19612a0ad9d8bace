import { z } from 'zod'
import { directoryOf, type GitConfig } from '../core/worker-config.ts'
import { CONTROL, line, present, secretName } from './fields.ts'

/** Hosts of repositories; `URL` checks those of http(s) URLs only. */
const HOST = /^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])$/
/** `user@host:path`, which git reads as an ssh URL. */
const SCP_LIKE = /^([^\s/:@]+@([^\s/:@[\]]+|\[[^\s/@\]]*\])):\/?/
const asUrl = (remote: string) => remote.replace(SCP_LIKE, 'ssh://$1/')
const gitRemote = line(2048).superRefine((remote, context) => {
  const wrong = (message: string) => context.addIssue({ code: 'custom', message })
  const value = asUrl(remote)
  const url = URL.parse(value)
  // Some parsers read a backslash as a slash, others as part of the host.
  if (!url || !/^(https?|ssh):\/\/[^\s\\]+$/.test(value) || !HOST.test(url.hostname)) {
    wrong('must be an http(s) or ssh URL, such as https://host/path.git or git@host:path.git')
  } else if (url.password !== '' || (url.username !== '' && url.protocol !== 'ssh:')) {
    wrong('must not contain a user name or password; use username and secret_name')
  } else if (url.search !== '' || url.hash !== '') {
    wrong('must not contain a query or a fragment')
  } else if (!isRepositoryPath(url.pathname)) wrong('must end in the name of a repository')
})

function isRepositoryPath(pathname: string): boolean {
  const path = /%(00|2f)/i.test(pathname) ? undefined : decoded(pathname)
  const name = path
    ?.replace(/\/+$/, '')
    .replace(/\.git$/, '')
    .replace(/^.*\//, '')
  return name !== undefined && !['', '.', '..', '.git'].includes(name)
}

function decoded(encoded: string): string | undefined {
  try {
    return decodeURIComponent(encoded)
  } catch {
    return undefined
  }
}

const isInside = (path: string) => !path.split('/').includes('..')
const localPath = line(1024)
  .refine((path) => isInside(path) && /^((~|\/home\/ubuntu)\/+)?[^/~]/.test(path), {
    error: 'must be a path below the home of the worker, such as ~/projects/name',
    abort: true,
  })
  .refine((path) => directoryBelowHome(path) !== '', 'must not be the home folder itself')
  .refine(
    (path) => !`${directoryBelowHome(path)}/`.startsWith('practicus/task/'),
    'is the folder of the task; use another, such as ~/projects/name',
  )
const directoryBelowHome = (localPath: string) => directoryOf({ remoteUrl: '', localPath })
/** Excludes what git would read as an option. */
const NOT_AN_OPTION = {
  pattern: new RegExp(`^(?!-)[^${CONTROL}]*$`),
  message: () => 'must not begin with -',
}

export const gitConfigSchema = z
  .strictObject({
    remote_url: gitRemote.describe(
      'Repository to clone: an http, https or ssh URL, or `git@host:path`',
    ),
    secret_name: secretName
      .nullish()
      .describe('Name of the secret that is the password; for ssh, the private key'),
    save_secret: z
      .boolean()
      .nullish()
      .describe(
        'Default true: the password stays on the worker, so that the task can pull and push; `false` removes it before the task runs. http(s) only: an ssh key is always removed',
      ),
    username: line(255)
      .nullish()
      .describe('Default `x-access-token`, which suits tokens; http(s) only'),
    local_path: localPath
      .nullish()
      .describe(
        'Folder to clone into, below the home of the worker, as `~/…` or `/home/ubuntu/…`; default `~/projects/<repository>`',
      ),
    branch: line(255, NOT_AN_OPTION)
      .nullish()
      .describe(
        'A branch, a tag, a ref such as `refs/pull/1/head`, or a full commit id; default: the default branch of the repository',
      ),
    sparse_checkout_folders: z
      .array(line(1024, NOT_AN_OPTION).refine(isInside, 'must be inside the repository'))
      .max(1000)
      .nullish()
      .describe('Check out only these folders and the files at the top level'),
    fetch_depth: z.int32().positive().nullish().describe('Number of latest commits to fetch'),
  })
  .superRefine((config, context) => {
    const wrong = (field: string, message: string) =>
      context.addIssue({ code: 'custom', path: [field], message })
    const isSsh = asUrl(config.remote_url).startsWith('ssh:')
    if (config.username && isSsh) wrong('username', 'is for http(s) repositories')
    if (config.save_secret && isSsh) wrong('save_secret', 'is for http(s) repositories')
    else if (config.save_secret && config.secret_name == null) {
      wrong('save_secret', 'requires secret_name')
    }
  })
  .meta({
    id: 'GitConfig',
    description: 'A repository cloned before the task runs',
    examples: [{ remote_url: 'https://git.example.com/team/repo.git', secret_name: 'git_secret' }],
  })

export function fromGitConfig(wire: z.output<typeof gitConfigSchema>): GitConfig {
  return present({
    // The URL as it was validated: git reads some other spellings differently.
    remoteUrl: new URL(asUrl(wire.remote_url)).href,
    secretName: wire.secret_name,
    saveSecret: wire.save_secret,
    username: wire.username,
    localPath: wire.local_path,
    branch: wire.branch,
    sparseCheckoutFolders: wire.sparse_checkout_folders,
    fetchDepth: wire.fetch_depth,
  })
}

export function toWireGitConfig(config: GitConfig): z.input<typeof gitConfigSchema> {
  return present({
    remote_url: config.remoteUrl,
    secret_name: config.secretName,
    save_secret: config.saveSecret,
    username: config.username,
    local_path: config.localPath,
    branch: config.branch,
    sparse_checkout_folders: config.sparseCheckoutFolders,
    fetch_depth: config.fetchDepth,
  })
}
