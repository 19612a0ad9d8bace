/** What a clone needs beyond its own repository: submodules and Git LFS files, and from which hosts they may come. */
import { execFile, execFileSync } from 'node:child_process'
import { cp, mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect } from 'vitest'
import { WorkerSetup } from '../../src/core/worker-setup.ts'
import { preparationFiles } from '../../src/workers/repositories.ts'
import { BOOTSTRAP } from '../../src/workers/worker-files.ts'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'
import { type GitServer, startGitServer } from '../helpers/git-server.ts'
import { type RawServer, startRawServer } from '../helpers/hostile-servers.ts'
import { needs } from '../helpers/needs.ts'

const test = needs('git')

const CLONE = fileURLToPath(new URL('../../src/workers/clone.sh', import.meta.url))
const CREDENTIALS = { username: 'x-access-token', password: 'canary/token' }
const POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n'
const SHELLS = [['/bin/sh'], ['/bin/bash', '--posix'], ['busybox', 'sh']].filter(
  ([command = '', ...options]) => {
    try {
      execFileSync(command, [...options, '-c', ':'], { stdio: 'ignore' })
      return true
    } catch {
      return false
    }
  },
)

let git: GitServer
let other: RawServer
let app: TestApp

beforeAll(async () => {
  git = await startGitServer(CREDENTIALS)
  other = await startRawServer()
  git.create('inner', { 'inner.txt': 'inner\n' })
  git.create('lib', { 'lib.txt': 'lib\n' }, { inner: '../inner.git' })
  git.create('away', { 'away.txt': '' })
  git.create('private/lib', { 'lib.txt': 'private lib\n' })
  git.create(
    'app',
    { 'README.md': 'app\n', 'src/a': '' },
    {
      lib: `${git.url}/lib.git`,
      away: `http://127.0.0.1:${other.port}/away.git`,
      'private/lib': 'git@127.0.0.1:private/lib.git',
    },
  )
  git.create('private/app', { a: '' }, { 'private/lib': '../lib.git', inner: '/inner.git' })
  git.create('files', {
    '.gitattributes': '*.bin filter=lfs diff=lfs merge=lfs -text\n',
    ...{ 'a model.bin': POINTER, 'sub/b.bin': POINTER, 'sub/real.bin': 'content', c: POINTER },
  })
  app = await startApp({ SECRET_GIT: CREDENTIALS.password })
})
afterAll(async () => {
  await app[Symbol.asyncDispose]()
  await other[Symbol.asyncDispose]()
  await git[Symbol.asyncDispose]()
})

async function run(gitConfig: object, script: string, variables: object = {}) {
  const request = taskRequest({
    task_file_name: 'w-eval.sh',
    worker_config: {
      git_configs: [gitConfig],
      env_variables: { SCRIPT: script, ...variables },
    },
  })
  expect(await app.submit(request)).toMatchObject({ status: 200 })
  const task = await app.finished(request.task_id)
  return { task, logs: await app.text(`/tasks/${request.task_id}/logs`) }
}

