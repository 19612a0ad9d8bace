import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, mkdtempSync, writeFileSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'

export interface GitServer extends AsyncDisposable {
  /** `http://127.0.0.1:<port>`; repositories are below it. */
  url: string
  port: number
  root: string
  /**
   * Makes a bare repository `<name>.git` with these files, each on the branch named before its colon, if any. `submodules`:
   * URLs by path; each is at the commit of the repository of the same name.
   */
  create(name: string, files: Record<string, string>, submodules?: Record<string, string>): void
  /** Runs git in the repository, and returns what it prints. */
  git(name: string, ...args: string[]): string
  /** Authorization headers that came, one for each request. */
  authorizations: Array<string | undefined>
}

/**
 * git's own HTTP server (git-http-backend(1)) on loopback. Repositories below `private/` want the credentials; those below
 * `old/` are served as servers did before version 2 of the protocol, which give no commit that no branch names.
 */
export async function startGitServer(credentials: {
  username: string
  password: string
}): Promise<GitServer> {
  const root = mkdtempSync(join(tmpdir(), 'git-server-'))
  const authorizations: Array<string | undefined> = []
  const expected = Buffer.from(`${credentials.username}:${credentials.password}`).toString('base64')
  const server = createServer(async (request, response) => {
    const url = new URL(request.url ?? '/', 'http://host')
    const { authorization } = request.headers
    authorizations.push(authorization)
    if (url.pathname.startsWith('/moved/')) {
      response.writeHead(301, { location: url.pathname.replace('/moved/', '/') + url.search }).end()
      return
    }
    if (url.pathname.startsWith('/private/') && authorization !== `Basic ${expected}`) {
      response.writeHead(401, { 'www-authenticate': 'Basic realm="git"' }).end('denied\n')
      return
    }
    const backend = spawn('git', ['http-backend'], {
      env: {
        PATH: process.env.PATH,
        GIT_PROJECT_ROOT: root,
        GIT_HTTP_EXPORT_ALL: '1',
        PATH_INFO: url.pathname,
        QUERY_STRING: url.search.slice(1),
        REQUEST_METHOD: request.method,
        CONTENT_TYPE: request.headers['content-type'] ?? '',
        HTTP_CONTENT_ENCODING: request.headers['content-encoding'] ?? '',
        REMOTE_USER: authorization === undefined ? '' : credentials.username,
        GIT_PROTOCOL: url.pathname.startsWith('/old/')
          ? ''
          : String(request.headers['git-protocol'] ?? ''),
        // The repositories may belong to another user.
        GIT_CONFIG_COUNT: '1',
        GIT_CONFIG_KEY_0: 'safe.directory',
        GIT_CONFIG_VALUE_0: '*',
      },
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    request.pipe(backend.stdin)
    const chunks: Buffer[] = []
    for await (const chunk of backend.stdout) chunks.push(chunk)
    const answer = Buffer.concat(chunks)
    const end = answer.indexOf('\r\n\r\n')
    let status = 200
    for (const line of answer.subarray(0, end).toString().split('\r\n')) {
      const [name = '', value = ''] = line.split(': ', 2)
      if (name === 'Status') status = Number.parseInt(value, 10)
      else response.setHeader(name, value)
    }
    response.writeHead(status).end(answer.subarray(end + 4))
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const gitIn = (name: string, ...args: string[]) =>
    execFileSync('git', ['-C', join(root, `${name}.git`), ...args], { stdio: 'pipe' }).toString()
  return {
    ...{ url: `http://127.0.0.1:${port}`, port, root, authorizations },
    git: gitIn,
    create(name, files, submodules = {}) {
      const work = mkdtempSync(join(tmpdir(), 'git-work-'))
      const git = (...args: string[]) =>
        execFileSync('git', ['-C', work, '-c', 'user.name=a', '-c', 'user.email=a@b', ...args], {
          stdio: 'pipe',
        })
      git('init', '--quiet', '--initial-branch', 'main')
      for (const [key, content] of Object.entries(files)) {
        const [branch, path] = key.includes(':') ? key.split(':') : ['main', key]
        if (branch !== 'main') git('checkout', '--quiet', '-B', branch as string)
        const file = join(work, path as string)
        mkdirSync(dirname(file), { recursive: true })
        writeFileSync(file, content)
        git('add', '.')
        git('commit', '--quiet', '-m', key)
        if (branch !== 'main') git('checkout', '--quiet', 'main')
      }
      for (const [path, url] of Object.entries(submodules)) {
        for (const [key, value] of Object.entries({ path, url })) {
          git('config', '--file', '.gitmodules', `submodule.the ${path}.${key}`, value)
        }
        const commit = gitIn(path, 'rev-parse', 'HEAD').trim()
        git('update-index', '--add', '--cacheinfo', `160000,${commit},${path}`)
        git('add', '.gitmodules')
        git('commit', '--quiet', '-m', path)
      }
      const bare = join(root, `${name}.git`)
      execFileSync('git', ['clone', '--quiet', '--bare', work, bare], { stdio: 'pipe' })
      gitIn(name, 'config', 'http.receivepack', 'true')
    },
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      server.close()
      await rm(root, { recursive: true, force: true })
    },
  }
}
