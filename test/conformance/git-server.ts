import { execFile, spawn } from 'node:child_process'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { listen } from './receiver.ts'

const run = promisify(execFile)

export interface GitServer extends AsyncDisposable {
  /** Of the repository `sample.git`: kept.txt, other/file.txt, sparse/file.txt; branch `side` has side.txt. */
  url: string
}

/** A repository over HTTP, served by git itself; undefined where there is no git. */
export async function startGitServer(): Promise<GitServer | undefined> {
  if (!(await run('git', ['--version']).catch(() => undefined))) return undefined
  const root = await mkdtemp(join(tmpdir(), 'task-runner-conformance-git-'))
  await makeRepository(join(root, 'work'), join(root, 'sample.git'))
  const server = await listen((request, response) => serve(root, request, response))
  return {
    url: `${server.url}/sample.git`,
    async [Symbol.asyncDispose]() {
      await server.close()
      await rm(root, { recursive: true, force: true })
    },
  }
}

async function makeRepository(work: string, bare: string): Promise<void> {
  const git = (...args: string[]) => run('git', ['-C', work, ...args], { env: environment() })
  const commit = async (name: string) => {
    await mkdir(dirname(join(work, name)), { recursive: true })
    await writeFile(join(work, name), `content of ${name}\n`)
    await git('add', '.')
    await git('commit', '--quiet', '--message', `Add ${name}`)
  }
  await mkdir(work, { recursive: true })
  await git('init', '--quiet', '--initial-branch=main')
  await commit('kept.txt')
  await commit('other/file.txt')
  await commit('sparse/file.txt')
  await git('switch', '--quiet', '--create', 'side')
  await commit('side.txt')
  await git('switch', '--quiet', 'main')
  await git('clone', '--quiet', '--bare', '.', bare)
  await run('git', ['-C', bare, 'config', 'uploadpack.allowFilter', 'true'])
}

/** Of nobody's own configuration. */
function environment(): NodeJS.ProcessEnv {
  return {
    PATH: process.env.PATH,
    GIT_CONFIG_GLOBAL: '/dev/null',
    GIT_CONFIG_NOSYSTEM: '1',
    GIT_AUTHOR_NAME: 'Conformance',
    GIT_AUTHOR_EMAIL: 'conformance@example.com',
    GIT_COMMITTER_NAME: 'Conformance',
    GIT_COMMITTER_EMAIL: 'conformance@example.com',
  }
}

/** `git http-backend` is a CGI program (RFC 3875): its answer begins with header lines. */
function serve(root: string, request: IncomingMessage, response: ServerResponse): void {
  const url = new URL(request.url ?? '/', 'http://host')
  const { headers } = request
  const backend = spawn('git', ['http-backend'], {
    env: {
      ...environment(),
      GIT_PROJECT_ROOT: root,
      GIT_HTTP_EXPORT_ALL: '1',
      GIT_PROTOCOL: String(headers['git-protocol'] ?? ''),
      PATH_INFO: url.pathname,
      QUERY_STRING: url.search.slice(1),
      REQUEST_METHOD: request.method,
      CONTENT_TYPE: headers['content-type'],
      HTTP_CONTENT_ENCODING: headers['content-encoding'],
    },
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  request.pipe(backend.stdin)
  // It does not read bodies that it has no use for.
  backend.stdin.on('error', () => {})
  const chunks: Buffer[] = []
  backend.stdout.on('data', (chunk) => chunks.push(chunk))
  backend.on('close', () => {
    const answer = Buffer.concat(chunks)
    const end = answer.indexOf('\r\n\r\n')
    const lines = answer.subarray(0, end).toString().split('\r\n')
    const pairs = lines.map((line) => line.split(': ', 2) as [string, string])
    const { Status = '200', ...rest } = Object.fromEntries(pairs)
    response.writeHead(Number.parseInt(Status, 10), rest).end(answer.subarray(end + 4))
  })
}