describe('submodules', () => {
  test('of the same host are fetched, theirs as well, and the log says which are not', async () => {
    const { task, logs } = await run(
      { remote_url: `${git.url}/app.git` },
      'cd ~/projects/app && cat lib/lib.txt lib/inner/inner.txt; ls away private/lib; git status -s',
    )
    expect(task).toMatchObject({ status: 'succeeded' })
    expect(logs).toContain('\nlib\ninner\n')
    expect(logs).toContain(
      `[task-runner] submodule "away" of ${git.url}/app.git is not fetched: only hosts of git_configs are checked. Add one for http://127.0.0.1:${other.port}/away.git with local_path "~/projects/app/away"\n`,
    )
    expect(other.connections).toHaveLength(0)
    // It is private, and there is no password.
    expect(logs).toMatch(
      /submodule "private\/lib" of .* is not fetched: fatal: Authentication failed for 'http/,
    )
    expect(logs).toMatch(/away:\n\nprivate\/lib:\n$/)
  })

  test('that are private are fetched with the password of their repository, which then is nowhere', async () => {
    const { logs } = await run(
      { remote_url: `${git.url}/private/app.git`, secret_name: 'GIT', save_secret: false },
      'cd ~/projects/app && cat private/lib/lib.txt; grep -rl --exclude=log -- canary "$HOME/.." || echo nowhere',
    )
    expect(logs).toContain('private lib\nnowhere\n')
    expect(logs).toMatch(/submodule "inner" of .* is not fetched: only hosts/)
  })

  test('below folders that sparse_checkout_folders leaves out are left out without a word', async () => {
    const { logs } = await run(
      { remote_url: `${git.url}/app.git`, sparse_checkout_folders: ['src'] },
      'cd ~/projects/app && ls && cat lib/lib.txt',
    )
    expect(logs).toMatch(/\nREADME.md\naway\nlib\nsrc\nlib\n$/)
    expect(logs).not.toContain('private/lib')
  })

  test('of an ssh repository are fetched with its key, from the address that was judged', async () => {
    const bin = join(app.dataDir, 'bin')
    const seen = join(bin, 'seen')
    // Stands in for ssh(1): keeps what it was given, and runs the command here instead of over there.
    const ssh = ['#!/bin/bash', `echo "$PWD $*" >>${seen}`, `exec sh -c "\${@: -1}"`]
    await mkdir(bin)
    await writeFile(join(bin, 'ssh'), ssh.join('\n'), { mode: 0o700 })
    git.create(
      'ssh',
      { a: '' },
      { lib: '../lib.git', 'private/lib': `git@localhost:${git.root}/private/lib.git` },
    )
    await using other = await startApp({ PATH: `${bin}:${process.env.PATH}`, SECRET_KEY: 'key' })
    const request = taskRequest({
      task_file_name: 'w-eval.sh',
      worker_config: {
        git_configs: [
          { remote_url: `ssh://git@localhost:2222${git.root}/ssh.git`, secret_name: 'KEY' },
        ],
        env_variables: {
          SCRIPT:
            'cd ~/projects/ssh && cat lib/inner/inner.txt private/lib/lib.txt; ls -a ~ | grep git',
        },
      },
    })
    await other.submit(request)
    await other.finished(request.task_id)
    expect(await other.text(`/tasks/${request.task_id}/logs`)).toMatch(/\ninner\nprivate lib\n$/)
    const calls = (await readFile(seen, 'utf8')).trim().split('\n')
    expect(calls).toHaveLength(4)
    for (const call of calls) {
      expect(call).toMatch(
        /^\S+\/home -F none .*-o HostName=(127\.0\.0\.1|::1) .*-i \S+\/secret-0 .*-p 2222 git@localhost/,
      )
    }
  })

  test.each([{ branch: 'v1' }, { fetch_depth: 1 }])('are fetched with %j', async (fields) => {
    git.git('app', 'tag', '--force', 'v1')
    const { logs } = await run(
      { remote_url: `${git.url}/app.git`, ...fields },
      'cat ~/projects/app/lib/inner/inner.txt',
    )
    expect(logs).toMatch(/^inner$/m)
  })
})

describe('Git LFS files', () => {
  const SHOW = 'cd ~/projects/files && head -qn 1 *.bin sub/real.bin; git status -s'

  test('stay pointers, and the log says which', async () => {
    const { task, logs } = await run({ remote_url: `${git.url}/files.git` }, SHOW)
    expect(task).toMatchObject({ status: 'succeeded' })
    expect(logs).toBe(
      [
        `[task-runner] cloning ${git.url}/files.git into ~/projects/files`,
        `[task-runner] Git LFS files of ${git.url}/files.git are not fetched: 2, the first is "a model.bin". "git lfs pull" in the task fetches them`,
        'version https://git-lfs.github.com/spec/v1',
        'content',
      ].join('\n'),
    )
  })

  test('are not asked for by a git-lfs that is installed: no host that they name was checked', async () => {
    const config = join(app.dataDir, 'gitconfig')
    await writeFile(config, '[filter "lfs"]\n\tsmudge = "echo skipped=$GIT_LFS_SKIP_SMUDGE"\n')
    const variables = { GIT_CONFIG_GLOBAL: config }
    const { logs } = await run({ remote_url: `${git.url}/files.git` }, SHOW, variables)
    expect(logs).toContain('skipped=1\n')
  })
})

describe.each(SHELLS.map((shell) => ({ shell, name: shell.join(' ') })))(
  'under $name',
  ({ shell: [command = '', ...options] }) => {
    const runWith = promisify(execFile)

    test('the address that was judged is the one that is dialled, for submodules as well', async () => {
      // One that only the pinned address leads to: the name itself is not in the machine's resolver.
      const setup = new WorkerSetup({
        secrets: { read: async () => CREDENTIALS.password },
        gitHosts: { refusal: () => undefined, addresses: async () => ['127.0.0.1'] },
        files: { has: async () => true },
        sizes: {},
        maxLogBytes: 1,
      })
      const remoteUrl = `http://pinned.invalid:${git.port}/private/app.git`
      const branch = git.git('private/app', 'rev-parse', 'main').trim()
      const gitConfigs = [
        { remoteUrl, branch, secretName: 'a' },
        {
          remoteUrl: `http://pinned.invalid:${git.port}/files.git`,
          ...{ branch: 'origin/main', fetchDepth: 1, sparseCheckoutFolders: ['sub'] },
        },
      ]
      const { spec } = await setup.specFor({
        ...{ taskId: 'a', taskFileName: 'a.sh', workerName: 'a', secretValues: [] },
        workerConfig: { gitConfigs },
      } as never)
      const folder = join(app.dataDir, "it's pinned")
      for (const name of ['home', 'tmp', 'tasks']) {
        await mkdir(join(folder, name), { recursive: true })
      }
      await cp(BOOTSTRAP, join(folder, 'bootstrap.sh'))
      for (const { name, content } of preparationFiles(spec)) {
        await writeFile(join(folder, name), content)
      }
      const script = 'cat ~/projects/app/private/lib/lib.txt ~/projects/files/sub/real.bin'
      await writeFile(join(folder, 'tasks', 'a.sh'), script)
      const { stdout } = await runWith(
        command,
        [
          ...[...options, join(folder, 'bootstrap.sh'), 'run', folder, 'tasks', 'a.sh'],
          ...['python3', '/bin/sh', 'node'],
        ],
        { env: { PATH: process.env.PATH, HOME: join(folder, 'home') } },
      )
      expect(stdout).toMatch(/private lib\ncontent$/)
      expect(stdout).toContain('are not fetched: 2, the first is "a model.bin"')
      await rm(folder, { recursive: true })
    })

    test.each([
      'http://other.invalid/a.git',
      'https://other.invalid/a.git',
      'http://host.invalid.other/a.git',
      'http://user@host.invalid/a.git',
      'http://host.invalid:81/a.git',
      'HTTP://other.invalid/a.git',
      'http::http://other.invalid/a.git',
      'https::https://other.invalid/a.git',
      'git@other.invalid:a.git',
      'git://host.invalid/a.git',
      'ext::sh -c :',
      '/etc',
    ])('git itself asks no other host than the one that was judged: %s', async (url) => {
      const asked = runWith(
        command,
        [
          ...[
            ...options,
            '-c',
            '. "$0"; restrict_git http://host.invalid/b.git "" ""; git ls-remote "$1"',
          ],
          ...[CLONE, url],
        ],
        { env: { PATH: process.env.PATH, LC_ALL: 'C', HOME: '/nonexistent' } },
      )
      await expect(asked).rejects.toMatchObject({
        stderr: expect.stringMatching(/transport '.*' not allowed|does not appear to be a git/),
      })
    })
  },
)
